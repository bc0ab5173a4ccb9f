"""Many deadlines with one timer."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from relaymux.net.deadlines import Deadlines


class DeadlineTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.over: list[tuple[object, float]] = []
        self.more = True
        self.deadlines = Deadlines(self.clock, self.is_over, lambda: self.more)

    def is_over(self, who: object, seconds: float) -> None:
        self.over.append((who, seconds))

    def test_each_in_its_time(self) -> None:
        """Whoever is waited for is told when its own time is over, in the order of these times."""
        for who, seconds in (("a", 10.0), ("b", 3.0), ("c", 10.0), ("d", 5.0)):
            self.deadlines.add(who, seconds)
            self.clock.advance(1)
        told = []
        for second in range(4, 16):
            told += [(second, *entry) for entry in self.over]
            self.over.clear()
            self.clock.advance(1)
        self.assertEqual(told, [(4, "b", 3.0), (8, "d", 5.0), (10, "a", 10.0), (12, "c", 10.0)])

    def test_several_at_once(self) -> None:
        """Those whose time is over are told oldest deadline first, however late the timer comes."""
        for who, seconds in (("a", 3.0), ("b", 1.0), ("c", 2.0)):
            self.deadlines.add(who, seconds)
        self.clock.advance(60)
        self.assertEqual(self.over, [("b", 1.0), ("c", 2.0), ("a", 3.0)])

    def test_discarded(self) -> None:
        """Who is not waited for any more is not told; again and again is no error."""
        self.deadlines.add("a", 1.0)
        self.deadlines.add("b", 1.0)
        self.deadlines.discard("a")
        self.deadlines.discard("a")
        self.clock.advance(2)
        self.deadlines.discard("b")
        self.assertEqual(self.over, [("b", 1.0)])

    def test_one_timer(self) -> None:
        """However many come and go, there is one timer, which is not touched."""
        self.deadlines.add("a", 5.0)
        (timer,) = self.clock.getDelayedCalls()
        for number in range(100):
            self.deadlines.add(number, 5.0)
            self.deadlines.discard(number)
        self.deadlines.discard("a")
        self.assertEqual(self.clock.getDelayedCalls(), [timer])
        self.assertEqual(timer.getTime(), 5.0)
        self.clock.advance(6)
        self.assertEqual((self.over, self.clock.getDelayedCalls()), ([], []))

    def test_an_earlier_one(self) -> None:
        """One with less time is not kept waiting by those before it."""
        self.deadlines.add("a", 50.0)
        self.deadlines.add("b", 1.0)
        self.clock.advance(1)
        self.assertEqual(self.over, [("b", 1.0)])
        self.clock.advance(49)
        self.assertEqual(self.over, [("b", 1.0), ("a", 50.0)])

    def test_rest(self) -> None:
        """With nobody to come, no timer is left behind the last one; before, it goes on for the others."""
        self.deadlines.add("a", 5.0)
        self.deadlines.add("b", 5.0)
        self.more = False
        self.deadlines.rest()
        self.deadlines.discard("a")
        self.assertEqual(len(self.clock.getDelayedCalls()), 1)
        self.deadlines.discard("b")
        self.assertEqual(self.clock.getDelayedCalls(), [])
        self.deadlines.add("c", 5.0)
        self.clock.advance(5)
        self.assertEqual(self.over, [("c", 5.0)])

    def test_changes_while_told(self) -> None:
        """Who is told may discard others, and begin to wait again."""

        def tell(who: object, seconds: float) -> None:
            self.is_over(who, seconds)
            if len(self.over) == 1:
                self.deadlines.discard("b")
                self.deadlines.add("a", 1.0)

        self.deadlines = Deadlines(self.clock, tell, lambda: False)
        self.deadlines.add("a", 1.0)
        self.deadlines.add("b", 1.0)
        self.clock.advance(1)
        self.assertEqual(self.over, [("a", 1.0)])
        self.clock.advance(1)
        self.assertEqual(self.over, [("a", 1.0), ("a", 1.0)])
        self.assertEqual(self.clock.getDelayedCalls(), [])
