"""The relays that are compared, each set up between UNIX sockets in a directory of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import (
    BenchmarkError,
    Daemon,
    Stream,
    free_port,
    python_module,
    running,
    wait_for_port,
    wait_for_socket,
)
from relaymux.certificates import make_certificates

__all__ = ["Relays", "direct", "plain_twisted", "relaymux"]

#: Enough for every buffer on the way to be used more than once.
_PROOF_BYTES = 128 * 1024 * 1024

_TWISTD = Path(sys.executable).with_name("twistd")


@dataclass(frozen=True)
class Relays:
    """
    A source relay, a destination relay, and the way through them.

    @ivar paths: for each stream the UNIX socket to connect to, and the one to listen on.
    @ivar daemons: the processes whose cost counts.
    """

    paths: tuple[tuple[Path, Path], ...]
    daemons: tuple[Daemon, ...] = ()

    def cpu_seconds(self) -> float:
        """
        @return: what the daemons have used so far.
        @raise BenchmarkError: one of them has ended.
        """
        return sum(daemon.cpu_seconds() for daemon in self.daemons)

    def prove(self) -> None:
        """
        Send checksummed bytes over each stream in turn; also warms up.

        @raise BenchmarkError: something else arrived.
        """
        for entry, exit in self.paths:
            with Stream(entry, exit) as stream:
                stream.start(["--bytes", _PROOF_BYTES, "--seconds", 30, "--checksum"], ["--checksum"])
                if stream.finish(60).total_bytes < _PROOF_BYTES:
                    raise BenchmarkError(f"{entry}: not even {_PROOF_BYTES} bytes in 30 s")


def direct(directory: Path) -> Relays:
    """No relay: what the source and the sink can do."""
    path = directory / "direct"
    return Relays(((path, path),))


@contextmanager
def plain_twisted(directory: Path, transport: str, forward: bool = False) -> Iterator[Relays]:
    """
    L{benchmarks.baseline_twisted}.

    @param transport: C{"tcp"} or C{"tls"}.
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
        yield Relays(((entry, exit),), (near, far))


@contextmanager
def relaymux(
    directory: Path, transport: str, streams: int = 1, link_options: Mapping[str, object] | None = None
) -> Iterator[Relays]:
    """
    Two C{twistd relaymux} daemons with their defaults.

    @param transport: C{"tcp"}, C{"tls"} or C{"unix"}.
    @param link_options: further keys of the C{[link]} sections.
    """
    port = free_port()
    address = f"{directory}/link" if transport == "unix" else f"127.0.0.1:{port}"
    keys = dict(link_options or {})
    if transport == "tls":
        make_certificates(directory / "pki", ["source", "destination"])
    paths = tuple((directory / f"in{number}", directory / f"out{number}") for number in range(streams))

    def command(role: str, peer: str, verb: str) -> list[str]:
        lines = ["[relay]", f"name = {role}", "drain-timeout = 1"]
        lines += [f"[link {peer}]", f"transport = {transport}", f"{verb} = {address}"]
        lines += [f"{key} = {value}" for key, value in keys.items()]
        if transport == "tls":
            lines += [f"certificate = pki/{role}.pem", f"private-key = pki/{role}.key"]
            lines += ["ca = pki/ca.pem", f"peer = {peer}"]
        for number, (entry, exit) in enumerate(paths):
            lines += [f"[stream {number}]", f"link = {peer}"]
            lines += [f"listen = {entry}" if role == "source" else f"connect = {exit}"]
        config = directory / f"{role}.ini"
        config.write_text("\n".join(lines) + "\n")
        return [str(_TWISTD), "--nodaemon", "--pidfile=", "relaymux", "--config", str(config)]

    with ExitStack() as stack:
        listening = command("destination", "source", "listen")
        far = stack.enter_context(running("destination", listening, directory))
        if transport == "unix":
            wait_for_socket(directory / "link", far)
        else:
            wait_for_port(port, far)
        connecting = command("source", "destination", "connect")
        near = stack.enter_context(running("source", connecting, directory))
        wait_for_socket(paths[0][0], near)
        yield Relays(paths, (near, far))
