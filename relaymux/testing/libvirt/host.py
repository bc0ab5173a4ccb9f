"""
One libvirt host in namespaces of its own.

It has a process tree, a network, a host name and a file system of its own.  The last
is the machine's, but what is written to F{/etc} and F{/var} goes to a tmpfs, and F{/run}
begins empty.  The first process of the tree
ends when its standard input does, which is a pipe that this process holds.  So the
host is gone when this process is, whatever ended it, and with it every process, mount,
interface and file.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import signal
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from relaymux.testing.libvirt.program import Program, children

__all__ = ["CommandFailed", "Host", "HostFailed", "Result"]

#: Seconds for a host to be there, and for a libvirtd to answer.
_START_SECONDS = 30.0

#: Seconds between two looks.
_LOOK_SECONDS = 0.05

#: Seconds for a host's processes to be gone.
_END_SECONDS = 10.0

#: libvirtd's children close every descriptor one by one.
_DESCRIPTORS = 8192

#: As they are in Debian's packages, in a range that users do not have.
_QEMU_UID = 64055

#: The first process.  It ignores SIGCHLD so that the kernel reaps what libvirtd's
#: daemons leave to it.
_FIRST = """
mount --make-rprivate /
mount -t overlay overlay -o "lowerdir=$tree/usr:/usr" /usr
for name in bin sbin lib; do
    # Debian's links from / to /usr are not in its packages.
    [ ! -d "$tree/$name" ] || mount -t overlay overlay -o "lowerdir=$tree/$name:/usr/$name" "/usr/$name"
done
mount -t tmpfs -o mode=0755 tmpfs /run
for name in etc var; do
    own=/run/host/$name
    mkdir -p $own/upper $own/work
    mount -t overlay overlay -o "lowerdir=/$name,upperdir=$own/upper,workdir=$own/work" /$name
done
# The usual devices and no KVM, so that every machine does the same: a /dev/kvm that
# opens and runs nothing lets libvirt examine QEMU again and again.
mkdir /run/host/dev
mount -t tmpfs -o mode=0755 tmpfs /run/host/dev
for name in null zero full random urandom tty; do
    touch /run/host/dev/$name
    mount --bind /dev/$name /run/host/dev/$name
