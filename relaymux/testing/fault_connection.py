"""
One connection through the fault proxy: two sockets, and what is on its way between them.

Bytes and ends travel in the same queue, so a delay or a blackhole holds back
an end as it does the bytes before it.  An end of input becomes a half-close on
the other side, a reset a reset.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IHalfCloseableProtocol, IPullProducer
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from zope.interface import implementer

from relaymux.testing.fault_lane import SLICE_BYTES, Lane

__all__ = ["Connection", "Ending", "Flow"]

#: Seconds that both sides have to close after a FIN that came from the proxy.
_FIN_SECONDS: Final = 5.0


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
    @ivar queued: bytes read that have not.
    @ivar cut_at: where C{carried} must not pass before a cut.
    @ivar hold_bytes: keep everything, up to this many bytes, instead of
        delivering it; L{None} does not.
    """

    def __init__(self, clock: Any, lane: Lane, source: End, target: End, stopped: Callable[[], object]) -> None:
        """
        @param stopped: called when C{cut_at} or the lane's C{stop_offset} is
            reached, with all before it in the kernel; and when C{hold_bytes} are there.
        """
        self.lane = lane
        self.carried = self.queued = 0
        self.cut_at = lane.pick_cut()
        self.hold_bytes: int | None = None
        self._clock = clock
        self.source = source
        self._target = target
        self._stopped = stopped
        #: Bounded by the lane's capacity, or C{hold_bytes}, and one read.
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
        if self.hold_bytes is not None and self.queued >= self.hold_bytes:
            self._stopped()

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

    def release(self) -> int:
        """
        Deliver what was held, and after it the end of input.

        @return: how many bytes that is.
        """
        self.hold_bytes = None
        held = self.queued
        self.end(Ending.FIN)
        return held

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
            not self.lane.silent
            and (self._discarding or (self._target.open and self.queued < capacity))
        )

    def _pump(self) -> None:
        lane = self.lane
        while self._target.open and not self._in_flight and self.hold_bytes is None:
            if not self._discarding and self._is_stop():
                self._stopped()
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
            self._in_flight = len(data)
            self.carried += len(data)
            self._target.write(lane.carry(data))

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

    def _wake(self) -> None:
        self._timer = None
        self.check()


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

    def __init__(self, connection: Connection, receive_buffer: int | None) -> None:
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

    def write(self, data: bytes) -> None:
        """Send, when all before has been sent.  C{data} is empty if a fault removed the only byte."""
        if data:
            self.transport.write(data)
        else:
            self.incoming.resumeProducing()

    def end(self, ending: Ending) -> None:
        """Half-close after what was written, or reset at once.  A second call may only turn one into the other."""
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


class Connection:
    """
    A connection that was accepted, and the one to the target that belongs to it.

    @ivar number: which one it is, from 1.
    @ivar near: the socket of who connected.
    @ivar far: the target's.
    @ivar flows: by the name of their side.
    @ivar buried: one side was told that the connection is lost while the other still has it.
    """

    def __init__(self, number: int, events: IConnectionEvents, lanes: dict[Side, Lane], clock: Any, receive_buffer: int | None) -> None:
        self.number = number
        self.buried = False
        self.near = End(self, receive_buffer)
        self.far = End(self, receive_buffer)
        self.flows: dict[Side, Flow] = {
            "up": Flow(clock, lanes["up"], self.near, self.far, self._flow_stopped),
            "down": Flow(clock, lanes["down"], self.far, self.near, self._flow_stopped),
        }
        self.near.outgoing = self.far.incoming = self.flows["up"]
        self.far.outgoing = self.near.incoming = self.flows["down"]
        self._events = events
        self._clock = clock
        self._held: Flow | None = None
        self._timer: Any = None
        self._dialled = False
        self._dial: Deferred[Any] | None = None
        self._over = False

    def check(self) -> None:
        """Do what can be done now; called whenever something has changed."""
        if self.near.open and not self._dialled and not all(flow.lane.silent for flow in self.flows.values()):
            self._dialled = True
            self._dial = self._events.dial(self)
            self._dial.addCallbacks(self._connected, self._unreachable)
        for flow in self.flows.values():
            flow.check()

    def _connected(self, _: object) -> None:
        self._dial = None

    def _unreachable(self, failure: Failure) -> None:
        self._dial = None
        self._events.unreachable(self, failure)
        self.near.end(Ending.RST)
        self.end_closed()

    def _flow_stopped(self, flow: Flow) -> None:
        if flow.hold_bytes is not None:
            self.bury()
        else:
            self._events.stop_reached(self, flow)

    def end_reset(self, end: End) -> None:
        """C{end} was lost without having ended both ways: let the other side know, unless it is not to."""
        if not self.buried or self._held is not end.outgoing:
            end.outgoing.end(Ending.RST)

    def end_closed(self) -> None:
        """One of the sockets, or the attempt to make one, is no more."""
        if not (self.near.open or self.far.open or self._dial or self._over):
            self._over = True
            self._stop_timer()
            for flow in self.flows.values():
                flow.discard()
            self._events.ended(self)

    def cut(self, ending: Ending) -> None:
        """End both sides, and drop what is on its way between them."""
        self._stop_timer()
        self._dialled = True
        for flow in self.flows.values():
            flow.discard()
        for end in (self.near, self.far):
            end.end(ending)
        if self._dial is not None and not self.far.open:
            self._dial.cancel()
        if ending is Ending.FIN and not self._over:
            self._timer = self._clock.callLater(_FIN_SECONDS, self._fin_overdue)

    def _fin_overdue(self) -> None:
        self._timer = None
        self.cut(Ending.RST)

    def hold(self, size: int, seconds: float, side: Side) -> None:
        """
        Keep what C{side} carries from now on, and then reset the socket it comes from.

        @param size: when so many bytes are there,
        @param seconds: or so much time has passed.
        """
        self._stop_timer()
        self._held = self.flows[side]
        self._held.hold_bytes = size
        self._timer = self._clock.callLater(seconds, self._hold_overdue)
        self._held.check()

    def _hold_overdue(self) -> None:
        self._timer = None
        self.bury()

    def bury(self) -> None:
        """Reset the socket that the held bytes come from; the other stays."""
        if self._held is not None and not self.buried:
            self.buried = True
            self._stop_timer()
            self._events.buried(self, self._held)
            self._held.source.end(Ending.RST)

    def release(self) -> int:
        """
        Deliver the held bytes; then, if their source is gone, the end of input.

        @return: how many bytes.
        """
        if self._held is None:
            return 0
        self._stop_timer()
        held, self._held = self._held, None
        return held.release(last=self.buried)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
