"""Row C{pipes}: long fat lines, by a delay of our own between the two sides."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.contenders import Plan, Turn, started, take_round
from benchmarks.generators import program
from benchmarks.processes import Daemon, free_port, running, wait_for_port
from benchmarks.relays import Relays
from benchmarks.results import OURS, Metric, Result, Target
from benchmarks.streams import Stream

__all__ = ["LINES", "METRICS", "PLAIN_TCP", "TARGETS", "Line", "delayed", "measure", "run"]

#: The yardstick: a source and a sink on one TCP connection through the same line.
PLAIN_TCP = "plain TCP"

TOOLS = ("ssh", OURS)

_LINKS = ("tcp", "tls")

#: Enough to begin with, and soon through the slowest.
_PROOF_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Line:
    """
    @ivar seconds: from one end to the other; a round trip is twice that.
    @ivar rate: bytes per second; 0 is as fast as this machine can.
    """

    seconds: float
    rate: float


LINES = {
    "100 ms, 1 Gbit/s": Line(0.05, 1e9 / 8),
    "100 ms, 4 Gbit/s": Line(0.05, 4e9 / 8),
    "100 ms": Line(0.05, 0),
    "no delay": Line(0, 0),
}

METRICS = (
    Metric("steady", "steady MB/s", 1e-6, 0),
    Metric("rate", "whole MB/s", 1e-6, 0),
    Metric("growth", "grown MiB", 1 / 2**20, 0),
)

TARGETS = (
    *(
        Target("pipes", case, _LINKS, "steady", at_least=0.95, against=PLAIN_TCP)
        for case, line in LINES.items()
        if line.rate
    ),
    Target("pipes", "100 ms", _LINKS, "steady", at_least=0.85, against=OURS, yardstick="no delay"),
)

#: Seconds between two looks at the daemons' memory.  With as much of it as a long line needs, a look takes
#: milliseconds of the processor time that is measured.
_INTERVAL = 0.5


@contextmanager
def delayed(line: Line, target: int, directory: Path) -> Iterator[tuple[int, Daemon]]:
    """
    @param target: the TCP port at the far end.
    @return: the one at the near end, and the process between them.
    """
    port = free_port()
    command = [str(program("delay")), str(port), str(target)]
    command += ["--seconds", str(line.seconds), "--rate", str(line.rate)]
    with running("line", command, directory) as daemon:
        wait_for_port(port, daemon)
        yield port, daemon


def measure(relays: Relays, line: Daemon, seconds: float) -> Mapping[str, float]:
    """
    Send for C{seconds} over the first stream.

    @return: bytes per second of the whole and of its second half, and the bytes
        of memory that the daemons grew by since they started.
    @raise BenchmarkError: something was lost, or it does not end, or the line could not hold it.
    """
    highest = relays.idle
    with Stream(*relays.paths[0]) as stream:
        stream.start(["--seconds", seconds])
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            highest = max(highest, relays.memory().proportional)
            time.sleep(_INTERVAL)
        line.check()
        report = stream.finish(60)
    line.check()
    return {"steady": report.steady, "rate": report.rate, "growth": highest - relays.idle}


def _plain_tcp(entry: int, sink: int, line: Daemon, seconds: float) -> Mapping[str, float]:
    with Stream(entry, sink) as stream:
        stream.start(["--seconds", seconds])
        report = stream.finish(seconds + 60)
    line.check()
    return {"steady": report.steady, "rate": report.rate}


def run(plan: Plan) -> list[Result]:
    """
    Measure relaymux and ssh; the others have no windows of their own, and are as plain TCP.

    @raise Unavailable: there is no C compiler.
    """
    program("delay")
    return [result for number in range(plan.rounds) for result in _run_round(plan, number)]


def _run_round(plan: Plan, round_number: int) -> list[Result]:
    """One round, with processes of its own as of L{benchmarks.contenders.take_turns_anew}."""
    order = []
    with ExitStack() as stack:
        for number, (case, line) in enumerate(LINES.items()):
            directory = plan.directory / f"round{round_number}-line{number}"
            directory.mkdir(mode=0o711)
            sink = free_port()
            entry, daemon = stack.enter_context(delayed(line, sink, directory))
            order.append(Turn(case, "-", PLAIN_TCP, partial(_plain_tcp, entry, sink, daemon, plan.seconds)))
            lines: list[Daemon] = []

            def through(
                target: int, line: Line = line, directory: Path = directory, lines: list[Daemon] = lines
            ) -> AbstractContextManager[int]:
                return _through(line, target, directory, lines)

            tools = [tool for tool in plan.tools if tool in TOOLS]
            links = [link for link in plan.links if link in _LINKS]
            part = replace(plan, directory=directory, tools=tools, links=links)
            options = {tool: {"through": through} for tool in tools}
            found = stack.enter_context(started(part, 1, options, _PROOF_BYTES))
            for ((link, tool), relays), own in zip(found.items(), lines, strict=True):
                order.append(Turn(case, link, tool, partial(measure, relays, own, plan.seconds)))
        return take_round(plan, "pipes", round_number, order)


@contextmanager
def _through(line: Line, target: int, directory: Path, lines: list[Daemon]) -> Iterator[int]:
    with delayed(line, target, directory) as (port, daemon):
        lines.append(daemon)
        yield port
