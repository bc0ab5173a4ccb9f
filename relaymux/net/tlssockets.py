"""
TLS on top of a socket transport.

Twisted's own TLS hands OpenSSL one record at a time and copies each byte five
times.  Here whole buffers are encrypted at once, into memory that is used
again, and what the socket received is decrypted straight into the buffers that
the protocol is given.

::

    protocol  --writeBuffers-->  queue  --encrypt-->  SocketTransport  --> kernel
    protocol  <--buffersReceived--     decrypt  <--   SocketTransport  <-- kernel

Only what the kernel is ready to take is encrypted: while the socket transport
has bytes queued it holds us (C{_held}), and plain bytes wait in our queue by
reference.

The protocol is connected once the handshake is through and the peer has proved
to be the one wanted.  In TLS 1.3 a client cannot know at that time whether the
server will accept the client's certificate; a refusal arrives later, and is
told by C{connectionLost} as a L{TransportError}.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final
from typing import Protocol as Contract

from OpenSSL import SSL
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.interfaces import (
    IAddress,
    IConsumer,
    IDelayedCall,
    IProtocol,
    IPushProducer,
    ITransport,
)
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import classImplements

from relaymux.errors import TransportError
from relaymux.interfaces import (
    Buffer,
    IBufferReceiver,
    IBufferTransport,
    IExpectingTransport,
    IExportingTransport,
    IIdentifiedTransport,
)
from relaymux.net.addresses import describe
from relaymux.net.buffers import BufferPool
from relaymux.net.sockets import SocketTransport
from relaymux.net.tlscontext import TLSIdentity
from relaymux.net.tlsengine import make_engine
from relaymux.net.tlserrors import handshake_error, lost_error
from relaymux.net.tlsreading import DecryptingTransport
from relaymux.net.tlsrecords import RecordEngine, take_over

__all__ = ["CLOSE_SECONDS", "HANDSHAKE_SECONDS", "TLSOwner", "TLSTransport"]

_log: Final = Logger("relaymux.net.tlssockets")

#: From the connection to the checked peer, however slowly bytes trickle in.
HANDSHAKE_SECONDS = 10.0

#: How long a peer may take to read what is left when we close.
CLOSE_SECONDS = 5.0


class TLSOwner(Contract):
    """Whoever makes a L{TLSTransport}: is told what became of the handshake."""

    def tls_established(self, transport: TLSTransport) -> IProtocol | None:
        """The peer is the one expected.  @return: the protocol to connect; L{None} to close."""

    def tls_connected(self, protocol: IProtocol) -> None:
        """C{protocol} is connected."""

    def tls_failed(self, error: TransportError) -> None:
        """Instead of the other two: it did not come to that, and the socket is closed."""


class _Below:
    """What the socket transport sees: the protocol it carries and the producer it holds."""

    transport: SocketTransport

    def __init__(self, tls: TLSTransport) -> None:
        self._tls = tls

    def makeConnection(self, transport: Any) -> None:
        self.transport = transport
        self.connectionMade()

    def connectionMade(self) -> None:
        self.transport.registerProducer(self, True)
        self._tls._socket_connected(self.transport)

    def dataReceived(self, data: bytes) -> None:
        self.buffersReceived((memoryview(data),))

    def buffersReceived(self, buffers: Sequence[memoryview]) -> None:
        self._tls._encrypted_received(buffers)

    def buffersWritten(self, count: int) -> None:
        self._tls._encrypted_written()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._tls._socket_lost(reason)

    def pauseProducing(self) -> None:
        self._tls._hold()

    def resumeProducing(self) -> None:
        self._tls._release()

    def stopProducing(self) -> None:
        """C{connectionLost} comes next."""


class TLSTransport(DecryptingTransport):
    """
    A connection whose peer has proved who it is.

    @ivar below: the protocol to give to the socket.
    @ivar peerIdentity: see L{IIdentifiedTransport}.
    """

    def __init__(
        self,
        reactor: Any,
        identity: TLSIdentity,
        pool: BufferPool,
        cipher_pool: BufferPool,
        owner: TLSOwner,
        *,
        is_server: bool,
    ) -> None:
        """
        @param pool: for decrypted bytes.
        @param cipher_pool: for encrypted ones.
        """
        self.below = _Below(self)
        self.peerIdentity = identity.credentials.peer.identity
        self._owner = owner
        self._certificate = identity.credentials.certificate
        self._is_server = is_server
        connection, self._check = identity.connection(is_server=is_server)
        super().__init__(reactor, make_engine(connection, cipher_pool), pool)
        self._records: RecordEngine | None = None  # the engine, if it is one whose keys can be lent
        self._timer: IDelayedCall | None = None

    # What it is

    def getHost(self) -> IAddress:
        return self._socket.getHost()

    def getPeer(self) -> IAddress:
        return self._socket.getPeer()

    def exporter(self, label: str, length: int) -> bytes:
        """
        Key material that both ends of this connection have and nobody else
        (RFC 8446 7.5), to bind something to it.

        @param label: what for; both ends must say the same.
        @param length: bytes wanted.
        """
        return self._engine.connection.export_keying_material(label.encode("ascii"), length)

    # Handshake

    def _socket_connected(self, transport: SocketTransport) -> None:
        self._socket = transport
        self._peer = describe(transport.getPeer())
        self._timer = self._reactor.callLater(HANDSHAKE_SECONDS, self._handshake_overdue)
        self._shake_hands()

    def _shake_hands(self) -> None:
        try:
            self._engine.shake_hands()
        except SSL.WantReadError:
            self._send_encrypted()
            return
        except Exception as error:
            # An exception of our own check ends here too: nobody passes by mistake.
            if not isinstance(error, SSL.Error):
                _log.failure("exception while checking {peer}", peer=self._peer)
            self._fail(handshake_error(error, self._check.problem, self._peer, self._certificate))
            return
        self._engine = engine = take_over(self._engine, is_server=self._is_server)
        self._records = engine if isinstance(engine, RecordEngine) else None
        self._send_encrypted()
        self._cancel_timer()
        protocol = self._owner.tls_established(self) if self._check.passed else None
        if protocol is None:
            self._fail(TransportError(f"the connection to {self._peer} is not wanted"))
            return
        self._protocol = protocol
        self._receiver = protocol if IBufferReceiver.providedBy(protocol) else None
        self.connected = True
        protocol.makeConnection(self)
        self._owner.tls_connected(protocol)

    def _handshake_overdue(self) -> None:
        self.give_up(TransportError(f"no TLS handshake with {self._peer} within {HANDSHAKE_SECONDS:g} s"))

    def give_up(self, reason: TransportError) -> None:
        """Close at once, while the handshake is not through."""
        self._reason = reason
        self._socket.abortConnection()

    def _fail(self, reason: Exception) -> None:
        """End what cannot go on, with the alert that tells the peer why."""
        self._reason = self._reason or reason
        self._drop_queue()
        self._send_encrypted()
        self._close_socket()

    # Lending the socket, as SocketTransport does

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def lends(self) -> bool:
        """Whether somebody else can ever read and write in our place."""
        return self._records is not None

    @property
    def is_read(self) -> bool:
        """Whether what arrives is delivered now."""
        return self._is_open() and not self._paused and not self._undelivered and self._socket.is_read

    @property
    def is_written(self) -> bool:
        """Whether what is written now follows what the socket has, without any word of TLS in between."""
        at_rest = self._records is not None and self._records.at_rest
        return at_rest and not self._queued and self._is_open() and self._socket.is_written

    def keys(self) -> tuple[Any, Any, BufferPool, type[Exception]]:
        """@return: as of L{RecordEngine.lend}, if L{lends}."""
        assert self._records is not None
        return self._records.lend()

    def hand_over(self) -> list[Buffer]:
        """As L{SocketTransport.hand_over}: what the kernel did not take is encrypted."""
        self._socket.expectBytes(0)
        return self._socket.hand_over()

    def take_over(self, buffers: Sequence[Buffer], error: int) -> None:
        """As L{SocketTransport.take_over}."""
        self._socket.take_over(buffers, error)
        # Nobody counts the plain ones here; all that matters is whether there are some.
        self._encrypted = self._socket.queuedBytes
        if self._encrypted:
            self._hold_producer()

    def take_back_keys(self, hole: bool, odd: tuple[int, int, bytes | None, list[memoryview]] | None) -> None:
        """As L{RecordEngine.take_back}; what comes of it, L{take_back} will tell."""
        assert self._records is not None
        self._records.take_back(hole, odd)

    def go_on(self) -> None:
        """As L{SocketTransport.go_on}."""
        self._socket.go_on()

    def take_back(self, buffers: Sequence[Buffer], ended: int) -> None:
        """As L{SocketTransport.take_back}: C{buffers} are plain."""
        if self._records is not None and self._is_open():
            self._records.unread(buffers)
            self._deliver()
        self._socket.take_back((), ended)

    # Ending

    def _input_over(self, error: SSL.Error) -> None:
        """Nothing more can be received."""
        if not isinstance(error, SSL.ZeroReturnError):
            self._fail(lost_error(error, self._peer, self._certificate))
        elif self.queuedBytes:
            self._fail(
                ConnectionLost(f"{self._peer} closed before it had taken the last {self.queuedBytes} bytes")
            )
        else:
            self._reason = ConnectionDone()
            self._say_goodbye()

    def loseConnection(self) -> None:
        """Send what is queued, tell the peer that this is the end, and close; within L{CLOSE_SECONDS}."""
        if not self.connected or self._closing or self._reason is not None:
            return
        self._closing = True
        self._timer = self._reactor.callLater(CLOSE_SECONDS, self._close_overdue)
        self._socket.resumeProducing()  # what comes now is dropped, so that the peer is not stuck
        self._reactor.callLater(0, self._drained)

    def abortConnection(self) -> None:
        """Close at once, as L{SocketTransport.abortConnection}."""
        if self.connected:
            self._drop_queue()
            self._socket.abortConnection()

    def _close_overdue(self) -> None:
        _log.warn(
            "{peer} does not read: closing without its having taken the last {count} bytes",
            peer=self._peer,
            count=self.queuedBytes,
        )
        self.abortConnection()

    def _say_goodbye(self) -> None:
        self._cancel_timer()
        if not self._engine.failed:
            self._engine.close()
        self._send_encrypted()
        self._close_socket()

    def _close_socket(self) -> None:
        self._socket.unregisterProducer()
        self._socket.loseConnection()

    def _socket_lost(self, reason: Failure) -> None:
        self._cancel_timer()
        self._drop_queue()
        error = self._reason or reason.value or ConnectionLost()
        protocol, self._protocol = self._protocol, None
        if protocol is None:
            if not isinstance(error, TransportError):
                error = TransportError(f"{self._peer} closed during the TLS handshake: {error}")
            self._owner.tls_failed(error)
            return
        if self._reason is None and isinstance(error, ConnectionDone) and not self._closing:
            error = ConnectionLost(
                f"{self._peer} closed the connection without saying so in TLS: what it sent may be incomplete"
            )
        self.connected = False
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.stopProducing()
        protocol.connectionLost(Failure(error))

    def _cancel_timer(self) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()


classImplements(_Below, IBufferReceiver, IProtocol, IPushProducer)
classImplements(
    TLSTransport,
    IBufferTransport,
    IConsumer,
    IExpectingTransport,
    IExportingTransport,
    IIdentifiedTransport,
    IPushProducer,
    ITransport,
)
