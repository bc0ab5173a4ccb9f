"""
What a configuration file says, once it is read: one frozen dataclass per kind
of section, with the defaults and where each of them comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from relaymux.core.budget import link_beginning, stream_beginning
from relaymux.core.handshake import Limits
from relaymux.interfaces import TransportSettings
from relaymux.service.config_values import KIB, MIB

__all__ = [
    "Configuration",
    "Direction",
    "DirectoryToMake",
    "LibvirtSection",
    "LinkSection",
    "Role",
    "ServiceKind",
    "ServiceSection",
    "VmPart",
    "VmSection",
]

Role = Literal["connect", "listen"]
ServiceKind = Literal["disk", "stream", "vm"]
Direction = Literal["both", "in", "out"]
VmPart = Literal["control", "ram", "nbd"]

#: Seconds.  Long enough for what a finished migration has in flight (the replay
#: buffer, 32 MiB, needs 3 s at 100 Mbit/s), short enough to be done before
#: systemd's default of 90 s turns SIGTERM into SIGKILL.
DEFAULT_DRAIN_TIMEOUT = 30.0

#: Seconds.  Often enough to see that something moves, in a log that is still readable
#: after a night of it.
DEFAULT_PROGRESS = 10.0

_LIMITS = Limits()

#: Bytes for all links together.  Half of it, which one stream alone can get, are 10
#: Gbit/s at 200 ms; and it is little beside the guests of a host that moves them.
DEFAULT_MEMORY = 512 * MIB

#: Bytes that a stream begins with, and always has.  No more, since it is promised
#: before anybody knows whether the stream is a bulk one, and 170 of them fit into the
#: part of the memory that is kept for them; no less, since what asks and waits for
#: the answer (NBD with requests of 64 KiB) should not depend on growth.
DEFAULT_WINDOW = 256 * KIB

#: Bytes that a link begins with, and always has.  Eight times as much as a peer
#: leaves unacknowledged, so that its acknowledgements are no more than they need be.
DEFAULT_REPLAY_BUFFER = 4 * MIB

#: QEMU's NBD server takes a hundred disks; twice that, and the migration's own
#: channels.  Each is a file descriptor on both sides, of which a process usually
#: may have 1024.
DEFAULT_MAX_STREAMS = _LIMITS.max_streams

#: Seconds.  Half of the 30 s after which libvirt's keepalive gives up a migration,
#: so that as long remains to dial again; relays that waited 5 s were seen to kill
#: links that were only slow.
DEFAULT_SILENCE = _LIMITS.silence

#: Seconds.  Long enough for a switch that restarts or a route that changes, and for
#: a person to notice; QEMU waits on these sockets without a limit of its own.
#: libvirt's keepalive gives up after 30 s, whatever is set here.
DEFAULT_RESUME_WINDOW = 60.0

#: Only the daemon's own user, and root.  QEMU usually runs as another one: then
#: set C{owner} or C{group}.
DEFAULT_MODE = 0o600

#: Seconds.  QEMU has no time limit of its own on these sockets, and libvirt's gives
#: up after 30 s: an error after 10 s comes while somebody still listens to it.
DEFAULT_OPEN_TIMEOUT = 10.0

#: The largest use of one socket is a migration with multifd; QEMU's examples use 4
#: to 16 channels, so this bounds a client that runs wild and nothing else.
DEFAULT_MAX_CONNECTIONS = 128

#: Where the sockets of C{[vm]} sections are.  Debian's AppArmor lets an arriving QEMU
#: bind C{*.tunnelmigrate.dest.NAME} in a directory below C{/run/libvirt}, and nowhere else.
DEFAULT_DIRECTORY = Path("/run/libvirt/relaymux")

#: libvirt's own sockets: that of the modular daemon for QEMU, and that of libvirtd, or of
#: virtproxyd in its place.
DEFAULT_LIBVIRT_SOCKETS = (Path("/run/libvirt/virtqemud-sock"), Path("/run/libvirt/libvirt-sock"))

#: Where libvirt notes the VMs that run.
DEFAULT_STATE_DIRECTORY = Path("/run/libvirt/qemu")

#: On the wire a VM's name has one of these behind it, and a name has 64 characters at most.
LONGEST_VM_NAME = 64 - len(".control")

#: Whom libvirt runs QEMU as, if it is not told otherwise: Debian and its kin; Fedora, SUSE.
QEMU_USERS = ("libvirt-qemu", "qemu")


@dataclass(frozen=True)
class LinkSection:
    """
    One C{[link NAME]}: how the one connection to one peer comes to be.

    @ivar role: which side of the connection this daemon is.
    @ivar addresses: ways to the same peer, at least one; not parsed, their form
        is the transport's business.
    @ivar options: the transport's own keys that are present, as written.
    @ivar directory: what relative file names in C{options} and C{addresses} are
        relative to; absolute.
    @ivar window: bytes of one stream this side is willing to hold before its
        consumer took them; more within the memory of the daemon.
    @ivar replay_buffer: bytes sent in the session that the peer may leave
        unacknowledged; more within the memory of the daemon.
    @ivar max_streams: streams that the peer may have open at once.
    @ivar silence: seconds without any byte after which the link is dead.
    @ivar resume_window: seconds for which streams wait for another connection when
        theirs is lost; 0: they end with it.  The shorter of both sides counts.
    """

    name: str
    transport: str
    role: Role
    addresses: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    directory: Path = Path()
    window: int = DEFAULT_WINDOW
    replay_buffer: int = DEFAULT_REPLAY_BUFFER
    max_streams: int = DEFAULT_MAX_STREAMS
    silence: float = DEFAULT_SILENCE
    resume_window: float = DEFAULT_RESUME_WINDOW

    @property
    def section(self) -> str:
        """The section's header without brackets, for messages."""
        return f"link {self.name}"

    def settings(self) -> tuple[TransportSettings, ...]:
        """@return: what the transport is told, one for each address and in their order."""
        return tuple(
            TransportSettings(address=address, options=self.options, directory=self.directory)
            for address in self.addresses
        )


