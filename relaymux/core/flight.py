"""
What is on its way to the other daemon, as PING and PONG tell.

The kernels at both ends of a link hold megabytes.  Whenever the receiving daemon is the
slower one of the two they fill, and every message is behind that: 6 MB are 10 ms.  So
while somebody waits for answers, PINGs are put among the data.  The answer to one says
that the peer's daemon has read everything in front of it, and bulk waits while as much as
is allowed was sent since.

An ACK says as much, but need not come before 512 KiB were received.  A PING is answered
at once, by any peer (protocol.md 9.1), so only the side that sends has to know that
somebody waits.
"""

from __future__ import annotations

from collections import deque
from typing import Final

__all__ = ["FLIGHT_BYTES", "UNBOUNDED", "Flight"]

#: Beyond every offset.
UNBOUNDED: Final = 2**64

#: Bytes that bulk may have on its way beside a message, on a line that takes no time.
#: Half a turn of reading: with more p99 of a message is worse, with less bulk is slower than ssh's
#: (docs/decisions/0023).
FLIGHT_BYTES = 64 * 1024

#: Bytes per second for which there is room besides, times the round trip: what is on a long
#: line is not in anybody's queue.  About what one daemon sends.
FASTEST = 1_000_000_000

#: PINGs to be sent in what may be on its way.
PINGS_PER_FLIGHT: Final = 2

#: PINGs whose answers are waited for.  More than L{PINGS_PER_FLIGHT} and those of the
#: keepalive are not on their way at once, unless the peer answers none.
MOST_UNANSWERED: Final = 8


class Flight:
    """
    One direction of one link.

    Offsets number the bytes of sequenced frames.

    @ivar round_trip: seconds that the last PING took; 0 before the first.
    """

    def __init__(self) -> None:
        self.round_trip = 0.0
        self._shortest: float | None = None
        self._number = 0
        self._pinged = 0  # offset of the last PING
        self._arrived = 0
        # Oldest first: number, offset, time.  A peer need not answer each of them.
        self._unanswered: deque[tuple[int, int, float]] = deque(maxlen=MOST_UNANSWERED)

    def ping(self, offset: int, now: float) -> int:
        """
        A PING leaves behind everything below C{offset}.

        @return: its number.
        """
        self._number += 1
        self._pinged = offset
        self._unanswered.append((self._number, offset, now))
        return self._number

    def pong(self, number: int, now: float) -> bool:
        """
        An answer arrived.

        @return: whether to a PING that was not answered yet; C{round_trip} is its time then.
        """
        unanswered = self._unanswered
        if not any(number == sent for sent, _, _ in unanswered):
            return False
        while unanswered[0][0] != number:
            unanswered.popleft()  # the peer answers only the latest
        _, offset, since = unanswered.popleft()
        self.arrived(offset)
        self.round_trip = max(0.0, now - since)
        if self._shortest is None or self.round_trip < self._shortest:
            self._shortest = self.round_trip
        return True

    def arrived(self, offset: int) -> None:
        """The peer has everything below C{offset}; it may be known."""
        self._arrived = max(self._arrived, offset)

    @property
    def bulk_until(self) -> int:
        """The offset that bulk may reach while somebody waits; L{UNBOUNDED} before the first answer."""
        return UNBOUNDED if self._shortest is None else self._arrived + self._allowed

    def probe_due(self, offset: int) -> bool:
        """@return: whether the next PING should leave now that everything below C{offset} has."""
        return self._shortest is not None and offset - self._pinged >= self._allowed // PINGS_PER_FLIGHT

    @property
    def _allowed(self) -> int:
        """Bytes; by the shortest round trip, as others waited behind data."""
        return FLIGHT_BYTES + int(FASTEST * (self._shortest or 0.0))
