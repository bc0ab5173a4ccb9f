"""What a guest says on its serial console, and whether it may be believed."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass

__all__ = ["Console", "Continuity", "GuestFailed", "continuity"]

_LINE = re.compile(rb"tick (\d{8}) ok\r\n")

#: The guest's last words, with three numbers.
_COMPLAINT = re.compile(rb"BAD \w+ (?:[0-9A-F]{8} ){3}")


class GuestFailed(Exception):
    """The guest found something wrong, or says what it should not say."""


class Console:
    """
    The bytes of one machine's serial console with their arrival.

    @ivar data: all of them so far.
    @ivar ticks: number and arrival (seconds of the monotonic clock) of every
        tick whose whole line is in C{data}.
    """

    def __init__(self) -> None:
        self.data = bytearray()
        self.ticks: list[tuple[int, float]] = []
        self._changed = asyncio.Condition()
        self._parsed = 0
        self.ended = False

    @property
    def last(self) -> int:
        """Number of the last tick; 0 before the first."""
        return self.ticks[-1][0] if self.ticks else 0

    async def read_from(self, stream: asyncio.StreamReader) -> None:
        """Take bytes until C{stream} ends."""
        while chunk := await stream.read(1 << 16):
            self.feed(chunk, time.monotonic())
            async with self._changed:
                self._changed.notify_all()
        self.ended = True
        async with self._changed:
            self._changed.notify_all()

    def feed(self, chunk: bytes, now: float) -> None:
        """Add bytes that arrived at C{now}."""
        self.data += chunk
        for match in _LINE.finditer(self.data, self._parsed):
            self.ticks.append((int(match[1]), now))
            self._parsed = match.end()

    def check(self) -> None:
        """@raise GuestFailed: it has reported, or begun to report, something bad."""
        place = self.data.find(b"BAD", self._parsed)
        if place >= 0:
            raise GuestFailed(bytes(self.data[place:]).decode("ascii", "replace").strip())

    async def wait_tick(self, number: int, seconds: float) -> None:
        """
        Wait for tick C{number} or a later one.

        @raise GuestFailed: the guest found something bad, ended, or is too slow.
        """

        def reached() -> bool:
            return self.last >= number or self.ended or bool(_COMPLAINT.search(self.data, self._parsed))

        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(reached), seconds)
            except asyncio.TimeoutError:
                self.check()
                raise GuestFailed(
                    f"no tick {number} within {seconds:g} s; the last one is {self.last}"
                ) from None
        self.check()
        if self.last < number:
            raise GuestFailed(f"the console ended at tick {self.last}, before {number}")


@dataclass(frozen=True)
class Continuity:
    """
    What two consoles say together.

    @ivar last: the last tick whose line began on the source.
    @ivar end: the last tick on the destination.
    @ivar pause: seconds between the source's last tick and the destination's first.
    """

    last: int
    end: int
    pause: float


def continuity(source: Console, destination: Console) -> Continuity:
    """
    Check that the destination's console continues the source's at the exact byte.

    @raise GuestFailed: something is missing, doubled, or not a tick.
    """
    source.check()
    destination.check()
    if not source.ticks or not destination.ticks:
        silent = "source" if not source.ticks else "destination"
        raise GuestFailed(f"the {silent}'s console has no tick")
    whole = bytes(source.data + destination.data)
    count = len(whole) // 18 + 1
    expected = b"".join(b"tick %08d ok\r\n" % number for number in range(1, count + 1))
    if not expected.startswith(whole):
        place = next(i for i, (a, b) in enumerate(zip(whole, expected, strict=False)) if a != b)
        start = place - place % 18
        side = "source" if place < len(source.data) else "destination"
        raise GuestFailed(
            f"the {side} says {whole[start : start + 18]!r} where {expected[start : start + 18]!r} follows"
        )
    pause = destination.ticks[0][1] - source.ticks[-1][1]
    return Continuity((len(source.data) + 17) // 18, destination.last, pause)
