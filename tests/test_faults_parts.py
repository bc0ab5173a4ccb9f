"""The fault proxy: arithmetic and plans, without sockets and with a clock that is moved by hand."""

from __future__ import annotations

from random import Random
from typing import Any

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from relaymux.errors import LocalError
from relaymux.testing import fault_timers
from relaymux.testing.fault_lane import BUFFER_BYTES, SLICE_BYTES, Lane
from tests.sockets import content


class LaneTests(SynchronousTestCase):
    """A direction's arithmetic, without sockets."""

    def test_same_seed(self) -> None:
        """Everything random follows from the seed and the side."""

        def sample(seed: int, side: Any) -> list[object]:
            lane = Lane(side, seed)
            lane.jitter, lane.segments, lane.cut_each = 1.0, (1, 1000), (1, 1000)
            lane.corrupt(0.1)
            lane.damage(3, "insert")
            return [
                [lane.due(0) for _ in range(5)],
                [lane.allowance(0) for _ in range(5)],
                [lane.pick_cut() for _ in range(5)],
                lane.carry(content(200)),
            ]

        self.assertEqual(sample(1, "up"), sample(1, "up"))
        self.assertNotEqual(sample(1, "up"), sample(2, "up"))
        self.assertNotEqual(sample(1, "up"), sample(1, "down"))

    def test_damage_does_not_depend_on_pieces(self) -> None:
        """However the bytes are cut into pieces, the same ones are damaged in the same way."""
        results = set()
        for size in (1, 7, 1000):
            lane = Lane("up", 5)
            lane.corrupt(0.01)
            for offset in range(0, 1000, 90):
                lane.damage(offset, ("flip", "insert", "remove")[offset // 90 % 3])
            data = content(1000)
            results.add(b"".join(lane.carry(data[i : i + size]) for i in range(0, 1000, size)))
        self.assertEqual(len(results), 1)

    def test_corrupt_always(self) -> None:
        """Probability 1 is every byte."""
        lane = Lane("up", 5)
        lane.corrupt(1)
        data = content(100)
        self.assertTrue(all(a != b for a, b in zip(data, lane.carry(data), strict=True)))

    def test_rate(self) -> None:
        """Bytes are allowed so that a second takes as many as the rate says, however late one asks."""
        lane = Lane("up", 5)
        lane.rate = 1000
        now = carried = 0.0
        while now < 10:
            size = lane.allowance(now)
            lane.carry(bytes(size))
            carried += size
            now = max(now, lane.free_at) + 0.001
        self.assertTrue(9_900 <= carried <= 10_100, carried)

    def test_capacity(self) -> None:
        """Each kind of fault has its bound for what waits."""
        lane = Lane("up", 5)
        self.assertEqual(lane.capacity, SLICE_BYTES)
        lane.delay = 0.1
        self.assertEqual(lane.capacity, BUFFER_BYTES)
        lane.rate = 10_000_000
        self.assertEqual(lane.capacity, 1_000_000)
        lane.rate = 10**12
        self.assertEqual(lane.capacity, BUFFER_BYTES)
        lane.rate = 1
        self.assertEqual(lane.capacity, 65_536)


class PlanTests(SynchronousTestCase):
    """at, every and clear, with a clock that is moved by hand."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.done: list[float] = []
        self.troubles: list[str] = []
        self.timers = fault_timers.Timers(self.clock, Random(1), self.troubles.append)

    def note(self) -> None:
        self.done.append(round(self.clock.seconds(), 3))

    def test_at_and_every(self) -> None:
        """Operations happen at their time, again and again if they are to."""
        self.timers.at(2.5, self.note)
        self.timers.every(1, 1, self.note)
        self.clock.pump([0.5] * 7)
        self.assertEqual(self.done, [1, 2, 2.5, 3])

    def test_random_intervals(self) -> None:
        """Intervals are within their range and not all the same."""
        self.timers.every(1, 3, self.note)
        self.clock.pump([0.01] * 3000)
        gaps = [after - before for before, after in zip(self.done, self.done[1:], strict=False)]
        self.assertTrue(all(1 <= gap <= 3.02 for gap in gaps), gaps)
        self.assertGreater(len({round(gap, 1) for gap in gaps}), 3)

    def test_stop_from_within(self) -> None:
        """An operation may call everything off, itself included."""
        self.timers.every(1, 1, self.note)
        self.timers.every(1, 1, self.timers.stop_all)
        self.clock.pump([1] * 5)
        self.assertEqual(self.done, [1])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_trouble(self) -> None:
        """What a planned operation cannot do is told, and the plan goes on."""

        def fail() -> None:
            self.note()
            raise LocalError("impossible")

        self.timers.every(1, 1, fail)
        self.clock.pump([1, 1])
        self.assertEqual(self.done, [1, 2])
        self.assertEqual(self.troubles, ["impossible"] * 2)

    def test_bound(self) -> None:
        """Not more than so many operations can be planned."""
        for _ in range(fault_timers.MAX_PLANNED):
            self.timers.at(1, self.note)
        self.assertRaises(LocalError, self.timers.at, 1, self.note)
        self.clock.advance(1)
        self.timers.at(1, self.note)
