"""What the benchmarks make of their numbers, and where the numbers come from."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from rich.console import Console
from twisted.trial.unittest import SynchronousTestCase

from benchmarks import accounting
from benchmarks.accounting import Memory, Usage, memory, tree, usage
from benchmarks.contenders import (
    CONTENDERS,
    WARM_UP_BYTES,
    Contender,
    Plan,
    started,
    take_turns,
    take_turns_anew,
    turns,
)
from benchmarks.processes import BenchmarkError, Unavailable, running
from benchmarks.relays import PROOF_BYTES, Relays, direct
from benchmarks.results import OURS, Metric, Result, Target, judge
from benchmarks.streams import Report, combine
from benchmarks.table import results_table, verdicts_table

#: Uses processor time in a grandchild, which ends as its parent does, and then in a child that lives on.
FAMILY = """
import os, sys, time
def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
child = os.fork()
if not child:
    if not os.fork():
        burn(0.3)
        os._exit(0)
    os.wait()
    os._exit(0)
os.wait()
if not os.fork():
    burn(0.3)
    open(sys.argv[1], "w").close()
    time.sleep(60)
os.wait()
"""


def results(
    values: dict[tuple[str, str], list[float]], link: str = "tls", metric: str = "cpu"
) -> list[Result]:
    """@param values: by case and tool, one for each round."""
    return [
        Result("bulk", case, link, tool, number, {metric: value})
        for (case, tool), rounds in values.items()
        for number, value in enumerate(rounds)
    ]


class RatioTests(SynchronousTestCase):
    """L{judge}: the numbers that count."""

    def test_rounds_are_compared_pairwise(self) -> None:
        """A machine that becomes slower by eight times between two rounds changes nothing."""
        found = results({("one", "ssh"): [1.0, 2.0, 8.0], ("one", OURS): [0.5, 1.0, 4.0]})
        (verdict,) = judge(found, [Target("bulk", "one", ("tls",), "cpu", at_most=0.8)])
        self.assertEqual(verdict.ratios, (0.5, 0.5, 0.5))
        self.assertTrue(verdict.met)

    def test_the_best_of_all_rounds(self) -> None:
        """It is the peer beside which relaymux looks worst: one for all rounds, not the best of each."""
        found = results(
            {
                ("one", "ssh"): [1.0, 1.0, 9.0],
                ("one", "haproxy"): [2.0, 2.0, 2.0],
                ("one", OURS): [0.5, 0.5, 0.5],
            }
        )
        (cheapest,) = judge(found, [Target("bulk", "one", ("tls",), "cpu", at_most=0.5)])
        self.assertEqual((cheapest.rival, cheapest.ratios), ("ssh", (0.5, 0.5, 0.5 / 9)))
        self.assertTrue(cheapest.met)
        (fastest,) = judge(found, [Target("bulk", "one", ("tls",), "cpu", at_least=0.4)])
        self.assertEqual((fastest.rival, fastest.ratios), ("haproxy", (0.25, 0.25, 0.25)))
        self.assertFalse(fastest.met)

    def test_the_median_decides(self) -> None:
        """One round that went wrong does not."""
        found = results({("one", "ssh"): [1.0] * 3, ("one", OURS): [0.7, 9.0, 0.8]})
        (verdict,) = judge(found, [Target("bulk", "one", ("tls",), "cpu", at_most=0.8)])
        self.assertEqual(verdict.ratio, 0.8)
        self.assertTrue(verdict.met)

    def test_only_peers_are_rivals(self) -> None:
        """Neither no relay at all nor Twisted is a peer; nor is a tool over another kind of link."""
        found = results({("one", "no relay"): [0.1], ("one", "twisted-mux"): [0.1], ("one", OURS): [1.0]})
        found += results({("one", "haproxy"): [0.1]}, link="tcp")
        self.assertEqual(judge(found, [Target("bulk", "one", ("tls", "tcp"), "cpu", at_most=0.8)]), [])

    def test_a_round_without_a_rival_does_not_count(self) -> None:
        """A peer whose run failed is not missed."""
        found = results({("one", "ssh"): [1.0], ("one", OURS): [0.5, 7.0]})
        (verdict,) = judge(found, [Target("bulk", "one", ("tls",), "cpu", at_most=0.8)])
        self.assertEqual(verdict.ratios, (0.5,))

    def test_against_one_tool(self) -> None:
        """A named tool without such a link is compared all the same; one that has it only over that link."""
        found = results({("one", OURS): [1.0]}, link="tcp") + results({("one", "ssh"): [4.0]})
        target = Target("bulk", "one", ("tcp", "tls"), "cpu", at_most=0.5, against="ssh")
        self.assertEqual([verdict.ratios for verdict in judge(found, [target])], [(0.25,)])
        found += results({("one", "ssh"): [2.0]}, link="tcp")
        self.assertEqual([verdict.ratios for verdict in judge(found, [target])], [(0.5,)])

    def test_against_itself(self) -> None:
        """One case can be the yardstick of another, over the same link."""
        found = results({("alone", OURS): [10.0], ("beside", OURS): [9.0]})
        found += results({("alone", OURS): [1.0]}, link="tcp")
        target = Target("bulk", "beside", ("tls",), "cpu", at_least=0.95, against=OURS, yardstick="alone")
        (verdict,) = judge(found, [target])
        self.assertEqual(verdict.ratio, 0.9)
        self.assertFalse(verdict.met)

    def test_absolute(self) -> None:
        """A target can be for the value itself."""
        found = results({("one", OURS): [3.0, 5.0, 4.0]})
        (verdict,) = judge(found, [Target("bulk", "one", ("tls",), "cpu", at_most=4.0, absolute=True)])
        self.assertEqual(verdict.ratio, 4.0)
        self.assertTrue(verdict.met)

    def test_streams_side_by_side(self) -> None:
        """Several streams' rate is all their bytes over the time from the first byte to the last end."""
        whole = combine(
            [Report(60, 10.0, 12.0, 30.0), Report(40, 11.0, 15.0, 10.0), Report(0, 0.0, 0.0, 0.0)]
        )
        self.assertEqual((whole.total_bytes, whole.seconds, whole.rate, whole.steady), (100, 5.0, 20.0, 40.0))
        self.assertRaises(BenchmarkError, combine, [Report(0, 1.0, 1.0, 0.0)])


