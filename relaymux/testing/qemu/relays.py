"""
Two relay daemons on this machine, one for each end of a migration.

They are what an operator runs: C{twistd relaymux} with a configuration file
each, and one link between them.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from relaymux.certificates import make_certificates
from relaymux.testing.qemu.cuts import LinkProxy
from relaymux.testing.qemu.observe import cpu_seconds, peak_memory
from relaymux.testing.qemu.outages import LinkWatch, Outage, links_up, outages

__all__ = ["TRANSPORTS", "RelayFailed", "RelayPair", "twistd_program"]

TRANSPORTS = ("tls", "tcp", "unix")

#: Seconds for both daemons to start and to have a link.
_START_SECONDS = 30.0

#: Seconds between two looks at the daemons' connections.
_LOOK_SECONDS = 0.05

#: Seconds for a daemon to deliver what it has and end.
_DRAIN_SECONDS = 10.0

_OPENED = re.compile(r"(?:disk|stream) (\S+?)\]?: connection \d+ open\b")


class RelayFailed(Exception):
    """A daemon did not start, or ended; the message has the end of its log."""


@dataclass
class _Daemon:
    name: str
    directory: Path
    process: asyncio.subprocess.Process | None = None

    @property
    def configuration(self) -> Path:
        return self.directory / f"{self.name}.ini"

    @property
    def log(self) -> Path:
        return self.directory / f"{self.name}.log"

    @property
    def pid(self) -> int:
        assert self.process is not None, "not started"
        return self.process.pid

    async def start(self) -> None:
        with (self.directory / f"{self.name}.err").open("wb") as errors:
            self.process = await asyncio.create_subprocess_exec(
                twistd_program(),
                *("--nodaemon", "--pidfile=", f"--logfile={self.log}"),
                *("relaymux", "--config", str(self.configuration)),
                cwd=self.directory,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=errors,
            )

    def said(self) -> str:
        """The log, and what went to standard error."""
        paths = (self.log, self.directory / f"{self.name}.err")
        return "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths if path.exists())


@dataclass
class RelayPair:
    """
    The two daemons, as an asynchronous context manager; a carrier for a rehearsal.

    @ivar directory: private, with a short path; configuration, keys, logs and
        sockets are made in it.
    @ivar transport: one of L{TRANSPORTS}.
    @ivar disks: the disks that have a socket of their own.
    @ivar link_options: further lines for both C{[link]} sections.
    @ivar relay_options: further lines for both C{[relay]} sections.
    @ivar proxied: whether there is a proxy between the two.
    @ivar proxy: that, once started.
    @ivar statuses: the daemons' exit statuses, once closed.
    @ivar cpu: processor seconds of both daemons together, once closed.
    @ivar peak: the most resident bytes of either daemon, once closed.
    @ivar watch: what the kernel says of the link, once started.
    """

    directory: Path
    transport: str = "tls"
    disks: Sequence[str] = ()
    link_options: Sequence[str] = ()
    relay_options: Sequence[str] = ()
    proxied: bool = False
    proxy: LinkProxy | None = None
    statuses: list[int] = field(default_factory=list)
    cpu: float = 0.0
    peak: int = 0
    watch: LinkWatch | None = None
    _watcher: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.source = _Daemon("hv-a", self.directory)
        self.destination = _Daemon("hv-b", self.directory)

    async def __aenter__(self) -> RelayPair:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def incoming_socket(self) -> Path:
        """Where the destination's QEMU listens for memory."""
        return self.directory / "b-ram.sock"

    @property
    def nbd_socket(self) -> Path:
        """Where the destination's QEMU listens for disks."""
        return self.directory / "b-nbd.sock"

    def ram_socket(self) -> Path:
        """Where the source's relay listens for memory."""
        return self.directory / "a-ram.sock"

    def disk_socket(self, name: str) -> Path:
        """Where the source's relay listens for one disk."""
        return self.directory / f"a-{name}.sock"

    async def start(self) -> None:
        """
        Start both daemons and wait for their sockets and their link.

        @raise RelayFailed: it did not come to that.
        """
        await asyncio.to_thread(self._configure)
        try:
            if self.proxy is not None:
                await self.proxy.start()
            for daemon in (self.destination, self.source):
                await daemon.start()
            await asyncio.wait_for(self._until_ready(), _START_SECONDS)
        except asyncio.TimeoutError:
            await self.close()
            raise RelayFailed(f"no link within {_START_SECONDS:.0f} s\n{self.logs()}") from None
        except BaseException:
            await self.close()
            raise
        self.watch = LinkWatch(self.source.pid, self.destination.pid)
        self._watcher = asyncio.ensure_future(self._look(self.watch))

    async def close(self) -> None:
        """Let both daemons drain and end; a second call does nothing."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
            self._watcher = None
        for daemon in (self.source, self.destination):
            process, daemon.process = daemon.process, None
            if process is None:
                continue
            if process.returncode is None:
                self.cpu += cpu_seconds(process.pid)
                self.peak = max(self.peak, peak_memory(process.pid))
                process.terminate()
                try:
                    await asyncio.wait_for(process.wait(), _DRAIN_SECONDS)
                except asyncio.TimeoutError:
                    process.kill()
                    await process.wait()
            assert process.returncode is not None
            self.statuses.append(process.returncode)
        if self.proxy is not None:
            await self.proxy.close()

    def links_up(self) -> list[int]:
        """@return: for each daemon, how many links its log says came up."""
        return [links_up(daemon.said()) for daemon in (self.source, self.destination)]

    def outages(self) -> tuple[list[Outage], list[Outage]]:
        """@return: the times without a link, as the dialling daemon and the other tell them."""
        return outages(self.source.said()), outages(self.destination.said())

    def opened(self) -> dict[str, int]:
        """@return: by the names of the sections, how many connections the source's log says were opened."""
        names = _OPENED.findall(self.source.said())
        return {name: names.count(name) for name in dict.fromkeys(names)}

    def logs(self, lines: int = 15) -> str:
        """@return: the end of what each daemon said."""
        parts = []
        for daemon in (self.source, self.destination):
            parts += [f"{daemon.name}:", *daemon.said().splitlines()[-lines:]]
        return "\n".join(parts)

    async def _until_ready(self) -> None:
        sockets = [self.ram_socket(), *map(self.disk_socket, self.disks)]
        while not (all(path.is_socket() for path in sockets) and min(self.links_up()) > 0):
            for daemon in (self.source, self.destination):
                if daemon.process is not None and daemon.process.returncode is not None:
                    raise RelayFailed(
                        f"{daemon.name} ended with status {daemon.process.returncode}\n{self.logs()}"
                    )
            await asyncio.sleep(_LOOK_SECONDS)

    async def _look(self, watch: LinkWatch) -> None:
        """Ask the kernel for the daemons' connections, again and again."""
        while True:
            try:
                watch.look()
            except FileNotFoundError:
                return  # a daemon has ended; whoever uses it notices
            await asyncio.sleep(_LOOK_SECONDS)

    def _configure(self) -> None:
        pki = self.directory / "pki"
        if self.transport == "tls":
            make_certificates(pki, ["hv-a.example", "hv-b.example"])
        address = target = self._free_address("link.sock")
        if self.proxied:
            address = self._free_address("proxy.sock")
            self.proxy = LinkProxy(self.directory, address, target)
        ends = (self.source, "hv-b", "connect", address), (self.destination, "hv-a", "listen", target)
        for daemon, other, role, where in ends:
            this = daemon.name
            lines = ["[relay]", f"name = {this}", "drain-timeout = 5", *self.relay_options]
            lines += [f"[link {other}]", f"transport = {self.transport}", f"{role} = {where}"]
            if self.transport == "tls":
                lines += [
                    f"certificate = {pki}/{this}.example.pem",
                    f"private-key = {pki}/{this}.example.key",
                ]
                lines += [f"ca = {pki}/ca.pem", f"peer = {other}.example"]
            lines += self.link_options
            sockets = {"stream ram": (self.ram_socket(), self.incoming_socket)}
            for disk in self.disks:
                sockets[f"disk {disk}"] = (self.disk_socket(disk), self.nbd_socket)
            for section, (near, far) in sockets.items():
                place = f"listen = {near}" if role == "connect" else f"connect = {far}"
                lines += [f"[{section}]", f"link = {other}", place]
            daemon.configuration.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _free_address(self, name: str) -> str:
        return str(self.directory / name) if self.transport == "unix" else f"127.0.0.1:{_free_port()}"


def twistd_program() -> str:
    """@return: the twistd of this Python, which finds relaymux."""
    beside = Path(sys.executable).with_name("twistd")
    found = str(beside) if beside.exists() else shutil.which("twistd")
    if found is None:
        raise RelayFailed(f"there is no twistd beside {sys.executable}")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
