"""The sending half of a TLS connection: only what the socket is ready to take is encrypted."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from twisted.internet.interfaces import IProducer

from relaymux.interfaces import Buffer, IBufferReceiver
from relaymux.net.sending import total_length
from relaymux.net.sockets import SocketTransport
from relaymux.net.tlsengine import BATCH, Engine

__all__ = ["EncryptingConsumer"]


class EncryptingConsumer:
    """
    A TLS connection as a consumer.

    @ivar connected: whether a protocol is connected.
    """

    _socket: SocketTransport

    def __init__(self, reactor: Any, engine: Engine) -> None:
        self.connected = False
        self._reactor = reactor
        self._engine = engine
        self._receiver: IBufferReceiver | None = None
        # Bounded by the producer's obedience: it is paused while anything is here.
        self._queue: deque[Buffer] = deque()
        self._queued = 0
        self._encrypted = 0  # plain bytes whose encrypted form the kernel has not taken
        self._held = False
        self._closing = False
        self._goodbye = False
        self._reason: Exception | None = None
        self._producer: Any = None
        self._streaming = False
        self._producer_paused = False

    @property
    def queuedBytes(self) -> int:
        """Plain bytes written that the kernel has not taken, encrypted."""
        return self._queued + self._encrypted

    def write(self, data: Buffer) -> None:
        self.writeBuffers((data,))

    def writeSequence(self, data: Iterable[bytes]) -> None:
        self.writeBuffers(tuple(data))

    def writeBuffers(self, buffers: Sequence[Buffer]) -> None:
        total = total_length(buffers)
        if not total or not self.connected or self._reason is not None or self._goodbye:
            return
        self._queue.extend(buffers)
        self._queued += total
        self._encrypt()
        if self.queuedBytes:
            self._hold_producer()
        elif self._producer is not None and not self._streaming:
            self._reactor.callLater(0, self._drained)

    def _encrypt(self) -> None:
        """Encrypt and hand down what the socket takes."""
        while self._queued and not (self._held or self._reason or self._engine.failed):
            self._socket.writeBuffers(self._engine.encrypt(self._next_batch()))

    def _next_batch(self) -> list[Buffer]:
        """Take up to L{BATCH} bytes out of the queue."""
        queue, size = self._queue, self._queued
        if size <= BATCH:  # as nearly always: a link hands over no more
            batch = list(queue)
            queue.clear()
        else:
            batch, size = [], 0
            while size < BATCH:
                data = queue.popleft()
                room = BATCH - size
                if len(data) > room:
                    queue.appendleft(memoryview(data)[room:])
                    data = memoryview(data)[:room]
                batch.append(data)
                size += len(data)
        self._queued -= size
        self._encrypted += size
        return batch

    def _send_encrypted(self) -> None:
        encrypted = self._engine.take()
        if encrypted:
            self._socket.writeBuffers(encrypted)

    def _encrypted_written(self) -> None:
        if not self._socket.queuedBytes and self._encrypted:
            count, self._encrypted = self._encrypted, 0
            if self._receiver is not None:
                self._receiver.buffersWritten(count)

    def _hold(self) -> None:
        self._held = True

    def _release(self) -> None:
        self._held = False
        self._encrypt()
        if not self.queuedBytes:
            self._drained()

    def _drained(self) -> None:
        """The kernel has everything: who was told to wait may go on."""
        if self.queuedBytes or not self.connected:
            return
        producer = self._producer
        if producer is not None and (self._producer_paused or not self._streaming):
            self._producer_paused = False
            producer.resumeProducing()
        done = self._producer is None or self._streaming
        if self._closing and not self._goodbye and not self.queuedBytes and done:
            self._goodbye = True
            self._say_goodbye()

    def _hold_producer(self) -> None:
        if self._producer is not None and self._streaming and not self._producer_paused:
            self._producer_paused = True
            self._producer.pauseProducing()

    def registerProducer(self, producer: IProducer, streaming: object) -> None:
        if self._producer is not None:
            raise RuntimeError(f"cannot register {producer}: {self._producer} was never unregistered")
        if not self.connected:
            producer.stopProducing()
            return
        self._producer, self._streaming, self._producer_paused = producer, bool(streaming), False
        if not streaming:
            self._drained()
        elif self.queuedBytes:
            self._hold_producer()

    def unregisterProducer(self) -> None:
        self._producer = None
        if self._closing:
            self._reactor.callLater(0, self._drained)

    def _say_goodbye(self) -> None:
        """Everything is sent and this is the end.  For subclasses."""
        raise NotImplementedError

    def _drop_queue(self) -> None:
        self._queue.clear()
        self._queued = self._encrypted = 0
