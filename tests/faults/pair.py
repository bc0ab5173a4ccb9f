"""Two daemons over TLS, as processes, with a fault proxy between them."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from relaymux.certificates import make_certificates
from tests.faults.traffic import PATIENCE, Traffic, wait_until
from tests.faults.wire import PROJECT, Wire

__all__ = [
    "BEGUN",
    "DOWN",
    "MIB",
    "OVER",
    "RESUMED",
    "SMALL",
    "SMALL_FLOW",
    "STOPPED",
    "THOROUGH",
    "UP",
    "Daemon",
    "FaultTestCase",
    "Pair",
    "thorough",
]

THOROUGH = bool(os.environ.get("RELAYMUX_THOROUGH"))

KIB, MIB = 1024, 1024 * 1024

#: Limits with which little traffic is many windows and replay buffers.
SMALL = ("memory = 6M", "window = 64K", "replay-buffer = 256K")

#: Bytes of each flow that are more than four windows, and together more than two replay buffers, of L{SMALL},
#: even if one of them grows by what the memory lets it.
SMALL_FLOW = 4 * MIB + 12345

#: Matches one line of each connection that had a stream: that it is open, or, if it was over
#: by then, that of its end.
BEGUN = r"connection \d+ .*, stream \d+ of link "

_Test = Callable[[Any], Any]


def thorough(test: _Test) -> _Test:
    """For tests that take long."""
    if not THOROUGH:
        test.skip = "takes long; make test-faults runs it"  # type: ignore[attr-defined]
    return test


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@functools.cache
def certificates() -> Path:
    """@return: a directory with certificates for C{hv-a.example}, C{hv-b.example} and C{other.example}."""
    directory = Path(tempfile.mkdtemp(prefix="rmxpki"))
    make_certificates(directory, ["hv-a.example", "hv-b.example", "other.example"])
    return directory


class Daemon:
    """
    C{twistd relaymux}, which may be started more than once; its log goes on.

    @ivar name: C{hv-a} dials, C{hv-b} listens.
    """

    def __init__(self, name: str, directory: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.config = directory / f"{name}.ini"
        self.log = directory / f"{name}.log"
        self._environment = environment
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-c", "from twisted.scripts.twistd import run; run()"),
                    *("--nodaemon", "--pidfile=", "relaymux", "--config", str(self.config)),
                ],
                cwd="/",
                env={"PYTHONPATH": str(PROJECT), **self._environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, to a process that is there."""
        assert self.process is not None
        self.process.send_signal(number)

    def ended(self) -> int:
        """Wait for its end.  @return: the exit status, or minus the signal."""
        assert self.process is not None
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        """SIGKILL, also to a stopped one; nothing if it has ended."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def count(self, pattern: str) -> int:
        """@return: how often the log has the regular expression."""
        return len(re.findall(pattern, self.output()))

    def numbers(self, pattern: str) -> list[tuple[float, ...]]:
        """@return: the groups of all matches, as numbers."""
        found = re.findall(pattern, self.output())
        return [tuple(map(float, (groups,) if isinstance(groups, str) else groups)) for groups in found]

    def wait_for(self, pattern: str, times: int = 1, seconds: float = PATIENCE) -> float:
        """Wait until the log has this.  @return: seconds."""
        what = f"{times} times {pattern!r} in the log of {self.name}"
        return wait_until(lambda: self.count(pattern) >= times, what, seconds, self.tail)

    def trouble(self) -> str:
        """@return: what no daemon should say: the first unexpected exception in the log."""
        _, start, rest = self.output().partition("Traceback (most recent call last)")
        return start + rest[:2000]

    def tail(self) -> str:
        return "\n".join([f"{self.name}:", *self.output().splitlines()[-25:]])

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    @property
    def resident(self) -> int:
        """Bytes."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


UP = r"link \S+: up,"
DOWN = r"link \S+: down: "
RESUMED = r"link \S+: resumed after ([\d.]+) s, connection \d+, generation (\d+)"
OVER = r"session over: .*; (\d+) streams ended with it, (\d+) bytes from here and (\d+) for here not deliv"
_AMOUNT = r"(?:[\d.]+ \w+ \()?(\d+) bytes\)?"
CLOSED = rf"connection \d+ (?:closed by .*|ended as an error: .*), {_AMOUNT} sent, {_AMOUNT} received"
STOPPED = r"stopped: (\d+) bytes taken from local programs were not delivered, exit status (\d+)"


