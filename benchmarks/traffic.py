"""
The two ends of a bulk stream where there is no C compiler: C{python -m benchmarks.traffic source|sink ...}.

It does what F{generators/traffic.c} does in one direction, with the same options and
the same report, at a higher cost: one block is sent over and over and one buffer
received into.  Every block starts with its own offset, and the receiver checks
it: bytes that were lost, doubled or moved end the run.  C{--verify} compares
every byte, for runs whose time does not count.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.streams import Report

__all__ = ["BLOCK_BYTES", "check_stamps", "main", "verify_bytes"]

#: Fits into the second-level cache of current processors, so that reading it
#: again and again costs memory bandwidth to nobody.
BLOCK_BYTES = 256 * 1024
STAMP = struct.Struct("<Q")

#: Seconds between two entries of the history, from which the steady rate comes.
_INTERVAL = 0.02

#: Not compressible, and different in every place.
_PATTERN = random.Random(16).randbytes(BLOCK_BYTES)


@dataclass(frozen=True)
class Options:
    """
    @ivar seconds: how long to send at most.
    @ivar maximum: how many bytes to send at most, rounded up to whole blocks.
    @ivar verify: compare every byte.
    @ivar stall_after: number of bytes after which the receiver stops reading.
    @ivar stall_seconds: how long it then does not read; 0 reads on at once.
    """

    seconds: float
    maximum: int
    verify: bool
    stall_after: int
    stall_seconds: float


def transmit(connection: socket.socket, options: Options) -> Report:
    """Send, then half-close."""
    block = bytearray(_PATTERN)
    offset = 0
    begin = time.monotonic()
    while time.monotonic() - begin < options.seconds and offset < options.maximum:
        STAMP.pack_into(block, 0, offset)
        connection.sendall(block)
        offset += BLOCK_BYTES
    connection.shutdown(socket.SHUT_WR)
    return Report(offset, begin, time.monotonic(), 0.0)


def receive(connection: socket.socket, options: Options) -> Report:
    """
    Read to the end of the stream.

    @raise ConnectionError: the bytes are not those of L{transmit}.
    """
    buffer = memoryview(bytearray(1024 * 1024))
    received, begin, stall_seconds = 0, 0.0, options.stall_seconds
    history: list[tuple[float, int]] = []
    while count := connection.recv_into(buffer):
        moment = time.monotonic()
        begin = begin or moment
        check_stamps(buffer[:count], received)
        if options.verify:
            verify_bytes(buffer[:count], received)
        received += count
        if not history or moment - history[-1][0] >= _INTERVAL:
            history.append((moment, received))
        if stall_seconds and received >= options.stall_after:
            time.sleep(stall_seconds)
            stall_seconds = 0.0
    end = time.monotonic()
    begin = begin or end
    later = [(moment, count) for moment, count in history if moment >= (begin + end) / 2]
    steady = (received - later[0][1]) / (end - later[0][0]) if later else 0.0
    return Report(received, begin, end, steady)


def check_stamps(received: memoryview, offset: int) -> None:
    """
    Check the blocks' offsets that lie entirely within C{received}.

    @param offset: the place in the stream of its first byte.
    @raise ConnectionError: a block has another offset than its place.
    """
    for place in range(-offset % BLOCK_BYTES, len(received) - STAMP.size + 1, BLOCK_BYTES):
        (found,) = STAMP.unpack_from(received, place)
        if found != offset + place:
            raise ConnectionError(f"byte {offset + place}: the bytes of {found} are here")


def verify_bytes(received: memoryview, offset: int) -> None:
    """
    Compare every byte.

    @param offset: the place in the stream of the first one.
    @raise ConnectionError: one is not what belongs there.
    """
    place = 0
    while place < len(received):
        block = bytearray(_PATTERN)
        within = (offset + place) % BLOCK_BYTES
        STAMP.pack_into(block, 0, offset + place - within)
        piece = received[place : place + BLOCK_BYTES - within]
        expected = memoryview(block)[within : within + len(piece)]
        if piece != expected:
            wrong = next(i for i, (a, b) in enumerate(zip(piece, expected, strict=True)) if a != b)
            raise ConnectionError(
                f"byte {offset + place + wrong}: {piece[wrong]:02x} instead of {expected[wrong]:02x}"
            )
        place += len(piece)


def connect(role: str, address: str) -> socket.socket:
    """
    @param role: C{"source"} dials, C{"sink"} takes one connection.
    @param address: path of a UNIX socket, or number of a TCP port of 127.0.0.1.
    """
    local = "/" in address
    place = address if local else ("127.0.0.1", int(address))
    connection = socket.socket(socket.AF_UNIX if local else socket.AF_INET)
    if role == "source":
        connection.connect(place)
        return connection
    with connection as port:
        port.bind(f"{address}~" if local else place)
        port.listen()
        if local:
            # A relay may run as another user; the directory keeps everybody else out.
            Path(f"{address}~").chmod(0o777)
            # It gets its name now that who has seen that can connect.
            Path(f"{address}~").rename(address)
        return port.accept()[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Be one end and print as JSON what was sent and received."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__)
    parser.add_argument("role", choices=["source", "sink"])
    parser.add_argument("address")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to send")
    parser.add_argument("--bytes", type=int, default=sys.maxsize, help="how much to send at most")
    parser.add_argument("--verify", action="store_true", help="compare every byte that is received")
    parser.add_argument("--stall-after", type=int, default=0, help="bytes after which to stop reading")
    parser.add_argument("--stall-seconds", type=float, default=0.0, help="how long not to read")
    given = parser.parse_args(arguments)
    options = Options(given.seconds, given.bytes, given.verify, given.stall_after, given.stall_seconds)
    sent = Report(0, 0.0, 0.0, 0.0)
    with connect(given.role, given.address) as connection:
        if given.role == "source":
            sent = transmit(connection, options)
        received = receive(connection, options)
    if given.role == "source" and received.total_bytes:
        raise ConnectionError(f"{given.address}: the sink does not send, yet bytes came back")
    print(json.dumps({"sent": vars(sent), "received": vars(received)}))


if __name__ == "__main__":
    main()