@dataclass(frozen=True)
class ServiceSection:
    """
    One C{[disk NAME]} or C{[stream NAME]}, or one socket of a C{[vm NAME]}: a local
    UNIX socket that is coupled to the service of that name over a link.

    @ivar name: the service's name on the wire, unique among both kinds.
    @ivar link: the name of the L{LinkSection} it travels over.
    @ivar role: C{"listen"} makes the socket and opens a stream for each
        connection to it; C{"connect"} takes streams from the peer and dials the
        socket for each.
    @ivar path: the socket; absolute, at most 107 bytes.
    @ivar mode: the socket's permissions; only with C{"listen"}, as are the next two.
    @ivar owner: user id to give the socket to; L{None} leaves the daemon's.
    @ivar group: group id to give the socket to; L{None} leaves the daemon's.
    @ivar open_timeout: seconds until a connection or stream that the other end
        does not answer is ended as failed.
    @ivar max_connections: connections of this section that may be open at once.
    @ivar others: with C{"connect"}, sockets to try when nobody listens at C{path}.
    @ivar vm: the name of the L{VmSection} that this is a socket of, if it is.
    @ivar part: which of its sockets.
    """

    kind: ServiceKind
    name: str
    link: str
    role: Role
    path: Path
    mode: int = DEFAULT_MODE
    owner: int | None = None
    group: int | None = None
    open_timeout: float = DEFAULT_OPEN_TIMEOUT
    max_connections: int = DEFAULT_MAX_CONNECTIONS
    others: tuple[Path, ...] = ()
    vm: str = ""
    part: VmPart | None = None

    @property
    def section(self) -> str:
        """The section's header without brackets, for messages."""
        return f"{self.kind} {self.vm or self.name}"

    @property
    def label(self) -> str:
        """The section and which socket of it, for logs."""
        return f"{self.section} {self.part}" if self.part else self.section


@dataclass(frozen=True)
class LibvirtSection:
    """
    C{[libvirt]}: what all C{[vm]} sections have in common.

    @ivar directory: the one below which their sockets are, in one directory for each
        host that a VM can arrive at, of that host's name; absolute.
    @ivar sockets: where libvirt listens on this host; the first that answers is taken.
    @ivar state_directory: where libvirt has a file C{NAME.xml} for each VM that runs; absolute.
    @ivar qemu_user: user id that libvirt runs QEMU as; L{None} if it is this daemon's.
    """

    directory: Path = DEFAULT_DIRECTORY
    sockets: tuple[Path, ...] = DEFAULT_LIBVIRT_SOCKETS
    state_directory: Path = DEFAULT_STATE_DIRECTORY
    qemu_user: int | None = None


