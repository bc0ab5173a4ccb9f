"""
The ends of a connection in memory; see L{relaymux.testing.memory}.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import (
    IAddress,
    IConsumer,
    IHalfCloseableProtocol,
    IProducer,
    IProtocol,
    IPushProducer,
    ITransport,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from relaymux.interfaces import Buffer, IBufferReceiver, IBufferTransport, IHalfReadTransport

__all__ = ["BufferMemoryTransport", "MemoryAddress", "MemoryTransport", "Network", "Pipe"]


class Network(Protocol):
    """What an end asks of the connection it belongs to."""

    def portion(self, available: int) -> int:
        """@return: how many of so many bytes to take next, at least 1."""

    def wake(self) -> None:
        """There is something to do in the next turn."""

    def cut(self) -> None:
        """Lose the connection now."""


@implementer(IAddress)
@dataclass(frozen=True)
class MemoryAddress:
    """One end of a connection in memory."""

    name: str


@dataclass
class Pipe:
    """
    What is under way in one direction.

    @ivar held: bytes that the writer got rid of and the reader has not got; at most C{capacity}.
    @ivar total: bytes that the reader got.
    @ivar cut_at: the connection is cut when C{total} is this.
    @ivar stalled: nothing arrives, an end or a loss neither.
    @ivar ended: nothing comes after C{held}.
    @ivar broken: what comes after C{held} is no clean end.
    @ivar closed: the reader takes no more.
    """

    capacity: int
    held: bytearray = field(default_factory=bytearray)
    total: int = 0
    cut_at: int | None = None
    stalled: bool = False
    ended: bool = False
    broken: bool = False
    closed: bool = False


@implementer(ITransport, IConsumer, IPushProducer, IHalfReadTransport)
class MemoryTransport:
    """
    One end, of the plain kind: it calls C{dataReceived}.

    @ivar protocol: what it is connected to.
    @ivar connected: whether C{connectionLost} was not called yet.
    @ivar disconnecting: whether C{loseConnection} was called.
    @ivar paused: whether the protocol takes nothing at the moment.
    @ivar queuedBytes: bytes written that found no room on the way yet.
    @ivar peerIdentity: see L{IIdentifiedTransport}, which it provides if the connection has identities.
    @ivar exporter: see L{IExportingTransport}, which it provides if the connection has key material.
    """

    peerIdentity: str
    exporter: Callable[[str, int], bytes]

    def __init__(
        self, connection: Network, name: str, protocol: IProtocol, incoming: Pipe, outgoing: Pipe
    ) -> None:
        """
        @param name: of this end; C{getHost} and C{getPeer} tell it.
        """
        self.protocol = protocol
        self.connected = True
        self.disconnecting = False
        self.paused = False
        self.queuedBytes = 0
        self._connection = connection
        self._name = name
        self._incoming = incoming
        self._outgoing = outgoing
        # Bounded by the producer's obedience, as in any transport.
        self._queue: deque[memoryview] = deque()
        self._producer: IProducer | None = None
        self._streaming = False
        self._producer_paused = False
        self._input_open = True
        self._output_open = True
        self._output_ending = False
        self._output_failed = False
        self._aborted = False
        self._ending: Exception = ConnectionDone()  # the reason once both directions have ended

    @property
    def received_bytes(self) -> int:
        """How many bytes have arrived here."""
        return self._incoming.total

    def getHost(self) -> MemoryAddress:
        """This end."""
        return MemoryAddress(self._name)

    def getPeer(self) -> MemoryAddress:
        """The other end."""
        return MemoryAddress(f"peer of {self._name}")

    # Writing

    def write(self, data: bytes) -> None:
        """See C{ITransport.write}."""
        self._write((data,))

    def writeSequence(self, iovec: Iterable[bytes]) -> None:
        """See C{ITransport.writeSequence}."""
        self._write(tuple(iovec))

    def registerProducer(self, producer: IProducer, streaming: bool) -> None:
        """See C{IConsumer.registerProducer}."""
        if self._producer is not None:
            raise RuntimeError(f"cannot register {producer!r}: {self._producer!r} was never unregistered")
        if not self.connected:
            producer.stopProducing()
            return
        self._producer, self._streaming, self._producer_paused = producer, streaming, False
        if not streaming:
            cast(IPushProducer, producer).resumeProducing()
        self._hold_producer()

    def unregisterProducer(self) -> None:
        """See C{IConsumer.unregisterProducer}."""
        self._producer = None
        self._connection.wake()

    def _write(self, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            if not isinstance(buffer, (bytes, memoryview)):
                raise TypeError(f"data must be bytes or a memoryview, not {type(buffer).__name__}")
        if not self._output_open or self._output_ending:
            return
        had_queue = bool(self._queue)
        self._queue.extend(memoryview(buffer) for buffer in buffers if len(buffer))
        self.queuedBytes += sum(map(len, buffers))
        if not had_queue:
            self._flush()
        self._hold_producer()
        self._connection.wake()

    def _flush(self) -> int:
        """Move what there is room for from the queue onto the way.  @return: how many bytes."""
        pipe, sent = self._outgoing, 0
        if pipe.closed and not self._incoming.stalled and self._queue:
            self._output_failed = True
            self._drop_queue()
        while self._queue and len(pipe.held) < pipe.capacity:
            buffer = self._queue.popleft()
            room = pipe.capacity - len(pipe.held)
            pipe.held += buffer[:room]
            sent += min(room, len(buffer))
            if len(buffer) > room:
                self._queue.appendleft(buffer[room:])
        self.queuedBytes -= sent
        if sent:
            self._sent(sent)
        return sent

    def _sent(self, count: int) -> None:
        """C{count} bytes left the queue."""

    def _hold_producer(self) -> None:
        producer: Any = self._producer
        if self._queue and producer is not None and self._streaming and not self._producer_paused:
            self._producer_paused = True
            producer.pauseProducing()

    def _drop_queue(self) -> None:
        self._queue.clear()
        self.queuedBytes = 0

    # Reading

    def pauseProducing(self) -> None:
        """Deliver nothing until L{resumeProducing}."""
        self.paused = True

    def resumeProducing(self) -> None:
        """Deliver again, from the next turn on."""
        self.paused = False
        self._connection.wake()

    def stopProducing(self) -> None:
        """See C{IProducer.stopProducing}."""
        self.loseConnection()

    def loseReadConnection(self) -> None:
        """See L{IHalfReadTransport.loseReadConnection}."""
        self._input_open = False
        self._incoming.closed = True
        self._incoming.held.clear()
        if not self._output_open:
            self.lose(self._ending)
        self._connection.wake()

    # Ending

    def loseWriteConnection(self) -> None:
        """Send what is queued, then the end of our direction."""
        if self._output_open:
            self._output_ending = True
            self._connection.wake()

    def loseConnection(self) -> None:
        """
        Send what is queued, then close.

        Nothing is read any more, as by Twisted's own: two ends that both close
        with more queued than finds room wait for one another until one aborts.
        """
        if self.connected:
            self.disconnecting = True
            self._connection.wake()

    def abortConnection(self) -> None:
        """Close, dropping what is queued and under way; C{connectionLost} comes in the next turn."""
        if self.connected:
            self._aborted = self._outgoing.broken = True
            self._output_open = self._input_open = False
            self._drop_queue()
            self._outgoing.held.clear()
            self._connection.wake()

    # What the connection tells us

    def turn(self) -> bool:
        """Do what can be done now, once.  @return: whether that was anything."""
        if not self.connected:
            return False
        if self._aborted:
            self.lose(ConnectionAborted())
            return True
        if self.disconnecting and not self._output_open:
            self.lose(self._ending)
            return True
        moved = self._output_open and self._send_turn()
        return self._receive_turn() or moved

    def lose(self, reason: Exception) -> None:
        """The connection is gone, unless it was already: the one place where it ends."""
        if not self.connected:
            return
        self.connected = self._input_open = self._output_open = False
        self._drop_queue()
        self._outgoing.ended = True
        self._outgoing.broken |= bool(self._incoming.held)
        self._incoming.closed = True
        self._incoming.held.clear()
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.stopProducing()
        self._connection.wake()
        self.protocol.connectionLost(Failure(reason))

    def _send_turn(self) -> bool:
        moved = self._flush() > 0
        producer: Any = self._producer
        if self._output_failed:
            return self._fail_output() or moved
        if self._queue:
            return moved
        if self._output_ending:
            self._end_output()
            return True
        if producer is not None and (self._producer_paused or not self._streaming):
            self._producer_paused = False
            producer.resumeProducing()
            return True
        if self.disconnecting:
            self.lose(self._ending)
            return True
        return moved

    def _end_output(self) -> None:
        self._output_open = False
        self._outgoing.ended = True
        half_closeable = IHalfCloseableProtocol(self.protocol, None)
        if self.disconnecting or not self._input_open:
            self.lose(self._ending)
        elif half_closeable is not None:
            half_closeable.writeConnectionLost()

    def _fail_output(self) -> bool:
        """
        The peer takes nothing more; what it sent before still arrives.

        @return: whether anything was done.
        """
        half_closeable = IHalfCloseableProtocol(self.protocol, None)
        self._ending = ConnectionLost("the peer closed its input before it had everything")
        if not self._input_open or self.disconnecting:
            self.lose(self._ending)
        elif half_closeable is not None:
            self._output_open = False
            half_closeable.writeConnectionLost()
        elif self._incoming.held:
            return False
        else:
            self.lose(self._ending)
        return True

    def _receive_turn(self) -> bool:
        pipe = self._incoming
        if not self._input_open or pipe.stalled or self.disconnecting or self.paused:
            return False
        if pipe.held:
            count = self._connection.portion(len(pipe.held))
            if pipe.cut_at is not None:
                count = min(count, pipe.cut_at - pipe.total)
            data = bytes(pipe.held[:count])
            del pipe.held[:count]
            pipe.total += count
            self._deliver(data)
            if pipe.total == pipe.cut_at:
                self._connection.cut()
            return True
        if pipe.ended:
            self._input_ended(pipe.broken)
            return True
        return False

    def _deliver(self, data: bytes) -> None:
        self.protocol.dataReceived(data)

    def _input_ended(self, broken: bool) -> None:
        self._input_open = False
        half_closeable = IHalfCloseableProtocol(self.protocol, None)
        if broken:
            self.lose(ConnectionLost("reset by the peer"))
        elif half_closeable is None:
            self.lose(self._ending)
        else:
            half_closeable.readConnectionLost()
            if not self._output_open and not self._aborted:
                self.lose(self._ending)


@implementer(IBufferTransport)
class BufferMemoryTransport(MemoryTransport):
    """One end that also provides L{IBufferTransport}, and calls C{buffersReceived} if its protocol has it."""

    def writeBuffers(self, buffers: Sequence[Buffer]) -> None:
        """See L{IBufferTransport.writeBuffers}."""
        self._write(buffers)

    def _sent(self, count: int) -> None:
        if IBufferReceiver.providedBy(self.protocol):
            self.protocol.buffersWritten(count)

    def _deliver(self, data: bytes) -> None:
        if not IBufferReceiver.providedBy(self.protocol):
            super()._deliver(data)
            return
        view, views = memoryview(data), []
        while view:
            count = self._connection.portion(len(view))
            views.append(view[:count])
            view = view[count:]
        self.protocol.buffersReceived(views)
