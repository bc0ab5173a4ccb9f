"""
One stream as two halves that share nothing (protocol.md 4).

The sending half of one side and the receiving half of the other form one
direction.  A direction ends once: with FIN (everything was sent) or with RESET
(abruptly).  The receiver then says CLOSED, with the bytes its consumer took,
and both have forgotten that direction.  STOP_SENDING is the receiver's way to
make the sender reset.

State tables; what is not listed is the peer's error or the caller's::

    SendHalf                          ReceiveHalf
    OPEN      finish()   -> FINISHING  OPEN       recv FIN       -> FINISHED
    FINISHING queue sent -> ENDED      OPEN       recv RESET     -> ENDED
    OPEN      reset()    -> ENDED      OPEN       stop()         -> DISCARDING
    FINISHING reset()    -> ENDED      FINISHED   stop()         -> ENDED
    ENDED     recv CLOSED-> CLOSED     FINISHED   all consumed   -> ENDED
                                       DISCARDING recv FIN/RESET -> ENDED
                                       ENDED      CLOSED sent    -> CLOSED
"""

from __future__ import annotations

from collections import deque
from enum import Enum

from relaymux.core.frames import Buffer
from relaymux.core.window import ReceiveWindow, SendWindow
from relaymux.errors import ErrorCode, LocalError, RemoteProtocolError


class SendState(Enum):
    """Where the sending half of a stream is."""

    OPEN = "open"
    FINISHING = "finishing"
    ENDED = "ended"
    CLOSED = "closed"


class ReceiveState(Enum):
    """Where the receiving half of a stream is."""

    OPEN = "open"
    FINISHED = "finished"
    DISCARDING = "discarding"
    ENDED = "ended"
    CLOSED = "closed"


class SendHalf:
    """
    Our direction of a stream.

    @ivar accepted: bytes taken from the producer.
    @ivar delivered: bytes that the peer said its consumer took.
    @ivar queued: bytes accepted and not sent.  The producer is told to pause
        while there are any, so that this is at most what it writes at once.
    """

    __slots__ = ("_queue", "accepted", "delivered", "queued", "state", "stream_id", "window")

    def __init__(self, stream_id: int, credit: int) -> None:
        self.stream_id = stream_id
        self.window = SendWindow(credit)
        self.state = SendState.OPEN
        self.accepted = 0
        self.delivered = 0
        self.queued = 0
        self._queue: deque[Buffer] = deque()

    @property
    def ready(self) -> bool:
        """Whether there is something that credit allows to send: data, or the FIN after the last."""
        if self.queued:
            return self.window.room > 0
        return self.state is SendState.FINISHING

    def write(self, *buffers: Buffer) -> None:
        """
        Queue C{buffers}.

        @raise LocalError: the direction was ended before.
        """
        if self.state is not SendState.OPEN:
            raise LocalError(f"stream {self.stream_id}: write after {self.state.value}")
        size = sum(map(len, buffers))
        self._queue.extend(filter(None, buffers))
        self.accepted += size
        self.queued += size

    def take(self, limit: int) -> tuple[list[Buffer], int]:
        """
        Take the payload of the next DATA frame.

        @param limit: the most bytes to take; credit may allow fewer.
        @return: buffers and their total size, which is 0 if nothing can be sent.
        """
        limit = min(limit, self.window.room, self.queued)
        queue = self._queue
        taken: list[Buffer] = []
        missing = limit
        if limit == self.queued:  # as nearly always
            taken.extend(queue)
            queue.clear()
            missing = 0
        while missing > 0:
            buffer = queue.popleft()
            size = len(buffer)
            if size > missing:
                view = memoryview(buffer)
                queue.appendleft(view[missing:])
                buffer = view[:missing]
                size = missing
            taken.append(buffer)
            missing -= size
        self.queued -= limit
        self.window.sent += limit
        return taken, limit

    def finish(self) -> None:
        """No more data follows; the FIN is due once the queue is empty."""
        if self.state is not SendState.OPEN:
            raise LocalError(f"stream {self.stream_id}: finish after {self.state.value}")
        self.state = SendState.FINISHING

    def reset(self) -> None:
        """End abruptly; what is queued is dropped.  Legal until the direction has ended."""
        if self.state not in (SendState.OPEN, SendState.FINISHING):
            raise LocalError(f"stream {self.stream_id}: reset after {self.state.value}")
        self._queue.clear()
        self.queued = 0
        self.state = SendState.ENDED

    def receive_credit(self, limit: int, delivered: int) -> None:
        """CREDIT arrived.  @raise RemoteProtocolError: it does not fit what was said before."""
        if self.state is SendState.CLOSED:
            raise _state_error("CREDIT after CLOSED", self.stream_id)
        self._receive_delivered(delivered)
        self.window.raise_limit(limit, self.stream_id)

    def receive_closed(self, delivered: int) -> None:
        """CLOSED arrived.  @raise RemoteProtocolError: the direction has not ended, or twice."""
        if self.state is not SendState.ENDED:
            raise _state_error(f"CLOSED for a direction that is {self.state.value}", self.stream_id)
        self._receive_delivered(delivered)
        self.state = SendState.CLOSED

    def _receive_delivered(self, delivered: int) -> None:
        if not self.delivered <= delivered <= self.window.sent:
            raise _state_error(
                f"{delivered} bytes reported delivered after {self.delivered}, of {self.window.sent} sent",
                self.stream_id,
            )
        self.delivered = delivered