@dataclass(frozen=True)
class VmSection:
    """
    One C{[vm NAME]}: a VM that libvirt moves, with all the sockets that this takes.

    Each of its sockets has one path on both hosts, since C{virsh} is told one.  So the
    path names the host that the VM arrives at: there QEMU makes the socket, and here
    relaymux does.  A VM that goes back uses other paths, and no path ever changes hands.

    @ivar name: the domain's name, with C{.control}, C{.ram} and C{.nbd} behind it on the
        wire; or C{"*"} for all that have no section.
    @ivar links: the links it may go over, each with the name of the daemon at its other end.
    @ivar direction: whether the VM may leave over them (C{"out"}), arrive, or both.
    @ivar services: its sockets on this host.
    """

    name: str
    links: tuple[str, ...]
    direction: Direction
    services: tuple[ServiceSection, ...] = ()

    @property
    def section(self) -> str:
        """The section's header without brackets, for messages."""
        return f"vm {self.name}"

    def paths_to(self, host: str, libvirt: LibvirtSection) -> dict[VmPart, Path]:
        """@return: the paths of the VM's sockets on its way to C{host}, the same on both hosts."""
        directory = libvirt.directory / host
        return {
            "control": directory / f"control.{self.name}",
            # The names that virt-aa-helper writes into the profile of a VM that arrives.
            "ram": directory / f"ram.tunnelmigrate.dest.{self.name}",
            "nbd": directory / f"nbd.tunnelmigrate.dest.{self.name}",
        }

    @property
    def is_any(self) -> bool:
        """Whether this stands for all VMs that have no section."""
        return self.name == "*"

    def called(self, name: str) -> VmSection:
        """@return: what this section, which C{is_any}, means for the VM C{name}."""
        services = [
            replace(
                service,
                name=f"{name}.{service.part}",
                vm=name,
                path=service.path.with_name(service.path.name.replace("*", name)),
            )
            for service in self.services
        ]
        return replace(self, name=name, services=tuple(services))

    @property
    def leaves(self) -> bool:
        """Whether it may leave this host."""
        return self.direction != "in"

    @property
    def arrives(self) -> bool:
        """Whether it may arrive at this host."""
        return self.direction != "out"


@dataclass(frozen=True)
class DirectoryToMake:
    """
    A directory that the daemon makes if it is missing.

    @ivar owner: user id to give it to; L{None} leaves the daemon's.
    """

    path: Path
    mode: int = 0o700
    owner: int | None = None


@dataclass(frozen=True)
class Configuration:
    """
    A whole file, free of contradictions in itself.

    @ivar file: the file's name as the operator gave it, for messages.
    @ivar name: the daemon's name, told to its peers.
    @ivar links: at least one, in the file's order.
    @ivar services: in the file's order, then those of all C{vms} with a name; may be empty.
    @ivar vms: in the file's order.
    @ivar memory: bytes that may be promised and held for all links.
    @ivar drain_timeout: seconds that SIGTERM waits for open streams.
    @ivar progress: seconds between two lines on what moves; 0: none.
    @ivar status: the socket at which the daemon tells its state; absolute.
    @ivar runtime_directory: a directory that the daemon makes if it is missing,
        as it does those of sockets below it; absolute.
    """

    file: str
    name: str
    links: tuple[LinkSection, ...]
    services: tuple[ServiceSection, ...] = ()
    memory: int = DEFAULT_MEMORY
    drain_timeout: float = DEFAULT_DRAIN_TIMEOUT
    progress: float = DEFAULT_PROGRESS
    status: Path | None = None
    runtime_directory: Path | None = None
    libvirt: LibvirtSection = LibvirtSection()
    vms: tuple[VmSection, ...] = ()

    def least_memory(self) -> int:
        """@return: bytes with which every link can be, and one connection of every service."""
        windows = {link.name: link.window for link in self.links}
        return sum(link_beginning(link.replay_buffer) for link in self.links) + sum(
            stream_beginning(windows[service.link]) for service in self.services if service.link in windows
        )

    @property
    def any_vm(self) -> VmSection | None:
        """The section C{[vm *]}."""
        return next((vm for vm in self.vms if vm.is_any), None)

    def directories_to_make(self) -> tuple[DirectoryToMake, ...]:
        """
        @return: parents first: the runtime directory and those below it in which sockets
            are to be made, private to the daemon's user; and those of L{VmSection}s.
            Directories in other places must be there, so that a misspelt path is not
            taken for a wish.
        """
        return (*map(DirectoryToMake, self._private_directories()), *self._vm_directories())

    def _private_directories(self) -> list[Path]:
        if self.runtime_directory is None:
            return []
        found = {self.runtime_directory}
        made = [service.path for service in self.services if service.role == "listen"]
        for path in (*made, *([self.status] if self.status else [])):
            if self.runtime_directory in path.parents:
                below = path.parent.relative_to(self.runtime_directory)
                found.update(self.runtime_directory / part for part in (below, *below.parents))
        return sorted(found)

    def _vm_directories(self) -> list[DirectoryToMake]:
        """
        QEMU, as another user, connects to sockets in those of other hosts, and makes its
        own in that of this host, where nobody else may put anything.
        """
        if not self.vms:
            return []
        base = self.libvirt.directory
        directories = [DirectoryToMake(base, 0o755)]
        hosts = sorted({link for vm in self.vms if vm.leaves for link in vm.links})
        directories += [DirectoryToMake(base / host, 0o755) for host in hosts]
        if any(vm.arrives for vm in self.vms):
            directories.append(DirectoryToMake(base / self.name, 0o700, self.libvirt.qemu_user))
        return directories
