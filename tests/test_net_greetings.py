"""What a program says before its stream is there: it leaves with OPEN, and is taken when the answer comes."""

from __future__ import annotations

import gc
import socket
import struct
from dataclasses import replace

from relaymux.core.schedule import GREETING
from relaymux.net.bridge import Bridge
from relaymux.net.sockets import SocketTransport
from relaymux.net.stream import StreamTransport
from relaymux.testing.recording import HalfCloseRecorder
from tests import bridges
from tests.bridges import LARGE, LIMITS, BridgeTestCase
from tests.peers import Undecided, stamped
from tests.test_core_nbd import QEMU


class GreetingTests(BridgeTestCase):
    """The first words of a program that speaks first."""

    async def setUp(self) -> None:  # type: ignore[override]
        await super().setUp()
        self.serve()
        await self.pair()  # a session in which something was heard

    def silence(self) -> None:
        """The near daemon hears nothing more of the far one, until L{hear}."""
        self.connection.stall(self.connection.client)

    def hear(self) -> None:
        """Undo L{silence}."""
        self.connection.release(self.connection.client)

    def greet(self, data: bytes = b"") -> socket.socket:
        """@return: a program that has connected and said C{data} before anybody has looked."""
        near = self.connect()
        if data:
            self.assertEqual(near.send(data), len(data))
        return near

    async def test_no_round_trip(self) -> None:
        """The far program has them before the near daemon can know of it, and nothing comes twice."""
        self.silence()
        first, rest, answer = stamped(1000, 1), stamped(LARGE, 2), stamped(LARGE, 3)
        near = self.greet(first)
        far = await self.accept()
        self.assertEqual(await self.read(far, len(first)), first)
        await self.nothing(far)
        self.hear()
        await self.exchange([(near, far, rest), (far, near, answer)])
        near.close()
        self.assertEqual(await self.ended(far), b"")
        far.close()
        near_line = f"({len(first + rest)} bytes) sent"
        await self.until(lambda: bool(self.lines("connection 2 closed", near_line)), "all was counted")

    async def test_more_than_fits(self) -> None:
        """Of somebody who has more to say nothing is sent before the answer: all of it goes as bulk."""
        for number, size in enumerate((GREETING, GREETING + 1)):
            self.silence()
            data = stamped(size, number)
            near = self.greet(data)
            far = await self.accept()
            if size > GREETING:
                await self.nothing(far)
                self.hear()
            self.assertEqual(await self.read(far, size), data)
            self.hear()
            await self.exchange([(near, far, stamped(LARGE, 2)), (far, near, stamped(LARGE, 3))])

    async def test_said_and_gone(self) -> None:
        """A program that speaks and closes at once: all of it arrives, then the end."""
        for size in (1, 1000, GREETING, GREETING + 1, 100_000):
            data = stamped(size)
            near = self.greet(data)
            near.close()
            far = await self.accept()
            self.same(await self.ended(far), data)
            far.close()

    async def test_refused(self) -> None:
        """What was said and not taken is still unread: the program sees a reset, and no end in order."""
        self.far.unregister("ram")
        near = self.greet(b"unread")
        with self.assertRaises(ConnectionResetError):
            await self.read(near)
        self.assertEqual(len(self.lines("connection 2 failed", "'ram'", self.near_path)), 1)
        self.far.register("ram", self.dialer)

    async def test_silent_programs(self) -> None:
        """Who says nothing is connected all the same: the other one may be to speak first."""
        self.silence()
        self.greet()
        far = await self.accept()
        await self.nothing(far)
        self.hear()

    async def test_behind_what_waits(self) -> None:
        """The first words wait for room in the replay buffer: nothing else is read before they have left."""
        pairs = [await self.pair() for _ in range(LIMITS.replay // LIMITS.window + 1)]
        self.silence()
        held = self.near.held
        assert held is not None

        def is_full() -> bool:
            for near, _ in pairs:
                self.fill(near)
            return held.streams.session.replay.room < 1024

        await self.until(is_full, "the replay buffer was full")
        data = stamped(3000, 1)
        near = self.greet(data)
        far = await self.accept()
        await self.nothing(far)
        [stream] = [stream for stream in held.streams._streams.values() if stream.greeting]
        self.assertEqual((stream.greeting, stream.queuedBytes), (data, len(data)))
        self.hear()
        self.assertEqual(await self.read(far, len(data)), data)
        await self.exchange([(near, far, stamped(LARGE, 2)), (far, near, stamped(LARGE, 3))])


class NarrowTests(BridgeTestCase):
    """A peer that takes less than the first words at once."""

    WINDOW = 1024

    async def setUp(self) -> None:  # type: ignore[override]
        self.patch(bridges, "LIMITS", replace(LIMITS, window=self.WINDOW))
        await super().setUp()
        self.serve()
        await self.pair()

    async def test_not_read_on(self) -> None:
        """While a part of the first words waits for credit, what comes behind them is left in the socket."""
        self.far.unregister("ram")
        undecided = Undecided()
        self.far.register("ram", undecided)
        data = stamped(LARGE)
        near = self.connect()
        said = near.send(data[:GREETING])
        await self.until(lambda: bool(undecided.streams), "the stream was opened")
        said += near.send(data[GREETING:])
        [far] = undecided.streams
        far.accept()
        await self.until(lambda: self.listener.totals.opened == 2, "the answer came")
        await self.turns(20)
        held = self.near.held
        assert held is not None
        stream = held.streams._streams[far.stream_id]
        self.assertEqual(stream.queuedBytes, GREETING - self.WINDOW)
        protocol = HalfCloseRecorder()
        far.begin(protocol)
        await self.until(lambda: len(protocol.received) == said, "all that was said had arrived")
        self.same(bytes(protocol.received), data[:said])
        near.close()
        far.loseConnection()
        self.far.unregister("ram")
        self.far.register("ram", self.dialer)


class NewSessionTests(BridgeTestCase):
    """A session in which nothing was heard yet."""

    async def test_nothing_with_the_first(self) -> None:
        """
        The first stream may have to be opened in another session, and so what its program
        says stays with it until it was heard that this one works.
        """
        self.serve()
        self.connection.stall(self.connection.client)
        near = self.connect()
        near.send(b"first")
        far = await self.accept()
        await self.nothing(far)
        self.connection.release(self.connection.client)
        self.assertEqual(await self.read(far, 5), b"first")


class WatcherTests(BridgeTestCase):
    """Who reads along."""

    async def test_first_words_are_seen(self) -> None:
        """An NBD client that does not wait for the server's greeting: its disk has its name on both sides."""
        self.serve(is_nbd=True)
        await self.pair()
        client = b"".join(data for side, data in QEMU if side == "client")
        server = b"".join(data for side, data in QEMU if side == "server")
        self.assertLess(len(client), GREETING)
        near = self.connect()
        near.send(client)
        far = await self.accept()
        self.assertEqual(await self.read(far, len(client)), client)
        await self.send(far, server)
        self.assertEqual(await self.read(near, len(server)), server)
        self.assertEqual(len(self.lines("connection 2", "is disk drive-virtio-disk0")), 2)


class MemoryTests(BridgeTestCase):
    """What is over is gone."""

    async def test_nothing_for_the_collector(self) -> None:
        """A connection that has ended leaves nothing that only the garbage collector would find."""
        self.serve()
        await self.pair()
        kinds = (Bridge, StreamTransport, SocketTransport)
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)

        def count() -> int:
            return sum(isinstance(thing, kinds) for thing in gc.get_objects())

        before = count()
        for number in range(20):
            near = self.connect()
            near.send(struct.pack("!I", number))
            far = await self.accept()
            self.assertEqual(await self.read(far, 4), struct.pack("!I", number))
            (near if number % 2 else far).close()
            self.assertEqual(await self.ended(far if number % 2 else near), b"")
            (far if number % 2 else near).close()
        await self.until(lambda: self.near.open_streams == self.far.open_streams == 1, "all were over")
        del near, far
        await self.until(lambda: count() <= before, f"they were gone: {count()} of {before}")
