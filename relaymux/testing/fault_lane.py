"""
One direction through the fault proxy: what is wrong with it now, and what it has carried.

A lane belongs to the proxy, not to a connection, as a cable does: its rate is
shared, and offsets of cuts and damaged bytes go on counting from one
connection to the next.
"""

from __future__ import annotations

import bisect
import math
import random
from typing import Final, Literal

from relaymux.errors import LocalError

__all__ = ["BUFFER_BYTES", "SLICE_BYTES", "Damage", "Lane", "Range", "Side"]

Side = Literal["up", "down"]
Damage = Literal["flip", "insert", "remove"]
#: Lowest and highest, both possible.
Range = tuple[int, int]

#: The most that is read ahead for a delay, for each direction of each connection;
#: 50 ms at 320 MB/s.  One read more may come on top.
BUFFER_BYTES: Final = 16 * 1024 * 1024

#: Bytes read and written at once, and held without a delay.
SLICE_BYTES: Final = 256 * 1024

#: Bytes held at least for a rate: what one write of a daemon may have.
_LEAST_CAPACITY: Final = 64 * 1024

#: Seconds of a rate that are caught up with when the process ran late.
_CATCH_UP_SECONDS: Final = 0.05

#: Seconds' worth of a rate in one piece.
_PIECE_SECONDS: Final = 0.01

#: Offsets waiting for a byte to be damaged.
_MAX_DAMAGES: Final = 10_000


class Lane:
    """
    A direction's faults and counters.

    @ivar silent: whether nothing is read and nothing delivered.
    @ivar delay: seconds that everything is late.
    @ivar jitter: up to so many seconds more, another number for each read.
        The order stays.
    @ivar rate: bytes per second of all connections together; 0 for no limit.
    @ivar segments: sizes of single writes, taken at random; L{None} as it comes.
    @ivar cut_each: after how many bytes a new connection is cut.
    @ivar stop_offset: where L{position} must not pass before a cut.
    @ivar free_at: when the rate allows the next byte.
    @ivar position: bytes of C{received} that have left, or are just leaving.
    @ivar received: bytes read.
    @ivar delivered: of those, how many the kernel took for the other side.
        Damaged ones count, also removed ones; inserted ones do not.
    @ivar dropped: of those, how many ended with a connection.  The last write
        before a reset counts as a whole, though a part may have arrived.
    """

    def __init__(self, side: Side, seed: int) -> None:
        self.side = side
        self._random = {
            use: random.Random(f"{seed} {side} {use}")
            for use in ("jitter", "segments", "each", "damage", "corrupt")
        }
        self.position = self.received = self.delivered = self.dropped = self.damaged = 0
        self.clear()

    def clear(self) -> None:
        """Heal everything; the counters stay."""
        self.silent = False
        self.delay = self.jitter = self.free_at = 0.0
        self.rate = 0
        self.segments: Range | None = None
        self.cut_each: Range | None = None
        self.stop_offset: int | None = None
        self._damages: list[tuple[int, Damage]] = []
        self.corrupt(0)

    @property
    def capacity(self) -> int:
        """Bytes that a connection's direction may wait with before the sender is no longer read."""
        wait = self.delay + self.jitter
        if not self.rate:
            return BUFFER_BYTES if wait else SLICE_BYTES
        return min(BUFFER_BYTES, max(_LEAST_CAPACITY, math.ceil(self.rate * wait)))

    def due(self, now: float) -> float:
        """@return: when what is read at C{now} may leave."""
        return now + self.delay + (self._random["jitter"].uniform(0, self.jitter) if self.jitter else 0)

    def pick_cut(self) -> int | None:
        """@return: after how many bytes a connection that is made now is to be cut."""
        return None if self.cut_each is None else self._random["each"].randint(*self.cut_each)

    def damage(self, offset: int, damage: Damage) -> None:
        """
        Damage the byte that leaves after C{offset} more have: flip one bit of
        it, insert another before it, or remove it.

        @raise LocalError: that one is damaged already, or too many are to be.
        """
        offset += self.position
        if any(taken == offset for taken, _ in self._damages):
            raise LocalError(f"byte {offset - self.position} {self.side} is already to be damaged")
        if len(self._damages) == _MAX_DAMAGES:
            raise LocalError(f"at most {_MAX_DAMAGES} bytes at a time can be marked to be damaged")
        bisect.insort(self._damages, (offset, damage))

    def corrupt(self, probability: float) -> None:
        """From now on flip one bit in a byte with this probability, 0 to 1."""
        self._corruption = probability
        self._corrupt_at = self.position
        if probability:
            self._corrupt_at += self._gap()

    def _gap(self) -> int:
        """@return: how many bytes stay whole before the next damaged one."""
        if self._corruption >= 1:
            return 0
        return int(math.log1p(-self._random["corrupt"].random()) / math.log1p(-self._corruption))

    def allowance(self, now: float) -> int:
        """@return: how many bytes may leave at once, before any cut; only asked when C{free_at} is past."""
        size = SLICE_BYTES
        if self.segments is not None:
            size = self._random["segments"].randint(*self.segments)
        if self.rate:
            size = min(size, max(1, int(self.rate * _PIECE_SECONDS)))
            self.free_at = max(self.free_at, now - _CATCH_UP_SECONDS)
        return size

    def carry(self, data: bytes) -> bytes:
        """
        Account for C{data}, which leaves now.

        @return: what leaves instead.
        """
        start = self.position
        self.position += len(data)
        if self.rate:
            self.free_at += len(data) / self.rate
        corrupt = self._corruption and self._corrupt_at < self.position
        if not corrupt and not (self._damages and self._damages[0][0] < self.position):
            return data
        altered = bytearray(data)
        while self._corruption and self._corrupt_at < self.position:
            altered[self._corrupt_at - start] ^= 1 << self._random["corrupt"].randrange(8)
            self._corrupt_at += 1 + self._gap()
            self.damaged += 1
        shift = 0
        chance = self._random["damage"]
        while self._damages and self._damages[0][0] < self.position:
            offset, damage = self._damages.pop(0)
            at = offset - start + shift
            if damage == "flip":
                altered[at] ^= 1 << chance.randrange(8)
            elif damage == "insert":
                altered.insert(at, chance.randrange(256))
                shift += 1
            else:
                del altered[at]
                shift -= 1
            self.damaged += 1
        return bytes(altered)
