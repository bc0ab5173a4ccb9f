"""Links that are cut, at many moments and in many ways: the streams notice nothing."""

from __future__ import annotations

import statistics
from functools import partial

from tests.faults.pair import (
    MIB,
    RESUMED,
    SMALL,
    SMALL_FLOW,
    FaultTestCase,
    Pair,
    thorough,
)
from tests.faults.traffic import PATIENCE, wait_until

#: Limits between the small ones and those of production.
MEDIUM = ("memory = 32M", "window = 256K", "replay-buffer = 2M")


class CutTestCase(FaultTestCase):
    """Traffic that is not to be over before the last cut."""

    def is_cut(self, pair: Pair, cuts: int) -> bool:
        """@return: whether there were so many cuts; fails when the traffic ends before."""
        pair.traffic.check()
        enough = pair.wire.status()["cuts"] >= cuts
        self.assertTrue(enough or not pair.traffic.over, "all done before the last cut")
        return enough


class CutTests(CutTestCase):
    """Cuts while data is on its way."""

    def cut_often(
        self, pair: Pair, cuts: int, flow: int, low: int = 2_000_000, rate: int = 7_000_000
    ) -> None:
        """
        Cut each connection after C{low} to C{1.4 * low} bytes in either direction, and bring all through.

        @param flow: bytes of each flow.
        @param rate: bytes per second.  A link that lives for less than a quarter
            of a second does not count as one, and the delay before the next rises
            to 2 s: at full speed, C{rate} 0, the time to resume says nothing.
        """
        pair.wire.do("rate", rate)
        for side in ("up", "down"):
            pair.wire.do("cut_each", low, low * 14 // 10, side)
        pair.wire.do("cut")
        pair.traffic.open(4, flow, flow)
        wait_until(lambda: self.is_cut(pair, cuts), f"{cuts} cuts", 4 * PATIENCE, pair.wire_logs)
        pair.wire.do("clear")
        pair.traffic.join()
        count = pair.wire.status()["cuts"]
        self.assertGreaterEqual(count, cuts)
        pair.wait_resumed(count)
        seconds = [away for away, _ in pair.a.numbers(RESUMED)]
        self.say(
            f"{count} cuts in {pair.traffic.size // MIB} MiB,"
            f" resumed after {statistics.median(seconds):.2f} s (median), at most {max(seconds):.2f} s"
        )
        if rate:
            self.assertLessEqual(statistics.median(seconds), 2)
        self.assert_balanced(pair)

    def test_20_cuts_in_100_mib(self) -> None:
        """Cuts at random places, in four streams both ways; the share of every test run."""
        with self.pair(*MEDIUM) as pair:
            self.cut_often(pair, 20, 100 * MIB // 8)

    @thorough
    def test_200_cuts_in_1_gib(self) -> None:
        """The same with production's limits."""
        with self.pair() as pair:
            self.cut_often(pair, 200, 1024 * MIB // 8)

    @thorough
    def test_cuts_with_small_limits(self) -> None:
        """So small that every cut finds full windows and a full replay buffer."""
        with self.pair(*SMALL) as pair:
            self.cut_often(pair, 50, 128 * MIB // 8, 500_000, 0)

    def cut_while_resuming(self, times: int, last: int) -> None:
        """Cut so many connections in a row in the C{last} bytes up to about the end of RESUME or RESUMED."""
        with self.pair(*SMALL) as pair:
            shaken = pair.wire.status()
            pair.traffic.open(3, SMALL_FLOW, SMALL_FLOW)
            pair.traffic.wait_received(pair.traffic.size // 4)
            for side in ("up", "down"):
                # What HELLO and WELCOME took is about what RESUME and RESUMED take.
                size = shaken[f"{side}_received"]
                pair.wire.do("cut_each", max(1, size - last), size + 100, side)
            pair.wire.do("cut")
            wait_until(lambda: pair.wire.status()["cuts"] > times, f"{times} cuts in a row")
            pair.wire.do("clear")
            self.assert_balanced(pair)
            generation = pair.a.numbers(RESUMED)[-1][1]
            self.say(f"{generation - 1:.0f} of {times} cuts after RESUME was sent")

    def test_cut_while_resuming(self) -> None:
        """Twice in a row, anywhere from the second half of the TLS handshake on."""
        self.cut_while_resuming(2, 800)

    @thorough
    def test_cut_while_resuming_ten_times(self) -> None:
        """Ten times in a row, in the midst of RESUME, or of RESUMED, or just after it."""
        self.cut_while_resuming(10, 60)


class DamageTests(FaultTestCase):
    """Bytes that change on their way."""

    def damage(self, *kinds: str) -> None:
        """Damage a byte in each of these ways in either direction, one after the other."""
        with self.pair(*SMALL) as pair:
            pair.traffic.open(4, len(kinds) * SMALL_FLOW, len(kinds) * SMALL_FLOW)
            damages = [(kind, side) for kind in kinds for side in ("up", "down")]
            for number, (damage, side) in enumerate(damages, 1):
                pair.wire.do("damage", self.random.randrange(200_000), side, damage)
                pair.wait_resumed(number)
                self.assertFalse(pair.traffic.over, "all done before the last damage")
            status = pair.wire.status()
            self.assertEqual(status["up_damaged"] + status["down_damaged"], len(damages))
            self.assert_balanced(pair)

    def test_flipped_bits(self) -> None:
        """TLS finds one flipped bit; the link is lost, and resumed."""
        self.damage("flip")

    @thorough
    def test_bytes_too_many_and_too_few(self) -> None:
        """The same with a byte that was inserted, or lost."""
        self.damage("insert", "remove", "flip")


class LateBytesTests(CutTestCase):
    """What an old link had on its way arrives when nobody expects it any more."""

    def late(self, side: str, *, before: bool) -> None:
        """
        @param side: where the late bytes go.
        @param before: whether they arrive before the session is resumed, or after.
        """
        with self.pair(*SMALL, "silence = 2") as pair:
            pair.traffic.open(4, SMALL_FLOW, SMALL_FLOW)
            for number in range(1, 4):
                pair.traffic.wait_received(pair.traffic.size * number // 5)
                if before:
                    pair.wire.do("refuse")
                pair.wire.do("hold", 100_000, 0.5, side)
                wait_until(partial(self.is_cut, pair, number), "an old link")
                if before:
                    self.assertGreater(pair.wire.do("release"), 0)
                    pair.wire.do("refuse", 0)
                pair.wait_resumed(number)
                if not before:
                    pair.wire.do("release")
            self.assert_balanced(pair)

    @thorough
    def test_late_bytes_of_the_dialler(self) -> None:
        """They arrive on the old link after the new one is up."""
        self.late("up", before=False)

    @thorough
    def test_late_bytes_of_the_acceptor(self) -> None:
        """The dialling side finds out by silence that its link is dead."""
        self.late("down", before=False)

    @thorough
    def test_late_bytes_before_resuming(self) -> None:
        """The acceptor takes bytes on the old link until it is asked to resume."""
        self.late("up", before=True)

    @thorough
    def test_late_bytes_of_the_acceptor_before_resuming(self) -> None:
        """The dialling side takes bytes of a link that its peer has lost."""
        self.late("down", before=True)
