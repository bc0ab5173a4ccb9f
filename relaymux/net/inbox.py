"""
Received bytes that wait for their consumer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

__all__ = ["Inbox"]

#: Pieces shorter than this are copied when they have to wait.  A view of pooled
#: memory pins a whole buffer of 256 KiB, so what waits in pieces of this length
#: pins at most four times its own; shorter ones are gathered.
WAITING_PIECE = 64 * 1024


class Inbox:
    """Pieces in the order of their arrival; bounded by the window of their stream."""

    def __init__(self) -> None:
        self._pieces: deque[memoryview | bytearray] = deque()  # a bytearray is still being filled

    def __bool__(self) -> bool:
        """Whether anything waits."""
        return bool(self._pieces)

    def add(self, buffers: Sequence[memoryview]) -> None:
        """Keep C{buffers} for an indefinite time without pinning much more memory than they are long."""
        pieces = self._pieces
        for buffer in buffers:
            last = pieces[-1] if pieces else None
            if len(buffer) >= WAITING_PIECE:
                pieces.append(buffer)
            elif isinstance(last, bytearray) and len(last) < WAITING_PIECE:
                last += buffer
            else:
                pieces.append(bytearray(buffer))

    def put_back(self, buffers: Sequence[memoryview]) -> None:
        """Keep what was taken and not wanted yet, in front of everything."""
        self._pieces.extendleft(reversed(buffers))

    def take(self) -> tuple[memoryview, ...]:
        """@return: all that waits, which does not any more."""
        taken = tuple(
            memoryview(piece).toreadonly() if isinstance(piece, bytearray) else piece
            for piece in self._pieces
        )
        self._pieces.clear()
        return taken

    def clear(self) -> None:
        """Drop what waits."""
        self._pieces.clear()
