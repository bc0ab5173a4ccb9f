"""
A stream as a Twisted transport.

Towards its protocol a stream behaves like a connection of Twisted's: ITransport
to write to, an IConsumer that pauses its producer, an IPushProducer of what the
peer sends, half-closeable in both directions.  Pausing it stops the reading of
the socket at the far end, one window of bytes later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from typing import Protocol as Contract

from twisted.internet.error import ConnectionAborted
from twisted.internet.interfaces import (
    IAddress,
    IConsumer,
    IHalfCloseableProtocol,
    IProtocol,
    IPushProducer,
    ITransport,
)
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import classImplements, implementer

from relaymux.core.stream import ReceiveState, SendState
from relaymux.errors import ErrorCode, StreamReset
from relaymux.interfaces import Buffer, IBufferReceiver, IBufferTransport, IHalfReadTransport
from relaymux.net.inbox import Inbox
from relaymux.net.producing import ProducerSlot

if TYPE_CHECKING:
    from relaymux.net.sockets import SocketTransport
    from relaymux.net.streams import SessionStreams

__all__ = ["StreamAddress", "StreamTransport"]


_log: Final = Logger("relaymux.link")


class Carrier(Contract):
    """Couples a stream to a socket; see L{relaymux.net.fastpath}."""

    def lend(self) -> SocketTransport | None:
        """@return: the socket, if nobody has to see the bytes."""

    def carried(self, sent: int, received: int, at_once: int) -> None:
        """C{sent} bytes were read of the socket, and C{received} written to it; C{at_once} in one turn."""


@implementer(IAddress)
@dataclass(frozen=True)
class StreamAddress:
    """A service of a peer, or a stream's place on this side."""

    peer: str
    service: str

    def __str__(self) -> str:
        return f"{self.service} via {self.peer}"


