"""
What was sent and not acknowledged yet (protocol.md 6).

Each side numbers the bytes of its sequenced frames (header and payload) from
0, once per session.  This buffer holds the frames between C{acknowledged} and
C{end}: they would have to be said again on a new link.  It holds references,
not copies, to the buffers that the transport was given.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final

from relaymux.core.frames import Buffer
from relaymux.errors import ErrorCode, RemoteProtocolError

#: Bytes of control frames that may be unacknowledged beyond the capacity: some ten
#: thousand frames, of which a peer that acknowledges at all never leaves so many.
HEAD_ROOM: Final = 256 * 1024

#: Bytes of memory that a frame costs here beside its own: its tuple, list and header
#: objects.  Without it, a capacity filled by frames of a few bytes would be exceeded
#: several times over.
FRAME_COST: Final = 256


#: Times its own length that what is held without a link may pin of others' memory.
PINNED_SHARE: Final = 4


class ReplayBuffer:
    """
    The unacknowledged sequenced frames of one direction, oldest first.

    C{capacity} bounds what DATA frames may fill.  Control frames may exceed it
    by L{HEAD_ROOM}: holding back a CREDIT because data is unacknowledged could
    stop both sides for good.

    @ivar least: what C{capacity} began with, and does not fall below.
    @ivar widened_at: C{acknowledged} when C{capacity} was last raised.
    """

    def __init__(self, capacity: int) -> None:
        """@param capacity: bytes of unacknowledged frames at which DATA waits."""
        self.capacity = self.least = capacity
        self.widened_at = 0
        self.end = 0
        self.acknowledged = 0
        self._frames: deque[tuple[int, Sequence[Buffer]]] = deque()

    @property
    def held_bytes(self) -> int:
        """Bytes sent and not acknowledged."""
        return self.end - self.acknowledged

    @property
    def room(self) -> int:
        """Bytes of DATA frames, headers included, that may be added; never negative."""
        return max(0, self.slack)

    @property
    def slack(self) -> int:
        """As C{room}, and negative if control frames have exceeded the capacity."""
        return self.capacity - self.held_bytes - FRAME_COST * len(self._frames)

    @property
    def most_held(self) -> int:
        """Bytes held from which on control frames have to wait, too."""
        return self.capacity + HEAD_ROOM

    @property
    def ends(self) -> list[int]:
        """The offsets at which the frames end that are held, oldest first."""
        return [end for end, _ in self._frames]

    @property
    def full(self) -> bool:
        """Whether control frames have to wait, too."""
        return self.held_bytes >= self.most_held

    def append(self, buffers: Sequence[Buffer], size: int) -> None:
        """Keep one frame: C{buffers} in order, C{size} bytes in all."""
        self.end += size
        self._frames.append((self.end, buffers))

    def acknowledge(self, offset: int) -> bool:
        """
        Drop what the peer has.

        @param offset: the peer's receive offset; one heard before is no news.
        @return: whether anything was dropped.
        @raise RemoteProtocolError: an offset we never sent, one behind an
            earlier one, or one inside a frame.
        """
        if offset == self.acknowledged:
            return False
        if not self.acknowledged < offset <= self.end:
            raise RemoteProtocolError(
                ErrorCode.ACK_ERROR,
                f"acknowledged {offset}; expected {self.acknowledged} to {self.end}",
            )
        frames = self._frames
        while frames and frames[0][0] <= offset:
            self.acknowledged = frames.popleft()[0]
        if self.acknowledged != offset:
            raise RemoteProtocolError(ErrorCode.ACK_ERROR, f"acknowledged {offset}, which is inside a frame")
        return True

    def carried(self, sent: Sequence[tuple[int, Sequence[Buffer]]], end: int, acknowledged: int) -> None:
        """
        Keep frames that others have sent, behind those that are here; see L{Outbox.carried}.

        @raise RemoteProtocolError: C{acknowledged} is inside a frame.
        """
        if acknowledged > self.end:
            # So all that is here is, and those of the others that are not among C{sent}.
            self._frames.clear()
            self.acknowledged = acknowledged
        else:
            self.acknowledge(acknowledged)
        self._frames.extend(sent)
        self.end = end

    def can_continue_at(self, offset: int) -> bool:
        """Whether C{offset} is one at which sending can go on: on a frame boundary, still held here."""
        return offset == self.acknowledged or any(end == offset for end, _ in self._frames)

    def unacknowledged(self) -> Iterator[Sequence[Buffer]]:
        """@return: the frames that are held, oldest first."""
        return (buffers for _, buffers in self._frames)

    def compact(self) -> None:
        """
        See that what is held for long pins little more memory than it is long.

        Frames are views of buffers that others share.  With a link those are wanted
        for a round trip; without one for as long as the session is kept.
        """
        pinned = {
            id(buffer.obj): memoryview(buffer.obj).nbytes
            for _, buffers in self._frames
            for buffer in buffers
            if isinstance(buffer, memoryview)
        }
        if sum(pinned.values()) <= PINNED_SHARE * self.held_bytes:
            return
        self._frames = deque((end, (b"".join(buffers),)) for end, buffers in self._frames)