done
mkdir /run/host/dev/pts /run/host/dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 devpts /run/host/dev/pts
mount -t tmpfs -o mode=1777 tmpfs /run/host/dev/shm
ln -s pts/ptmx /run/host/dev/ptmx
ln -s /proc/self/fd /run/host/dev/fd
mount --rbind /run/host/dev /dev
umount -l /sys
mount -t sysfs sysfs /sys
mount -t tmpfs -o ro tmpfs /sys/fs/cgroup
hostname "$name_of_host"
ip link set lo up
echo ready
exec env --ignore-signal=CHLD cat
"""

_LIBVIRTD_CONF = """
host_uuid = "{uuid}"
unix_sock_group = "root"
auth_unix_rw = "none"
auth_unix_ro = "none"
listen_tls = 0
listen_tcp = 1
auth_tcp = "none"
log_level = 3
log_outputs = "3:file:/var/log/libvirt/libvirtd.log"
keepalive_interval = 5
keepalive_count = 5
"""

_QEMU_CONF = """
user = "{user}"
group = "{user}"
cgroup_controllers = [ ]
namespaces = [ ]
security_driver = "none"
remember_owner = 0
stdio_handler = "file"
"""


class HostFailed(Exception):
    """A host did not come up; the message has what was said."""


class CommandFailed(Exception):
    """
    A command on a host failed.

    @ivar status: its exit status; negative for a signal.
    @ivar said: its standard error.
    """

    def __init__(self, host: str, command: Sequence[str], status: int, said: str) -> None:
        super().__init__(f"{host}: {shlex.join(command)}: status {status}: {said.strip()}")
        self.status = status
        self.said = said.strip()


@dataclass(frozen=True)
class Result:
    """What a command that succeeded has printed."""

    output: str
    errors: str


@dataclass
class Host:
    """
    @ivar name: its host name, and for messages.
    @ivar address: of its interface, with the prefix's length; set by the network.
    @ivar tree: unpacked packages with libvirt, laid over the machine's own.
    @ivar qemu_user: whom QEMU runs as; C{"root"} or C{"libvirt-qemu"}.
    @ivar pid: of the first process, once started.
    """

    name: str
    address: str
    tree: Path
    qemu_user: str = "libvirt-qemu"
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    pid: int = 0
    _unshare: asyncio.subprocess.Process | None = None
    _libvirtd: Program | None = None

    async def start(self) -> None:
        """
        Make the namespaces and the files.

        @raise HostFailed: this machine does not let us.
        """
        environment = {
            **os.environ,
            "LC_ALL": "C.UTF-8",
            "name_of_host": self.name,
            "tree": str(self.tree),
        }
        self._unshare = await asyncio.create_subprocess_exec(
            *("unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child"),
            *("--mount-proc", "sh", "-eu", "-c", _FIRST),
            env=environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # Away from the terminal's Ctrl-C: hosts end when we have done with them.
            start_new_session=True,
        )
        assert self._unshare.stdout is not None
        try:
            line = await asyncio.wait_for(self._unshare.stdout.readline(), _START_SECONDS)
        except asyncio.TimeoutError:
            line = b""
        if line != b"ready\n":
            said = await self._abandon()
            raise HostFailed(f"{self.name}: no namespaces: {said}")
        (self.pid,) = children(self._unshare.pid)
        self._write_files()

    async def stop(self) -> None:
        """End everything on it.  A second call does nothing."""
        process, self._unshare = self._unshare, None
        libvirtd, self._libvirtd = self._libvirtd, None
        self.pid = 0
        if process is not None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), _END_SECONDS)
            except asyncio.TimeoutError:
                process.kill()
                await process.wait()
        if libvirtd is not None:
            await libvirtd.wait()

    def path(self, inside: str | Path) -> Path:
        """@return: where a file of this host is for this process."""
        assert self.pid, f"{self.name} is not started"
        return Path(f"/proc/{self.pid}/root") / str(inside).lstrip("/")

    def enter(self, command: Sequence[str]) -> list[str]:
        """@return: C{command}, so that it runs on this host."""
        assert self.pid, f"{self.name} is not started"
        return ["nsenter", f"--target={self.pid}", "--mount", "--net", "--uts", "--ipc", "--pid", *command]

    async def spawn(
        self, *command: str, environment: Mapping[str, str] | None = None, log: Path | None = None
    ) -> Program:
        """
        Start a program that goes on.

        @param log: where its output goes, a path outside; None to drop it.
        """
        with (log or Path(os.devnull)).open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                *self.enter(command),
                env=self._environment(environment),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        for _ in range(int(_START_SECONDS / _LOOK_SECONDS)):
            if process.returncode is not None:
                raise HostFailed(f"{self.name}: {command[0]} ended with status {process.returncode}")
            if started := children(process.pid):
                return Program(process, started[0])
            await asyncio.sleep(_LOOK_SECONDS / 10)
        process.kill()
        raise HostFailed(f"{self.name}: {command[0]} does not start")

    async def run(
        self, *command: str, seconds: float = 60.0, stdin: str = "", descriptors: Sequence[int] = ()
    ) -> Result:
        """
        Run a command to its end.

        @param stdin: its standard input.
        @param descriptors: of this process, that the command is to have, too.
        @raise CommandFailed: it failed, or did not end within C{seconds}.
        """
        process = await asyncio.create_subprocess_exec(
            *self.enter(command),
            env=self._environment(),
            pass_fds=descriptors,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        try:
            output, errors = await asyncio.wait_for(process.communicate(stdin.encode()), seconds)
        except asyncio.TimeoutError:
            raise CommandFailed(self.name, command, -1, f"no end within {seconds:g} s") from None
        finally:
            if process.returncode is None:
                for pid in [*children(process.pid), process.pid]:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                await process.wait()
        said = errors.decode("utf-8", "replace")
        if process.returncode:
            raise CommandFailed(self.name, command, process.returncode, said)
        return Result(output.decode("utf-8", "replace"), said)

    async def virsh(self, *arguments: str, seconds: float = 60.0) -> str:
        """
        @return: what virsh prints.
        @raise CommandFailed: with libvirt's own words.
        """
        return (await self.run("virsh", "--quiet", *arguments, seconds=seconds)).output

    @property
    def libvirtd_pid(self) -> int:
        """Of its libvirtd."""
        assert self._libvirtd is not None, f"{self.name} has no libvirtd"
        return self._libvirtd.pid

    async def start_libvirtd(self) -> None:
        """
        Start its libvirtd and wait until it answers.

        @raise HostFailed: it does not, or it is not this host's own.
        """
        limited = f"ulimit -n {_DESCRIPTORS}; exec libvirtd --listen"
        log = self.path("/var/log/libvirt/libvirtd.err")
        self._libvirtd = await self.spawn("sh", "-c", limited, log=log)
        said = ""
        for _ in range(int(_START_SECONDS / _LOOK_SECONDS)):
            if self._libvirtd.status is not None:
                break
            try:
                capabilities = await self.virsh("capabilities")
            except CommandFailed as error:
                said = error.said
                await asyncio.sleep(_LOOK_SECONDS)
                continue
            if self.uuid not in capabilities:
                raise HostFailed(f"{self.name}: its libvirtd says it is another host")
            return
        raise HostFailed(f"{self.name}: libvirtd does not start: {said}\n{self.said()}")

    async def stop_libvirtd(self, kill: bool = False) -> None:
        """
        End it; its virtual machines go on.

        @param kill: as if it had crashed.
        """
        libvirtd, self._libvirtd = self._libvirtd, None
        if libvirtd is not None:
            await libvirtd.end(signal.SIGKILL if kill else signal.SIGTERM)

    def said(self, lines: int = 15) -> str:
        """@return: the end of what libvirtd has logged."""
        text = ""
        for name in ("libvirtd.err", "libvirtd.log"):
            path = self.path(f"/var/log/libvirt/{name}")
            if path.exists():
                text += path.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def _environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        names = ("PATH", "HOME", "TERM")
        kept = {name: os.environ[name] for name in names if name in os.environ}
        return {**kept, "LC_ALL": "C.UTF-8", **(more or {})}

    def _write_files(self) -> None:
        etc = self.path("/etc")
        (etc / "machine-id").unlink(missing_ok=True)
        (etc / "machine-id").write_text(self.uuid.replace("-", "") + "\n", encoding="ascii")
        (etc / "hostname").write_text(f"{self.name}\n", encoding="ascii")
        with (etc / "passwd").open("a", encoding="ascii") as passwd:
            passwd.write(f"libvirt-qemu:x:{_QEMU_UID}:{_QEMU_UID}::/var/lib/libvirt:/usr/sbin/nologin\n")
        with (etc / "group").open("a", encoding="ascii") as group:
            group.write(f"libvirt-qemu:x:{_QEMU_UID}:\n")
        for name in ("etc/libvirt", "var/lib/libvirt", "var/cache/libvirt", "var/log/libvirt/qemu"):
            directory = self.path(name)
            if directory.exists():
                # Of a libvirt that the machine itself has.
                shutil.rmtree(directory)
            directory.mkdir(parents=True)
        (etc / "libvirt" / "libvirtd.conf").write_text(
            _LIBVIRTD_CONF.format(uuid=self.uuid), encoding="ascii"
        )
        (etc / "libvirt" / "qemu.conf").write_text(_QEMU_CONF.format(user=self.qemu_user), encoding="ascii")

    async def _abandon(self) -> str:
        """@return: what a first process that did not come up has said."""
        process, self._unshare = self._unshare, None
        assert process is not None
        if process.returncode is None:
            process.kill()
        _, errors = await process.communicate()
        return errors.decode("utf-8", "replace").strip() or "nothing was said"
