"""
The two ends of a benchmark stream: C{python -m benchmarks.traffic source|sink ...}, a process each.

They are kept cheap so that the relays between them are what is measured: one
block is sent over and over and one buffer received into.  Every block starts
with its number, and the sink checks the numbers it meets: bytes that were
lost, doubled or moved end the run.  C{--checksum} also covers every byte, for
runs whose time does not count.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import struct
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["BLOCK_BYTES", "Report", "SinkOptions", "main", "run_sink", "run_source"]

#: Fits into the second-level cache of current processors, so that reading it
#: again and again costs memory bandwidth to nobody.
BLOCK_BYTES = 256 * 1024
STAMP = struct.Struct("<Q")


@dataclass(frozen=True)
class Report:
    """
    What one end saw.

    @ivar seconds: from the first byte to the end of the stream.
    @ivar checksum: CRC-32 of all bytes; 0 when not asked for.
    """

    total_bytes: int
    seconds: float
    checksum: int


@dataclass(frozen=True)
class SinkOptions:
    """
    @ivar stall_after: number of bytes after which the sink stops reading.
    @ivar stall_seconds: how long it then does not read; 0 reads on at once.
    """

    checksum: bool = False
    stall_after: int = 0
    stall_seconds: float = 0.0


def run_source(path: Path, seconds: float, maximum: int = sys.maxsize, checksum: bool = False) -> Report:
    """
    Connect to the UNIX socket at C{path}, send for C{seconds} or until
    C{maximum} bytes (rounded up to whole blocks) are sent, half-close, and
    wait for the other end to close.

    @raise ConnectionError: the stream was refused, reset, or answered with bytes.
    """
    # Not compressible, and different in every place.
    block = bytearray(random.Random(16).randbytes(BLOCK_BYTES))
    number, crc = 0, 0
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        started = time.monotonic()
        while time.monotonic() - started < seconds and number * BLOCK_BYTES < maximum:
            STAMP.pack_into(block, 0, number)
            if checksum:
                crc = zlib.crc32(block, crc)
            connection.sendall(block)
            number += 1
        connection.shutdown(socket.SHUT_WR)
        if connection.recv(1):
            raise ConnectionError(f"{path}: the sink never sends, yet bytes came back")
    return Report(number * BLOCK_BYTES, time.monotonic() - started, crc)


def run_sink(path: Path, options: SinkOptions) -> Report:
    """
    Listen on the UNIX socket C{path}, take one connection, read it to its end and close it.

    @raise ConnectionError: the bytes are not those of L{run_source}, or the stream was reset.
    """
    buffer = memoryview(bytearray(1024 * 1024))
    received, crc, started = 0, 0, 0.0
    stall_seconds = options.stall_seconds
    with socket.socket(socket.AF_UNIX) as port:
        port.bind(str(path))
        port.listen(1)
        connection, _ = port.accept()
    with connection:
        while count := connection.recv_into(buffer):
            started = started or time.monotonic()
            check_stamps(buffer[:count], received)
            if options.checksum:
                crc = zlib.crc32(buffer[:count], crc)
            received += count
            if stall_seconds and received >= options.stall_after:
                time.sleep(stall_seconds)
                stall_seconds = 0.0
        finished = time.monotonic()
    return Report(received, finished - started, crc)


def check_stamps(received: memoryview, offset: int) -> None:
    """
    Check the block numbers that lie entirely within C{received}.

    @param offset: the place in the stream of its first byte.
    @raise ConnectionError: a block has another number than its place says.
    """
    first = -offset % BLOCK_BYTES
    for place in range(first, len(received) - STAMP.size + 1, BLOCK_BYTES):
        (number,) = STAMP.unpack_from(received, place)
        expected = (offset + place) // BLOCK_BYTES
        if number != expected:
            raise ConnectionError(f"block {expected} expected at byte {offset + place}, found block {number}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Be one end and print its L{Report} as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__)
    parser.add_argument("role", choices=["source", "sink"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0, help="source: how long to send")
    parser.add_argument("--bytes", type=int, default=sys.maxsize, help="source: how much to send at most")
    parser.add_argument("--checksum", action="store_true")
    parser.add_argument("--stall-after", type=int, default=0, help="sink: bytes after which to stop reading")
    parser.add_argument("--stall-seconds", type=float, default=0.0, help="sink: how long not to read")
    given = parser.parse_args(arguments)
    if given.role == "source":
        report = run_source(given.path, given.seconds, given.bytes, given.checksum)
    else:
        report = run_sink(given.path, SinkOptions(given.checksum, given.stall_after, given.stall_seconds))
    print(json.dumps(asdict(report)))


if __name__ == "__main__":
    main()