class Pair:
    """
    Both daemons, the proxies between them, and local programs.

    @ivar a: the daemon that dials.
    @ivar b: the one that listens.
    @ivar wires: one proxy for each path; C{wire} is the first.
    @ivar traffic: connections to C{a} that come out of C{b}.
    """

    def __init__(
        self,
        seed: int,
        options: Sequence[str] = (),
        *,
        paths: int = 1,
        section: Sequence[str] = (),
        fake_clock: str = "",
    ) -> None:
        """
        @param options: lines for both C{[link]} sections, or C{memory} for both C{[relay]} sections.
        @param section: lines for C{a}'s C{[stream]} section.
        @param fake_clock: the library that gives both daemons the wall clock that
            the file C{clock} says.
        """
        self.directory = Path(tempfile.mkdtemp(prefix="rmxf"))
        environment = {}
        if fake_clock:
            (self.directory / "clock").write_text("+0d\n")
            environment = {
                "LD_PRELOAD": fake_clock,
                "FAKETIME_TIMESTAMP_FILE": str(self.directory / "clock"),
                "FAKETIME_NO_CACHE": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }
        self.a = Daemon("hv-a", self.directory, environment)
        self.b = Daemon("hv-b", self.directory, environment)
        self.wires: list[Wire] = []
        self._port = free_port()
        self.pki = self.directory / "pki"
        shutil.copytree(certificates(), self.pki)
        try:
            self.wires = [Wire(f"127.0.0.1:{self._port}", seed + path) for path in range(paths)]
            self._configure(options, section)
            self.traffic = Traffic(self.directory / "a.sock", self.directory / "b.sock")
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def wire(self) -> Wire:
        return self.wires[0]

    @property
    def daemons(self) -> tuple[Daemon, Daemon]:
        return self.a, self.b

    def start(self) -> None:
        """Start both daemons and wait for the link."""
        for daemon in (self.b, self.a):
            daemon.start()
        for daemon in self.daemons:
            daemon.wait_for(UP)

    def wait_resumed(self, times: int = 1, seconds: float = PATIENCE) -> None:
        """Wait until both daemons have said so often that they resumed."""
        for daemon in self.daemons:
            daemon.wait_for(RESUMED, times, seconds)

    def logs(self) -> str:
        return "\n".join(daemon.tail() for daemon in self.daemons)

    def wire_logs(self) -> str:
        """What the proxies that still answer say."""
        return "\n".join("\n".join(wire.events()[-15:]) for wire in self.wires if wire.process.poll() is None)

    def close(self) -> None:
        for daemon in self.daemons:
            daemon.kill()
        for wire in self.wires:
            wire.close()
        if hasattr(self, "traffic"):
            self.traffic.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _configure(self, options: Sequence[str], section: Sequence[str]) -> None:
        addresses = {
            "hv-a": "connect = " + ", ".join(wire.address for wire in self.wires),
            "hv-b": f"listen = 127.0.0.1:{self._port}",
        }
        for daemon, other in ((self.a, "hv-b"), (self.b, "hv-a")):
            lines = ["[relay]", f"name = {daemon.name}", "drain-timeout = 3"]
            lines += [option for option in options if option.startswith("memory")]
            lines += [f"[link {other}]", "transport = tls", addresses[daemon.name]]
            lines += [
                f"certificate = {self.pki}/{daemon.name}.example.pem",
                f"private-key = {self.pki}/{daemon.name}.example.key",
                f"ca = {self.pki}/ca.pem",
                f"peer = {other}.example",
                *(option for option in options if not option.startswith("memory")),
                "[stream s]",
                f"link = {other}",
            ]
            if daemon is self.a:
                lines += [f"listen = {self.directory}/a.sock", *section]
            else:
                lines += [f"connect = {self.directory}/b.sock"]
            daemon.config.write_text("\n".join(lines) + "\n")


class FaultTestCase(SynchronousTestCase):
    """
    Makes pairs.

    @ivar seed: of everything random; C{RELAYMUX_SEED} repeats one.
    """

    def setUp(self) -> None:
        self.seed = int(os.environ.get("RELAYMUX_SEED") or random.SystemRandom().randrange(2**31))
        self.random = random.Random(self.seed)

    @contextlib.contextmanager
    def pair(self, *options: str, **kwargs: Any) -> Iterator[Pair]:
        """A pair with its link up; arguments as of L{Pair}.  A failure comes with what the pair knows."""
        pair = Pair(self.seed, options, **kwargs)
        try:
            yield pair
        except BaseException:
            print(f"RELAYMUX_SEED={self.seed}", pair.traffic, pair.logs(), pair.wire_logs(), sep="\n")
            raise
        finally:
            pair.close()

    def say(self, text: str) -> None:
        """Put a measurement where whoever runs the tests sees it."""
        print(f"{self.id().rpartition('.')[2]}: {text}", file=sys.__stderr__)

    def assert_balanced(self, pair: Pair) -> None:
        """All flows complete, nothing reported as undelivered, and both daemons end with 0."""
        pair.traffic.assert_complete()
        self.assertEqual(sum(flow.sent for flow in pair.traffic.flows), pair.traffic.received)
        pair.traffic.hang_up()
        for daemon in pair.daemons:
            daemon.signal(signal.SIGTERM)
            self.assertEqual(daemon.ended(), 0)
            self.assertEqual(daemon.numbers(STOPPED)[-1], (0, 0))
            self.assertFalse(daemon.trouble(), daemon.trouble())

    def assert_failed(self, pair: Pair) -> None:
        """
        All flows ended as errors, and the ledger has no gap: every byte that a daemon
        read from a local program arrived, or was reported as not delivered.
        """
        pair.traffic.join()
        for flow in pair.traffic.flows:
            flow.assert_failed()
        ups = [conversation.up for conversation in pair.traffic.conversations]
        downs = [conversation.down for conversation in pair.traffic.conversations]
        for daemon, flows in ((pair.a, ups), (pair.b, downs)):
            daemon.wait_for(CLOSED, len(flows))
            taken = sum(int(sent) for sent, _ in daemon.numbers(CLOSED))
            reported = sum(int(lost) for _, lost, _ in daemon.numbers(OVER))
            arrived = sum(flow.received for flow in flows)
            offered = sum(flow.sent for flow in flows)
            ledger = f"{daemon.name}: {offered=:,} {taken=:,} {arrived=:,} {reported=:,}"
            self.assertTrue(arrived <= taken <= offered, ledger)
            self.assertTrue(taken - arrived <= reported <= taken, ledger)
