"""A relay daemon on either host, as an operator sets them up for libvirt."""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from relaymux.certificates import make_certificates
from relaymux.testing.libvirt.host import Host
from relaymux.testing.libvirt.moves import Route
from relaymux.testing.libvirt.program import Program
from relaymux.testing.libvirt.rig import Rig
from relaymux.testing.qemu.observe import cpu_seconds, peak_memory, tcp_connections
from relaymux.testing.qemu.outages import Outage, links_up, outages
from relaymux.testing.qemu.relays import RelayFailed, twistd_program

__all__ = ["Relays"]

#: Seconds for both daemons to start and to have a link.
_START_SECONDS = 30.0

#: Seconds between two looks at the daemons' connections.
_LOOK_SECONDS = 0.05

#: Seconds for a daemon to deliver what it has and end.
_DRAIN_SECONDS = 15.0

_PORT = 16515

_CONFIGURATION = "/etc/relaymux/relay.ini"

_LOG = "/var/log/relaymux.log"

_SOCKETS = "/run/libvirt/relaymux"


@dataclass
class _Daemon:
    host: Host
    program: Program | None = None
    cpu: float = 0.0
    peak: int = 0

    def said(self) -> str:
        path = self.host.path(_LOG)
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def measure(self) -> None:
        """Add what the running program has used; it is to end now."""
        if self.program is not None and self.program.status is None:
            self.cpu += cpu_seconds(self.program.pid)
            self.peak = max(self.peak, peak_memory(self.program.pid))

    async def start(self) -> None:
        self.program = await self.host.spawn(
            *(twistd_program(), "--nodaemon", "--pidfile=", f"--logfile={_LOG}"),
            *("relaymux", "--config", _CONFIGURATION),
            log=self.host.path(f"{_LOG}.err"),
        )


