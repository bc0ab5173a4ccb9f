"""What relaymux ends of a VM's disks it ends one after the other."""

from __future__ import annotations

import socket

from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from relaymux.errors import GivenUp
from relaymux.net.apart import APART_SECONDS, Apart
from tests.bridges import BridgeTestCase


class ApartTests(SynchronousTestCase):
    """L{Apart} by itself."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.apart = Apart(self.clock)
        self.ended: list[int] = []

    def add(self, *numbers: int) -> None:
        for number in numbers:
            self.apart.add(lambda number=number: self.ended.append(number))  # type: ignore[misc]

    def test_one_after_the_other(self) -> None:
        """The first at once, each of the others some time after the one before."""
        self.add(1, 2, 3)
        for expected in ([1], [1, 2], [1, 2, 3]):
            self.assertEqual(self.ended, expected)
            self.clock.advance(APART_SECONDS / 2)
            self.assertEqual(self.ended, expected)
            self.clock.advance(APART_SECONDS / 2)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_also_later(self) -> None:
        """What is added in between has its distance to the last one, whether that waited or not."""
        self.add(1)
        self.clock.advance(APART_SECONDS * 0.75)
        self.add(2)
        self.assertEqual(self.ended, [1])
        self.clock.advance(APART_SECONDS * 0.25)
        self.assertEqual(self.ended, [1, 2])
        self.add(3)
        self.assertEqual(self.ended, [1, 2])
        self.clock.advance(APART_SECONDS)
        self.clock.advance(APART_SECONDS)
        self.add(4)
        self.assertEqual(self.ended, [1, 2, 3, 4])

    def test_added_meanwhile(self) -> None:
        """An end that brings about another one."""
        self.apart.add(lambda: self.add(1, 2))
        self.assertEqual(self.ended, [])
        self.clock.advance(APART_SECONDS)
        self.assertEqual(self.ended, [1])
        self.apart.hurry()
        self.assertEqual(self.ended, [1, 2])

    def test_hurry(self) -> None:
        """Those that wait, in their order, and then every one at once; no timer is left."""
        self.add(1, 2, 3)
        self.apart.hurry()
        self.assertEqual(self.ended, [1, 2, 3])
        self.add(4, 5)
        self.assertEqual(self.ended, [1, 2, 3, 4, 5])
        self.assertEqual(self.clock.getDelayedCalls(), [])


class BridgeTests(BridgeTestCase):
    """Connections of a socket whose ends are apart."""

    async def three(self) -> list[tuple[socket.socket, socket.socket]]:
        """@return: three connections, near and far, whose near ends a L{Clock} lets go."""
        self.clock = Clock()
        self.serve("web1.nbd", ends_apart=self.clock)
        # A test that fails has not let all of them go.
        self.addCleanup(self.listener.connections.hurry)
        return [await self.pair() for _ in range(3)]

    def told(self) -> list[str]:
        return self.lines("stream web1.nbd: connection", " ended as an error: ", self.near_path)

    async def end_in_order(self, pairs: list[tuple[socket.socket, socket.socket]]) -> None:
        """One ends with each step of the clock, and has one line in the log; the others notice nothing."""
        for number, (near, _) in enumerate(pairs, 1):
            await self.ended(near)
            await self.until(lambda number=number: len(self.told()) == number, "its line was there")  # type: ignore[misc]
            for other, _ in pairs[number:]:
                await self.nothing(other)
            self.assertEqual(len(self.told()), number)
            self.clock.advance(APART_SECONDS)

    async def test_session_lost(self) -> None:
        """The session takes all with it: at the near end one after the other, at the far end at once."""
        pairs = await self.three()
        for near, _ in pairs:
            self.fill(near)
        self.connection.cut()
        for _, far in pairs:
            await self.ended(far)
        await self.end_in_order(pairs)
        for number, line in enumerate(self.told(), 1):
            self.assertIn(f"connection {number} ended as an error: the daemons lost their session", line)

    async def test_not_read_any_more(self) -> None:
        """Nobody is there for what a program says while it waits for its end, and none of it is counted."""
        pairs = await self.three()
        self.connection.cut()
        await self.end_in_order(pairs[:1])
        near = pairs[2][0]
        said = len(self.fill(near))
        self.assertGreater(said, 0)
        await self.turns(20)
        self.assertEqual(self.fill(near), b"")
        self.clock.advance(APART_SECONDS)
        await self.ended(near)
        await self.until(lambda: len(self.told()) == 3, "all had their line")
        self.assertEqual(self.listener.totals.sent, 0)

    async def test_taken_late(self) -> None:
        """What had arrived for a program is still its own, and is not called lost when it takes it."""
        pairs = await self.three()
        near, far = pairs[2]
        while self.fill(far):
            await self.turns(20)
        [*_, bridge] = self.listener.connections._open
        self.connection.cut()
        await self.end_in_order(pairs[:1])
        before, arrived = bridge.received, bridge.received + bridge.untaken
        got = bytearray()

        def step() -> bool:
            try:
                got.extend(near.recv(1 << 18))
            except BlockingIOError:
                return before < bridge.received == len(got)
            return False

        await self.until(step, "the program had taken what there was for it")
        self.clock.advance(APART_SECONDS)
        self.clock.advance(APART_SECONDS)
        await self.until(lambda: len(self.told()) == 3, "all had their line")
        left = arrived - bridge.received
        self.assertIn(
            f"; {left} bytes were not taken by the program here;" if left else "delivered all", self.told()[2]
        )

    async def test_program_does_not_wait(self) -> None:
        """A program that goes away in between is no trouble when its turn comes."""
        pairs = await self.three()
        self.connection.cut()
        for near, _ in pairs:
            near.close()
        self.clock.advance(APART_SECONDS)
        self.clock.advance(APART_SECONDS)
        await self.until(lambda: len(self.told()) == 3, "each had its line")

    async def test_given_up(self) -> None:
        """relaymux's own decision about connections of a session that goes on."""
        pairs = await self.three()
        for connection in self.listener.connections.open_connections:
            connection.bridge.give_up(Failure(GivenUp("the test says so")))
        await self.end_in_order(pairs)
        for line in self.told():
            self.assertIn("ended as an error: relaymux gave up: the test says so, ", line)
        for _, far in pairs:
            await self.ended(far)
        lines = self.lines("stream web1.nbd: connection", "the other daemon gave it up", self.far_path)
        self.assertEqual(len(lines), 3)

    async def test_given_up_and_lost(self) -> None:
        """The session is lost while some wait for their turn: they end once, and for the first reason."""
        pairs = await self.three()
        for connection in self.listener.connections.open_connections:
            connection.bridge.give_up(Failure(GivenUp("the test says so")))
        await self.ended(pairs[0][0])
        self.connection.cut()
        for _ in range(4):
            self.clock.advance(APART_SECONDS)
        await self.until(lambda: len(self.told()) == 3, "each had its line")
        await self.turns(20)
        self.assertEqual(len(self.told()), 3)

    async def test_daemon_stops(self) -> None:
        """Then nothing waits."""
        pairs = await self.three()
        self.connection.cut()
        await self.ended(pairs[0][0])
        self.listener.connections.hurry()
        for near, _ in pairs:
            await self.ended(near)
        await self.until(lambda: len(self.told()) == 3, "each had its line")

    async def test_in_order_is_at_once(self) -> None:
        """What the programs end does not wait for anything."""
        pairs = await self.three()
        for near, far in pairs:
            far.close()
            self.assertEqual(await self.read(near), b"")
            near.close()
        lines = "stream web1.nbd: connection", "closed by the program at the other end"
        await self.until(lambda: len(self.lines(*lines)) == 3, "all were over")
