"""
Whose turn it is to send, and how much.

Streams that can send wait in one queue.  The first sends at most one frame
and goes to the end, so a stream with little to say waits for at most one frame
of each of the others, however much they have.
"""

from __future__ import annotations

from collections import deque

#: The longest DATA payload we make when one stream alone has something to send: the
#: cost of a frame is per frame (5 - 20 microseconds of Python on each side), so bulk
#: wants long ones.  Longer ones than this gain little: a local socket takes about as
#: much at once.
BULK_FRAME = 512 * 1024

#: The longest while several streams take turns: 64 KiB are 5 ms at 100 Mbit/s, which
#: is what a small urgent message waits for each busy neighbour.
SHARED_FRAME = 64 * 1024


class TurnQueue:
    """
    Streams with something to send, each at most once, first come first served.

    Bounded by the number of open streams.
    """

    def __init__(self) -> None:
        self._turns: deque[int] = deque()
        self._waiting: set[int] = set()

    def __len__(self) -> int:
        return len(self._turns)

    def add(self, stream_id: int) -> None:
        """Queue C{stream_id} at the end, unless it waits already."""
        if stream_id not in self._waiting:
            self._waiting.add(stream_id)
            self._turns.append(stream_id)

    def take(self) -> int:
        """Remove and return the stream whose turn it is.  C{IndexError} when none waits."""
        stream_id = self._turns.popleft()
        self._waiting.discard(stream_id)
        return stream_id

    def discard(self, stream_id: int) -> None:
        """Forget C{stream_id}; not an error when it does not wait."""
        if stream_id in self._waiting:
            self._waiting.discard(stream_id)
            self._turns.remove(stream_id)

    def frame_limit(self) -> int:
        """@return: the longest DATA payload for the turn just taken."""
        return SHARED_FRAME if self._turns else BULK_FRAME
