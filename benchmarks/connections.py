"""Row C{connections}: how fast streams are opened and closed, and what memory an idle one takes."""

from __future__ import annotations

import selectors
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.contenders import LINKS, NO_RELAY, Plan, started, take_turns, turns
from benchmarks.generators import program
from benchmarks.latency import ask, echoing
from benchmarks.processes import BenchmarkError, end
from benchmarks.relays import Relays
from benchmarks.results import OURS, Metric, Result, Target

__all__ = ["IDLE", "METRICS", "ONE_BY_ONE", "TARGETS", "held", "measure_idle", "measure_rate", "run"]

STREAMS = 500

ONE_BY_ONE, IDLE = "one at a time", f"{STREAMS} idle streams"

METRICS = (
    Metric("rate", "per second", 1, 0),
    Metric("cpu", "CPU us each", 1e6, 0),
    Metric("p99", "p99 us", 1e6, 0),
    Metric("memory", "KiB each", 1 / 1024, 1),
)

TARGETS = (
    Target("connections", ONE_BY_ONE, LINKS, "rate", at_least=0.5, against="ssh"),
    Target("connections", ONE_BY_ONE, LINKS, "cpu", at_most=2.0, against="ssh"),
    Target("connections", IDLE, LINKS, "memory", at_most=16 * 1024, absolute=True),
)

#: Seconds for what happens after the last connection was closed, and for memory to come to rest.
_SETTLE = 0.3

#: Seconds to open all idle streams.
_PATIENCE = 60.0


@contextmanager
def held(entry: Path, count: int) -> Iterator[None]:
    """
    C{count} streams through the UNIX socket C{entry} are open, each after a byte there and back.

    @raise BenchmarkError: they cannot be opened.
    """
    command = [str(program("latency")), "hold", str(entry), "--count", str(count)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            said = process.stdout.readline() if selector.select(_PATIENCE) else b"nothing"
        if said != b"ready\n":
            end(process)
            reason = process.stderr.read().decode(errors="replace").strip() or said.decode(errors="replace")
            raise BenchmarkError(f"{count} streams through {entry}: {reason}")
        yield
    finally:
        end(process)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def measure_rate(relays: Relays, seconds: float) -> Mapping[str, float]:
    """
    Connect, get one byte back and close, one after the other, for C{seconds}.

    @return: connections per second, and the daemons' processor seconds for each.
    """
    entry, exit = relays.paths[0]
    before = sum(side.total for side in relays.usage())
    with echoing(exit):
        values = ask("dial", entry, seconds)
        time.sleep(_SETTLE)
    found = {"rate": values["count"] / values["seconds"], "p99": values["p99"]}
    if relays.daemons:
        found["cpu"] = (sum(side.total for side in relays.usage()) - before) / values["count"]
    return found


def measure_idle(relays: Relays, count: int = STREAMS) -> Mapping[str, float]:
    """@return: by how many bytes both sides together grow for each stream that is open and idle."""
    entry, exit = relays.paths[0]
    with echoing(exit):
        time.sleep(_SETTLE)
        before = relays.memory().proportional
        with held(entry, count):
            time.sleep(_SETTLE)
            growth = relays.memory().proportional - before
    # For the next to begin where this one began.
    time.sleep(_SETTLE)
    return {"memory": growth / count}


def run(plan: Plan) -> list[Result]:
    """
    Measure all contenders.

    @raise Unavailable: there is no C compiler.
    """
    program("latency")
    options = {
        "link_options": {"max-streams": 2 * STREAMS},
        "stream_options": {"max-connections": 2 * STREAMS},
    }
    cases = {ONE_BY_ONE: lambda relays: measure_rate(relays, plan.seconds), IDLE: measure_idle}
    with started(plan, 1, {OURS: options}) as found:
        order = [turn for turn in turns(found, cases) if (turn.tool, turn.case) != (NO_RELAY, IDLE)]
        return take_turns(plan, "connections", order)
