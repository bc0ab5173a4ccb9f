"""
How much memory both daemons need while a reader stalls under full load.

Several streams send as fast as they can; the reader of the first stops
reading for a while, then reads on to the end.  Nothing may be lost, the other
streams must go on, and both daemons together may grow by no more than the
windows of the streams, the replay buffer, and a constant.  Then the same with
the stalled stream alone.  See docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.processes import BenchmarkError, Memory, Stream
from benchmarks.relays import Relays, relaymux

__all__ = ["ALLOWANCE", "Stall", "main", "measure_stall"]

MIB = 1024 * 1024

#: Bytes beside windows and replay buffer, for both daemons together: receive
#: buffers, what TLS holds, objects, and what malloc has not given back.
ALLOWANCE = 64 * MIB

#: Seconds between two looks at the daemons' memory.
INTERVAL = 0.1

#: Bytes that the stalling reader takes first, so that the stream has grown
#: whatever grows with use.
BEFORE_STALL = 64 * MIB


@dataclass(frozen=True)
class Stall:
    """
    One scenario's outcome; all sizes in bytes.

    @ivar idle: resident memory of both daemons before the first stream.
    @ivar peak: the highest sum of both that was seen.
    @ivar peak_source: the source daemon's own highest, and so on for the destination.
    @ivar anonymous_growth: as C{peak - idle}, counting only the processes' own data.
    @ivar bound: what C{growth} may be.
    @ivar stalled_bytes: what the stalled stream carried in all, checksummed.
    @ivar other_rate: GB/s that the other streams together carried meanwhile.
    """

    transport: str
    streams: int
    seconds: float
    idle: int
    peak: int
    peak_source: int
    peak_destination: int
    anonymous_growth: int
    bound: int
    stalled_bytes: int
    other_rate: float

    @property
    def growth(self) -> int:
        """How much both daemons grew."""
        return self.peak - self.idle


def measure_stall(relays: Relays, transport: str, seconds: float, window: int, replay: int) -> Stall:
    """
    Let the first stream's reader stall for C{seconds} while the others are busy.

    @param window: bytes, as configured for each stream.
    @param replay: bytes, as configured for the link.
    @raise BenchmarkError: bytes were lost, or a stream does not end.
    """
    idle = _memory(relays)
    relays.prove()
    samples: list[list[Memory]] = []
    load = ["--seconds", seconds + 2]
    with ExitStack() as stack:
        streams = [stack.enter_context(Stream(*path)) for path in relays.paths]
        stalling = ["--checksum", "--stall-after", BEFORE_STALL, "--stall-seconds", seconds]
        streams[0].start([*load, "--checksum"], stalling)
        for stream in streams[1:]:
            stream.start(load)
        end = time.monotonic() + seconds + 3  # The sources stop after 2, then the stalled reader catches up.
        while time.monotonic() < end:
            samples.append(_memory(relays))
            time.sleep(INTERVAL)
        reports = [stream.finish(120) for stream in streams]
    samples.append(_memory(relays))
    source, destination = zip(*samples, strict=True)
    both = [near.resident + far.resident for near, far in samples]
    own = [near.anonymous + far.anonymous for near, far in samples]
    return Stall(
        transport=transport,
        streams=len(streams),
        seconds=seconds,
        idle=sum(memory.resident for memory in idle),
        peak=max(both),
        peak_source=max(memory.resident for memory in source),
        peak_destination=max(memory.resident for memory in destination),
        anonymous_growth=max(own) - sum(memory.anonymous for memory in idle),
        bound=len(streams) * window + replay + ALLOWANCE,
        stalled_bytes=reports[0].total_bytes,
        other_rate=sum(report.total_bytes / report.seconds for report in reports[1:]) / 1e9,
    )


def _memory(relays: Relays) -> list[Memory]:
    return [daemon.memory() for daemon in relays.daemons]


def table(stalls: Sequence[Stall]) -> Table:
    """@return: what was seen, in MiB, for the terminal."""
    shown = Table(title="Most resident memory while a reader stalls, both daemons, MiB", box=SIMPLE_HEAD)
    columns = "link", "streams", "stall", "idle", "source", "dest.", "growth", "allowed", "others"
    for column in columns:
        shown.add_column(column, justify="right")
    for stall in stalls:
        colour = "green" if stall.growth <= stall.bound else "red"
        shown.add_row(
            stall.transport,
            str(stall.streams),
            f"{stall.seconds:.0f} s",
            f"{stall.idle / MIB:.1f}",
            f"{stall.peak_source / MIB:.1f}",
            f"{stall.peak_destination / MIB:.1f}",
            f"[{colour}]{stall.growth / MIB:.1f}[/]",
            f"{stall.bound / MIB:.0f}",
            f"{stall.other_rate:.2f} GB/s" if stall.streams > 1 else "-",
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """@return: exit status; 1 if bytes were lost, or with C{--check} if a bound was exceeded."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stall", description=__doc__)
    parser.add_argument("--transport", choices=["tcp", "tls", "unix"], default="tcp")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="how long the reader stalls (default: 60)"
    )
    parser.add_argument("--streams", type=int, default=4, help="in the first scenario (default: 4)")
    parser.add_argument("--window", type=int, default=4, metavar="MIB", help="of each stream (default: 4)")
    parser.add_argument("--replay-buffer", type=int, default=32, metavar="MIB", help="(default: 32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here, in bytes")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a bound is exceeded")
    given = parser.parse_args(arguments)
    options = {"window": f"{given.window}M", "replay-buffer": f"{given.replay_buffer}M"}
    stalls = []
    try:
        for streams in dict.fromkeys((given.streams, 1)):
            with (
                tempfile.TemporaryDirectory(prefix="rmx-") as directory,
                relaymux(Path(directory), given.transport, streams, options) as relays,
            ):
                sizes = given.window * MIB, given.replay_buffer * MIB
                stalls.append(measure_stall(relays, given.transport, given.seconds, *sizes))
    except BenchmarkError as e:
        print(f"benchmark failed: {e}", file=sys.stderr)
        return 1
    Console().print(table(stalls))
    if given.json:
        given.json.write_text(json.dumps([asdict(stall) for stall in stalls], indent=2) + "\n")
    return 1 if given.check and any(stall.growth > stall.bound for stall in stalls) else 0


if __name__ == "__main__":
    raise SystemExit(main())
