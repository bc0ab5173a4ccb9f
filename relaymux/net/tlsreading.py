"""The receiving half of a TLS connection: what the socket brought is decrypted and delivered at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from OpenSSL import SSL
from twisted.internet.interfaces import IProtocol
from twisted.logger import Logger

from relaymux.interfaces import IBufferReceiver
from relaymux.net.buffers import BufferPool
from relaymux.net.receiving import PLAIN_READ, READ_ROOM
from relaymux.net.tlsengine import RECORD, Engine
from relaymux.net.tlswriting import EncryptingConsumer

__all__ = ["DecryptingTransport"]

_log: Final = Logger("relaymux.net.tlssockets")


class DecryptingTransport(EncryptingConsumer):
    """A TLS connection that is read for one protocol, once there is one."""

    _peer: str

    def __init__(self, reactor: Any, engine: Engine, pool: BufferPool) -> None:
        """@param pool: for decrypted bytes."""
        super().__init__(reactor, engine)
        self._pool = pool
        self._protocol: IProtocol | None = None
        self._paused = False
        self._undelivered = False

    def pauseProducing(self) -> None:
        self._paused = True
        self._socket.pauseProducing()

    def resumeProducing(self) -> None:
        self._paused = False
        if self._undelivered:
            # What OpenSSL still has comes first, but not from within this call.
            self._reactor.callLater(0, self._deliver_rest)
        elif self._is_open():
            self._socket.resumeProducing()

    def stopProducing(self) -> None:
        self.loseConnection()

    def expectBytes(self, count: int) -> None:
        """See L{IExpectingTransport}."""
        # A record counts when it is there as a whole, and OpenSSL may have most of one.
        self._socket.expectBytes(count - RECORD)

    def _encrypted_received(self, buffers: Sequence[memoryview]) -> None:
        if self._reason is not None or self._closing:
            return
        for data in buffers:
            self._engine.feed(data)
        if self._protocol is None:
            self._shake_hands()
        if self._protocol is not None:
            self._deliver()

    def _deliver(self) -> None:
        """Pass on what OpenSSL has, unless the protocol has paused, and say so if that was the end."""
        self._undelivered = False
        try:
            if self._receiver is not None:
                self._deliver_buffers(self._receiver)
            else:
                self._deliver_bytes()
        except SSL.Error as error:
            if self._is_open():
                self._input_over(error)
            return
        # Reading may have made OpenSSL answer: a new key, for example.
        if self._is_open():
            self._send_encrypted()

    def _deliver_buffers(self, receiver: IBufferReceiver) -> None:
        """@raise SSL.Error: there is nothing more, since the peer has closed or TLS is broken."""
        if self._paused or not self._is_open():
            self._undelivered = True
            return
        buffers = self._engine.read(self._pool)
        if buffers:
            receiver.buffersReceived(buffers)
        if self._engine.error is not None:
            raise self._engine.error

    def _deliver_bytes(self) -> None:
        """As L{_deliver_buffers}; pausing takes effect with the next portion."""
        while self._protocol is not None and self._is_open():
            if self._paused:
                self._undelivered = True
                return
            room = self._pool.room(READ_ROOM)[:PLAIN_READ]
            count = self._engine.read_into(room)
            if not count:
                return
            self._protocol.dataReceived(bytes(room[:count]))

    def _deliver_rest(self) -> None:
        if self._paused or not self._undelivered or not self._is_open():
            return
        try:
            self._deliver()
        except Exception as error:
            _log.failure("exception from the protocol of {peer}", peer=self._peer)
            self._reason = error
            self._socket.abortConnection()
        else:
            if not self._paused and self._is_open():
                self._socket.resumeProducing()

    def _is_open(self) -> bool:
        return self.connected and self._reason is None and not self._closing

    def loseConnection(self) -> None:
        """See C{ITransport.loseConnection}.  For subclasses."""
        raise NotImplementedError

    def _shake_hands(self) -> None:
        """Something has arrived, and there is no protocol yet.  For subclasses."""
        raise NotImplementedError

    def _input_over(self, error: SSL.Error) -> None:
        """Nothing more can be received.  For subclasses."""
        raise NotImplementedError
