"""
Couples a local UNIX socket to a stream, byte for byte, end for end.

What happens at one end is done at the other, as if QEMU's two sockets were one::

    local socket                         stream
    end of input                ->       FIN
    reset, or read error        ->       RESET and STOP_SENDING
    takes no more (EPIPE)       ->       STOP_SENDING
    output ended, all delivered <-       FIN
    closed abruptly             <-       RESET, refusal, session lost (*)
    input shut                  <-       STOP_SENDING

(*) one after the other, where the local program cannot bear several at once.

Each end is the other's producer, so neither reads what the other cannot take.
Bytes count as consumed, and give the peer new credit, when the kernel has taken
them for the local socket.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast
from typing import Protocol as Contract

from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IHalfCloseableProtocol, IProtocol, IPushProducer
from twisted.internet.protocol import connectionDone
from twisted.python.failure import Failure
from zope.interface import classImplements

from relaymux.core.schedule import GREETING
from relaymux.errors import ErrorCode, SessionLost
from relaymux.interfaces import IBufferReceiver
from relaymux.net.apart import Apart
from relaymux.net.ending import Ending
from relaymux.net.sockets import SocketTransport
from relaymux.net.stream import StreamTransport

__all__ = ["Bridge", "Watcher"]


class Watcher(Contract):
    """Sees the bytes of both directions pass by; keeps them at most for the call."""

    def passed_from_local(self, buffers: Sequence[memoryview]) -> None:
        """The local program has sent C{buffers}."""

    def passed_from_stream(self, buffers: Sequence[memoryview]) -> None:
        """The program at the other end has sent C{buffers}."""


class LocalEnd:
    """
    The protocol of the local socket.  Until L{Bridge.join} it reads nothing:
    what is unread when the stream cannot be had stays unread, and the local
    program sees a reset where the kernel can show one.  Its first words may
    have been looked at, and sent (L{Bridge.greeting}).
    """

    __deletable__ = ("transport", "_bridge")

    transport: SocketTransport

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge

    def makeConnection(self, transport: Any) -> None:
        self.transport = transport
        self.connectionMade()

    def connectionMade(self) -> None:
        self.transport.pauseProducing()
        self._bridge.local_connected()

    def dataReceived(self, data: bytes) -> None:
        self.buffersReceived((memoryview(data),))

    def buffersReceived(self, buffers: Sequence[memoryview]) -> None:
        self._bridge.from_local(buffers)

    def buffersWritten(self, count: int) -> None:
        self._bridge.written_locally(count)

    def readConnectionLost(self) -> None:
        self._bridge.local_finished()

    def writeConnectionLost(self) -> None:
        self._bridge.local_stopped()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._bridge.local_lost(reason)

    def let_go(self) -> None:
        """It is over: what knows one another would only be freed by the garbage collector."""
        del self.transport, self._bridge

    # As the stream's producer.

    def pauseProducing(self) -> None:
        self.transport.pauseProducing()

    def resumeProducing(self) -> None:
        self.transport.resumeProducing()

    def stopProducing(self) -> None:
        """The stream is over, which the other end is told with its reason."""


class StreamEnd:
    """The protocol of the stream."""

    def __init__(self, bridge: Bridge, stream: StreamTransport) -> None:
        self._bridge = bridge
        self._stream = stream

    def makeConnection(self, transport: Any) -> None:
        """It has been given the stream already."""

    def connectionMade(self) -> None:
        """See L{makeConnection}."""

    def dataReceived(self, data: bytes) -> None:
        self.buffersReceived((memoryview(data),))

    def buffersReceived(self, buffers: Sequence[memoryview]) -> None:
        self._bridge.from_stream(buffers)

    def buffersWritten(self, count: int) -> None:
        """Of no interest: what the peer took is told by its credit."""

    def readConnectionLost(self) -> None:
        self._bridge.stream_finished()

    def writeConnectionLost(self) -> None:
        self._bridge.stream_stopped()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._bridge.stream_lost(reason)

    # As the local socket's producer.

    def pauseProducing(self) -> None:
        self._stream.pauseProducing()

    def resumeProducing(self) -> None:
        self._stream.resumeProducing()

    def stopProducing(self) -> None:
        """The local socket is gone, which the other end is told with its reason."""


classImplements(LocalEnd, IBufferReceiver, IHalfCloseableProtocol, IProtocol, IPushProducer)
classImplements(StreamEnd, IBufferReceiver, IHalfCloseableProtocol, IProtocol, IPushProducer)


class Bridge:
    """
    One local connection and its stream.

    @ivar local: the protocol to give to the local connection.
    @ivar sent: bytes read from the local socket.
    @ivar received: bytes that the kernel took for the local socket.
    @ivar ending: what is known of its end.
    @ivar watcher: sees the bytes before they go on; L{None} costs nothing.
    """

    def __init__(
        self,
        lost: Callable[[Bridge], None],
        connected: Callable[[Bridge], None] = lambda _: None,
        apart: Apart | None = None,
    ) -> None:
        """
        @param connected: called with it when the local connection is there.
        @param lost: called once, when neither end is left; C{ending} says why.
        @param apart: decides when the local connection is closed where relaymux ends the bridge,
            with others; L{None} closes it at once.
        """
        self.local = LocalEnd(self)
        self._connected = connected
        self.sent = 0
        self.received = 0
        self.ending = Ending()
        self.watcher: Watcher | None = None
        self._apart = apart
        self._given_up = False
        self._taken_late = 0
        self._lost: Callable[[Bridge], None] | None = lost
        self._stream: StreamTransport | None = None
        self._local_open = True

    @property
    def is_local_open(self) -> bool:
        """Whether the local connection was not lost yet."""
        return self._local_open

    @property
    def is_local_gone(self) -> bool:
        """Whether the local program has closed, even if what it had sent before is not read yet."""
        return not self._local_open or self.local.transport.hung_up

    @property
    def is_joined(self) -> bool:
        """Whether there is a stream."""
        return self._stream is not None

    @property
    def undelivered(self) -> int:
        """When it is over, bytes read here that the program at the other end is not known to have taken."""
        return self._stream.undelivered if self._stream is not None else 0

    @property
    def untaken(self) -> int:
        """When it is over, bytes that arrived for the local program and that it did not take."""
        return self._stream.untaken - self._taken_late if self._stream is not None else 0

    def join(self, stream: StreamTransport, *, local_speaks: bool = False) -> None:
        """
        Let bytes flow; C{local} is connected.

        @param local_speaks: whether the local program is likely to have said something already.
        """
        self._stream = stream
        if not self._local_open:
            stream.abort(ErrorCode.LOCAL_RESET)
            return
        end = StreamEnd(self, stream)
        socket = self.local.transport
        stream.begin(end, manual_credit=True)
        stream.carrier = self
        stream.registerProducer(cast(IPushProducer, self.local), True)
        socket.registerProducer(cast(IPushProducer, end), True)
        if stream.greeting:
            self._take_greeting(stream.greeting)
            local_speaks = False  # it has spoken
        if stream.queuedBytes:
            return  # for which the socket's producer waits: it will be resumed
        if local_speaks:
            socket.resume_reading()
        else:
            socket.resumeProducing()

    def greeting(self) -> bytes:
        """
        What the local program has said before it is joined, to be sent with OPEN: nothing if that is
        more than L{GREETING}.  A round trip is little to bulk, which is better sent as such from its first
        byte on.

        It is left in the socket until the stream is there: if it cannot be had, nothing was taken.
        """
        said = self.local.transport.peek(GREETING + 1)
        return said if len(said) <= GREETING else b""

    def _take_greeting(self, greeting: bytes) -> None:
        """C{greeting} was sent: what is read from now on is what comes behind it."""
        self.local.transport.skip(len(greeting))
        self._passes_from_local((memoryview(greeting),))

    def refuse(self, reason: Failure) -> None:
        """There will be no stream: close the local connection, as abruptly as the kernel can."""
        self.ending.lost(reason, here=False)
        self.local.transport.abortConnection()

    def give_up(self, reason: Failure) -> None:
        """
        End both ends as an error, when others that were given up have had their time.

        A second call does nothing.  It must be joined, and be one of those that end apart.
        """
        stream, apart = self._stream, self._apart
        assert stream is not None and apart is not None
        if not self._given_up:
            self._given_up = True
            apart.add(lambda: stream.abort(ErrorCode.ABORTED, reason))

    # For the fast path.

    def lend(self) -> SocketTransport | None:
        """See L{Carrier.lend}."""
        return (
            self.local.transport if self.watcher is None and self._local_open and not self._given_up else None
        )

    def carried(self, sent: int, received: int, at_once: int) -> None:
        """See L{Carrier.carried}."""
        self.sent += sent
        self.received += received
        if sent or received:  # nothing at all is no talk
            self.local.transport.passed(at_once)

    # From the local end.

    def local_connected(self) -> None:
        """The local connection is there."""
        self._connected(self)

    def from_local(self, buffers: Sequence[memoryview]) -> None:
        """Bytes for the peer."""
        assert self._stream is not None
        self._passes_from_local(buffers)
        self._stream.writeBuffers(buffers)

    def _passes_from_local(self, buffers: Sequence[memoryview]) -> None:
        count = sum(map(len, buffers))
        self.sent += count
        self.local.transport.passed(count)
        if self.watcher is not None:
            self.watcher.passed_from_local(buffers)

    def written_locally(self, count: int) -> None:
        """The kernel took bytes of the peer."""
        self.received += count
        if self._stream is None:
            return
        if self._stream.connected:
            self._stream.consumed(count)
        else:
            self._taken_late += count

    def local_finished(self) -> None:
        """The local program sends nothing more."""
        self.ending.finished(here=True)
        if self._stream is not None:
            self._stream.loseWriteConnection()

    def local_stopped(self) -> None:
        """The local program takes nothing more."""
        if self._stream is not None:
            self._stream.stop_receiving(ErrorCode.LOCAL_CLOSED)

    def local_lost(self, reason: Failure) -> None:
        """The local connection is gone."""
        self._local_open = False
        self.ending.lost(reason, here=True)
        stream = self._stream
        if stream is not None and stream.connected:
            if isinstance(reason.value, ConnectionDone):
                # All it had was read, and all it wanted was taken.
                stream.unregisterProducer()
                stream.loseConnection()
            elif stream.writable:
                stream.abort(ErrorCode.LOCAL_RESET)
            else:
                # Its input had ended in order before: what was read still arrives.
                stream.stop_receiving(ErrorCode.LOCAL_CLOSED)
        self._check_over()

    # From the stream.

    def from_stream(self, buffers: Sequence[memoryview]) -> None:
        """Bytes for the local program."""
        self.local.transport.passed(sum(map(len, buffers)))
        if self.watcher is not None:
            self.watcher.passed_from_stream(buffers)
        self.local.transport.writeBuffers(buffers)

    def stream_finished(self) -> None:
        """The peer sends nothing more, and all it sent was written."""
        self.ending.finished(here=False)
        self.local.transport.loseWriteConnection()

    def stream_stopped(self) -> None:
        """The peer takes nothing more."""
        self.local.transport.loseReadConnection()

    def stream_lost(self, reason: Failure) -> None:
        """The stream is over."""
        self.ending.lost(reason, here=False)
        if self._local_open:
            if isinstance(reason.value, ConnectionDone):
                self.local.transport.unregisterProducer()
                self.local.transport.loseConnection()
            elif self._apart is not None and isinstance(reason.value, SessionLost):
                # The local program is to notice nothing as yet, and nobody is there for what it says.
                self.local.transport.pauseProducing()
                self._apart.add(self.local.transport.abortConnection)
            else:
                self.local.transport.abortConnection()
        self._check_over()

    def _check_over(self) -> None:
        over = self._stream is None or not self._stream.connected
        lost = self._lost
        if over and not self._local_open and lost is not None:
            self._lost = None
            lost(self)
            self.local.let_go()
