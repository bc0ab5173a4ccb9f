"""Row C{nbd}: a disk copied through the relay as nbdcopy does it, and single reads as a guest makes them."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.contenders import Plan, started, take_turns, turns
from benchmarks.processes import BenchmarkError, end, running, wait_for_socket
from benchmarks.relays import Relays
from benchmarks.results import Metric, Result
from benchmarks.tools import find

__all__ = ["METRICS", "measure", "prove", "run"]

MIB = 1024 * 1024
DISK_BYTES, PROOF_BYTES = 1024 * MIB, 64 * MIB

#: Requests of 4 KiB, one at a time.
REQUESTS = 4000

METRICS = (
    Metric("to_rate", "to GB/s", 1e-9),
    Metric("to_cpu", "CPU s/GB"),
    Metric("from_rate", "from GB/s", 1e-9),
    Metric("from_cpu", "CPU s/GB"),
    Metric("read", "4k read us", 1e6, 0),
)

#: Seconds for a whole copy through the slowest.
_COPY_SECONDS = 120.0


@contextmanager
def serving(path: Path) -> Iterator[None]:
    """An empty disk in memory is served at the UNIX socket C{path}."""
    path.unlink(missing_ok=True)
    command = [find("nbdkit"), "--foreground", "--exit-with-parent", "--unix", str(path), "memory"]
    with running("nbdkit", [*command, f"size={DISK_BYTES}"], path.parent) as server:
        wait_for_socket(path, server)
        # A relay may run as another user; the directory keeps everybody else out.
        path.chmod(0o777)
        yield
        server.check()


def prove(relays: Relays, image: Path) -> None:
    """
    Copy the beginning of C{image} there and back, and compare.

    @raise BenchmarkError: it is not the same.
    """
    entry, exit = relays.paths[0]
    content = image.read_bytes()[:PROOF_BYTES]
    small, back = entry.with_name("small"), entry.with_name("back")
    small.write_bytes(content)
    with serving(exit):
        _run([find("nbdcopy"), "--flush", str(small), _uri(entry)])
        _run([find("nbdcopy"), _uri(entry), str(back)])
    with back.open("rb") as file:
        if file.read(PROOF_BYTES) != content:
            raise BenchmarkError(f"the disk behind {entry} is not what was copied to it")
    small.unlink()
    back.unlink()


def measure(relays: Relays, image: Path) -> Mapping[str, float]:
    """
    Copy C{image} to the far side, and back to nowhere; then read 4 KiB at a time.

    @return: bytes per second, processor seconds of the relays per 10⁹ bytes, and seconds of one read.
    """
    entry, exit = relays.paths[0]
    values: dict[str, float] = {}
    copies = {"to": ["--flush", str(image), _uri(entry)], "from": [_uri(entry), "null:"]}
    with serving(exit):
        for way, arguments in copies.items():
            before = sum(side.total for side in relays.usage())
            begin = time.monotonic()
            _run([find("nbdcopy"), *arguments])
            values[f"{way}_rate"] = DISK_BYTES / (time.monotonic() - begin)
            if relays.daemons:
                cpu = sum(side.total for side in relays.usage()) - before
                values[f"{way}_cpu"] = cpu / (DISK_BYTES / 1e9)
        command = [find("qemu-img"), "bench", "-f", "raw", "-c", str(REQUESTS), "-d", "1", "-s", "4096"]
        said = _run([*command, _uri(entry)])
    completed = re.search(r"completed in ([\d.]+) seconds", said)
    if completed is None:
        raise BenchmarkError(f"qemu-img bench said: {said.strip()}")
    return {**values, "read": float(completed[1]) / REQUESTS}


def _uri(path: Path) -> str:
    return f"nbd+unix:///?socket={path}"


def _run(command: list[str]) -> str:
    """
    @return: what it wrote.
    @raise BenchmarkError: it failed, or is not done in time; it is gone then.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        said = process.communicate(timeout=_COPY_SECONDS)[0].decode(errors="replace")
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"not done in {_COPY_SECONDS:.0f} s: {' '.join(command)}") from None
    finally:
        end(process)
    if process.returncode:
        raise BenchmarkError(f"{' '.join(command)}: {said.strip()}")
    return said


def run(plan: Plan) -> list[Result]:
    """
    Measure all contenders.

    @raise Unavailable: nbdkit, nbdcopy or qemu-img is not there.
    """
    for program in ("nbdkit", "nbdcopy", "qemu-img"):
        find(program)
    image = plan.directory / "image"
    with image.open("wb") as file:
        for _ in range(DISK_BYTES // (16 * MIB)):
            file.write(os.urandom(16 * MIB))
    try:
        with started(plan, 1) as found:
            for (link, tool), relays in found.items():
                plan.step(f"nbd: content through {tool} over {link}")
                prove(relays, image)
            return take_turns(plan, "nbd", turns(found, {"1 GiB": partial(measure, image=image)}))
    finally:
        image.unlink()
