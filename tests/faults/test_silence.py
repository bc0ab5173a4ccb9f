"""Paths that go silent, and processes that do: found by their silence, and not before."""

from __future__ import annotations

import signal
import time

from tests.faults.pair import DOWN, SMALL, SMALL_FLOW, Daemon, FaultTestCase, Pair, thorough

#: Bytes per second each way: so slow that traffic of L{FLOW} lasts for several faults.
RATE = 8_000_000

FLOW = 2 * SMALL_FLOW


class SilenceTestCase(FaultTestCase):
    """Traffic that outlasts the faults."""

    def begin(self, pair: Pair) -> None:
        """Begin it, and wait until the link is busy."""
        pair.wire.do("rate", RATE)
        pair.traffic.open(4, FLOW, FLOW)
        pair.traffic.wait_received(pair.traffic.size // 20)

    def assert_goes_on(self, pair: Pair) -> None:
        """Something arrives, and something was left to arrive."""
        self.assertLess(pair.traffic.received, pair.traffic.size, "all done before the fault")
        pair.traffic.wait_received(pair.traffic.received + 200_000)


class BlackholeTests(SilenceTestCase):
    """Nothing arrives, and nobody says why."""

    def blackhole(self, pair: Pair, seconds: float, resumes: int, sides: str = "both") -> None:
        """
        @param resumes: how often the session has been resumed after it, all in all.
        """
        pair.wire.do("blackhole", seconds, sides)
        began = time.monotonic()
        time.sleep(seconds)
        self.assert_goes_on(pair)
        self.say(f"{seconds:g} s {sides}: goes on {time.monotonic() - began - seconds:.1f} s after the end")
        pair.wait_resumed(resumes)
        for daemon in pair.daemons:
            self.assertEqual(daemon.count(DOWN), resumes)

    def test_short_and_long(self) -> None:
        """Shorter than the limit: the link stays.  Longer: it is resumed.  With a limit of 2 s."""
        with self.pair(*SMALL, "silence = 2") as pair:
            self.begin(pair)
            self.blackhole(pair, 0.7, 0)
            self.blackhole(pair, 3.5, 1)
            self.assert_balanced(pair)

    @thorough
    def test_5_14_and_30_seconds(self) -> None:
        """With production's limit of 15 s."""
        with self.pair(*SMALL) as pair:
            self.begin(pair)
            self.blackhole(pair, 5, 0)
            self.blackhole(pair, 14, 0)
            self.blackhole(pair, 30, 1)
            self.assert_balanced(pair)

    @thorough
    def test_one_way(self) -> None:
        """Each direction alone: the side that hears nothing ends the link, and its peer notices that."""
        with self.pair(*SMALL) as pair:
            self.begin(pair)
            self.blackhole(pair, 30, 1, "up")
            self.blackhole(pair, 30, 2, "down")
            self.assert_balanced(pair)

    @thorough
    def test_production_limits(self) -> None:
        """A busy link with full buffers is not taken for a dead one, and a dead one is."""
        with self.pair() as pair:
            pair.traffic.open(4, 40_000_000, 40_000_000)
            pair.traffic.wait_received(pair.traffic.size // 10)
            self.blackhole(pair, 14, 0)
            self.blackhole(pair, 20, 1)
            self.assert_balanced(pair)


class StoppedProcessTests(SilenceTestCase):
    """A daemon that does not run for a while."""

    def stop(self, pair: Pair, daemon: Daemon, seconds: float) -> None:
        """SIGSTOP and, so much later, SIGCONT."""
        daemon.signal(signal.SIGSTOP)
        time.sleep(seconds)
        daemon.signal(signal.SIGCONT)
        self.assert_goes_on(pair)

    @thorough
    def test_for_3_seconds(self) -> None:
        """The link stays."""
        with self.pair(*SMALL) as pair:
            self.begin(pair)
            for daemon in pair.daemons:
                self.stop(pair, daemon, 3)
            for daemon in pair.daemons:
                self.assertEqual(daemon.count(DOWN), 0)
            self.assert_balanced(pair)

    @thorough
    def test_for_30_seconds(self) -> None:
        """The peer gives up the link and dials, or waits; whoever stood still finds that out."""
        with self.pair(*SMALL) as pair:
            self.begin(pair)
            for number, daemon in enumerate(pair.daemons, 1):
                self.stop(pair, daemon, 30)
                pair.wait_resumed(number)
            self.assert_balanced(pair)
