"""
Measures relaymux beside what people use instead, side by side on this machine.

All contenders run at the same time and take turns, round after round, so that
a machine which gets slower or faster does so for each of them.  What counts is
the median of the ratios within each round; single numbers hold for one machine at one moment.
See docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks import bulk, connections, latency, nbd, pipes, stall
from benchmarks.contenders import CONTENDERS, DEFAULT_TOOLS, LINKS, Plan
from benchmarks.processes import BenchmarkError, Unavailable
from benchmarks.results import Metric, Result, Target, judge
from benchmarks.table import results_table, verdicts_table
from relaymux.net.compiled import describe_compiled
from relaymux.net.families import CONGESTION_NAME

__all__ = ["ROWS", "Row", "main"]


@dataclass(frozen=True)
class Row:
    """
    One thing that is measured.

    @ivar run: does it; may raise L{Unavailable}.
    @ivar seconds: how long each of its runs sends, if nothing else is asked for;
        0 where that is not a matter of time.
    @ivar rounds: how often each has its turn, likewise.
    @ivar quick_seconds: the same with C{--quick}.
    """

    title: str
    run: Callable[[Plan], list[Result]]
    metrics: Sequence[Metric]
    targets: Sequence[Target]
    seconds: float
    rounds: int
    quick_seconds: float = 0.5


ROWS: Mapping[str, Row] = {
    "bulk": Row("1. Bulk", bulk.run, bulk.METRICS, bulk.TARGETS, 1.5, 5, 0.5),
    "latency": Row("2. Latency", latency.run, latency.METRICS, latency.TARGETS, 1.5, 5, 0.3),
    "stall": Row("3. A reader that stalls", stall.run, stall.METRICS, stall.TARGETS, 3.0, 5),
    "pipes": Row("4. Long pipes", pipes.run, pipes.METRICS, pipes.TARGETS, 6.0, 4),
    "connections": Row("5. Connections", connections.run, connections.METRICS, connections.TARGETS, 2.0, 3),
    "nbd": Row("6. NBD", nbd.run, nbd.METRICS, (), 0.0, 3),
}

_QUICK = {
    "rows": ("bulk", "latency"),
    "tools": ("socat", "haproxy", "ssh", "relaymux"),
    "links": ("tcp", "tls"),
}


def measure(
    rows: Sequence[str], plan: Plan, seconds: Mapping[str, float], rounds: Mapping[str, int]
) -> list[Result]:
    """
    Measure one row after the other.

    @param seconds: for each run of each row.
    @param rounds: of each row.
    """
    results = []
    for name in rows:
        plan.seconds, plan.rounds = seconds[name], rounds[name]
        try:
            results += ROWS[name].run(plan)
        except Unavailable as missing:
            plan.note(f"{name}: not measured, since this machine has no {missing}")
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument(
        "--row", choices=list(ROWS), action="append", help="only this one; may be given again"
    )
    parser.add_argument("--tool", choices=list(CONTENDERS), action="append", help="only this one, likewise")
    parser.add_argument("--link", choices=LINKS, action="append", help="only this one, likewise")
    parser.add_argument("--rounds", type=int, help="how often each has its turn (default: 3 to 5)")
    parser.add_argument("--seconds", type=float, help="how long each run sends (default: as each row needs)")
    parser.add_argument(
        "--quick", action="store_true", help="the rows and tools for everyday, below two minutes"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all runs and ratios here")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    return parser


def _raise_interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _congestion_control() -> str:
    """@return: that of a new TCP connection; what plain links cost depends on it (docs/performance.md)."""
    with socket.socket() as sock:
        name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CONGESTION_NAME)
    return name.rstrip(b"\0").decode("ascii", "replace")


def main(arguments: Sequence[str] | None = None) -> int:
    """@return: exit status; 1 if a run failed, or with C{--check} if a target was missed."""
    given = _parser().parse_args(arguments)
    rows = given.row or (_QUICK["rows"] if given.quick else list(ROWS))
    tools = given.tool or (_QUICK["tools"] if given.quick else DEFAULT_TOOLS)
    links = given.link or (_QUICK["links"] if given.quick else LINKS)
    rounds = {name: given.rounds or (3 if given.quick else row.rounds) for name, row in ROWS.items()}
    usual = {name: row.quick_seconds if given.quick else row.seconds for name, row in ROWS.items()}
    seconds = {name: given.seconds or usual[name] for name in rows}
    # Ended from outside, it ends what it started as after Ctrl-C.
    signal.signal(signal.SIGTERM, _raise_interrupt)
    # Two descriptors for each stream are more than the usual soft limit.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    console = Console()
    load, began = os.getloadavg()[0], time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="rmx-") as directory,
        Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        ) as progress,
    ):
        # For an sshd that is not root's.
        Path(directory).chmod(0o711)
        task = progress.add_task("starting", total=None)
        plan = Plan(
            Path(directory),
            [tool for tool in CONTENDERS if tool in tools],
            [link for link in LINKS if link in links],
            0,
            0.0,
            lambda text: progress.update(task, description=text),
        )
        try:
            results = measure(rows, plan, seconds, rounds)
        except BenchmarkError as error:
            progress.stop()
            print(f"benchmark failed: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            progress.stop()
            print("interrupted; all that was started has ended", file=sys.stderr)
            return 130
    verdicts = judge(results, [target for name in rows for target in ROWS[name].targets])
    machine = {
        "processors": os.cpu_count(),
        "load": load,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "compiled": describe_compiled(),
        "congestion": _congestion_control(),
    }
    for name in rows:
        own = [result for result in results if result.row == name]
        if own:
            console.print(results_table(ROWS[name].title, own, ROWS[name].metrics))
    if verdicts:
        console.print(verdicts_table(verdicts))
    for note in plan.notes:
        console.print(note, markup=False)
    console.print(
        f"{machine['processors']} processors, load average {load:.1f} before the start, {machine['system']}, "
        f"{time.monotonic() - began:.0f} s in all; medians (lowest-highest) of the rounds; "
        f"congestion control {machine['congestion']}; of relaymux compiled: {machine['compiled']}"
    )
    if given.json:
        result = {
            "machine": machine,
            "results": [asdict(result) for result in results],
            "verdicts": [
                asdict(verdict) | {"ratio": verdict.ratio, "met": verdict.met} for verdict in verdicts
            ],
            "notes": plan.notes,
        }
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    missed = sum(not verdict.met for verdict in verdicts)
    if given.check and missed:
        print(f"{missed} of {len(verdicts)} targets missed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
