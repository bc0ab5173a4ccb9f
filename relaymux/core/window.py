"""
Credit: how much one side may send, and when the other grants more (protocol.md 5).

Credit is an absolute offset in one direction of one stream: "you may send up
to byte N".  Saying it again is therefore harmless, and a newer value replaces
an older one that has not been sent yet.  Credit is returned when the local
consumer I{took} bytes, never when they arrived: a consumer that stalls stops
its sender after one window, and nothing else.
"""

from __future__ import annotations

from typing import Final

from relaymux.core.meter import Meter
from relaymux.errors import ErrorCode, LocalError, RemoteProtocolError

#: Highest offset that is legal: leaves the top bit for sums that cannot overflow.
MAX_OFFSET: Final = 2**63 - 1

#: A grant waits until this share of the window was consumed.  With a quarter the
#: sender always has at least three quarters of a window of credit in hand as long
#: as the consumer keeps up, and four CREDIT frames are sent per window.
GRANT_SHARE: Final = 4


class SendWindow:
    """What the peer lets us send in one direction of one stream."""

    __slots__ = ("limit", "sent")

    def __init__(self, limit: int) -> None:
        """@param limit: the credit to begin with, from the peer's HELLO or WELCOME."""
        self.limit = limit
        self.sent = 0

    @property
    def room(self) -> int:
        """Bytes that may be sent now."""
        return self.limit - self.sent

    def raise_limit(self, limit: int, stream_id: int) -> None:
        """@raise RemoteProtocolError: C{limit} is lower than before, or no offset."""
        if not self.limit <= limit <= MAX_OFFSET:
            raise RemoteProtocolError(
                ErrorCode.FLOW_CONTROL_ERROR, f"credit went from {self.limit} to {limit}", stream_id
            )
        self.limit = limit


class ReceiveWindow:
    """
    What we let the peer send in one direction of one stream.

    @ivar size: bytes we are willing to hold.
    @ivar least: what C{size} began with, and does not fall below.
    @ivar drawn: bytes that this has of the session's account; see L{Growth}.
    @ivar meter: of how fast the consumer takes bytes.
    """

    __slots__ = ("consumed", "drawn", "granted", "least", "meter", "received", "size")

    def __init__(self, size: int) -> None:
        """@param size: bytes we are willing to hold; also the credit the peer begins with."""
        self.size = self.least = size
        self.drawn = 0
        self.meter = Meter()
        self.granted = size
        self.received = 0
        self.consumed = 0

    def receive(self, count: int, stream_id: int) -> None:
        """@raise RemoteProtocolError: the peer exceeded its credit; nothing was counted."""
        if self.received + count > self.granted:
            raise RemoteProtocolError(
                ErrorCode.FLOW_CONTROL_ERROR,
                f"{self.received + count} bytes sent with credit for {self.granted}",
                stream_id,
            )
        self.received += count

    def consume(self, count: int) -> bool:
        """
        Note that the consumer took C{count} bytes.

        @return: whether enough was consumed for new credit to be worth a frame.
        @raise LocalError: more than was received.
        """
        if count < 0 or self.consumed + count > self.received:
            raise LocalError(f"{self.consumed} + {count} bytes consumed of {self.received} received")
        self.consumed += count
        return self.consumed + self.size - self.granted >= self.size // GRANT_SHARE

    def grant(self) -> int:
        """Raise the limit as far as the window allows.  @return: the new limit."""
        self.granted = max(self.granted, self.consumed + self.size)
        return self.granted
