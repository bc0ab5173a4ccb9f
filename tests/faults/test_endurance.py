"""What must not grow, and clocks that cannot be relied on."""

from __future__ import annotations

import glob
import time

from tests.faults.pair import BEGUN, DOWN, MIB, SMALL, SMALL_FLOW, FaultTestCase, Pair, thorough
from tests.faults.traffic import PATIENCE, wait_until

#: Seconds for which a link is left alone before it is cut: little more than what makes it
#: count (C{net.dialer.SETTLED_SECONDS}); else the delays before the next ones would rise.
#: With the 0.2 s before the first attempt to dial, 1200 resumes take somewhat under ten minutes.
SETTLED = 0.26

#: Resumes after which a daemon has the memory that it keeps: 8 MiB more than before
#: the first one, most of it from the first 100.
WARM_UP = 200

#: Bytes that garbage, which Python collects when it likes, may take.  The least leak,
#: of a connection's TLS state, would be ten times as much.
MARGIN = 4 * MIB


class ResumeTests(FaultTestCase):
    """The same again and again."""

    def resume(self, pair: Pair, times: int) -> None:
        """Cut so often, with a few bytes both ways in between."""
        near, far = pair.traffic.connect(), pair.traffic.accept()
        for number in range(times):
            time.sleep(SETTLED)
            cuts = pair.wire.status()["cuts"]
            pair.wire.do("cut")
            self.assertEqual(pair.wire.status()["cuts"], cuts + 1)
            message = number.to_bytes(8, "big")
            for source, target in ((near, far), (far, near)):
                source.send(message)
                self.assertEqual(target.recv(8), message)
        near.close()
        far.close()

    def resident_when_idle(self, pair: Pair) -> list[tuple[int, int]]:
        """@return: of both daemons, resident bytes and descriptors."""
        wait_until(
            lambda: all(
                daemon.count(BEGUN) == daemon.count(r"connection \d+ closed") for daemon in pair.daemons
            ),
            "nothing is open",
            PATIENCE,
            pair.logs,
        )
        time.sleep(1)
        return [(daemon.resident, daemon.descriptors) for daemon in pair.daemons]

    @thorough
    def test_1000_resumes(self) -> None:
        """Neither memory nor descriptors grow, from idle to idle."""
        with self.pair(*SMALL) as pair:
            # What is made once, as buffers are, is made before.
            pair.traffic.open(2, SMALL_FLOW, SMALL_FLOW)
            pair.traffic.assert_complete()
            pair.traffic.hang_up()
            self.resume(pair, WARM_UP)
            before = self.resident_when_idle(pair)
            self.resume(pair, 1000)
            after = self.resident_when_idle(pair)
            self.say(
                ", ".join(
                    f"{daemon.name} {was / MIB:.1f} MiB before, {now / MIB:.1f} after"
                    for daemon, (was, _), (now, _) in zip(pair.daemons, before, after, strict=True)
                )
            )
            for (memory, descriptors), (memory_after, descriptors_after) in zip(before, after, strict=True):
                self.assertLess(memory_after - memory, MARGIN)
                self.assertEqual(descriptors_after, descriptors)
            self.assert_balanced(pair)


def faketime() -> str:
    """@return: the library that makes a process see another clock; empty if it is not installed."""
    places = ("/usr/lib/*/faketime", "/usr/lib*/faketime", "/usr/local/lib/faketime")
    found = [file for place in places for file in glob.glob(f"{place}/libfaketime.so.1")]
    return found[0] if found else ""


class ClockTests(FaultTestCase):
    """The wall clock is set while bytes are on their way."""

    if not faketime():
        skip = "no libfaketime here; Debian's package faketime has it"

    def jump(self, pair: Pair, to: str) -> None:
        """Set the daemons' clocks, and see that the link notices nothing."""
        (pair.directory / "clock").write_text(to + "\n")
        before = pair.traffic.received
        time.sleep(2)
        self.assertLess(pair.traffic.received, pair.traffic.size, "all done before the jump")
        self.assertGreater(pair.traffic.received, before)
        for daemon in pair.daemons:
            self.assertEqual(daemon.count(DOWN), 0)

    @thorough
    def test_a_day_either_way(self) -> None:
        """No link is lost, and later one that is cut is resumed as usual."""
        with self.pair(*SMALL, fake_clock=faketime()) as pair:
            pair.wire.do("rate", 2_000_000)
            pair.traffic.open(4, SMALL_FLOW, SMALL_FLOW)
            for to in ("+1d", "-1d", "+0d"):
                self.jump(pair, to)
            pair.wire.do("clear")
            pair.wire.do("cut")
            pair.wait_resumed()
            self.assert_balanced(pair)

    @thorough
    def test_jump_in_an_outage(self) -> None:
        """The time for which streams wait for a link is not that of the wall clock, either."""
        with self.pair(*SMALL, "resume-window = 20", fake_clock=faketime()) as pair:
            pair.traffic.open(4, SMALL_FLOW, SMALL_FLOW)
            pair.wire.do("refuse")
            pair.wire.do("cut")
            for daemon in pair.daemons:
                daemon.wait_for(DOWN)
            (pair.directory / "clock").write_text("+1d\n")
            time.sleep(1)
            pair.wire.do("refuse", 0)
            pair.wait_resumed()
            for daemon in pair.daemons:
                days = {line[:10] for line in daemon.output().splitlines() if " link " in line}
                self.assertGreater(len(days), 1, "the clock was not set")
            self.assert_balanced(pair)
