"""
A stream as a Twisted transport.

Towards its protocol a stream behaves like a connection of Twisted's: ITransport
to write to, an IConsumer that pauses its producer, an IPushProducer of what the
peer sends, half-closeable in both directions.  Pausing it stops the reading of
the socket at the far end, one window of bytes later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from twisted.internet.error import ConnectionAborted, ConnectionDone
from twisted.internet.interfaces import (
    IAddress,
    IConsumer,
    IHalfCloseableProtocol,
    IProtocol,
    IPushProducer,
    ITransport,
)
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

from relaymux.core.stream import ReceiveState, SendState
from relaymux.errors import ErrorCode, LocalError, StreamReset
from relaymux.interfaces import Buffer, IBufferReceiver, IBufferTransport, IHalfReadTransport

if TYPE_CHECKING:
    from relaymux.net.streams import SessionStreams

__all__ = ["StreamAddress", "StreamTransport"]

#: Pieces shorter than this are copied when they have to wait.  A view of pooled
#: memory pins a whole buffer of 256 KiB, so what waits in pieces of this length
#: pins at most four times its own; shorter ones are gathered.
WAITING_PIECE = 64 * 1024


@implementer(IAddress)
@dataclass(frozen=True)
class StreamAddress:
    """A service of a peer, or a stream's place on this side."""

    peer: str
    service: str

    def __str__(self) -> str:
        return f"{self.service} via {self.peer}"


