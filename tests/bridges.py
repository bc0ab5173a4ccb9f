"""Two peers with real sockets at both ends of a bridge, and programs to use them."""

from __future__ import annotations

import socket
from typing import Any

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import capturedLogs, formatEvent

from relaymux.core.handshake import Limits
from relaymux.net.buffers import pool_for
from relaymux.net.connections import LocalSocket
from relaymux.net.disks import bind_unix
from relaymux.net.listen import listen_on
from relaymux.net.local import LocalDialer, LocalListener
from relaymux.net.peer import Identity, Peer
from relaymux.testing.memory import MemoryConnection
from tests.sockets import SocketTestCase, reactor

#: Small, so that what a test moves is a multiple of each, and of what the kernel holds.
LIMITS = Limits(max_payload=64 * 1024, max_streams=64, window=64 * 1024, replay=256 * 1024)


LARGE = 4 * 1024 * 1024


class BridgeTestCase(SocketTestCase):
    """Two peers, a listening socket near, and a program's listening socket far."""

    async def setUp(self) -> None:  # type: ignore[override]
        logged = capturedLogs()
        self.events: Any = logged.__enter__()
        self.addCleanup(logged.__exit__, None, None, None)
        self.path = self.directory()
        self.near_path, self.far_path = f"{self.path}/near", f"{self.path}/far"
        self.near = Peer(reactor, "to-far", Identity("hv-near", b"n" * 16), LIMITS, dialing=True)
        self.far = Peer(reactor, "to-near", Identity("hv-far", b"f" * 16), LIMITS, dialing=False)
        self.open_sockets = self.open_descriptors()
        self.programs: list[socket.socket] = []
        self.ports: list[Any] = []
        self.sections: list[LocalListener | LocalDialer] = []
        self.addCleanup(self.finish)
        await self.link()

    async def link(self) -> None:
        """Join the peers, in memory: this link can be stalled and cut."""
        near, far = self.near.build_link(), self.far.build_link()
        assert near is not None and far is not None
        self.connection = MemoryConnection(near, far, capacity=64 * 1024)
        self.pump = LoopingCall(self.connection.settle)
        self.pump.start(0.001)
        await self.until(lambda: self.near.is_up and self.far.is_up, "the link was up")

    def serve(
        self,
        service: str = "ram",
        *,
        backlog: int = 100,
        listen: bool = True,
        open_timeout: float = 10.0,
        max_connections: int = 64,
        far_open_timeout: float | None = None,
        far_max_connections: int = 64,
        is_nbd: bool = False,
        others: tuple[str, ...] = (),
        ends_apart: IReactorTime | None = None,
    ) -> None:
        """
        Offer the program's socket at the far end, and listen for it at the near one.

        @param ends_apart: the clock that lets the near ends go, where they are not to go together.
        """
        options = (far_open_timeout or open_timeout, far_max_connections)
        if listen:
            self.program = self.far_socket(backlog)
        local = LocalSocket(
            f"stream {service}", service, self.far_path, *options, is_nbd=is_nbd, others=others
        )
        self.dialer = LocalDialer(reactor, self.far, local)
        self.far.register(service, self.dialer)
        options = (open_timeout, max_connections)
        self.listener = LocalListener(
            ends_apart or reactor,
            self.near,
            LocalSocket(
                f"stream {service}",
                service,
                self.near_path,
                *options,
                is_nbd=is_nbd,
                ends_apart=ends_apart is not None,
            ),
        )
        bound = bind_unix(self.near_path)
        port = listen_on(reactor, bound.socket, self.listener, pool_for(reactor), closed=bound.remove)
        self.ports.append(port)
        self.sections += [self.listener, self.dialer]

    def far_socket(self, backlog: int = 100) -> socket.socket:
        """The listening socket of the program at the far end."""
        listening = socket.socket(socket.AF_UNIX)
        self.programs.append(listening)
        listening.bind(self.far_path)
        listening.listen(backlog)
        listening.setblocking(False)
        return listening

    async def finish(self) -> None:
        """Close the programs' sockets, then the link; nothing must be left of the bridges."""
        for program in self.programs:
            program.close()
        for port in self.ports:
            await port.stopListening()
        await self.until(lambda: not self.open_connections, "all connections were over")
        for section in self.sections:
            section.connections.rest()
        await self.close_link()
        self.assertEqual((self.near.open_streams, self.far.open_streams), (0, 0))

    @property
    def open_connections(self) -> int:
        """How many connections the sections have, and streams the peers."""
        connections = sum(len(section.connections._open) for section in self.sections)
        return connections + self.near.open_streams + self.far.open_streams

    async def close_link(self) -> None:
        """Take the link down."""
        self.connection.cut()
        self.pump.stop()

    # The programs

    def connect(self) -> socket.socket:
        """The program at the near end connects."""
        program = socket.socket(socket.AF_UNIX)
        self.programs.append(program)
        program.connect(self.near_path)
        program.setblocking(False)
        return program

    async def accept(self) -> socket.socket:
        """The program at the far end accepts."""
        found: list[socket.socket] = []

        def step() -> bool:
            try:
                found.append(self.program.accept()[0])
            except BlockingIOError:
                return False
            return True

        await self.until(step, "a connection arrived at the far end")
        found[0].setblocking(False)
        self.programs.append(found[0])
        return found[0]

    async def pair(self) -> tuple[socket.socket, socket.socket]:
        """@return: the two programs, connected, with both sides knowing it."""
        before = self.listener.totals.opened
        near, far = self.connect(), await self.accept()
        await self.until(lambda: self.listener.totals.opened > before, "the connection was answered")
        return near, far

    async def ended(self, program: socket.socket) -> bytes:
        """@return: what C{program} reads to its end, be it an end or a reset."""
        data = bytearray()

        def step() -> bool:
            while True:
                try:
                    piece = program.recv(1 << 18)
                except BlockingIOError:
                    return False
                except ConnectionResetError:
                    return True
                if not piece:
                    return True
                data.extend(piece)

        await self.until(step, f"the connection ended; {len(data)} bytes were read")
        return bytes(data)

    async def overfill(self, near: socket.socket) -> int:
        """
        Write to the far program, which does not read, as much as ever goes.

        @return: how much that was: what the kernel holds, and what this side's limits allow.
        """
        [bridge] = self.dialer.connections._open
        far_kernel = bridge.local.transport.socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        near_kernel = near.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        sent, quiet = 0, 0
        while quiet < 20:
            more = len(self.fill(near))
            sent, quiet = sent + more, 0 if more else quiet + 1
            await self.turns(2)
        one_read = 2 * 512 * 1024
        self.assertLess(sent, near_kernel + one_read + LIMITS.replay + LIMITS.window + far_kernel)
        self.assertGreater(sent, LIMITS.window)
        return sent

    async def nothing(self, program: socket.socket) -> None:
        """C{program} is still connected, and has nothing to read."""
        await self.turns(20)
        with self.assertRaises(BlockingIOError):
            program.recv(1)

    async def cannot_write(self, program: socket.socket) -> None:
        """C{program} is told that nobody takes its bytes."""

        def step() -> bool:
            try:
                program.send(b"x")
            except BlockingIOError:
                return False
            except (BrokenPipeError, ConnectionResetError):
                return True
            return False

        await self.until(step, "a write failed")

    async def exchange(self, jobs: list[tuple[socket.socket, socket.socket, bytes]]) -> None:
        """Send each job's bytes from its first socket to its second, all at once, and half-close."""
        left = [memoryview(data) for _, _, data in jobs]
        got = [bytearray() for _ in jobs]
        done: set[int] = set()

        def step() -> bool:
            for i, (sender, receiver, _) in enumerate(jobs):
                try:
                    while left[i]:
                        left[i] = left[i][sender.send(left[i][:100_000]) :]
                        if not left[i]:
                            sender.shutdown(socket.SHUT_WR)
                except BlockingIOError:
                    pass
                try:
                    while i not in done:
                        piece = receiver.recv(100_000)
                        got[i] += piece
                        if not piece:
                            done.add(i)
                except BlockingIOError:
                    pass
            return len(done) == len(jobs)

        await self.until(step, "all bytes had arrived")
        for (_, _, data), received in zip(jobs, got, strict=True):
            self.same(bytes(received), data)

    def lines(self, *words: str) -> list[str]:
        """@return: the log lines with all of C{words}."""
        lines = [formatEvent(event) for event in self.events]
        return [line for line in lines if all(word in line for word in words)]

    def same(self, got: bytes, wanted: bytes) -> None:
        """The content is the same."""
        if got != wanted:
            pairs = zip(got, wanted, strict=False)
            place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(got), len(wanted)))
            self.fail(f"{len(got)} bytes instead of {len(wanted)}, other from {place} on")
