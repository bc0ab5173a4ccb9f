"""Row C{bulk}: throughput and processor time of one stream, four streams, and both directions at once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack

from benchmarks.contenders import Plan, take_turns_anew
from benchmarks.generators import compiler
from benchmarks.processes import BenchmarkError
from benchmarks.relays import Relays
from benchmarks.results import PLAIN, Metric, Result, Target
from benchmarks.streams import Stream, combine

__all__ = ["DUPLEX", "FOUR", "METRICS", "ONE", "TARGETS", "measure", "run"]

ONE, FOUR, DUPLEX = "one stream", "four streams", "both ways"

METRICS = (
    Metric("rate", "GB/s", 1e-9),
    Metric("cpu", "CPU s/GB"),
    Metric("near_user", "near user"),
    Metric("near_system", "near sys"),
    Metric("far_user", "far user"),
    Metric("far_system", "far sys"),
)

TARGETS = tuple(
    target
    for case in (ONE, FOUR, DUPLEX)
    for target in (
        Target("bulk", case, ("tls",), "cpu", at_most=0.80),
        Target("bulk", case, ("tls",), "rate", at_least=1.15),
        Target("bulk", case, PLAIN, "cpu", at_most=1.15),
        Target("bulk", case, PLAIN, "rate", at_least=0.95),
    )
)

#: Seconds after the end of a stream for the last acknowledgements, so that their cost is counted.
_SETTLE = 0.1


def measure(relays: Relays, seconds: float, streams: int = 1, duplex: bool = False) -> Mapping[str, float]:
    """
    Send for C{seconds}.

    @return: bytes per second from the first byte received to the last, and the
        daemons' processor time in seconds per 10⁹ bytes.
    @raise BenchmarkError: something was lost, or it does not end.
    """
    if len(relays.paths) < streams:
        raise BenchmarkError(f"it carries no more than {len(relays.paths)} stream")
    options = ["--seconds", seconds, *(["--duplex"] if duplex else [])]
    before = relays.usage()
    with ExitStack() as stack:
        running = [stack.enter_context(Stream(*path)) for path in relays.paths[:streams]]
        for stream in running:
            stream.start(options, options)
        report = combine(stream.finish(seconds + 60) for stream in running)
    time.sleep(_SETTLE)
    near, far = (after - earlier for after, earlier in zip(relays.usage(), before, strict=True))
    gigabytes = report.total_bytes / 1e9
    values = {"rate": report.rate}
    if relays.daemons:
        values |= {
            "cpu": (near + far).total / gigabytes,
            "near_user": near.user / gigabytes,
            "near_system": near.system / gigabytes,
            "far_user": far.user / gigabytes,
            "far_system": far.system / gigabytes,
        }
    return values


def run(plan: Plan) -> list[Result]:
    """Measure all contenders."""
    cases = {
        ONE: lambda relays: measure(relays, plan.seconds),
        FOUR: lambda relays: measure(relays, plan.seconds, streams=4),
        DUPLEX: lambda relays: measure(relays, plan.seconds, duplex=True),
    }
    if compiler() is None:
        del cases[DUPLEX]
        plan.note(f"{DUPLEX}: not measured, and the rest with slower ends, since there is no C compiler")
    return take_turns_anew(plan, "bulk", 4, cases)