@implementer(ITransport, IConsumer, IPushProducer, IBufferTransport, IHalfReadTransport)
class StreamTransport:
    """
    One stream of a session.

    Made when the stream is opened; received bytes wait (within the stream's
    window) until L{begin} gives it a protocol.

    @ivar stream_id: the id on the wire.
    @ivar service: the name of the service that was asked for.
    @ivar outgoing: whether this side opened it.
    @ivar connected: whether C{connectionLost} was not called yet.
    """

    disconnecting = False

    _log = Logger("relaymux.link")

    def __init__(self, streams: SessionStreams, stream_id: int, service: str, *, outgoing: bool) -> None:
        self.stream_id = stream_id
        self.service = service
        self.outgoing = outgoing
        self.connected = True
        self._streams = streams
        self._session = streams.session
        self._protocol: IProtocol | None = None
        self._receiver: IBufferReceiver | None = None
        self._manual_credit = False
        self._paused = False
        self._delivering = False
        # Bounded by the stream's window; a bytearray is still being filled.
        self._inbound: deque[memoryview | bytearray] = deque()
        self._stopped_pending = False
        self._given_up: Callable[[], None] | None = None
        self._finish_pending = False
        self._producer: Any = None  # IPushProducer, or IPullProducer: not streaming
        self._streaming = False
        self._held = False

    def begin(self, protocol: IProtocol, *, manual_credit: bool = False) -> None:
        """
        Connect C{protocol} and give it what has arrived so far.

        @param manual_credit: the protocol provides L{IBufferReceiver} and says
            with L{consumed} when it is done with bytes.  Otherwise bytes count as
            consumed when the protocol has returned from receiving them.
        """
        self._protocol = protocol
        self._manual_credit = manual_credit
        if IBufferReceiver.providedBy(protocol):
            self._receiver = protocol
        self._given_up = None
        self.tell(protocol.makeConnection, self)
        self._deliver()
        if self._stopped_pending:
            self._stopped_pending = False
            self.sending_stopped()

    def when_given_up(self, call: Callable[[], None]) -> None:
        """Have C{call} called if the stream ends before L{begin}: its opener does not want it any more."""
        self._given_up = call

    def tell(self, call: Callable[..., object], *args: object) -> None:
        """
        Call our side's program.

        Its failure is the end of its stream.  Passed on, it would be taken for
        the link's, over which the next one would go on behind the lost bytes.
        """
        try:
            call(*args)
        except Exception:
            reason = Failure()
            self._log.failure(
                "stream {number}, {address}: the program behind it failed; the stream is ended",
                failure=reason,
                number=self.stream_id,
                address=self.getPeer(),
            )
            self.abort(ErrorCode.LOCAL_RESET, reason)

    # For the service that the peer asked for.

    def accept(self) -> None:
        """Tell the peer that its stream is connected here; L{begin} comes next."""
        if self.connected:
            self._session.accept(self.stream_id)
            self._streams.flush()

    def refuse(self, code: int, text: str) -> None:
        """Tell the peer why it cannot be connected, in one line."""
        if self.connected:
            self._streams.handle(self._session.refuse(self.stream_id, code, text))
            self._streams.flush()
            self.ended(Failure(StreamReset(code, text)))

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
    def readable(self) -> bool:
        """Whether the peer may still send, or has sent what was not consumed yet."""
        stream = self._session.streams.get(self.stream_id)
        return (
            self.connected
            and stream is not None
            and stream.receive.state in (ReceiveState.OPEN, ReceiveState.FINISHED)
        )

    def write(self, data: bytes) -> None:
        """Send C{data}.  Dropped after the end of our direction, as by any transport of Twisted's."""
        self.writeBuffers((data,))

    def writeSequence(self, iovec: Iterable[bytes]) -> None:
        """Send all of C{iovec}, without joining it."""
        self.writeBuffers(tuple(iovec))

    def writeBuffers(self, buffers: Sequence[Buffer]) -> None:
        """See L{IBufferTransport.writeBuffers}."""
        if not self.writable:
            return
        for buffer in buffers:
            self._session.write(self.stream_id, buffer)
        self._streams.flush()
        self._hold_producer()

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """See C{IConsumer.registerProducer}."""
        if self._producer is not None:
            raise LocalError(f"stream {self.stream_id} has a producer already")
        if not self.writable:
            producer.stopProducing()
            return
        self._producer, self._streaming, self._held = producer, streaming, False
        if streaming:
            self._hold_producer()
        else:
            producer.resumeProducing()

    def unregisterProducer(self) -> None:
        """See C{IConsumer.unregisterProducer}."""
        self._producer = None
        if self.disconnecting:
            self.loseWriteConnection()

    def loseWriteConnection(self) -> None:
        """Half-close: what was written still arrives, then the peer sees the end."""
        if self.writable:
            self._session.finish(self.stream_id)
            self._streams.flush()

    def loseReadConnection(self) -> None:
        """See L{IHalfReadTransport.loseReadConnection}."""
        self.stop_receiving(ErrorCode.LOCAL_CLOSED)

    def loseConnection(self) -> None:
        """
        Close: what was written still arrives; what the peer still sends is dropped.

        C{connectionLost} comes when the peer has everything.
        """
        if self.connected and not self.disconnecting:
            self.disconnecting = True
            if self._producer is None or not self._streaming:
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
        if self.stream_id in self._session.streams:
            events = self._session.abort(self.stream_id, code)
            self._streams.handle(events)
            self._streams.flush()
        self.ended(reason or Failure(StreamReset(code)))

    def stop_receiving(self, code: int) -> None:
        """Take nothing more from the peer and tell it C{code}."""
        if self.readable:
            self._drop_inbound()
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
        self._streams.flush()

    # What the session's table tells us.

    def data_received(self, buffers: list[memoryview]) -> None:
        """Bytes arrived."""
        if self._paused or self._inbound or self._protocol is None or self._delivering:
            self._keep(buffers)
        else:
            self._inbound.extend(buffers)
        self._deliver()

    def finished(self) -> None:
        """The peer half-closed."""
        self._finish_pending = True
        self._deliver()

    def sending_stopped(self) -> None:
        """The peer takes nothing more from us."""
        half_closeable = IHalfCloseableProtocol(self._protocol, None)
        if self._protocol is None:
            self._stopped_pending = True
        elif half_closeable is not None:
            self._producer = None
            self.tell(half_closeable.writeConnectionLost)
        else:
            self._stop_producer()
            self.loseConnection()

    def drained(self) -> None:
        """Everything written is on the link."""
        if self._held:
            self._held = False
            if self._producer is not None:
                self.tell(self._producer.resumeProducing)
        elif self._producer is not None and not self._streaming:
            self.tell(self._producer.resumeProducing)

    def ended(self, reason: Failure) -> None:
        """The stream is over; the protocol is told once."""
        if not self.connected:
            return
        self.connected = False
        self._drop_inbound()
        self._stop_producer()
        self._streams.gone(self)
        protocol, self._protocol = self._protocol, None
        given_up, self._given_up = self._given_up, None
        if protocol is not None:
            self.tell(protocol.connectionLost, reason)
        elif given_up is not None:
            given_up()

    def closed(self) -> None:
        """Both directions ended in order: a pause has nothing to hold back any more."""
        self._paused = False
        self._tell_finished()
        self.ended(Failure(ConnectionDone()))

    # Inside.

    def _deliver(self) -> None:
        if self._delivering or self._protocol is None:
            return
        self._delivering = True
        try:
            while self._inbound and not self._paused and self.connected:
                buffers = tuple(
                    memoryview(piece).toreadonly() if isinstance(piece, bytearray) else piece
                    for piece in self._inbound
                )
                self._inbound.clear()
                self._give(buffers)
        finally:
            self._delivering = False
        self._tell_finished()

    def _tell_finished(self) -> None:
        """Tell the protocol of the peer's end, once it has everything before it."""
        if self._protocol is None or self._paused or not self.connected:
            return
        if self._finish_pending and not self._inbound:
            self._finish_pending = False
            half_closeable = IHalfCloseableProtocol(self._protocol, None)
            if half_closeable is not None:
                self.tell(half_closeable.readConnectionLost)
            else:
                self.loseConnection()

    def _keep(self, buffers: Sequence[memoryview]) -> None:
        """Let C{buffers} wait without pinning much more memory than they are long."""
        for buffer in buffers:
            last = self._inbound[-1] if self._inbound else None
            if len(buffer) >= WAITING_PIECE:
                self._inbound.append(buffer)
            elif isinstance(last, bytearray) and len(last) < WAITING_PIECE:
                last += buffer
            else:
                self._inbound.append(bytearray(buffer))

    def _give(self, buffers: Sequence[memoryview]) -> None:
        assert self._protocol is not None
        if self._receiver is not None:
            self.tell(self._receiver.buffersReceived, buffers)
        else:
            for index, buffer in enumerate(buffers):
                self.tell(self._protocol.dataReceived, bytes(buffer))
                if self._paused or not self.connected:
                    self._inbound.extendleft(reversed(buffers[index + 1 :]))
                    buffers = buffers[: index + 1]
                    break
        if not self._manual_credit:
            self.consumed(sum(map(len, buffers)))

    def _drop_inbound(self) -> None:
        self._inbound.clear()
        self._finish_pending = False

    def _hold_producer(self) -> None:
        if self._streaming and self._producer is not None and not self._held and self.queuedBytes:
            self._held = True
            self._producer.pauseProducing()

    def _stop_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            self.tell(producer.stopProducing)
