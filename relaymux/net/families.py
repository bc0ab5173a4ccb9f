"""What only TCP sockets have, and only UNIX sockets."""

from __future__ import annotations

from socket import (
    AF_UNIX,
    IPPROTO_TCP,
    SO_KEEPALIVE,
    SO_RCVLOWAT,
    SO_SNDBUF,
    SOL_SOCKET,
    TCP_CONGESTION,
    TCP_NODELAY,
    TCP_NOTSENT_LOWAT,
    TCP_USER_TIMEOUT,
    socket,
)
from typing import Any, Final

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.interfaces import IAddress, IProtocol, ITCPTransport
from zope.interface import classImplements

from relaymux.interfaces import IIdentifiedTransport
from relaymux.net.buffers import BufferPool
from relaymux.net.disks import peer_credentials
from relaymux.net.sockets import SocketTransport

__all__ = ["TCPTransport", "UNIXTransport", "transport_for", "tune_link"]

#: Bytes the kernel may hold that it has not sent yet.  What is urgent then
#: waits behind this much in front of it and not behind megabytes.
NOTSENT_LOWAT: Final = 512 * 1024

#: The same where pages are passed on to a connection that sends by timers.  Half of the largest packet, so
#: that more is written when all is sent.  Of somebody who always has more to send bbr takes what was
#: sent for all that can be, and waits between any two packets; whoever has nothing more keeps the pace
#: that he had at his best.
PACED_NOTSENT_LOWAT: Final = 32 * 1024

#: Milliseconds that sent bytes may stay unacknowledged before the connection
#: is lost; the kernel's own patience is about 15 minutes.
USER_TIMEOUT: Final = 20_000

#: Bytes of the name of a congestion control: TCP_CA_NAME_MAX (linux/include/net/tcp.h).
CONGESTION_NAME: Final = 16

#: Bytes worth waiting for: fewer arrive in about the time that a wake-up takes.
LEAST_EXPECTED: Final = 64 * 1024

#: Bytes waited for at most.  Twice as many are what the kernel makes room for, and
#: bytes of more than this at once would fall out of the second-level cache.
MOST_EXPECTED: Final = 256 * 1024

#: Bytes that a UNIX socket shall take at once, asked for: more than a bulk frame.
#: Linux's default of 208 KiB is less, and every such write would be cut in two
#: with a wait in between.  Without privileges the kernel grants up to twice
#: C{net.core.wmem_max}, 416 KiB by default.
UNIX_SEND_BUFFER: Final = 1024 * 1024


class TCPTransport(SocketTransport):
    """A L{SocketTransport} with what only TCP has."""

    _host: IPv4Address | IPv6Address
    _peer: IPv4Address | IPv6Address
    _low_water = 1
    _is_paced: bool | None = None
    _expects_pages = False

    def getHost(self) -> IPv4Address | IPv6Address:
        return self._host

    def getPeer(self) -> IPv4Address | IPv6Address:
        return self._peer

    def expectBytes(self, count: int) -> None:
        """See L{SocketTransport.expectBytes}; SO_RCVLOWAT, socket(7)."""
        low_water = min(count, MOST_EXPECTED) if count >= LEAST_EXPECTED else 1
        if low_water != self._low_water and self.connected:
            self._low_water = low_water
            self.socket.setsockopt(SOL_SOCKET, SO_RCVLOWAT, low_water)

    @property
    def is_paced(self) -> bool:
        """Whether its congestion control sends by timers (bbr), as it was when this was first asked."""
        if self._is_paced is None:
            name = self.socket.getsockopt(IPPROTO_TCP, TCP_CONGESTION, CONGESTION_NAME)
            self._is_paced = name.startswith(b"bbr")
        return self._is_paced

    def expectPages(self, expected: bool) -> None:
        """See L{SocketTransport.expectPages}; TCP_NOTSENT_LOWAT, L{PACED_NOTSENT_LOWAT}."""
        if expected != self._expects_pages and self.is_paced:
            self._expects_pages = expected
            most = PACED_NOTSENT_LOWAT if expected else NOTSENT_LOWAT
            self.socket.setsockopt(IPPROTO_TCP, TCP_NOTSENT_LOWAT, most)

    def getTcpNoDelay(self) -> bool:
        return bool(self.socket.getsockopt(IPPROTO_TCP, TCP_NODELAY))

    def setTcpNoDelay(self, enabled: object) -> None:
        self.socket.setsockopt(IPPROTO_TCP, TCP_NODELAY, bool(enabled))

    def getTcpKeepAlive(self) -> bool:
        return bool(self.socket.getsockopt(SOL_SOCKET, SO_KEEPALIVE))

    def setTcpKeepAlive(self, enabled: object) -> None:
        self.socket.setsockopt(SOL_SOCKET, SO_KEEPALIVE, bool(enabled))


class UNIXTransport(SocketTransport):
    """A L{SocketTransport} whose peer the kernel knows."""

    is_local = True

    @property
    def peerIdentity(self) -> str:
        """
        C{"uid:N"}, as of when it was connected.

        @raise OSError: it is closed.
        """
        return f"uid:{peer_credentials(self.socket).uid}"


classImplements(TCPTransport, ITCPTransport)
classImplements(UNIXTransport, IIdentifiedTransport)


def transport_for(
    reactor: Any,
    sock: socket,
    protocol: IProtocol,
    pool: BufferPool,
    peer: IAddress | None = None,
    flush_seconds: float | None = None,
    host: IAddress | None = None,
) -> SocketTransport:
    """Make the transport for C{sock}, by its family; parameters as of L{SocketTransport}."""
    # Asking a socket for its family makes an object of an enumeration each time.
    if isinstance(peer, UNIXAddress) if peer is not None else sock.family == AF_UNIX:
        sock.setsockopt(SOL_SOCKET, SO_SNDBUF, UNIX_SEND_BUFFER)
        return UNIXTransport(reactor, sock, protocol, pool, peer, flush_seconds, host)
    return TCPTransport(reactor, sock, protocol, pool, peer, flush_seconds, host)


def tune_link(sock: socket) -> None:
    """Set what a TCP connection between two daemons wants: low delay, and an early notice of a dead peer."""
    sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
    sock.setsockopt(IPPROTO_TCP, TCP_NOTSENT_LOWAT, NOTSENT_LOWAT)
    sock.setsockopt(IPPROTO_TCP, TCP_USER_TIMEOUT, USER_TIMEOUT)
    sock.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 1)
