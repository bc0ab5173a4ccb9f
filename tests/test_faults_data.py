"""The fault proxy: what happens at an offset, what changes the pace, and everything at once."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from random import Random

from twisted.internet.task import LoopingCall

from relaymux.errors import LocalError
from relaymux.testing.fault_lane import Lane
from relaymux.testing.fault_script import parse_script
from relaymux.testing.faults import Ending, FaultProxy
from tests.proxies import LONG, RESET, FaultProxyTestCase
from tests.sockets import PlainRecorder, RecorderFactory, content, reactor


class OffsetTests(FaultProxyTestCase):
    """What happens at an offset happens exactly there."""

    async def test_cut_after(self) -> None:
        """Exactly so many bytes arrive, up and down, wherever the writes begin and end."""
        for offset in (1, 2, 17, 65_536, 300_001):
            for side in ("up", "down"):
                near, far = await self.pair()
                self.proxy.cut_after(offset, side, Ending.FIN)
                sender, receiver = (near, far) if side == "up" else (far, near)
                data = content(offset + 1000, offset)
                self.fill_gently(sender, data)
                self.assertTrue(await self.read(receiver) == data[:offset], f"cut {side} after {offset}")
                near.close()
                far.close()

    def fill_gently(self, peer: socket.socket, data: bytes) -> None:
        """Write what is small enough for the kernel."""
        peer.setblocking(False)
        self.assertEqual(peer.send(data), len(data))

    async def test_cut_after_without_more(self) -> None:
        """The cut does not wait for the byte behind it."""
        near, far = await self.pair()
        self.proxy.cut_after(3, "up")
        await self.send(near, b"abc")
        self.assertEqual(await self.ending(far), (b"abc", RESET))
        self.assertEqual(await self.ending(near), (b"", RESET))

    async def test_cut_after_nothing(self) -> None:
        """After 0 bytes means now, or as soon as something is connected."""
        near, _ = await self.pair()
        self.proxy.cut_after(0, "up")
        self.assertEqual(await self.ending(near), (b"", RESET))
        self.proxy.cut_after(0, "down")
        self.assertEqual(await self.ending(self.connect()), (b"", RESET))
        await self.until(lambda: not self.proxy.status()["open"], "all were closed")
        self.target.close()

    async def test_cut_after_is_once_and_spans_connections(self) -> None:
        """The bytes of several connections count together; after the cut nothing is left of it."""
        self.proxy.cut_after(10, "up")
        near, far = await self.pair()
        await self.send(near, b"123456")
        self.assertEqual(await self.read(far, 6), b"123456")
        near.close()
        near, far = await self.pair()
        await self.send(near, b"7890abc")
        self.assertEqual(await self.ending(far), (b"7890", RESET))
        await self.carries(*await self.pair())

    async def test_cut_each(self) -> None:
        """Every new connection is cut at its own offset, until cleared; the numbers follow from the seed."""
        self.proxy.cut_each(5, 500, "up")
        lengths = []
        for _ in range(4):
            near, far = await self.pair()
            await self.send(near, content(1000))
            data, end = await self.ending(far)
            self.assertEqual(end, RESET)
            self.assertEqual(data, content(1000)[: len(data)])
            lengths.append(len(data))
        expected = Lane("up", self.proxy.seed)
        expected.cut_each = (5, 500)
        self.assertEqual(lengths, [expected.pick_cut() for _ in range(4)])
        self.assertGreater(len(set(lengths)), 1)
        self.proxy.clear()
        await self.carries(*await self.pair())

    async def test_cut_each_and_refuse(self) -> None:
        """The refusal that belongs to it comes with it."""
        self.proxy.cut_each(3, 3, "down", Ending.FIN, LONG)
        near, far = await self.pair()
        await self.send(far, b"abcdef")
        self.assertEqual(await self.read(near), b"abc")
        await self.until(lambda: isinstance(self.try_connect(), OSError), "connections were refused")

    async def test_flip(self) -> None:
        """One bit of one byte differs, and no other."""
        near, far = await self.pair()
        self.proxy.damage(70_000, "down")
        self.proxy.damage(70_003, "down")
        data = content(100_000)
        got = await self.read_while(self.send(far, data), near, len(data))
        differing = {i: got[i] ^ data[i] for i in range(len(data)) if got[i] != data[i]}
        self.assertEqual(set(differing), {70_000, 70_003})
        for difference in differing.values():
            self.assertEqual(difference.bit_count(), 1)
        self.assertEqual(self.proxy.lanes["down"].damaged, 2)

    async def test_insert_and_remove(self) -> None:
        """A byte more, a byte less, the rest in its place."""
        near, far = await self.pair()
        self.proxy.damage(2, "up", "remove")
        self.proxy.damage(4, "up", "insert")
        self.proxy.damage(6, "up", "flip")
        await self.send(near, b"0123456789")
        got = await self.read(far, 10)
        self.assertEqual(got[:3] + got[4:6] + got[7:], b"01345789")
        self.assertEqual((got[6] ^ ord("6")).bit_count(), 1)

    async def test_remove_all(self) -> None:
        """Writes of which nothing is left do not stop the rest."""
        near, far = await self.pair()
        self.proxy.segments(1, 1)
        for offset in range(3000):
            self.proxy.damage(offset, "up", "remove")
        await self.send(near, content(3000) + b"rest")
        self.assertEqual(await self.read(far, 4), b"rest")

    async def test_damage_twice(self) -> None:
        """The same byte cannot be damaged in two ways."""
        self.proxy.damage(5, "up")
        error = self.assertRaises(LocalError, self.proxy.damage, 5, "up", "remove")
        self.assertIn("byte 5 up", str(error))

    async def test_corrupt(self) -> None:
        """About as many bytes as asked for are damaged, the same ones for the same seed, and it ends."""
        damaged = []
        for _ in range(2):
            lane = self.proxy.lanes["up"] = Lane("up", 11)
            near, far = await self.pair()
            self.proxy.corrupt(0.001, "up")
            data = content(100_000)
            got = await self.read_while(self.send(near, data), far, len(data))
            damaged.append([i for i in range(len(data)) if got[i] != data[i]])
            self.proxy.corrupt(0, "up")
            await self.carries(near, far)
            self.assertEqual(lane.damaged, len(damaged[-1]))
        self.assertEqual(damaged[0], damaged[1])
        self.assertTrue(50 < len(damaged[0]) < 200, len(damaged[0]))


class PaceTests(FaultProxyTestCase):
    """Delay, rate and segmentation change no byte."""

    async def test_delay(self) -> None:
        """All arrives in order, though each read is late by another time; so does the end."""
        self.proxy.delay(0.01, 0.02)
        near, far = await self.pair()
        await self.carries(near, far, 2_000_000)
        near.close()
        self.assertEqual(await self.ending(far), (b"", "end"))

    async def test_rate(self) -> None:
        """A limited line delivers everything."""
        self.proxy.rate(4_000_000)
        near, far = await self.pair()
        await self.carries(near, far)

    async def test_rate_ends(self) -> None:
        """A connection that waits for its turn at a very slow line goes on when the limit ends."""
        near, far = await self.pair()
        self.proxy.rate(1)
        await self.send(near, content(100_000))
        await self.read(far, 1)
        self.proxy.rate(0)
        self.assertEqual(await self.read(far, 99_999), content(100_000)[1:])

    async def test_segments(self) -> None:
        """A target that reads whenever there is something gets single bytes, or two when it is late."""
        target = RecorderFactory(PlainRecorder)
        port = reactor.listenTCP(0, target, interface="127.0.0.1")
        self.addCleanup(port.stopListening)
        proxy = FaultProxy(reactor, "127.0.0.1:0", f"127.0.0.1:{port.getHost().port}")
        proxy.start()
        self.addCleanup(proxy.stop)
        proxy.segments(1, 1)
        with socket.create_connection(("127.0.0.1", int(proxy.address.rpartition(":")[2]))) as near:
            await self.send(near, content(2000))
            await self.until(lambda: target.made, "the target was connected to")
            await self.arrived(target.made[0], 2000)
        self.assertEqual(target.made[0].received, content(2000))
        self.assertGreaterEqual(target.made[0].deliveries, 1000)

    async def test_random_segments(self) -> None:
        """Pieces of random sizes put together are what was sent."""
        self.proxy.segments(1, 5000)
        near, far = await self.pair()
        await self.carries(near, far, 200_000)

    async def test_changes_under_way(self) -> None:
        """Turning everything on and off while bytes pass loses none and keeps their order."""
        near, far = await self.pair()
        changes: list[Callable[[], object]] = [
            lambda: self.proxy.delay(0.005, 0.01),
            lambda: self.proxy.segments(1000, 9000),
            lambda: self.proxy.blackhole(0.01),
            lambda: self.proxy.rate(50_000_000),
            lambda: self.proxy.delay(0),
            self.proxy.clear,
        ]

        def change() -> None:
            changes.append(changes.pop(0))
            changes[0]()

        for _ in range(3):
            loop = LoopingCall(change)
            loop.start(0.004)
            await self.carries(near, far, 3_000_000)
            loop.stop()
            self.proxy.clear()

    async def test_receive_buffer(self) -> None:
        """With a small receive buffer and a blackhole the kernel takes little from the sender."""
        self.proxy._receive_buffer = 8192
        near, _ = await self.pair()
        self.proxy.blackhole()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        self.assertLess(len(self.fill(near)), 200_000)


class Transfer:
    """One end that sends as much of its data as goes, and takes what comes."""

    def __init__(self, peer: socket.socket, data: bytes) -> None:
        peer.setblocking(False)
        self._peer = peer
        self._left = memoryview(data)
        self.received = bytearray()

    def step(self) -> None:
        """Send and receive what can be at once."""
        for move in (self._send, self._receive):
            with contextlib.suppress(BlockingIOError, ConnectionResetError, BrokenPipeError):
                move()

    def _send(self) -> None:
        self._left = self._left[self._peer.send(self._left) :]

    def _receive(self) -> None:
        self.received += self._peer.recv(1 << 18)


class EverythingTests(FaultProxyTestCase):
    """All at once."""

    async def test_prefixes(self) -> None:
        """Whatever happens in whatever order, who receives gets a prefix of what was sent to it."""
        seed = Random().randrange(1 << 32)
        chance = Random(seed)
        data = content(200_000, 3)
        scripts = [
            "cut",
            "cut fin",
            "cut after 50K up",
            "cut fin after 30K down refuse 0.01",
            "cut each 0..150K down",
            "refuse 0.01",
            "refuse 0.01 reset",
            "blackhole 0.01",
            "blackhole 0.01 up",
            "delay 0.002 0.002",
            "rate 20M",
            "segments 100..20000",
            "hold 20K within 0.01",
            "hold 0 down",
            "release",
            "clear",
        ]
        pairs: list[Transfer] = []
        history = []
        for _ in range(300):
            history.append(chance.choice(scripts))
            for operation in parse_script(history[-1]):
                operation(self.proxy)
            near = self.try_connect() if len(pairs) < 60 else None
            if isinstance(near, socket.socket):
                pairs.append(Transfer(near, data))
            with contextlib.suppress(BlockingIOError):
                far, _ = self.target.accept()
                self.addCleanup(far.close)
                pairs.append(Transfer(far, data))
            for transfer in pairs:
                transfer.step()
                if not data.startswith(transfer.received):
                    self.fail(f"seed {seed}: bytes differ within {len(transfer.received)}; after {history}")
            await self.turns(1)
        self.assertGreater(sum(len(transfer.received) for transfer in pairs), len(data))