@dataclass
class Relays:
    """
    Two daemons, one TLS connection, and a C{[vm]} section for each machine.

    @ivar rig: started.
    @ivar names: the domains they are for.
    @ivar link_options: further lines for both C{[link]} sections.
    @ivar most: the most TCP connections that either daemon had at once.
    @ivar looks: how often the kernel was asked for them.
    @ivar statuses: the daemons' exit statuses, once closed.
    """

    rig: Rig
    names: Sequence[str]
    link_options: Sequence[str] = ()
    most: int = 0
    looks: int = 0
    statuses: list[int] = field(default_factory=list)
    _watcher: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.daemons = [_Daemon(host) for host in self.rig.hosts]

    async def __aenter__(self) -> Relays:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def route(self, destination: Host, name: str) -> Route:
        """@return: how the domain gets to C{destination}."""
        directory = f"{_SOCKETS}/{destination.name}"
        return Route(
            f"qemu+unix:///system?socket={directory}/control.{name}",
            f"unix://{directory}/ram.tunnelmigrate.dest.{name}",
            f"unix://{directory}/nbd.tunnelmigrate.dest.{name}",
        )

    async def start(self) -> None:
        """
        Start both daemons and wait for their link.

        @raise RelayFailed: it did not come up.
        """
        await asyncio.to_thread(self._configure)
        try:
            # The side that dials comes last, so that it dials once.
            await self.daemons[1].start()
            await self._until_listening(self.daemons[1])
            await self.daemons[0].start()
            await self.wait_links([1, 1])
        except BaseException:
            await self.close()
            raise
        self._watcher = asyncio.ensure_future(self._watch())

    async def close(self) -> None:
        """Let both daemons drain and end; a second call does nothing."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
            self._watcher = None
        for daemon in self.daemons:
            daemon.measure()
            program, daemon.program = daemon.program, None
            if program is not None:
                self.statuses.append(await program.end(seconds=_DRAIN_SECONDS))

    async def kill(self, side: int) -> None:
        """Let one daemon die as in a crash."""
        daemon = self.daemons[side]
        daemon.measure()
        assert daemon.program is not None, "not started"
        await daemon.program.end(signal.SIGKILL)

    async def restart(self, side: int) -> None:
        """Start one again that has ended, and wait for the link."""
        wanted = [count + 1 for count in self.links_up()]
        await self.daemons[side].start()
        await self.wait_links(wanted)

    async def wait_links(self, wanted: Sequence[int]) -> None:
        """
        Wait until the logs tell of so many links that came up.

        @raise RelayFailed: they do not, or a daemon has ended.
        """
        for _ in range(int(_START_SECONDS / _LOOK_SECONDS)):
            if all(count >= least for count, least in zip(self.links_up(), wanted, strict=True)):
                return
            for daemon in self.daemons:
                if daemon.program is not None and daemon.program.status is not None:
                    raise RelayFailed(f"{daemon.host.name}: status {daemon.program.status}\n{self.logs()}")
            await asyncio.sleep(_LOOK_SECONDS)
        raise RelayFailed(f"no link within {_START_SECONDS:.0f} s\n{self.logs()}")

    @property
    def cpu(self) -> float:
        """Processor seconds of both daemons so far."""
        running = [daemon.program for daemon in self.daemons if daemon.program is not None]
        now = sum(cpu_seconds(program.pid) for program in running if program.status is None)
        return now + sum(daemon.cpu for daemon in self.daemons)

    def pids(self) -> list[int]:
        """@return: of both daemons."""
        programs = [daemon.program for daemon in self.daemons]
        return [program.pid for program in programs if program is not None]

    def links_up(self) -> list[int]:
        """@return: for each daemon, how many sessions its log says began."""
        return [links_up(daemon.said()) for daemon in self.daemons]

    def outages(self) -> tuple[list[Outage], list[Outage]]:
        """@return: the times without a link, as either daemon tells them."""
        one, other = (outages(daemon.said()) for daemon in self.daemons)
        return one, other

    def logs(self, lines: int = 15) -> str:
        """@return: the end of what each daemon said."""
        parts = []
        for daemon in self.daemons:
            errors = daemon.host.path(f"{_LOG}.err")
            said = daemon.said() + (errors.read_text(encoding="utf-8") if errors.exists() else "")
            parts += [f"{daemon.host.name}:", *said.splitlines()[-lines:]]
        return "\n".join(parts)

    def said(self, side: int) -> str:
        """@return: one daemon's whole log."""
        return self.daemons[side].said()

    async def _until_listening(self, daemon: _Daemon) -> None:
        for _ in range(int(_START_SECONDS / _LOOK_SECONDS)):
            if f": listening on {daemon.host.address}:{_PORT}" in daemon.said():
                return
            if daemon.program is None or daemon.program.status is not None:
                break
            await asyncio.sleep(_LOOK_SECONDS)
        raise RelayFailed(f"{daemon.host.name} does not listen\n{self.logs()}")

    async def _watch(self) -> None:
        while True:
            for daemon in self.daemons:
                if daemon.program is None or daemon.program.status is not None:
                    continue
                try:
                    self.most = max(self.most, len(tcp_connections(daemon.program.pid)))
                except FileNotFoundError:  # it ends just now
                    continue
            self.looks += 1
            await asyncio.sleep(_LOOK_SECONDS)

    def _configure(self) -> None:
        names = [f"{host.name}.example" for host in self.rig.hosts]
        with tempfile.TemporaryDirectory(prefix="rmx-") as directory:
            pki = Path(directory, "pki")
            make_certificates(pki, names)
            for host, other in (self.rig.hosts, self.rig.hosts[::-1]):
                target = host.path(_CONFIGURATION).parent
                shutil.rmtree(target, ignore_errors=True)
                (target / "pki").mkdir(parents=True)
                for name in (f"{host.name}.example.pem", f"{host.name}.example.key", "ca.pem"):
                    shutil.copy(pki / name, target / "pki" / name)
                text = "\n".join(self._lines(host, other)) + "\n"
                host.path(_CONFIGURATION).write_text(text, encoding="utf-8")

    def _lines(self, host: Host, other: Host) -> list[str]:
        """@return: the configuration of C{host}'s daemon."""
        dials = host is self.rig.hosts[0]
        lines = ["[relay]", f"name = {host.name}", "drain-timeout = 5"]
        lines += [f"[link {other.name}]", "transport = tls"]
        lines += [f"connect = {other.name}:{_PORT}" if dials else f"listen = {host.address}:{_PORT}"]
        lines += [f"certificate = pki/{host.name}.example.pem", f"private-key = pki/{host.name}.example.key"]
        lines += ["ca = pki/ca.pem", f"peer = {other.name}.example", *self.link_options]
        for name in self.names:
            lines += [f"[vm {name}]", f"link = {other.name}"]
        return lines
