"""Runs what is measured and what feeds it, and reads from the kernel what it costs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE

from benchmarks.traffic import Report

__all__ = [
    "BenchmarkError",
    "Daemon",
    "Memory",
    "Stream",
    "free_port",
    "python_module",
    "running",
    "wait_for_port",
    "wait_for_socket",
]

ROOT = Path(__file__).resolve().parent.parent

#: Seconds for a daemon to start or end, or for bytes on their way to arrive.
#: Generous: machines that run benchmarks are also used for other things.
PATIENCE = 20.0

_TICK = 1 / os.sysconf("SC_CLK_TCK")


class BenchmarkError(Exception):
    """A run that has no result: what ended, and what it said."""


@dataclass(frozen=True)
class Memory:
    """
    @ivar resident: VmRSS in bytes: all of the process that is in memory,
        shared libraries included.
    @ivar anonymous: the part of it that is the process's own data.
    """

    resident: int
    anonymous: int


@dataclass(frozen=True)
class Daemon:
    """A process under measurement."""

    process: subprocess.Popen[bytes]
    log: Path

    def cpu_seconds(self) -> float:
        """
        @return: user and system time so far, of its children too, alive or not.
        @raise BenchmarkError: it has ended.
        """
        self.check()
        return _cpu_seconds(self.process.pid)

    def memory(self) -> Memory:
        """
        @return: what it has in memory now.
        @raise BenchmarkError: it has ended.
        """
        self.check()
        kib = {}
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in ("VmRSS", "RssAnon"):
                kib[key] = int(value.split()[0])
        return Memory(kib["VmRSS"] * 1024, kib["RssAnon"] * 1024)

    def check(self) -> None:
        """@raise BenchmarkError: it has ended; shows the end of its log."""
        if self.process.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise BenchmarkError(f"{self.log.stem} ended with status {self.process.returncode}:\n{tail}")


def _cpu_seconds(pid: int) -> float:
    # What follows the name, which is in parentheses and may hold spaces, begins with field 3.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = sum(map(int, fields[11:15])) * _TICK
    children = [task.joinpath("children").read_text().split() for task in Path(f"/proc/{pid}/task").iterdir()]
    return own + sum(_cpu_seconds(int(child)) for found in children for child in found)


def python_module(module: str, *arguments: object) -> list[str]:
    """@return: the command that runs C{python -m MODULE ARGUMENTS} with this interpreter."""
    return [sys.executable, "-m", module, *map(str, arguments)]


@contextmanager
def running(name: str, command: Sequence[str], directory: Path) -> Iterator[Daemon]:
    """Run C{command} with its output in C{directory/NAME.log}; ends it on leaving."""
    log = directory / f"{name}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, cwd=ROOT)
    try:
        yield Daemon(process, log)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """@return: a TCP port of 127.0.0.1 that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_port(port: int, daemon: Daemon) -> None:
    """
    Wait until somebody listens on TCP C{port}, without connecting to it.

    @raise BenchmarkError: C{daemon} ended, or it took too long.
    """
    _wait(lambda: _tcp_listening(port), f"{daemon.log.stem} on TCP port {port}", daemon.check)


def wait_for_socket(path: Path, daemon: Daemon) -> None:
    """As L{wait_for_port}, for a UNIX socket: until there is one."""
    _wait(path.is_socket, f"{daemon.log.stem} on {path}", daemon.check)


def _tcp_listening(port: int) -> bool:
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    # Local address in hexadecimal, remote address, state; 0A is a listening one's.
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)


def _wait(ready: Callable[[], bool], what: str, check: Callable[[], None]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        check()
        if time.monotonic() > deadline:
            raise BenchmarkError(f"nobody listens after {PATIENCE:.0f} s: {what}")
        time.sleep(0.02)


class Stream:
    """
    A source and a sink (L{benchmarks.traffic}) at the two ends of a relay.

    Use as a context manager: leaving kills what still runs.
    """

    def __init__(self, entry: Path, exit: Path) -> None:
        """
        @param entry: the UNIX socket that the source connects to.
        @param exit: the one that the sink listens on; what is left of an earlier one is removed.
        """
        self._entry = entry
        self._exit = exit
        self._ends: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._ends.values():
            process.kill()
            process.communicate()

    def start(self, source: Sequence[object], sink: Sequence[object] = ()) -> None:
        """Start the two with these options, the sink first; returns once the source is on its way."""
        self._exit.unlink(missing_ok=True)
        self._start("sink", self._exit, sink)
        _wait(self._exit.is_socket, f"the sink at {self._exit}", lambda: None)
        self._start("source", self._entry, source)

    def _start(self, role: str, path: Path, options: Sequence[object]) -> None:
        command = python_module("benchmarks.traffic", role, path, *options)
        self._ends[role] = subprocess.Popen(command, stdout=PIPE, stderr=PIPE, cwd=ROOT)

    def finish(self, seconds: float) -> Report:
        """
        Wait for both ends.

        @param seconds: how long at most.
        @return: what the sink saw.
        @raise BenchmarkError: an end failed or is not done by then, or the two disagree.
        """
        deadline = time.monotonic() + seconds
        source, sink = (self._report(role, deadline - time.monotonic()) for role in ("source", "sink"))
        if (source.total_bytes, source.checksum) != (sink.total_bytes, sink.checksum):
            raise BenchmarkError(f"the sink did not get what the source sent: {sink} instead of {source}")
        return sink

    def _report(self, role: str, seconds: float) -> Report:
        process = self._ends[role]
        try:
            output, errors = process.communicate(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            raise BenchmarkError(f"the {role} at {self._path(role)} is not done in time") from None
        if process.returncode:
            said = errors.decode(errors="replace").strip()
            raise BenchmarkError(f"the {role} at {self._path(role)} failed: {said}")
        return Report(**json.loads(output))

    def _path(self, role: str) -> Path:
        return self._entry if role == "source" else self._exit
