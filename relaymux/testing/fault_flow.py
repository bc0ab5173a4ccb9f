"""
One direction of one connection through the fault proxy, and the sockets at its ends.

Bytes and ends travel in the same queue, so a delay or a blackhole holds back
an end as it does the bytes before it.  An end of input becomes a half-close on
the other side, a reset a reset.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any
from typing import Protocol as Structure

from twisted.internet.interfaces import IHalfCloseableProtocol, IPullProducer
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from relaymux.testing.fault_lane import SLICE_BYTES, Lane

__all__ = ["End", "Ending", "Flow"]


class Ending(Enum):
    """How a connection ends."""

    FIN = "fin"
    RST = "rst"


@implementer(IPullProducer)
class Flow:
    """
    One direction of a connection.

    It is the pull producer of the socket it writes to, which asks for more
    when the kernel has taken all: so each write is one C{send}, and the moment
    after exactly N bytes is known.

    @ivar source: where it comes from.
    @ivar carried: bytes that have left this flow.
    @ivar queued: bytes received that have not, at most the lane's capacity, or
        C{hold_bytes}, and one read.
    @ivar cut_at: where C{carried} must not pass before a cut.
    @ivar hold_bytes: keep everything, up to this many bytes, instead of
        delivering it; L{None} does not.
    """

    def __init__(
        self, clock: Any, lane: Lane, source: End, target: End, stopped: Callable[[Flow], object]
    ) -> None:
        """
        @param stopped: called with this when C{cut_at} or the lane's C{stop_offset}
            is reached, with all before it in the kernel; and when C{hold_bytes} are there.
        """
        self.lane = lane
        self.carried = self.queued = 0
        self.cut_at: int | None = None
        self.hold_bytes: int | None = None
        self._clock = clock
        self.source = source
        self._target = target
        self._stopped = stopped
        self._queue: deque[tuple[float, bytes | memoryview | Ending]] = deque()
        self._in_flight = 0
        self._discarding = False
        self._timer: Any = None

    def received(self, data: bytes) -> None:
        """The source sent C{data}."""
        self.lane.received += len(data)
        if self._discarding:
            self.lane.dropped += len(data)
            return
        self.queued += len(data)
        self._enqueue(data)
        if self.is_full_hold():
            self._stopped(self)

    def is_full_hold(self) -> bool:
        """@return: whether C{hold_bytes} are there."""
        return self.hold_bytes is not None and self.queued >= self.hold_bytes

    def end(self, ending: Ending) -> None:
        """The source ended so: let the target end likewise, after all that was received."""
        if not self._discarding:
            self._enqueue(ending)

    def _enqueue(self, item: bytes | Ending) -> None:
        due = self.lane.due(self._clock.seconds())
        if self._queue:
            due = max(due, self._queue[-1][0])
        self._queue.append((due, item))
        self.check()

    def discard(self) -> None:
        """Drop what waits and what comes; what the target's socket has been given leaves."""
        self._discarding = True
        self.lane.dropped += self.queued
        self.queued = 0
        self._queue.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.check()

    def target_lost(self) -> None:
        """Nothing can leave any more."""
        self.lane.dropped += self._in_flight
        self._in_flight = 0
        self.discard()

    def resumeProducing(self) -> None:
        """The kernel has all that was written."""
        self.lane.delivered += self._in_flight
        self._in_flight = 0
        self.check()

    def stopProducing(self) -> None:
        """The target's socket is lost, which its protocol is about to be told."""

    def check(self) -> None:
        """Do what can be done now; called whenever something has changed."""
        self._pump()
        capacity = self.lane.capacity if self.hold_bytes is None else self.hold_bytes
        self.source.keep_reading(
            not self.lane.silent and (self._discarding or (self._target.open and self.queued < capacity))
        )

    def _pump(self) -> None:
        lane = self.lane
        while self._target.open and not self._in_flight and self.hold_bytes is None:
            if not self._discarding and self._is_stop():
                self._stopped(self)
                return
            if not self._queue or lane.silent:
                return
            due, item = self._queue[0]
            now = self._clock.seconds()
            wait = max(due, lane.free_at if lane.rate else 0) - now
            if wait > 0:
                self._wake_in(wait)
                return
            if isinstance(item, Ending):
                self._queue.popleft()
                self._target.end(item)
                continue
            size = lane.allowance(now)
            if self.cut_at is not None:
                size = min(size, self.cut_at - self.carried)
            if lane.stop_offset is not None:
                size = min(size, lane.stop_offset - lane.position)
            data = self._take(size, now)
            self.carried += len(data)
            altered = lane.carry(data)
            if altered:
                self._in_flight = len(data)
                self._target.transport.write(altered)
            else:
                lane.delivered += len(data)

    def _is_stop(self) -> bool:
        offset = self.lane.stop_offset
        return (offset is not None and self.lane.position >= offset) or (
            self.cut_at is not None and self.carried >= self.cut_at
        )

    def _take(self, size: int, now: float) -> bytes:
        """@return: what may leave by now, at most C{size} bytes."""
        pieces: list[bytes | memoryview] = []
        while size and self._queue:
            due, item = self._queue[0]
            if due > now or isinstance(item, Ending):
                break
            if len(item) > size:
                view = memoryview(item)
                self._queue[0] = (due, view[size:])
                item = view[:size]
            else:
                self._queue.popleft()
            pieces.append(item)
            size -= len(item)
            self.queued -= len(item)
        return b"".join(pieces)

    def _wake_in(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = self._clock.callLater(seconds, self._wake)
        else:
            self._timer.reset(seconds)

    def _wake(self) -> None:
        self._timer = None
        self.check()


class Ends(Structure):
    """What an L{End} belongs to."""

    def check(self) -> None:
        """The end is connected."""

    def end_reset(self, end: End) -> None:
        """C{end} is lost and had not ended both ways."""

    def end_closed(self) -> None:
        """An end is lost."""


@implementer(IHalfCloseableProtocol)
class End(Protocol):
    """
    One of the two sockets.

    @ivar open: whether it is connected.
    @ivar outgoing: what comes from this socket.
    @ivar incoming: what goes to it.
    """

    transport: Any
    outgoing: Flow
    incoming: Flow

    def __init__(self, connection: Ends, receive_buffer: int | None) -> None:
        self.open = False
        self._connection = connection
        self._receive_buffer = receive_buffer
        self._reading = True
        self._read_ended = self._write_ended = False

    def connectionMade(self) -> None:
        self.open = True
        handle = self.transport.getHandle()
        if handle.family != socket.AF_UNIX:
            self.transport.setTcpNoDelay(True)
        if self._receive_buffer is not None:
            handle.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._receive_buffer)
        self.transport.bufferSize = SLICE_BYTES
        self.transport.registerProducer(self.incoming, False)
        self._connection.check()

    def keep_reading(self, wanted: bool) -> None:
        """Read from the socket, or let its sender wait."""
        if self.open and not self._read_ended and wanted is not self._reading:
            self._reading = wanted
            (self.transport.resumeProducing if wanted else self.transport.pauseProducing)()

    def end(self, ending: Ending) -> None:
        """Half-close after what was written, or reset at once; does nothing the second time."""
        if not self.open:
            return
        if ending is Ending.RST:
            self.transport.abortConnection()
        elif not self._write_ended:
            self.transport.unregisterProducer()
            self.transport.loseWriteConnection()

    def dataReceived(self, data: bytes) -> None:
        self.outgoing.received(data)

    def readConnectionLost(self) -> None:
        self._read_ended = True
        self.outgoing.end(Ending.FIN)
        self._close_if_ended()

    def writeConnectionLost(self) -> None:
        self._write_ended = True
        self.incoming.resumeProducing()
        self._close_if_ended()

    def _close_if_ended(self) -> None:
        if self._read_ended and self._write_ended:
            self.transport.loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.open = False
        self.incoming.target_lost()
        if not (self._read_ended and self._write_ended):
            self._connection.end_reset(self)
        self._connection.end_closed()
