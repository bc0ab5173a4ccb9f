"""What a guest says on its serial port, wherever it is just now."""

from __future__ import annotations

import asyncio
import time
from io import FileIO
from itertools import pairwise
from pathlib import Path

from relaymux.testing.qemu.console import GuestFailed

__all__ = ["Heartbeat"]

_LINE_BYTES = 18

#: Seconds between two looks at the files, which is what the guest takes for a tick.
_LOOK_SECONDS = 0.005

#: Bytes that are read at once; the guest says 4 KiB in a second.
_CHUNK = 1 << 16


class Heartbeat:
    """
    Follows two files as one: what is written on one host goes on on the other.

    @ivar ticks: number and arrival (seconds of the monotonic clock) of each tick; some
        thousand in a test, so they are all kept.
    @ivar moves: arrival of the first byte after each move, and on which side.
    """

    def __init__(self, files: tuple[Path, Path]) -> None:
        """@param files: of the two sides; they need not exist yet."""
        self.ticks: list[tuple[int, float]] = []
        self.moves: list[tuple[float, int]] = []
        self._files = files
        self._open: list[FileIO | None] = [None, None]
        self._active: int | None = None
        self._rest = b""
        self._failure: str | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def last(self) -> int:
        """Number of the last tick; 0 before the first."""
        return self.ticks[-1][0] if self.ticks else 0

    @property
    def side(self) -> int | None:
        """Which of the two files was written to last."""
        return self._active

    def start(self) -> None:
        """Begin to follow."""
        self._task = asyncio.ensure_future(self._follow())

    async def stop(self) -> None:
        """Read what there is, and follow no longer."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self.look()
        for side, file in enumerate(self._open):
            if file is not None:
                file.close()
                self._open[side] = None

    def check(self) -> None:
        """@raise GuestFailed: it has found something wrong, or says what does not follow."""
        if self._failure is not None:
            raise GuestFailed(self._failure)

    async def wait_tick(self, number: int, seconds: float) -> None:
        """
        Wait for tick C{number} or a later one.

        @raise GuestFailed: the guest found something bad, or is too slow.
        """
        until = time.monotonic() + seconds
        while self.last < number:
            self.check()
            if time.monotonic() > until:
                raise GuestFailed(f"no tick {number} within {seconds:g} s; the last one is {self.last}")
            await asyncio.sleep(_LOOK_SECONDS)
        self.check()

    def longest_gap(self, since: float) -> float:
        """@return: the most seconds between two ticks that arrived after C{since}."""
        times = [arrival for _, arrival in self.ticks if arrival >= since]
        return max((b - a for a, b in pairwise(times)), default=0.0)

    def look(self) -> None:
        """Read what has come since the last look."""
        # The side where the guest is not comes first: if the guest has just arrived
        # there, all that it had said on the other side is in that file by now.
        order = (1, 0) if self._active == 0 else (0, 1)
        found = {side: self._read(side) for side in order}
        now = time.monotonic()
        for side in reversed(order):
            if not found[side]:
                continue
            if side != self._active:
                self._active = side
                self.moves.append((now, side))
            self._take(found[side], now)

    async def _follow(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(_LOOK_SECONDS)

    def _read(self, side: int) -> bytes:
        file = self._open[side]
        if file is None:
            try:
                file = self._open[side] = self._files[side].open("rb", buffering=0)
            except FileNotFoundError:
                return b""
        return file.read(_CHUNK)

    def _take(self, data: bytes, now: float) -> None:
        text = self._rest + data
        place = 0
        while self._failure is None and len(text) - place >= _LINE_BYTES:
            expected = b"tick %08d ok\r\n" % (self.last + 1)
            line = text[place : place + _LINE_BYTES]
            if line != expected:
                said = text[place : place + 64].decode("ascii", "replace").strip()
                self._failure = f"the guest says {said!r} where {expected.decode().strip()!r} follows"
                break
            self.ticks.append((self.last + 1, now))
            place += _LINE_BYTES
        self._rest = text[place:]
        if self._failure is None and b"BAD" in self._rest:
            self._failure = f"the guest found something wrong: {self._rest.decode('ascii', 'replace')}"