class TableTests(SynchronousTestCase):
    """L{benchmarks.table}."""

    def shown(self, table: object) -> str:
        out = io.StringIO()
        Console(file=out, width=200).print(table)
        return out.getvalue()

    def test_results(self) -> None:
        """A line for each case, link and tool, with the median and the range, in the unit of the column."""
        found = results({("one", "ssh"): [0.001, 0.004, 0.002], ("one", OURS): [0.5]})
        lines = self.shown(
            results_table("Title", found, [Metric("cpu", "ms", 1e3, 1), Metric("x", "nobody")])
        )
        self.assertRegex(lines, r"one +tls +ssh +2\.0 \(1\.0-4\.0\)")
        self.assertRegex(lines, r"one +tls +relaymux +500\.0")
        self.assertNotIn("nobody", lines)

    def test_verdicts(self) -> None:
        """Each target with its ratio, what it was compared with, and what was wanted."""
        found = results({("one", "ssh"): [1.0], ("one", OURS): [0.9]})
        target = Target("bulk", "one", ("tls",), "cpu", at_most=0.8)
        self.assertRegex(
            self.shown(verdicts_table(judge(found, [target]))), r"ssh +0\.90.*at most 0\.8 +missed"
        )


class AccountingTests(SynchronousTestCase):
    """L{benchmarks.accounting}."""

    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory(prefix="rmx-")
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)

    def wait_for(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not done():
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.01)

    def has_ended(self, pid: int) -> bool:
        """Whoever inherits an orphan may let it be a zombie for as long as it likes."""
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"

    def test_children_count(self) -> None:
        """Children that ended, theirs too, and children that live: all of it once."""
        done = self.directory / "done"
        with running("family", [sys.executable, "-c", FAMILY, str(done)], self.directory) as family:
            self.wait_for(done.exists)
            members = tree(family.process.pid)
            self.assertEqual(len(members), 2)
            found = family.usage()
            self.assertGreater(family.memory().resident, family.memory().anonymous)
        self.assertGreaterEqual(found.total, 0.58)
        self.assertLess(found.total, 0.58 + 0.3)
        self.wait_for(lambda: all(self.has_ended(member.pid) for member in members))

    def test_gone(self) -> None:
        """Of a process that is gone there is no reading, rather than one of zero."""
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait()
        self.assertEqual(tree(process.pid), [])
        self.assertRaises(ProcessLookupError, usage, process.pid)
        self.assertRaises(ProcessLookupError, memory, process.pid)

    def test_read_again_if_a_child_ended_meanwhile(self) -> None:
        """A child that ends between two readings is not counted twice."""
        own = accounting.ProcessId(1, 1), accounting.ProcessId(2, 1)
        looks = [list(own), [own[0]], [own[0]], [own[0]]]
        readings = {1: [Usage(1.0), Usage(3.0)], 2: [Usage(2.0)]}
        with (
            patch.object(accounting, "tree", side_effect=looks),
            patch.object(accounting, "_usage_of", side_effect=lambda pid: readings[pid].pop(0)),
        ):
            self.assertEqual(usage(1), Usage(3.0))

    def test_this_process(self) -> None:
        """What is read agrees with what the process knows of itself."""
        times = os.times()
        found = usage(os.getpid())
        self.assertLess(abs(found.user - times.user - times.children_user), 0.5)
        self.assertGreater(memory(os.getpid()).proportional, 0)
        self.assertEqual(Memory(1, 2, 3) + Memory(1, 1, 1), Memory(2, 3, 4))

    def test_a_daemon_that_ends(self) -> None:
        """Shows what it said last."""
        command = [sys.executable, "-c", "import sys; sys.exit('no such file')"]
        with running("daemon", command, self.directory) as daemon:
            daemon.process.wait()
            self.assertIn("no such file", str(self.assertRaises(BenchmarkError, daemon.usage)))


