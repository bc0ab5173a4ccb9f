"""Starts what is measured, waits until it is ready, and ends it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks import accounting
from benchmarks.accounting import Memory, Usage

__all__ = [
    "BenchmarkError",
    "Daemon",
    "Unavailable",
    "end",
    "free_port",
    "python_module",
    "running",
    "tcp_listening",
    "wait_for_port",
    "wait_for_socket",
    "wait_until",
]

ROOT = Path(__file__).resolve().parent.parent

#: Seconds for a daemon to start or end, or for bytes on their way to arrive.
#: Generous: machines that run benchmarks are also used for other things.
PATIENCE = 20.0


class BenchmarkError(Exception):
    """A run that has no result: what ended, and what it said."""


class Unavailable(Exception):
    """Something that is to be measured or measured with is not on this machine; says what to install."""


@dataclass(frozen=True)
class Daemon:
    """A process under measurement."""

    process: subprocess.Popen[bytes]
    log: Path

    def usage(self) -> Usage:
        """
        @return: processor time so far, of its children too, alive or not.
        @raise BenchmarkError: it has ended.
        """
        self.check()
        return accounting.usage(self.process.pid)

    def memory(self) -> Memory:
        """
        @return: what it and its children have in memory now.
        @raise BenchmarkError: it has ended.
        """
        self.check()
        return accounting.memory(self.process.pid)

    def check(self) -> None:
        """@raise BenchmarkError: it has ended; shows the end of its log."""
        if self.process.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise BenchmarkError(f"{self.log.stem} ended with status {self.process.returncode}:\n{tail}")


def python_module(module: str, *arguments: object) -> list[str]:
    """@return: the command that runs C{python -m MODULE ARGUMENTS} with this interpreter."""
    return [sys.executable, "-m", module, *map(str, arguments)]


@contextmanager
def running(
    name: str,
    command: Sequence[str],
    directory: Path,
    environment: Mapping[str, str] | None = None,
    user: int | None = None,
) -> Iterator[Daemon]:
    """
    Run C{command} with its output in C{directory/NAME.log}; ends it and its descendants on leaving.

    @param environment: instead of this process's own.
    @param user: number of the user and group to run it as; None is this process's own.
    """
    log = directory / f"{name}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env=environment,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
            # Ctrl-C is for the benchmark, which then ends its daemons one after the other.
            start_new_session=True,
        )
    try:
        yield Daemon(process, log)
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started here, gently at first; then what is left of its descendants."""
    members = accounting.tree(process.pid) if process.poll() is None else []
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for member in members:
        # By its time of start too: the number may be somebody else's by now.
        if member in accounting.tree(member.pid)[:1]:
            with suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)


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
    wait_until(lambda: tcp_listening(port), f"{daemon.log.stem} on TCP port {port}", daemon.check)


def wait_for_socket(path: Path, daemon: Daemon) -> None:
    """As L{wait_for_port}, for a UNIX socket: until there is one."""
    wait_until(path.is_socket, f"{daemon.log.stem} on {path}", daemon.check)


def wait_until(ready: Callable[[], bool], what: str, check: Callable[[], None] = lambda: None) -> None:
    """
    @param what: who is to listen and where, for the message.
    @param check: raises if it is no use to wait any longer.
    @raise BenchmarkError: it took too long.
    """
    deadline = time.monotonic() + PATIENCE
    while not ready():
        check()
        if time.monotonic() > deadline:
            raise BenchmarkError(f"nobody listens after {PATIENCE:.0f} s: {what}")
        time.sleep(0.02)


def tcp_listening(port: int) -> bool:
    """@return: whether somebody listens on TCP C{port} of an IPv4 address."""
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    # Local address in hexadecimal, remote address, state; 0A is a listening one's.
    return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)
