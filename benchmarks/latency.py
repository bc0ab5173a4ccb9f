"""Row C{latency}: how long an answer takes on one stream, alone and beside a stream that is full."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.contenders import Plan, take_turns_anew
from benchmarks.generators import program
from benchmarks.processes import BenchmarkError, end, running, wait_for_socket
from benchmarks.relays import Relays
from benchmarks.results import Metric, Result, Target
from benchmarks.streams import Stream

__all__ = ["METRICS", "TARGETS", "ask", "echoing", "measure", "run"]

SIZES = {"64 B": 64, "4 KiB": 4096}

METRICS = (
    Metric("p50", "p50 us", 1e6, 0),
    Metric("p99", "p99 us", 1e6, 0),
    Metric("max", "max us", 1e6, 0),
    Metric("beside", "beside GB/s", 1e-9),
)

TARGETS = tuple(
    Target("latency", f"{size} beside bulk", ("tls", "tcp", "unix"), "p99", at_most=0.5, against="ssh")
    for size in SIZES
)

#: Seconds that the other stream has to become full before the first request.
_RAMP = 0.3


@contextmanager
def echoing(path: Path) -> Iterator[None]:
    """Something that sends back what it gets listens at the UNIX socket C{path}."""
    path.unlink(missing_ok=True)
    name = f"echo-{path.name}"
    with running(name, [str(program("latency")), "echo", str(path)], path.parent) as server:
        wait_for_socket(path, server)
        yield
        server.check()


def ask(role: str, path: Path, seconds: float, size: int = 1) -> Mapping[str, float]:
    """
    @param role: C{"ask"} or C{"dial"}.
    @param path: the UNIX socket that leads to something that echoes.
    @return: count and seconds, and p50, p99 and max in seconds.
    @raise BenchmarkError: an answer was wrong, or did not come.
    """
    command = [str(program("latency")), role, str(path), "--seconds", str(seconds), "--size", str(size)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=seconds + 30)
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"no answer came through {path}") from None
    finally:
        end(process)
    if process.returncode:
        raise BenchmarkError(f"requests through {path}: {errors.decode(errors='replace').strip()}")
    values: Mapping[str, float] = json.loads(output)
    return values


def measure(relays: Relays, size: int, seconds: float, busy: bool) -> Mapping[str, float]:
    """
    Ask over the first stream, while the second is full if C{busy}.

    @raise BenchmarkError: something was lost, or an answer did not come.
    """
    entry, exit = relays.paths[0]
    with echoing(exit):
        if not busy:
            return ask("ask", entry, seconds, size)
        with Stream(*relays.paths[1]) as bulk:
            bulk.start(["--seconds", seconds + _RAMP + 0.5])
            time.sleep(_RAMP)
            values = ask("ask", entry, seconds, size)
            report = bulk.finish(seconds + 60)
        return {**values, "beside": report.rate}


def run(plan: Plan) -> list[Result]:
    """
    Measure all contenders.

    @raise Unavailable: there is no C compiler.
    """
    program("latency")
    cases = {}
    for name, size in SIZES.items():
        for place, busy in (("idle", False), ("beside bulk", True)):
            cases[f"{name} {place}"] = lambda relays, size=size, busy=busy: measure(
                relays, size, plan.seconds, busy
            )
    return take_turns_anew(plan, "latency", 2, cases)
