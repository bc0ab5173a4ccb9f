"""
Whose turn it is to send, and how much.

Streams that can send wait in one queue.  The first sends at most one frame
and goes to the end, so a stream with much to say waits for at most one frame
of each of the others, however much they have.

Before that queue goes another one, of the streams that have just come to have
something to send, and little of it: libvirt's keepalive, an NBD server's answers, a
guest's request for a page.  They wait for one another and for what has left already, not
for disks.  One turn there, and what is left of a stream queues like everybody's.  So
nobody has to be told which stream is urgent, and none can be by being called so: it is
what RFC 8290 (FQ-CoDel) does for flows that are sparse.
"""

from __future__ import annotations

from collections import deque
from typing import Final

#: The longest DATA payload we make when one stream alone has something to send: the
#: cost of a frame is per frame (5 - 20 microseconds of Python on each side), so bulk
#: wants long ones.  Longer ones than this gain little: a local socket takes about as
#: much at once.
BULK_FRAME: Final = 512 * 1024

#: The longest while several streams take turns: 64 KiB are 5 ms at 100 Mbit/s, which
#: is what a message that is not small waits for each busy neighbour.
SHARED_FRAME: Final = 64 * 1024

#: The most that a stream may have to send to go before others: more than what libvirt and
#: NBD say in between, less than what is read of a stream that is held up by the link.
LITTLE: Final = 16 * 1024

#: The most that an opener says together with OPEN: a request, and all that it has to say for the
#: moment, so that an answer will come soon.
GREETING: Final = 4 * 1024

#: Turns in front of the others in a row: 256 KiB, 20 ms at 100 Mbit/s.  Streams that come
#: again and again with little are then not all there is.
LITTLE_TURNS: Final = 16


class TurnQueue:
    """
    Streams with something to send, each at most once.

    Bounded by the number of open streams.
    """

    def __init__(self) -> None:
        self._turns: deque[int] = deque()
        self._little: deque[int] = deque()
        self._waiting: set[int] = set()
        self._little_turns = 0
        self._is_little = False

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def has_little(self) -> bool:
        """Whether a stream with little to send waits for its first turn."""
        return bool(self._little)

    def add(self, stream_id: int, queued: int) -> None:
        """
        Queue C{stream_id}, which did not wait for a turn, unless it does.

        @param queued: the bytes that it has to send.
        """
        if stream_id not in self._waiting:
            self._waiting.add(stream_id)
            (self._little if queued <= LITTLE else self._turns).append(stream_id)

    def again(self, stream_id: int) -> None:
        """Queue C{stream_id}, which has had its turn and has more to send, at the end."""
        self._waiting.add(stream_id)
        self._turns.append(stream_id)

    def take(self) -> int:
        """Remove and return the stream whose turn it is.  C{IndexError} when none waits."""
        if self._little and (self._little_turns < LITTLE_TURNS or not self._turns):
            self._little_turns += 1
            self._is_little = True
            stream_id = self._little.popleft()
        else:
            self._little_turns = 0
            self._is_little = False
            stream_id = self._turns.popleft()
        self._waiting.discard(stream_id)
        return stream_id

    def discard(self, stream_id: int) -> None:
        """Forget C{stream_id}; not an error when it does not wait."""
        if stream_id in self._waiting:
            self._waiting.discard(stream_id)
            (self._turns if stream_id in self._turns else self._little).remove(stream_id)

    def frame_limit(self) -> int:
        """@return: the longest DATA payload for the turn just taken."""
        if self._is_little:
            return LITTLE
        return SHARED_FRAME if self._waiting else BULK_FRAME
