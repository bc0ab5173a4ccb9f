"""Listening stream sockets: connections are accepted and given protocols in the order of their arrival."""

from __future__ import annotations

import errno
import select
from collections.abc import Callable
from socket import (
    AF_INET,
    AF_INET6,
    IPPROTO_IPV6,
    IPV6_V6ONLY,
    SO_REUSEADDR,
    SOCK_STREAM,
    SOL_SOCKET,
    has_dualstack_ipv6,
    socket,
)
from typing import Any, Final

from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IListeningPort,
    ILoggingContext,
    IProtocol,
    IProtocolFactory,
    IReadDescriptor,
)
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import classImplements

from relaymux.errors import TransportError
from relaymux.net.addresses import address_of, describe
from relaymux.net.buffers import BufferPool
from relaymux.net.descriptor import Descriptor
from relaymux.net.families import transport_for

__all__ = ["SocketListener", "bind_tcp", "listen_on"]

_log: Final = Logger("relaymux.net.listen")

#: Connections that may wait to be accepted.  QEMU opens one per multifd
#: channel at once, and a full UNIX backlog refuses with EAGAIN.
BACKLOG: Final = 128

#: Connections accepted before others have their turn in the reactor.
ACCEPT_TURN: Final = 64

#: Seconds without accepting when the system is short of descriptors or
#: memory.  Waiting clients stay in the backlog, in order.
SHORTAGE_PAUSE = 1.0

_SHORTAGE: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

#: What C{accept} reports of the one connection it was about to return; the
#: listening socket itself is well (accept(2), "Error handling").
_ONE_CONNECTION: Final = (
    errno.ECONNABORTED,
    errno.EPERM,
    errno.EPROTO,
    errno.ENETDOWN,
    errno.ENOPROTOOPT,
    errno.EHOSTDOWN,
    errno.ENONET,
    errno.EHOSTUNREACH,
    errno.EOPNOTSUPP,
    errno.ENETUNREACH,
)

Prepare = Callable[[socket], None]


class SocketListener(Descriptor):
    """Accepts from one listening socket, TCP or UNIX."""

    def __init__(
        self,
        reactor: Any,
        sock: socket,
        factory: IProtocolFactory,
        pool: BufferPool,
        prepare: Prepare | None = None,
        flush_seconds: float | None = None,
        address: IAddress | None = None,
        closed: Callable[[], object] = lambda: None,
    ) -> None:
        """
        @param sock: bound and listening; owned by the listener from now on.
        @param factory: a connection for which its C{buildProtocol} returns
            L{None} is closed.
        @param prepare: called with each new socket, to set its options.
        @param flush_seconds: see L{SocketTransport}.
        @param address: what C{getHost} says, where the socket itself says
            something else: one that was renamed after C{bind}.
        @param closed: called when listening has stopped, to remove what was
            made for it.
        """
        super().__init__(reactor)
        self.connected = False
        self._clock = reactor
        sock.setblocking(False)
        self._socket = sock
        # Asking whether another one waits costs less than an accept() in vain.
        self._look = select.poll()
        self._look.register(sock, select.POLLIN)
        self._factory = factory
        self._pool = pool
        self._prepare = prepare
        self._flush_seconds = flush_seconds
        self._closed = closed
        self._address = address or address_of(sock.getsockname())
        # All that it accepts have this address; of TCP only each of them knows its own.
        self._accepted_at = self._address if isinstance(self._address, UNIXAddress) else None
        self._pause: IDelayedCall | None = None
        self._short = False

    def fileno(self) -> int:
        return self._socket.fileno()

    def getHost(self) -> IAddress:
        return self._address

    def startListening(self) -> None:
        self._factory.doStart()
        self.connected = True
        self.startReading()

    def stopListening(self) -> Deferred[None]:
        """
        Accept nothing more.  Connections in the backlog are closed by the
        kernel; accepted ones live on.
        """
        self._close()
        return succeed(None)

    def connectionLost(self, reason: Failure) -> None:
        """Called by the reactor when it stops."""
        self._stop_watching()
        self._close()

    def _close(self) -> None:
        if not self.connected:
            return
        self._forget()
        if self._pause is not None and self._pause.active():
            self._pause.cancel()
        self._socket.close()
        self._factory.doStop()
        self._closed()

    def doRead(self) -> None:
        for _ in range(ACCEPT_TURN):
            if not self.connected:
                return
            try:
                sock, raw = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _ONE_CONNECTION:
                    continue
                if error.errno not in _SHORTAGE:
                    raise
                self._wait_for_descriptors(error)
                return
            self._short = False
            self._accepted(sock, address_of(raw))
            if not self.connected or not self._look.poll(0):
                return

    def _accepted(self, sock: socket, peer: IAddress) -> None:
        """One connection's trouble must not end the listener: it is logged and closed."""
        try:
            if self._prepare is not None:
                self._prepare(sock)
            protocol: IProtocol | None = self._factory.buildProtocol(peer)
            if protocol is None:
                sock.close()
                return
            transport = transport_for(
                self._clock, sock, protocol, self._pool, peer, self._flush_seconds, self._accepted_at
            )
        except Exception:
            _log.failure(
                "closing the connection from {peer} accepted on {address}",
                peer=describe(peer),
                address=describe(self._address),
            )
            sock.close()
        else:
            transport.begin()

    def _wait_for_descriptors(self, error: OSError) -> None:
        if not self._short:
            _log.error(
                "cannot accept on {address}: {reason}; trying again every {pause} s,"
                " connections wait meanwhile (raise LimitNOFILE, or look for what holds descriptors)",
                address=describe(self._address),
                reason=error.strerror,
                pause=SHORTAGE_PAUSE,
            )
        self._short = True
        self.stopReading()
        self._pause = self._clock.callLater(SHORTAGE_PAUSE, self.startReading)


classImplements(SocketListener, ILoggingContext, IListeningPort, IReadDescriptor)


def listen_on(
    reactor: Any,
    sock: socket,
    factory: IProtocolFactory,
    pool: BufferPool,
    prepare: Prepare | None = None,
    flush_seconds: float | None = None,
    address: IAddress | None = None,
    closed: Callable[[], object] = lambda: None,
) -> SocketListener:
    """Accept connections on C{sock}, which is bound and listening.  Parameters as of L{SocketListener}."""
    listener = SocketListener(reactor, sock, factory, pool, prepare, flush_seconds, address, closed)
    listener.startListening()
    return listener


def bind_tcp(host: str, port: int, backlog: int = BACKLOG) -> socket:
    """
    @param host: an IPv4 or IPv6 address; empty, or C{"::"}, for all of both families.
    @param port: 0 for any free one.
    @return: a bound and listening socket.
    @raise TransportError: the address is taken or not ours.
    """
    family = AF_INET6 if ":" in host or (not host and has_dualstack_ipv6()) else AF_INET
    sock = socket(family, SOCK_STREAM)
    try:
        sock.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        if family == AF_INET6:
            sock.setsockopt(IPPROTO_IPV6, IPV6_V6ONLY, 0 if host in ("", "::") else 1)
        sock.bind((host, port))
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        where = f"[{host}]:{port}" if ":" in host else f"{host or '*'}:{port}"
        raise TransportError(f"cannot listen on {where}: {error.strerror}") from error
    return sock
