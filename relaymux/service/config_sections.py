"""
What a configuration file says, once it is read: one frozen dataclass per kind
of section, with the defaults and where each of them comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from relaymux.core.budget import link_beginning, stream_beginning
from relaymux.core.handshake import Limits
from relaymux.interfaces import TransportSettings
from relaymux.service.config_values import KIB, MIB

__all__ = ["Configuration", "LinkSection", "Role", "ServiceKind", "ServiceSection"]

Role = Literal["connect", "listen"]
ServiceKind = Literal["disk", "stream"]

#: Seconds.  Long enough for what a finished migration has in flight (the replay
#: buffer, 32 MiB, needs 3 s at 100 Mbit/s), short enough to be done before
#: systemd's default of 90 s turns SIGTERM into SIGKILL.
DEFAULT_DRAIN_TIMEOUT = 30.0

_LIMITS = Limits()

#: Bytes for all links together.  Half of it, which one stream alone can get, are 10
#: Gbit/s at 200 ms; and it is little beside the guests of a host that moves them.
DEFAULT_MEMORY = 512 * MIB

#: Bytes that a stream begins with, and always has.  No more, since it is promised
#: before anybody knows whether the stream is a bulk one, and 250 of them fit into the
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
    One C{[disk NAME]} or C{[stream NAME]}: a local UNIX socket that is coupled
    to the service of that name over a link.

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

    @property
    def section(self) -> str:
        """The section's header without brackets, for messages."""
        return f"{self.kind} {self.name}"


@dataclass(frozen=True)
class Configuration:
    """
    A whole file, free of contradictions in itself.

    @ivar file: the file's name as the operator gave it, for messages.
    @ivar name: the daemon's name, told to its peers.
    @ivar links: at least one, in the file's order.
    @ivar services: in the file's order; may be empty.
    @ivar memory: bytes that may be promised and held for all links.
    @ivar drain_timeout: seconds that SIGTERM waits for open streams.
    @ivar runtime_directory: a directory that the daemon makes if it is missing,
        as it does those of sockets below it; absolute.
    """

    file: str
    name: str
    links: tuple[LinkSection, ...]
    services: tuple[ServiceSection, ...] = ()
    memory: int = DEFAULT_MEMORY
    drain_timeout: float = DEFAULT_DRAIN_TIMEOUT
    runtime_directory: Path | None = None

    def least_memory(self) -> int:
        """@return: bytes with which every link can be, and one connection of every service."""
        windows = {link.name: link.window for link in self.links}
        return sum(link_beginning(link.replay_buffer) for link in self.links) + sum(
            stream_beginning(windows[service.link]) for service in self.services if service.link in windows
        )

    def directories_to_make(self) -> tuple[Path, ...]:
        """
        @return: the runtime directory and those below it in which sockets are
            to be made, parents first.  The daemon makes the missing ones,
            private to its user, before anything listens.  Directories in other
            places must be there, so that a misspelt path is not taken for a wish.
        """
        if self.runtime_directory is None:
            return ()
        found = {self.runtime_directory}
        for service in self.services:
            if service.role == "listen" and self.runtime_directory in service.path.parents:
                below = service.path.parent.relative_to(self.runtime_directory)
                found.update(self.runtime_directory / part for part in (below, *below.parents))
        return tuple(sorted(found))
