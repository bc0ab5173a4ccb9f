"""
What a byte costs: one bulk stream through relaymux, and through plain Twisted.

All relays run side by side and take turns, round after round, so that a
machine which gets slower or faster does so for each of them.  What counts is
the ratio within a round; single numbers hold for one machine at one moment.
See docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.processes import BenchmarkError, Stream
from benchmarks.relays import Relays, direct, plain_twisted, relaymux

__all__ = ["TARGETS", "Run", "cpu_ratio", "main", "measure"]

#: The most that relaymux's CPU time per byte may be, as a part of what the
#: cheaper of the two plain Twisted relays needs.  TCP: 0.75 CPU s/GB where
#: that needs 1.2.
TARGETS = {"tcp": 0.75 / 1.2, "tls": 0.6}

NOTHING, FORWARDING, MULTIPLEXING = "no relay", "Twisted forwards", "Twisted muxes"
OURS = "relaymux"

RELAYS: dict[str, Callable[[Path, str], AbstractContextManager[Relays]]] = {
    FORWARDING: partial(plain_twisted, forward=True),
    MULTIPLEXING: plain_twisted,
    OURS: relaymux,
}

GIGABYTE = 1e9

#: Seconds after the end of a stream for the last acknowledgements, so that their cost is counted.
SETTLE = 0.1


@dataclass(frozen=True)
class Run:
    """
    One measurement.

    @ivar rate: GB/s, from the first byte at the sink to the last.
    @ivar cpu: user and system seconds per GB, of both relay daemons together.
    """

    transport: str
    relay: str
    rate: float
    cpu: float


def measure(transport: str, relay: str, relays: Relays, seconds: float) -> Run:
    """
    Send through C{relays} for C{seconds}.

    @raise BenchmarkError: something was lost, or it does not end.
    """
    entry, exit = relays.paths[0]
    before = relays.cpu_seconds()
    with Stream(entry, exit) as stream:
        stream.start(["--seconds", seconds])
        report = stream.finish(seconds + 60)
    time.sleep(SETTLE)
    gigabytes = report.total_bytes / GIGABYTE
    return Run(transport, relay, gigabytes / report.seconds, (relays.cpu_seconds() - before) / gigabytes)


@contextmanager
def started(transports: Sequence[str], directory: Path) -> Iterator[dict[tuple[str, str], Relays]]:
    """Run all relays: by transport and name, in the order in which they take turns."""
    with ExitStack() as stack:
        found = {("-", NOTHING): direct(directory)}
        for transport in transports:
            for name, start in RELAYS.items():
                place = directory / f"{transport}-{len(found)}"
                place.mkdir()
                found[transport, name] = stack.enter_context(start(place, transport))
        yield found


def measure_all(transports: Sequence[str], rounds: int, seconds: float, console: Console) -> list[Run]:
    """
    Prove that each relay carries content unharmed, then measure.

    @raise BenchmarkError: one of them does not.
    """
    with (
        tempfile.TemporaryDirectory(prefix="rmx-") as directory,
        started(transports, Path(directory)) as found,
        Progress(console=console, transient=True) as progress,
    ):
        task = progress.add_task("content", total=len(found) * (rounds + 1))
        for relays in found.values():
            relays.prove()
            progress.advance(task)
        runs = []
        for number in range(rounds):
            progress.update(task, description=f"round {number + 1}")
            for (transport, name), relays in found.items():
                runs.append(measure(transport, name, relays, seconds))
                progress.advance(task)
        return runs


def cpu_ratio(runs: Sequence[Run], transport: str, yardstick: str) -> float:
    """@return: relaymux's CPU time per byte over the yardstick's; the median of the rounds' ratios."""
    ours, theirs = (
        [run.cpu for run in runs if (run.transport, run.relay) == (transport, relay)]
        for relay in (OURS, yardstick)
    )
    return median(our / their for our, their in zip(ours, theirs, strict=True))


def table(runs: Sequence[Run], load: float) -> Table:
    """
    @param load: the machine's load average before the first run.
    @return: medians, ranges and ratios, for the terminal.
    """
    shown = Table(
        title="One bulk stream, UNIX socket to UNIX socket: median (range) of the rounds",
        caption=f"{os.cpu_count()} processors, load average {load:.1f} before the start",
        box=SIMPLE_HEAD,
    )
    shown.add_column("link")
    shown.add_column("relay")
    for column in ("GB/s", "CPU s/GB", "ratio", "allowed"):
        shown.add_column(column, justify="right")
    for transport, relay in dict.fromkeys((run.transport, run.relay) for run in runs):
        same = [run for run in runs if (run.transport, run.relay) == (transport, relay)]
        cells = [transport, relay, _spread([run.rate for run in same])]
        if relay != NOTHING:
            cells.append(_spread([run.cpu for run in same]))
        if relay in (FORWARDING, MULTIPLEXING):
            cells.append(f"{cpu_ratio(runs, transport, relay):.2f}")
        if relay == FORWARDING:
            cells.append(f"{TARGETS[transport]:.3f}")
        shown.add_row(*cells, end_section=relay in (NOTHING, OURS))
    return shown


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """@return: exit status; 1 if a run failed, or with C{--check} if a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("--transport", choices=sorted(TARGETS), action="append", help="only this one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each run sends (default: 3)")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 1.5 s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all runs and ratios here")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    given = parser.parse_args(arguments)
    rounds, seconds = (3, 1.5) if given.quick else (given.rounds, given.seconds)
    transports = given.transport or list(TARGETS)
    console = Console()
    load = os.getloadavg()[0]
    try:
        runs = measure_all(transports, rounds, seconds, console)
    except BenchmarkError as e:
        print(f"benchmark failed: {e}", file=sys.stderr)
        return 1
    console.print(table(runs, load))
    ratios = {
        name: {other: cpu_ratio(runs, name, other) for other in (FORWARDING, MULTIPLEXING)}
        for name in transports
    }
    if given.json:
        result = {
            "load": load,
            "runs": [asdict(run) for run in runs],
            "cpu_ratios": ratios,
            "targets": TARGETS,
        }
        given.json.write_text(json.dumps(result, indent=2) + "\n")
    missed = [name for name in transports if ratios[name][FORWARDING] > TARGETS[name]]
    if given.check and missed:
        print(f"above the target: {', '.join(missed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
