"""What must not grow, and clocks that cannot be relied on."""

from __future__ import annotations

import glob
import time

from tests.faults.pair import DOWN, MIB, SMALL, SMALL_FLOW, FaultTestCase, Pair, thorough
from tests.faults.traffic import PATIENCE, wait_until

#: Seconds for which a link is left alone before it is cut: a shorter-lived one does not
#: count, and the delays before the next ones rise.
SETTLED = 0.3


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
                daemon.count(r"connection \d+ open") == daemon.count(r"connection \d+ closed")
                for daemon in pair.daemons
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
            self.resume(pair, 50)
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
                self.assertLess(memory_after - memory, 3 * MIB)
                self.assertEqual(descriptors_after, descriptors)
            self.assert_balanced(pair)


def faketime() -> str:
    """@return: the library that makes a process see another clock; empty if it is not installed."""
    found = sorted(glob.glob("/usr/lib*/**/libfaketime.so.1", recursive=True))
    return found[0] if found else ""


class ClockTests(FaultTestCase):
    """The wall clock is set while bytes are on their way."""

    if not faketime():
        skip = "no libfaketime here; Debian's package faketime has it"

    def jump(self, pair: Pair, to: str) -> None:
        """Set the daemons' clocks, and see that the link notices nothing."""
        before = pair.traffic.received
        (pair.directory / "clock").write_text(to + "\n")
        pair.traffic.wait_received(before + pair.traffic.size // 8)
        time.sleep(2)
        self.assertLess(pair.traffic.received, pair.traffic.size, "all done before the jump")
        for daemon in pair.daemons:
            self.assertEqual(daemon.count(DOWN), 0)

    def days_in_log(self, pair: Pair) -> set[str]:
        """@return: the dates that the daemons logged something at."""
        return {line[:10] for daemon in pair.daemons for line in daemon.output().splitlines()}

    def test_a_day_either_way(self) -> None:
        """No link is lost, and after all of it a cut one is resumed as usual."""
        with self.pair(*SMALL, environment=FAKE_CLOCK, clock=True) as pair:
            pair.wire.do("rate", 4_000_000)
            pair.traffic.open(4, SMALL_FLOW, SMALL_FLOW)
            self.jump(pair, "+1d")
            self.jump(pair, "-1d")
            pair.wire.do("rate", 0)
            self.jump_back_and_cut(pair)
