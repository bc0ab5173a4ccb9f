"""The lines of connections that have ended in order."""

from __future__ import annotations

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from relaymux.net.endings import INTERVAL, MOST_LINES, Endings


class EndingsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.lines: list[str] = []
        self.endings = Endings(self.clock, "stream ram", self.lines.append)

    def end(self, count: int) -> None:
        for number in range(count):
            self.endings.add(lambda number=number: f"line {number}", 2, 3)  # type: ignore[misc]

    def test_each_has_its_line(self) -> None:
        """As long as they are not very many, at once."""
        for _ in range(3):
            self.lines.clear()
            self.end(MOST_LINES)
            self.assertEqual(self.lines, [f"line {number}" for number in range(MOST_LINES)])
            self.clock.advance(INTERVAL)
        self.assertEqual(len(self.lines), MOST_LINES)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_very_many(self) -> None:
        """Those beyond are counted, with their bytes, and said before the next ones."""
        self.end(MOST_LINES + 1500)
        self.clock.advance(INTERVAL / 2)
        self.end(1)
        self.assertEqual(len(self.lines), MOST_LINES)
        self.clock.advance(INTERVAL / 2)
        summary = (
            "stream ram: 1501 more connections ended in order within a second,"
            " 2.9 KiB (3002 bytes) sent, 4.4 KiB (4503 bytes) received"
        )
        self.assertEqual(self.lines[MOST_LINES:], [summary])
        self.end(2)
        self.assertEqual(self.lines[MOST_LINES:], [summary, "line 0", "line 1"])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_after_the_rest(self) -> None:
        """Who ends when the daemon has stopped is said at once."""
        self.end(MOST_LINES + 50)
        self.endings.rest()
        self.end(3)
        self.assertEqual(self.lines[-3:], ["line 0", "line 1", "line 2"])
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_clock_set_back(self) -> None:
        """A reactor that follows the wall clock may go back: no line waits longer than for a second."""
        self.end(MOST_LINES)
        self.clock.rightNow -= 10_000
        self.end(MOST_LINES + 1)
        self.assertEqual(len(self.lines), 2 * MOST_LINES)
        self.clock.advance(INTERVAL)
        self.assertIn("1 more connections", self.lines[-1])

    def test_nothing_is_lost(self) -> None:
        """What was not said is said when the daemon stops."""
        self.end(MOST_LINES + 1)
        self.endings.sum_up()
        self.assertIn("1 more connections", self.lines[-1])
        self.endings.sum_up()
        self.assertEqual(len(self.lines), MOST_LINES + 1)
        self.assertEqual(self.clock.getDelayedCalls(), [])
