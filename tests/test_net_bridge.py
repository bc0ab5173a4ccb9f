"""Bridges: two programs on UNIX sockets that talk as if the link were not there."""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall, deferLater
from twisted.logger import capturedLogs, formatEvent

from relaymux.core.handshake import Limits
from relaymux.interfaces import TransportSettings
from relaymux.net.bridge import Bridge
from relaymux.net.buffers import pool_for
from relaymux.net.dialer import Dialer, LinkFactory
from relaymux.net.disks import bind_unix
from relaymux.net.listen import listen_on
from relaymux.net.local import LocalDialer, LocalListener, LocalSocket
from relaymux.net.peer import Identity, Peer
from relaymux.testing.memory import MemoryConnection
from relaymux.transports.registry import find_transport
from tests.peers import stamped
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
    ) -> None:
        """Offer the program's socket at the far end, and listen for it at the near one."""
        options = (far_open_timeout or open_timeout, far_max_connections)
        if listen:
            self.program = self.far_socket(backlog)
        local = LocalSocket(f"stream {service}", service, self.far_path, *options)
        self.dialer = LocalDialer(reactor, self.far, local)
        self.far.register(service, self.dialer)
        options = (open_timeout, max_connections)
        self.listener = LocalListener(
            reactor, self.near, LocalSocket(f"stream {service}", service, self.near_path, *options)
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
        await self.close_link()
        self.assertEqual((self.near.open_streams, self.far.open_streams), (0, 0))

    @property
    def open_connections(self) -> int:
        """How many connections the sections have, and streams the peers."""
        connections = sum(len(section._connections._open) for section in self.sections)
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
        [bridge] = self.dialer._connections._open
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


class DataTests(BridgeTestCase):
    """Bytes."""

    async def test_both_ways(self) -> None:
        """Far more than any limit, both ways at once, on several connections."""
        self.serve()
        jobs = []
        for number in range(3):
            near, far = await self.pair()
            for sender, receiver, stream in ((near, far, 2 * number), (far, near, 2 * number + 1)):
                jobs.append((sender, receiver, stamped(LARGE, stream)))
        await self.exchange(jobs)

    async def test_stalled_reader(self) -> None:
        """A program that does not read stops the other one, and no other connection."""
        self.serve()
        near, far = await self.pair()
        sent = await self.overfill(near)
        other_near, other_far = await self.pair()
        data = stamped(LARGE, 7)
        await self.exchange([(other_near, other_far, data), (other_far, other_near, data)])
        near.shutdown(socket.SHUT_WR)
        self.assertEqual(len(await self.ended(far)), sent)

    async def test_last_words(self) -> None:
        """A program that writes and closes at once: all of it arrives, be the link stalled meanwhile."""
        for stalled in (False, True):
            if not stalled:
                self.serve()
            near, far = await self.pair()
            if stalled:
                self.connection.stall()
            data = self.fill(near)
            near.close()
            await self.turns(20)
            if stalled:
                self.connection.release()
            self.same(await self.ended(far), data)

    async def test_last_words_before_the_answer(self) -> None:
        """The same for one that has gone before the far end was even asked."""
        self.serve()
        self.connection.stall()
        near = self.connect()
        near.send(b"all I have to say")
        near.close()
        await self.turns(20)
        self.connection.release()
        far = await self.accept()
        self.assertEqual(await self.ended(far), b"all I have to say")

    async def test_server_speaks_first(self) -> None:
        """Nothing waits for a first byte of the client: an NBD server greets."""
        self.serve()
        near, far = await self.pair()
        await self.send(far, b"NBDMAGIC")
        self.assertEqual(await self.read(near, 8), b"NBDMAGIC")

    async def test_totals(self) -> None:
        """Each connection's bytes are logged and added up, on both sides."""
        self.serve()
        for number in range(3):
            near, far = await self.pair()
            data = stamped(1000 * (number + 1))
            await self.send(near, data)
            await self.read(far, len(data))
            await self.send(far, b"ok")
            await self.read(near, 2)
            near.close()
            far.close()
        await self.until(lambda: not self.open_connections, "all connections were over")
        for totals, sent, received in ((self.listener.totals, 6000, 6), (self.dialer.totals, 6, 6000)):
            self.assertEqual((totals.opened, totals.failed), (3, 0))
            self.assertEqual((totals.sent, totals.received), (sent, received))
        self.assertEqual(len(self.lines("ram: connection 2 closed", "(2000 bytes) sent", self.near_path)), 1)

    async def test_many_short_connections(self) -> None:
        """Two hundred that come and go; nothing is lost, mixed up or left open."""
        self.serve()
        for first in range(0, 200, 20):
            batch = [self.connect() for _ in range(20)]
            for number, near in enumerate(batch, first):
                near.send(stamped(64, number))
                if number % 2:
                    near.close()
                else:
                    near.shutdown(socket.SHUT_WR)
            for number in range(first, first + 20):
                far = await self.accept()
                self.assertEqual(await self.ended(far), stamped(64, number))
                if not number % 2:
                    await self.send(far, stamped(64, ~number & 0xFFFF))
                far.close()
            for number, near in enumerate(batch, first):
                if not number % 2:
                    self.assertEqual(await self.ended(near), stamped(64, ~number & 0xFFFF))
                    near.close()
        await self.until(lambda: not self.open_connections, "all connections were over")
        await self.turns()
        self.assertLessEqual(len(self.open_descriptors() - self.open_sockets), 2)


class OrderTests(BridgeTestCase):
    """Connections keep their order."""

    async def check_order(self, count: int) -> None:
        for number in range(count):
            far = await self.accept()
            self.assertEqual(await self.read(far, 4), struct.pack("!I", number))

    async def test_late_accepts(self) -> None:
        """They are dialled in the order of accepting, at once, though nobody accepts there yet."""
        self.serve(backlog=50)
        for number in range(40):
            self.connect().send(struct.pack("!I", number))
        await self.until(lambda: self.dialer.totals.opened == 40, "all were dialled")
        await self.check_order(40)

    async def test_full_backlog(self) -> None:
        """A full backlog is waited for: every connection arrives, in order."""
        self.serve(backlog=1)
        for number in range(12):
            self.connect().send(struct.pack("!I", number))
        await deferLater(reactor, 0.2)
        self.assertLess(self.dialer.totals.opened, 12)
        await self.check_order(12)
        self.assertEqual(self.dialer.totals.failed, 0)

    async def test_backlog_that_stays_full(self) -> None:
        """One that nobody ever accepts fails in time, and says why on both sides."""
        self.serve(backlog=0, open_timeout=0.5)
        first = self.connect()
        await self.until(lambda: self.dialer.totals.opened == 1, "the first was dialled")
        near = self.connect()
        self.assertEqual(await self.ended(near), b"")
        await self.until(lambda: self.dialer.totals.failed == 1, "the failure was counted")
        await self.nothing(first)
        self.assertEqual(len(self.lines("stream ram", "failed", self.near_path, "to-far")), 1)
        self.assertEqual(len(self.lines("stream ram", "failed", self.far_path, "to-near")), 1)

    async def test_socket_vanishes_while_many_wait(self) -> None:
        """All that wait for a full backlog are refused when its socket goes, however many there are."""
        self.serve(backlog=0)
        near = [self.connect() for _ in range(60)]
        await self.until(lambda: self.dialer.totals.opened == 1, "the first was dialled")
        await self.turns()
        os.unlink(self.far_path)
        for program in near[1:]:
            self.assertEqual(await self.ended(program), b"")
        self.assertEqual(self.dialer.totals.failed, 59)

    async def test_given_up_while_waiting(self) -> None:
        """Connections that have gone while they waited are not dialled on, and hold up nobody."""
        self.serve(backlog=0, open_timeout=0.3, far_open_timeout=1000.0)
        self.connect()
        await self.until(lambda: self.dialer.totals.opened == 1, "the first was dialled")
        near = [self.connect() for _ in range(3)]
        for program in near:
            self.assertEqual(await self.ended(program), b"")
        await self.until(lambda: len(self.dialer._connections._open) == 1, "the far end knows, too")
        await self.accept()
        late = self.connect()
        late.send(b"late")
        far = await self.accept()
        self.assertEqual(await self.read(far, 4), b"late")


class RefusalTests(BridgeTestCase):
    """What cannot be had."""

    async def test_nobody_there(self) -> None:
        """The local program sees its connection end, at once; both logs say which socket, whose, and why."""
        self.serve(listen=False)
        near = self.connect()
        near.send(b"unread")
        with self.assertRaises(ConnectionResetError):
            await self.read(near)
        [here] = self.lines("stream ram: connection 1 failed", self.near_path, "to-far")
        self.assertIn("no such socket", here)
        self.assertNotIn(self.far_path, here, "no path travels")
        [there] = self.lines("stream ram: connection 1 failed", self.far_path, "to-near")
        self.assertIn("no such socket", there)
        self.assertEqual((self.listener.totals.failed, self.listener.totals.opened), (1, 0))

    async def test_left_over_socket(self) -> None:
        """The same for a socket file that nobody listens on."""
        self.serve()
        self.program.close()
        self.assertEqual(await self.ended(self.connect()), b"")
        self.assertEqual(len(self.lines("nobody listens", self.far_path)), 1)

    async def test_unknown_service(self) -> None:
        """A name that the other daemon does not have."""
        self.serve()
        self.far.unregister("ram")
        self.assertEqual(await self.ended(self.connect()), b"")
        self.assertEqual(len(self.lines("connection 1 failed", "'ram'", self.near_path)), 1)
        self.far.register("ram", self.dialer)

    async def test_no_link(self) -> None:
        """Without a link the connection waits for the open timeout, and is closed then."""
        self.serve(open_timeout=0.3)
        self.connection.cut()
        near = self.connect()
        await self.nothing(near)
        self.assertEqual(await self.ended(near), b"")
        self.assertEqual(len(self.lines("connection 1 failed", "not up", "0.3 s", "to-far")), 1)

    async def test_link_comes_in_time(self) -> None:
        """... and is served when a link comes before."""
        self.serve()
        self.connection.cut()
        near = [self.connect() for _ in range(3)]
        for number, program in enumerate(near):
            program.send(bytes([number]))
        await self.turns()
        self.pump.stop()
        await self.link()
        for number in range(3):
            self.assertEqual(await self.read(await self.accept(), 1), bytes([number]))

    async def test_too_many_connections(self) -> None:
        """More than max-connections are refused here, with a line in the log; one that ends makes room."""
        self.serve(max_connections=2)
        near, far = await self.pair()
        await self.pair()
        self.assertEqual(await self.ended(self.connect()), b"")
        self.assertEqual(len(self.lines("max-connections", self.near_path)), 1)
        near.close()
        far.close()
        await self.until(lambda: self.near.open_streams == 1, "the first was over")
        await self.pair()

    async def test_too_many_connections_there(self) -> None:
        """The same at the far end, which tells the near one why."""
        self.serve(far_max_connections=1)
        await self.pair()
        self.assertEqual(await self.ended(self.connect()), b"")
        self.assertEqual(len(self.lines("refused", "max-connections", self.far_path)), 1)
        self.assertEqual(len(self.lines("connection 2 failed", "1 connections open", self.near_path)), 1)

    async def test_client_gone_before_the_answer(self) -> None:
        """A client that gives up while the far end is asked leaves nothing behind."""
        self.serve()
        self.connection.stall()
        self.connect().close()
        await self.turns()
        self.connection.release()
        far = await self.accept()
        self.assertEqual(await self.ended(far), b"")
        far.close()
        await self.until(lambda: not self.open_connections, "the stream was over")


class EndTests(BridgeTestCase):
    """Each way in which a connection can end."""

    async def test_half_closes_in_every_order(self) -> None:
        """What is written before a half-close, and after the other one's, arrives, and so do both ends."""
        self.serve()
        for order in itertools.permutations(("near write", "near end", "far write", "far end")):
            if order.index("near write") > order.index("near end"):
                continue
            if order.index("far write") > order.index("far end"):
                continue
            near, far = await self.pair()
            for step in order:
                who, other = (near, far) if step.startswith("near") else (far, near)
                if step.endswith("write"):
                    await self.send(who, step.encode())
                    self.assertEqual(await self.read(other, len(step)), step.encode(), order)
                else:
                    who.shutdown(socket.SHUT_WR)
                    self.assertEqual(await self.read(other), b"", order)
            await self.until(lambda: not self.open_connections, f"the stream was over; {order}")
        self.assertEqual(self.lines("ended as an error"), [])
        self.assertEqual((self.listener.totals.failed, self.dialer.totals.failed), (0, 0))

    async def test_half_closed_for_long(self) -> None:
        """A direction stays open as long as it likes after the other has ended."""
        self.serve()
        near, far = await self.pair()
        near.shutdown(socket.SHUT_WR)
        self.assertEqual(await self.read(far), b"")
        data = stamped(LARGE)
        await deferLater(reactor, 0.3)
        await self.nothing(near)
        await self.send(far, data[:1000])
        self.assertEqual(await self.read(near, 1000), data[:1000])
        sending = self.send(far, data[1000:])
        sent = Deferred.fromCoroutine(sending)
        self.same(await self.read(near, len(data) - 1000), data[1000:])
        await sent

    async def test_closed_by_either(self) -> None:
        """A program that closes in order ends the other's connection in order."""
        self.serve()
        for closing in (0, 1):
            pair = await self.pair()
            await self.send(pair[0], b"question")
            await self.read(pair[1], 8)
            await self.send(pair[1], b"answer")
            await self.read(pair[0], 6)
            pair[closing].close()
            self.assertEqual(await self.read(pair[1 - closing]), b"")
            pair[1 - closing].close()
            await self.until(lambda: not self.open_connections, "the stream was over")

    async def test_closed_with_unread_data(self) -> None:
        """A program that closes before it has read everything is an error to the other one."""
        self.serve()
        for closing in (0, 1):
            pair = await self.pair()
            data = self.fill(pair[1 - closing])
            await self.turns(20)
            pair[closing].recv(10)
            pair[closing].close()
            await self.cannot_write(pair[1 - closing])
            await self.ended(pair[1 - closing])
            self.assertGreater(len(data), 10)
            await self.until(lambda: not self.open_connections, "the stream was over")
        self.assertEqual(len(self.lines("ended as an error")), 4)
        self.assertEqual((self.listener.totals.failed, self.dialer.totals.failed), (2, 2))

    async def test_input_shut(self) -> None:
        """A program that takes nothing more makes the other one's writes fail, and may go on writing."""
        self.serve()
        near, far = await self.pair()
        near.shutdown(socket.SHUT_RD)
        await self.cannot_write(far)
        await self.send(near, b"still talking")
        self.assertEqual(await self.read(far, 13), b"still talking")

    async def test_link_cut(self) -> None:
        """With the link both programs lose their connection; what they got is a prefix of what was sent."""
        self.serve()
        near, far = await self.pair()
        data = self.fill(near)
        await self.until(lambda: self.dialer._connections._open, "it was connected")
        await self.turns()
        self.connection.cut()
        got = await self.ended(far)
        self.assertTrue(data.startswith(got))
        await self.ended(near)
        await self.cannot_write(near)
        await self.until(lambda: len(self.lines("connection 1 ended as an error")) == 2, "both logged it")

    async def test_link_cut_after_the_last_words(self) -> None:
        """A program that had closed in order, while its bytes were under way: logged as the loss it is."""
        self.serve()
        near, far = await self.pair()
        far.shutdown(socket.SHUT_WR)
        self.assertEqual(await self.read(near), b"")
        self.connection.stall()
        await self.send(near, b"lost with the link")
        near.close()
        await self.until(
            lambda: not self.listener._connections._open or not self._only_bridge().is_local_open,
            "its closing was noticed",
        )
        self.connection.cut()
        self.assertEqual(await self.ended(far), b"")
        await self.until(lambda: len(self.lines("connection 1 ended as an error")) == 2, "both logged it")

    def _only_bridge(self) -> Bridge:
        [bridge] = self.listener._connections._open
        return bridge

    async def test_reset_frees_both(self) -> None:
        """After all of that the same sockets serve new connections."""
        self.serve()
        for _ in range(5):
            near, far = await self.pair()
            self.fill(near)
            far.close()
            await self.ended(near)
            near.close()
        near, far = await self.pair()
        await self.send(near, b"fine")
        self.assertEqual(await self.read(far, 4), b"fine")


class TCPLinkTests(BridgeTestCase):
    """The same with a real link, kept up by a real dialer."""

    async def link(self) -> None:
        """Listen and dial on the loopback device."""
        transport = find_transport("tcp")
        port: Any = await transport.server(reactor, TransportSettings("127.0.0.1:0")).listen(
            LinkFactory(self.far)
        )
        self.ports.append(port)
        address = f"127.0.0.1:{port.getHost().port}"
        client = transport.client(reactor, TransportSettings(address))
        self.link_dialer = Dialer(reactor, self.near, [(address, client)])
        self.link_dialer.start()
        await self.until(lambda: self.near.is_up and self.far.is_up, "the link was up")

    async def close_link(self) -> None:
        """Take the link down, and see that it goes."""
        self.link_dialer.stop()
        for drained in (self.near.drain(1.0), self.far.drain(1.0)):
            await drained
        await self.turns(20)

    def abort_link(self) -> None:
        link: Any = self.near._link
        link.transport.abortConnection()

    async def test_both_ways(self) -> None:
        """Far more than any limit goes both ways at once."""
        self.serve()
        near, far = await self.pair()
        await self.exchange([(near, far, stamped(2 * LARGE, 1)), (far, near, stamped(2 * LARGE, 2))])

    async def test_link_returns(self) -> None:
        """A link that is reset is dialled again; old connections have failed, new ones work."""
        self.serve()
        near, far = await self.pair()
        data = self.fill(near)
        self.abort_link()
        self.assertTrue(data.startswith(await self.ended(far)))
        await self.ended(near)
        near, far = await self.pair()
        await self.send(near, b"again")
        self.assertEqual(await self.read(far, 5), b"again")

    async def test_stalled_reader(self) -> None:
        """The bound holds with the kernel's buffers of a real link in between, too."""
        self.serve()
        near, far = await self.pair()
        sent = await self.overfill(near)
        near.shutdown(socket.SHUT_WR)
        self.assertEqual(len(await self.ended(far)), sent)


class ProgramErrorTests(BridgeTestCase):
    """Errors that the kernel reports of a program's socket."""

    async def test_reading_fails(self) -> None:
        """An error while reading is told to the other side as a reset, with its reason in the log."""
        self.serve()
        near, far = await self.pair()
        await self.send(near, b"x")
        await self.read(far, 1)
        [bridge] = self.listener._connections._open
        transport: Any = bridge.local.transport
        transport._receiving_failed(OSError(errno.EIO, os.strerror(errno.EIO)))
        self.assertEqual(await self.ended(far), b"")
        await self.until(
            lambda: self.lines("connection 1 ended as an error", os.strerror(errno.EIO)), "logged"
        )
