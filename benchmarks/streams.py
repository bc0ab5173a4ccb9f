"""One bulk stream: a source and a sink at the two ends of a relay."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE

from benchmarks.generators import traffic
from benchmarks.processes import ROOT, BenchmarkError, tcp_listening, wait_until

__all__ = ["Report", "Stream", "combine"]


@dataclass(frozen=True)
class Report:
    """
    What was received.

    @ivar begin: of the first byte, in seconds of the monotonic clock.
    @ivar end: of the stream.
    @ivar steady: bytes per second in the second half of that time.
    """

    total_bytes: int
    begin: float
    end: float
    steady: float

    @property
    def seconds(self) -> float:
        """How long it took to receive it."""
        return self.end - self.begin

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.total_bytes / self.seconds if self.seconds > 0 else 0.0


def combine(reports: Iterable[Report]) -> Report:
    """@return: streams that were received side by side, as one."""
    parts = [report for report in reports if report.total_bytes]
    if not parts:
        raise BenchmarkError("not a byte was received")
    return Report(
        total_bytes=sum(report.total_bytes for report in parts),
        begin=min(report.begin for report in parts),
        end=max(report.end for report in parts),
        steady=sum(report.steady for report in parts),
    )


class Stream:
    """
    A source and a sink at the two ends of a relay, a process each.

    Use as a context manager: leaving kills what still runs.
    """

    def __init__(self, entry: Path | int, exit: Path | int) -> None:
        """
        @param entry: the UNIX socket, or TCP port of 127.0.0.1, that the source connects to.
        @param exit: the one that the sink listens on; what is left of an earlier socket is removed.
        """
        self._addresses = {"source": entry, "sink": exit}
        self._ends: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._ends.values():
            process.kill()
            process.communicate()

    def start(self, source: Sequence[object], sink: Sequence[object] = ()) -> None:
        """Start the two with these options, the sink first; returns once the source is on its way."""
        exit = self._addresses["sink"]
        if isinstance(exit, Path):
            exit.unlink(missing_ok=True)
        self._start("sink", sink)
        if isinstance(exit, Path):
            wait_until(exit.is_socket, f"the sink at {exit}", lambda: self._check("sink"))
        else:
            wait_until(lambda: tcp_listening(exit), f"the sink at {exit}", lambda: self._check("sink"))
        self._start("source", source)

    def finish(self, seconds: float) -> Report:
        """
        Wait for both ends.

        @param seconds: how long at most.
        @return: what was received; both directions together if both were used.
        @raise BenchmarkError: an end failed or is not done by then, or one
            did not get what the other sent.
        """
        deadline = time.monotonic() + seconds
        ends = {role: self._report(role, deadline - time.monotonic()) for role in ("sink", "source")}
        for role, other in (("sink", "source"), ("source", "sink")):
            sent, received = ends[other]["sent"], ends[role]["received"]
            if sent.total_bytes != received.total_bytes:
                raise BenchmarkError(
                    f"the {other} at {self._addresses[other]} sent {sent.total_bytes} bytes, "
                    f"and {received.total_bytes} arrived"
                )
        return combine(end["received"] for end in ends.values())

    def _start(self, role: str, options: Sequence[object]) -> None:
        command = traffic(role, self._addresses[role], *options)
        self._ends[role] = subprocess.Popen(
            command, stdout=PIPE, stderr=PIPE, stdin=subprocess.DEVNULL, cwd=ROOT, start_new_session=True
        )

    def _check(self, role: str) -> None:
        if self._ends[role].poll() is not None:
            self._report(role, 1.0)

    def _report(self, role: str, seconds: float) -> Mapping[str, Report]:
        process, address = self._ends[role], self._addresses[role]
        try:
            output, errors = process.communicate(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            for other, its_process in self._ends.items():
                if other != role and its_process.poll():
                    self._report(other, 1.0)  # what this one has waited for in vain
            raise BenchmarkError(f"the {role} at {address} is not done in time") from None
        if process.returncode:
            said = errors.decode(errors="replace").strip()
            raise BenchmarkError(f"the {role} at {address} failed: {said}")
        return {name: Report(**fields) for name, fields in json.loads(output).items()}