class PlanTests(SynchronousTestCase):
    """Contenders take turns, and what others cannot do stops nobody."""

    def plan(self, *tools: str) -> Plan:
        directory = tempfile.TemporaryDirectory(prefix="rmx-")
        self.addCleanup(directory.cleanup)
        return Plan(Path(directory.name), tools, ["tcp"], rounds=2, seconds=0.1)

    def contenders(self, **start: object) -> None:
        added = {name: Contender(("tcp",), call) for name, call in start.items()}  # type: ignore[arg-type]
        patcher = patch.dict(CONTENDERS, added)
        patcher.start()
        self.addCleanup(patcher.stop)

    def test_turns(self) -> None:
        """In each round one after the other."""
        taken: list[str] = []
        found = {("tcp", name): Relays(((Path(name), Path(name)),)) for name in "ab"}

        def measure(relays: Relays) -> dict[str, float]:
            taken.append(relays.paths[0][0].name)
            return {"cpu": len(taken)}

        found_out = take_turns(self.plan("a", "b"), "bulk", turns(found, {"one": measure}))
        self.assertEqual(taken, ["a", "b", "a", "b"])
        self.assertEqual(
            [(r.tool, r.round, r.values["cpu"]) for r in found_out],
            [*zip("abab", (0, 0, 1, 1), (1, 2, 3, 4), strict=True)],
        )

    def test_new_processes(self) -> None:
        """Each round starts its own, and ends them before the next one; the first proves most."""
        told: list[object] = []

        class Proven(Relays):
            def prove(self, proof_bytes: int = PROOF_BYTES) -> None:
                told.append(proof_bytes)

        @contextmanager
        def start(directory: Path, link: str, streams: int) -> Iterator[Relays]:
            told.append(f"{streams} streams")
            yield Proven(())
            told.append("end")

        def measure(relays: Relays) -> dict[str, float]:
            told.append("measure")
            return {"cpu": 1.0}

        self.contenders(fresh=start)
        found_out = take_turns_anew(self.plan("fresh"), "bulk", 4, {"one": measure})
        rounds = [["4 streams", proven, "measure", "end"] for proven in (PROOF_BYTES, WARM_UP_BYTES)]
        self.assertEqual(told, [*rounds[0], *rounds[1]])
        self.assertLess(WARM_UP_BYTES, PROOF_BYTES)
        self.assertEqual(
            [(r.case, r.tool, r.round) for r in found_out], [("one", "fresh", 0), ("one", "fresh", 1)]
        )

    def test_what_is_missing_is_told(self) -> None:
        """A program that is not installed, or does not start, is named at the end of the table."""

        def absent(directory: Path, link: str, streams: int) -> None:
            raise Unavailable("frobnicate (Debian: frob)")

        def broken(directory: Path, link: str, streams: int) -> None:
            raise BenchmarkError("ended with status 1")

        self.contenders(absent=absent, broken=broken, fine=direct)
        plan = self.plan("absent", "broken", "fine")
        with started(plan, 1) as found:
            self.assertEqual(list(found), [("tcp", "fine")])
        self.assertEqual(len(plan.notes), 2)
        self.assertIn("Debian: frob", plan.notes[0])
        self.assertIn("ended with status 1", plan.notes[1])
        self.assertEqual(list(plan.directory.iterdir()), [])

    def test_failures(self) -> None:
        """A peer's failed run is a note; relaymux's ends the benchmark."""

        def measure(relays: Relays) -> dict[str, float]:
            raise BenchmarkError("bytes were lost")

        plan = self.plan()
        ssh, ours = (turns({("tcp", tool): Relays(())}, {"one": measure}) for tool in ("ssh", OURS))
        self.assertEqual(take_turns(plan, "bulk", ssh), [])
        self.assertIn("bytes were lost", plan.notes[0])
        self.assertRaises(BenchmarkError, take_turns, plan, "bulk", ours)
