"""The relays that are compared, each set up between UNIX sockets in a directory of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from benchmarks.accounting import Memory, Usage
from benchmarks.generators import compiler
from benchmarks.processes import (
    BenchmarkError,
    Daemon,
    free_port,
    python_module,
    running,
    wait_for_port,
    wait_for_socket,
)
from benchmarks.streams import Stream
from relaymux.certificates import make_certificates

__all__ = ["PROOF_BYTES", "Relays", "Through", "direct", "make_paths", "plain_twisted", "relaymux"]

#: Enough for every buffer on the way to be used more than once.
PROOF_BYTES = 64 * 1024 * 1024

#: What lies between the two sides: given the TCP port that the destination's
#: side listens on, the one that the source's side connects to.
Through = Callable[[int], AbstractContextManager[int]]

_TWISTD = Path(sys.executable).with_name("twistd")


@dataclass(frozen=True)
class Relays:
    """
    A source relay, a destination relay, and the way through them.

    @ivar paths: for each stream the UNIX socket to connect to, and the one to listen on.
    @ivar near: the processes on the source's side whose cost counts.
    @ivar far: those on the destination's side.
    @ivar idle: bytes of memory that all of them had when they had just started.
    """

    paths: tuple[tuple[Path, Path], ...]
    near: tuple[Daemon, ...] = ()
    far: tuple[Daemon, ...] = ()
    idle: int = 0

    @property
    def daemons(self) -> tuple[Daemon, ...]:
        """All processes whose cost counts."""
        return self.near + self.far

    def usage(self) -> tuple[Usage, Usage]:
        """
        @return: what the source's side has used so far, and the destination's.
        @raise BenchmarkError: a daemon has ended.
        """
        near, far = ([daemon.usage() for daemon in side] for side in (self.near, self.far))
        return sum(near, Usage()), sum(far, Usage())

    def memory(self) -> Memory:
        """
        @return: what all of them together have in memory now.
        @raise BenchmarkError: a daemon has ended.
        """
        return sum((daemon.memory() for daemon in self.daemons), Memory())

    def prove(self, proof_bytes: int = PROOF_BYTES) -> None:
        """
        Send bytes over each stream in turn and compare all of them; also warms up.

        Both ways at once where there is a compiler for the ends that can do it.

        @raise BenchmarkError: something else arrived.
        """
        options = ["--bytes", proof_bytes, "--seconds", 30, "--verify"]
        options += ["--duplex"] if compiler() else []
        for entry, exit in self.paths:
            with Stream(entry, exit) as stream:
                stream.start(options, options)
                if stream.finish(60).total_bytes < proof_bytes:
                    raise BenchmarkError(f"{entry}: not even {proof_bytes} bytes in 30 s")


def make_paths(directory: Path, streams: int) -> tuple[tuple[Path, Path], ...]:
    """@return: for each stream the socket to connect to and the one to listen on."""
    return tuple((directory / f"in{number}", directory / f"out{number}") for number in range(streams))


@contextmanager
def direct(directory: Path, link: str = "-", streams: int = 1) -> Iterator[Relays]:
    """No relay: what the sources and the sinks can do."""
    paths = (directory / f"direct{number}" for number in range(streams))
    yield Relays(tuple((path, path) for path in paths))


@contextmanager
def plain_twisted(
    directory: Path, transport: str, streams: int = 1, forward: bool = False
) -> Iterator[Relays]:
    """
    L{benchmarks.baseline_twisted}.

    @param transport: C{"tcp"} or C{"tls"}.
    @param streams: it has only one, however many are asked for.
    @param forward: do not multiplex.
    """
    port = free_port()
    options: list[object] = ["--forward"] if forward else []
    if transport == "tls":
        make_certificates(directory / "pki", ["source", "destination"])
        options += ["--certificates", directory / "pki"]
    entry, exit = directory / "in", directory / "out"

    def command(role: str, path: Path) -> list[str]:
        return python_module("benchmarks.baseline_twisted", role, path, port, *options)

    with ExitStack() as stack:
        far = stack.enter_context(running("destination", command("destination", exit), directory))
        wait_for_port(port, far)
        near = stack.enter_context(running("source", command("source", entry), directory))
        wait_for_socket(entry, near)
        yield Relays(((entry, exit),), (near,), (far,))


@contextmanager
def relaymux(
    directory: Path,
    transport: str,
    streams: int = 1,
    through: Through = nullcontext,
    link_options: Mapping[str, object] | None = None,
    stream_options: Mapping[str, object] | None = None,
    relay_options: Mapping[str, object] | None = None,
) -> Iterator[Relays]:
    """
    Two C{twistd relaymux} daemons with their defaults.

    @param transport: C{"tcp"}, C{"tls"} or C{"unix"}.
    @param through: see L{Through}; not for C{"unix"}.
    @param link_options: further keys of the C{[link]} sections.
    @param stream_options: further keys of the C{[stream]} sections.
    @param relay_options: further keys of the C{[relay]} sections.
    """
    port = free_port()
    if transport == "tls":
        make_certificates(directory / "pki", ["source", "destination"])
    paths = make_paths(directory, streams)

    def command(role: str, peer: str, verb: str, tcp_port: int) -> list[str]:
        address = f"{directory}/link" if transport == "unix" else f"127.0.0.1:{tcp_port}"
        lines = ["[relay]", f"name = {role}", "drain-timeout = 1"]
        lines += [f"{key} = {value}" for key, value in (relay_options or {}).items()]
        lines += [f"[link {peer}]", f"transport = {transport}", f"{verb} = {address}"]
        lines += [f"{key} = {value}" for key, value in (link_options or {}).items()]
        if transport == "tls":
            lines += [f"certificate = pki/{role}.pem", f"private-key = pki/{role}.key"]
            lines += ["ca = pki/ca.pem", f"peer = {peer}"]
        for number, (entry, exit) in enumerate(paths):
            lines += [f"[stream {number}]", f"link = {peer}"]
            lines += [f"listen = {entry}" if role == "source" else f"connect = {exit}"]
            lines += [f"{key} = {value}" for key, value in (stream_options or {}).items()]
        config = directory / f"{role}.ini"
        config.write_text("\n".join(lines) + "\n")
        return [str(_TWISTD), "--nodaemon", "--pidfile=", "relaymux", "--config", str(config)]

    with ExitStack() as stack:
        listening = command("destination", "source", "listen", port)
        far = stack.enter_context(running("destination", listening, directory))
        if transport == "unix":
            wait_for_socket(directory / "link", far)
        else:
            wait_for_port(port, far)
        target = stack.enter_context(through(port))
        connecting = command("source", "destination", "connect", target)
        near = stack.enter_context(running("source", connecting, directory))
        wait_for_socket(paths[-1][0], near)
        yield Relays(paths, (near,), (far,))