class ReceiveHalf:
    """The peer's direction of a stream.  Received bytes are counted here and held by the consumer's side."""

    __slots__ = ("state", "stream_id", "window")

    def __init__(self, stream_id: int, window: int) -> None:
        self.stream_id = stream_id
        self.window = ReceiveWindow(window)
        self.state = ReceiveState.OPEN

    def receive_data(self, count: int) -> bool:
        """
        DATA arrived.

        @return: whether the consumer wants it; if not, it is counted and dropped.
        @raise RemoteProtocolError: after the end, or beyond the credit.
        """
        if self.state not in (ReceiveState.OPEN, ReceiveState.DISCARDING):
            raise _state_error("DATA after the end of its direction", self.stream_id)
        self.window.receive(count, self.stream_id)
        return self.state is ReceiveState.OPEN

    def receive_end(self, final_offset: int, *, clean: bool) -> bool:
        """
        FIN (C{clean}) or RESET arrived.

        @return: whether the consumer is to be told.
        @raise RemoteProtocolError: it is the second end, or C{final_offset} is
            not the number of bytes received.
        """
        if self.state not in (ReceiveState.OPEN, ReceiveState.DISCARDING):
            raise _state_error("second end of a direction", self.stream_id)
        if final_offset != self.window.received:
            raise _state_error(
                f"final offset {final_offset} after {self.window.received} bytes", self.stream_id
            )
        wanted = self.state is ReceiveState.OPEN
        # An empty rest needs no consumer: the direction is over at once.
        if clean and wanted and self.window.consumed < self.window.received:
            self.state = ReceiveState.FINISHED
        else:
            self.state = ReceiveState.ENDED
        return wanted

    def consume(self, count: int) -> bool:
        """
        The consumer took C{count} bytes.

        @return: whether a CREDIT is due.  In any state but OPEN credit is of no
            use to the peer; C{state} becomes ENDED with the last byte.
        """
        due = self.window.consume(count)
        if self.state is ReceiveState.FINISHED and self.window.consumed == self.window.received:
            self.state = ReceiveState.ENDED
        return due and self.state is ReceiveState.OPEN

    def stop(self) -> bool:
        """
        The consumer takes no more.

        @return: whether the peer has to be told: not when it has finished already.
        @raise LocalError: stopped or ended before.
        """
        if self.state is ReceiveState.OPEN:
            self.state = ReceiveState.DISCARDING
            return True
        if self.state is ReceiveState.FINISHED:
            self.state = ReceiveState.ENDED
            return False
        raise LocalError(f"stream {self.stream_id}: stop after {self.state.value}")


class Stream:
    """
    Both halves, and whether the far end is connected.

    @ivar outgoing: whether this side opened it.
    @ivar answered: whether OPENED or REFUSED was sent or received.
    @ivar drawn: bytes that it has of the session's account, beside its window's.
    @ivar last_control: the number, in its session, of the last control frame made for it.
    """

    __slots__ = ("answered", "drawn", "last_control", "outgoing", "receive", "send", "service", "stream_id")

    def __init__(self, stream_id: int, service: str, *, outgoing: bool, credit: int, window: int) -> None:
        self.stream_id = stream_id
        self.service = service
        self.outgoing = outgoing
        self.answered = False
        self.drawn = 0
        self.last_control = 0
        self.send = SendHalf(stream_id, credit)
        self.receive = ReceiveHalf(stream_id, window)

    @property
    def closed(self) -> bool:
        """Whether both directions are over and both sides know it."""
        return self.send.state is SendState.CLOSED and self.receive.state is ReceiveState.CLOSED


def _state_error(text: str, stream_id: int) -> RemoteProtocolError:
    return RemoteProtocolError(ErrorCode.STREAM_STATE_ERROR, text, stream_id)
