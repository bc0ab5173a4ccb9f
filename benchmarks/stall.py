"""Row C{stall}: what a reader that does not read costs the other streams, and in memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

from benchmarks.contenders import LINKS, Plan, Turn, started, take_turns
from benchmarks.processes import BenchmarkError
from benchmarks.relays import Relays
from benchmarks.results import OURS, Metric, Result, Target
from benchmarks.streams import Stream, combine
from relaymux.core.budget import link_beginning, stream_beginning

__all__ = ["ALLOWANCE", "ALONE", "BESIDE", "BOUND", "METRICS", "MIB", "OPTIONS", "TARGETS", "measure", "run"]

MIB = 1024 * 1024

#: Configured for this row: bytes of each stream, and of the link.
WINDOW, REPLAY = 4 * MIB, 32 * MIB

#: Bytes beside windows and replay buffer, for both daemons together: receive
#: buffers, what TLS holds, objects, and what malloc has not given back.
ALLOWANCE = 64 * MIB

STREAMS = 4

#: The budget of each daemon: what these take at the least, with what they are charged
#: beside (decision 0015), so that neither grows.
MEMORY = STREAMS * stream_beginning(WINDOW) + link_beginning(REPLAY)

#: How relaymux is configured.
OPTIONS: Mapping[str, Mapping[str, object]] = {
    "link_options": {"window": f"{WINDOW // MIB}M", "replay-buffer": f"{REPLAY // MIB}M"},
    "relay_options": {"memory": f"{MEMORY // 1024}K"},
}

#: Bytes by which both of relaymux's daemons may grow.
BOUND = STREAMS * WINDOW + REPLAY + ALLOWANCE

ALONE, BESIDE = "three alone", "three beside a stalled one"

METRICS = (
    Metric("rate", "GB/s", 1e-9),
    Metric("growth", "grown MiB", 1 / MIB, 1),
)

TARGETS = (
    Target("stall", BESIDE, LINKS, "rate", at_least=0.95, against=OURS, yardstick=ALONE),
    Target("stall", BESIDE, LINKS, "growth_of_bound", at_most=1.0, absolute=True),
)

#: Seconds between two looks at the daemons' memory.
_INTERVAL = 0.1

#: Bytes that the stalling reader takes first, so that the stream has grown
#: whatever grows with use.
_BEFORE = 64 * MIB

#: Seconds that the stalled stream has before the others start, and after they end.
_LEAD, _TAIL = 1.0, 0.5


def measure(relays: Relays, seconds: float, stalled: bool) -> Mapping[str, float]:
    """
    Send over all streams but the first for C{seconds}; if C{stalled}, the first
    is full meanwhile and its reader does not read, and then reads on to the end.

    @return: bytes per second of the others together; by how many bytes the
        daemons grew at most since they started, and what part that is of
        what relaymux's may.
    @raise BenchmarkError: bytes were lost, or a stream does not end.
    """
    highest = relays.idle
    with ExitStack() as stack:
        streams = [stack.enter_context(Stream(*path)) for path in relays.paths]
        if stalled:
            stall = seconds + _LEAD + _TAIL
            options = ["--verify", "--stall-after", _BEFORE, "--stall-seconds", stall]
            streams[0].start(["--seconds", stall], options)
            time.sleep(_LEAD)
        begin = time.monotonic()
        for stream in streams[1:]:
            stream.start(["--seconds", seconds])
        while time.monotonic() < begin + seconds:
            highest = max(highest, relays.memory().proportional)
            time.sleep(_INTERVAL)
        report = combine(stream.finish(60) for stream in streams[1:])
        if stalled:
            received = streams[0].finish(60 + seconds)
            if received.total_bytes <= _BEFORE:
                raise BenchmarkError(f"the reader could not stall after {_BEFORE} bytes: no more arrived")
    growth = highest - relays.idle
    return {"rate": report.rate, "growth": growth, "growth_of_bound": growth / BOUND}


def run(plan: Plan) -> list[Result]:
    """Measure all contenders."""
    with started(plan, STREAMS, {OURS: OPTIONS}) as found:
        order = [
            # Both cases of one contender side by side, since they are compared with each other.
            Turn(case, link, tool, partial(measure, relays, plan.seconds, case == BESIDE))
            for (link, tool), relays in found.items()
            for case in (ALONE, BESIDE)
        ]
        return take_turns(plan, "stall", order)