class StreamTransport:
    """
    One stream of a session.

    Made when the stream is opened; received bytes wait (within the stream's
    window) until L{begin} gives it a protocol.  An exception of the protocol, or
    of a producer, is logged and resets this stream; it harms no other.

    @ivar stream_id: the id on the wire.
    @ivar service: the name of the service that was asked for.
    @ivar outgoing: whether this side opened it.
    @ivar connected: whether C{connectionLost} was not called yet.
    @ivar undelivered: when it is over, bytes written to it that the peer's consumer is
        not known to have taken.
    @ivar untaken: when it is over, bytes that arrived and were not consumed here.
    @ivar greeting: what was said with OPEN.
    @ivar carrier: who passes its bytes on to a socket and from there as they are; L{None} if
        somebody wants to see them.
    """

    def __init__(self, streams: SessionStreams, stream_id: int, service: str, *, outgoing: bool) -> None:
        self.stream_id = stream_id
        self.service = service
        self.outgoing = outgoing
        self.connected = True
        self.disconnecting = False
        self.undelivered = 0
        self.untaken = 0
        self.greeting = b""
        self.carrier: Carrier | None = None
        self._streams = streams
        self._session = streams.session
        self._protocol: IProtocol | None = None
        self._receiver: IBufferReceiver | None = None
        self._half_closeable: IHalfCloseableProtocol | None = None
        self._manual_credit = False
        self._paused = False
        self._delivering = False
        self._inbox = Inbox()
        self._producer = ProducerSlot()
        self._ending: Failure | None = None
        self._stopped_pending = False
        self._finish_pending = False  # the peer's end was not told yet
        self._finishing = False  # our end has not left yet
        self._given_up: Callable[[], None] | None = None

    def begin(self, protocol: IProtocol, *, manual_credit: bool = False) -> None:
        """
        Connect C{protocol} and give it what has arrived so far.

        @param manual_credit: the protocol provides L{IBufferReceiver} and says
            with L{consumed} when it is done with bytes.  Otherwise bytes count as
            consumed when the protocol has returned from receiving them.
        """
        self._given_up = None
        if self._ending is not None:
            # It was over before there was anybody to be told.
            self._call(protocol.makeConnection, self)
            self._call(protocol.connectionLost, self._ending)
            return
        self._protocol = protocol
        self._manual_credit = manual_credit
        self._half_closeable = IHalfCloseableProtocol(protocol, None)
        if IBufferReceiver.providedBy(protocol):
            self._receiver = protocol
        self._call(protocol.makeConnection, self)
        self._deliver()
        if self._stopped_pending:
            self._stopped_pending = False
            self.sending_stopped()

    def when_given_up(self, call: Callable[[], None]) -> None:
        """Have C{call} called if the stream ends before L{begin}: its opener does not want it any more."""
        self._given_up = call

    def greet(self, data: bytes) -> None:
        """
        Say C{data} together with OPEN, which is about to leave.

        Whoever refuses the stream drops it, so it must not be gone here: whoever is given the
        stream finds it in C{greeting}, and takes it from where it is.
        """
        if data:
            self.greeting = data
            self._session.write(self.stream_id, data)

    # For the service that the peer asked for.

    def accept(self) -> None:
        """Tell the peer that its stream is connected here; L{begin} comes next."""
        if self.connected:
            self._session.accept(self.stream_id)
            self._streams.flush()

    def refuse(self, code: int, text: str) -> None:
        """Tell the peer why it cannot be connected, in one line."""
        if self.connected:
            events = self._session.refuse(self.stream_id, code, text)
            self.ended(Failure(StreamReset(code, text)))
            self._streams.handle(events)
            self._streams.flush()

    # ITransport, IConsumer, IBufferTransport: from our side to the peer.

    @property
    def queuedBytes(self) -> int:
        """Bytes written that are not on a link yet."""
        return self._session.queued(self.stream_id)

    @property
    def writable(self) -> bool:
        """Whether this side may still write."""
        stream = self._session.streams.get(self.stream_id)
        return self.connected and stream is not None and stream.send.state is SendState.OPEN

    @property
    def _is_finishing(self) -> bool:
        stream = self._session.streams.get(self.stream_id)
        return stream is not None and stream.send.state is SendState.FINISHING

    @property
    def readable(self) -> bool:
        """Whether the peer may still send, or has sent what was not consumed yet."""
        stream = self._session.streams.get(self.stream_id)
        return (
            self.connected
            and stream is not None
            and stream.receive.state in (ReceiveState.OPEN, ReceiveState.FINISHED)
        )

    def write(self, data: Buffer) -> None:
        """Send C{data}.  Dropped after the end of our direction, as by any transport of Twisted's."""
        self.writeBuffers((data,))

    def writeSequence(self, iovec: Iterable[bytes]) -> None:
        """Send all of C{iovec}, without joining it."""
        self.writeBuffers(tuple(iovec))

    def writeBuffers(self, buffers: Sequence[Buffer]) -> None:
        """See L{IBufferTransport.writeBuffers}."""
        if not self.writable:
            return
        self._session.write(self.stream_id, *buffers)
        self._streams.flush()
        if self.queuedBytes:
            self._call(self._producer.hold)

    def registerProducer(self, producer: Any, streaming: object) -> None:
        """See C{IConsumer.registerProducer}."""
        if not self.writable:
            producer.stopProducing()
            return
        self._producer.put(producer, bool(streaming))
        if self.queuedBytes:
            self._call(self._producer.hold)

    def unregisterProducer(self) -> None:
        """See C{IConsumer.unregisterProducer}."""
        self._producer.remove()
        if self.disconnecting:
            self.loseWriteConnection()

    def loseWriteConnection(self) -> None:
        """
        Half-close: what was written still arrives, then the peer sees the end.

        As with Twisted's own, C{writeConnectionLost} tells that all has left,
        which may be before this returns.
        """
        if self.writable:
            self._finishing = True
            self._session.finish(self.stream_id)
            self._streams.flush_soon()

    def loseReadConnection(self) -> None:
        """See L{IHalfReadTransport.loseReadConnection}."""
        self.stop_receiving(ErrorCode.LOCAL_CLOSED)

    def loseConnection(self) -> None:
        """
        Close: what was written still arrives; what the peer still sends is dropped.

        A registered producer is let come to its end before.  C{connectionLost}
        comes when the peer has everything.
        """
        if self.connected and not self.disconnecting:
            self.disconnecting = True
            if not self._producer:
                self.loseWriteConnection()
            self.stop_receiving(ErrorCode.LOCAL_CLOSED)

    def abortConnection(self) -> None:
        """End both directions as an error, now."""
        self.abort(ErrorCode.ABORTED, Failure(ConnectionAborted()))

    def abort(self, code: int, reason: Failure | None = None) -> None:
        """
        End, as an error with C{code}, what has not ended; C{connectionLost} comes at once.

        @param reason: for C{connectionLost}; made from the code if not given.
        """
        if not self.connected:
            return
        known = self.stream_id in self._session.streams
        self._take_stock()
        events = self._session.abort(self.stream_id, code) if known else []
        # Told first, with this reason: the events may say that all else had ended in order.
        self.ended(reason or Failure(StreamReset(code)))
        self._streams.handle(events)
        self._streams.flush()

    def stop_receiving(self, code: int) -> None:
        """Take nothing more from the peer and tell it C{code}."""
        if self.readable:
            self._inbox.clear()
            self._finish_pending = False
            events = self._session.stop(self.stream_id, code)
            self._streams.flush()
            self._streams.handle(events)

    def getPeer(self) -> StreamAddress:
        """The service at the other end."""
        return StreamAddress(self._streams.peer_name, self.service)

    def getHost(self) -> StreamAddress:
        """This end."""
        return StreamAddress(self._streams.peer_name, f"stream {self.stream_id}")

    # IPushProducer: from the peer to our side.

    def pauseProducing(self) -> None:
        """Deliver nothing until L{resumeProducing}; the peer is stopped by its credit."""
        self._paused = True

    def resumeProducing(self) -> None:
        """Deliver again, beginning with what has waited."""
        self._paused = False
        self._deliver()

    def stopProducing(self) -> None:
        """See C{IProducer.stopProducing}."""
        self.loseConnection()

    def consumed(self, count: int) -> None:
        """C{count} bytes given out with manual credit were taken: the peer may send as many more."""
        events = self._session.consumed(self.stream_id, count)
        if events:
            self._streams.handle(events)
        if self._session.has_control:
            self._streams.flush()

    @property
    def takes_directly(self) -> bool:
        """Whether what is written now leaves with the next frame, as far as the link takes it."""
        return self.writable and not self.disconnecting and not self.queuedBytes

    @property
    def gives_directly(self) -> bool:
        """Whether what arrives now is in front of nothing that its protocol did not take."""
        if self._paused or self._inbox or self._delivering or self._finish_pending or self.disconnecting:
            return False
        stream = self._session.streams.get(self.stream_id)
        return self.connected and stream is not None and stream.receive.state is ReceiveState.OPEN

    # What the session's table tells us.

    def data_received(self, buffers: list[memoryview], size: int) -> None:
        """C{size} bytes arrived."""
        if self._paused or self._inbox or self._protocol is None or self._delivering:
            # If that fails they are lost, as they count as received: then the stream is over.
            self._call(self._inbox.add, buffers)
            return
        self._delivering = True
        self._give(buffers, size)
        self._delivering = False
        if self._inbox or self._finish_pending:
            self._deliver()

    def finished(self) -> None:
        """The peer half-closed."""
        self._finish_pending = True
        self._deliver()

    def sending_stopped(self) -> None:
        """The peer takes nothing more from us."""
        self._finishing = False
        if self._protocol is None:
            self._stopped_pending = True
            return
        self._call(self._producer.stop)
        half_closeable = self._half_closeable
        if self.disconnecting:
            pass  # nobody wants to know; what is lost is told when all is over
        elif half_closeable is not None:
            self._call(half_closeable.writeConnectionLost)
        else:
            self.loseConnection()

    def drained(self) -> None:
        """Everything written, and our end if it was to follow, is on the link."""
        if self.writable:
            self._call(self._producer.go_on)
        elif self._finishing and not self._is_finishing:
            self._finishing = False
            half_closeable = self._half_closeable
            if half_closeable is not None and not self.disconnecting:
                self._call(half_closeable.writeConnectionLost)

    def ended(self, reason: Failure) -> None:
        """The stream is over; the protocol is told once."""
        if not self.connected:
            return
        self.connected = False
        self._take_stock()
        self._ending = reason
        self._inbox.clear()
        self._call(self._producer.stop)
        self._streams.gone(self, reason)
        protocol, self._protocol = self._protocol, None
        self._half_closeable = self._receiver = self.carrier = None
        given_up, self._given_up = self._given_up, None
        if protocol is not None:
            self._call(protocol.connectionLost, reason)
        elif given_up is not None:
            self._call(given_up)

    def closed(self, reason: Failure | None = None) -> None:
        """
        Both directions have ended.

        @param reason: why that is no good; L{None} if it was in order.
        """
        half_closeable = self._half_closeable
        if self._finish_pending and half_closeable is not None:
            # The consumer was given the last bytes just now, and hears of their end first.
            self._finish_pending = False
            self._call(half_closeable.readConnectionLost)
        self.ended(reason or connectionDone)

    # Inside.

    def _take_stock(self) -> None:
        """Note what is left over, as long as the session knows the stream."""
        stream = self._session.streams.get(self.stream_id)
        if stream is not None:
            self.undelivered = stream.send.accepted - stream.send.delivered
            self.untaken = stream.receive.window.received - stream.receive.window.consumed

    def _deliver(self) -> None:
        if self._delivering or self._protocol is None:
            return
        self._delivering = True
        while self._inbox and not self._paused and self.connected:
            buffers = self._inbox.take()
            self._give(buffers, sum(map(len, buffers)))
        self._delivering = False
        if self._finish_pending and not self._inbox and not self._paused and self.connected:
            self._finish_pending = False
            half_closeable = self._half_closeable
            if half_closeable is not None:
                self._call(half_closeable.readConnectionLost)
            else:
                self._call(self._producer.stop)
                self.loseConnection()

    def _give(self, buffers: Sequence[memoryview], given: int) -> None:
        assert self._protocol is not None
        if self._receiver is not None:
            self._call(self._receiver.buffersReceived, buffers)
        else:
            given = 0
            for number, buffer in enumerate(buffers, 1):
                given += len(buffer)
                self._call(self._protocol.dataReceived, bytes(buffer))
                if not self.readable:
                    return  # it has closed, and wants nothing more
                if self._paused:
                    self._inbox.put_back(buffers[number:])
                    break
        if not self._manual_credit:
            self.consumed(given)

    def _call(self, call: Callable[..., object], *args: object) -> None:
        """Call what others have written."""
        try:
            call(*args)
        except Exception:
            reason = Failure()
            _log.failure("{address}: exception from its user, resetting the stream", address=self.getPeer())
            self.abort(ErrorCode.INTERNAL_ERROR, reason)


classImplements(StreamTransport, IBufferTransport, IConsumer, IHalfReadTransport, IPushProducer, ITransport)
