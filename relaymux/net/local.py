"""
The local side of a service: where QEMU dials, and where QEMU is dialled.

A L{LocalListener} takes connections of a UNIX socket and opens a stream for each;
a L{LocalDialer} takes the peer's streams and makes a connection for each.  Both
keep the order: QEMU before 8.0 takes the first migration connection for the main
channel, so streams are opened in the order of accepting, and dialled one after
the other in the order of opening.  Neither waits for a first byte: an NBD server
speaks first, and a postcopy-preempt channel is silent until it is needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IAddress, IProtocol, IReactorTime
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.python.failure import Failure

from relaymux.errors import ErrorCode
from relaymux.net.bridge import Bridge, LocalEnd
from relaymux.net.buffers import pool_for
from relaymux.net.connect import connect_unix
from relaymux.net.peer import Peer
from relaymux.net.stream import StreamTransport

__all__ = ["LocalDialer", "LocalListener", "LocalSocket", "Totals"]

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class LocalSocket:
    """
    What a C{[disk]} or C{[stream]} section says, or a C{[vm]} section of one socket.

    @ivar section: the section's name, e.g. C{"disk vda"} or C{"vm web1 ram"}, for logs.
    @ivar service: the name on the wire.
    @ivar path: the UNIX socket.
    @ivar open_timeout: seconds until a connection that the other end does not
        answer has failed.
    @ivar max_connections: open connections at once.
    @ivar others: sockets to dial when nobody listens at C{path}.
    """

    section: str
    service: str
    path: str
    open_timeout: float
    max_connections: int
    others: tuple[str, ...] = ()


@dataclass
class Totals:
    """
    What went through a section's socket since the start.

    @ivar opened: connections that were coupled to a stream.
    @ivar failed: connections that were not, or ended as an error.
    @ivar sent: bytes read from the local socket, of connections that are over.
    @ivar received: bytes written to it, of connections that are over.
    """

    opened: int = 0
    failed: int = 0
    sent: int = 0
    received: int = 0

    def __str__(self) -> str:
        return (
            f"{self.opened} connections, {self.failed} failures,"
            f" {_amount(self.sent)} sent, {_amount(self.received)} received"
        )


@dataclass
class _Connection:
    number: int
    bridge: Bridge
    began: float
    request: Deferred[StreamTransport] | None = field(default=None)


class _Connections:
    """The connections of one section: numbered, bounded, logged."""

    _log = Logger("relaymux.socket")

    def __init__(self, reactor: IReactorTime, peer: Peer, local: LocalSocket) -> None:
        self.totals = Totals()
        self._reactor = reactor
        self._peer = peer
        self._local = local
        self._number = 0
        self._open: dict[Bridge, _Connection] = {}  # at most max_connections

    @property
    def full(self) -> bool:
        return len(self._open) >= self._local.max_connections

    def add(self) -> _Connection:
        return self._number_one(Bridge(self._over))

    def on_connected(self, connected: Callable[[_Connection], None]) -> Bridge:
        """@return: a bridge that becomes a connection when its local end is there."""
        bridge = Bridge(self._over, lambda: connected(self._number_one(bridge)))
        return bridge

    def _number_one(self, bridge: Bridge) -> _Connection:
        self._number += 1
        connection = _Connection(self._number, bridge, self._reactor.seconds())
        self._open[bridge] = connection
        return connection

    def joined(self, connection: _Connection, stream: StreamTransport) -> None:
        connection.request = None
        self.totals.opened += 1
        self._log.info(
            "{section}: connection {number} open, {path}, stream {stream} of link {peer}",
            section=self._local.section,
            number=connection.number,
            path=self._local.path,
            stream=stream.stream_id,
            peer=self._peer.name,
        )
        connection.bridge.join(stream)

    def not_joined(self, connection: _Connection, why: str) -> None:
        self._open.pop(connection.bridge, None)
        self.totals.failed += 1
        self._log.warn(
            "{section}: connection {number} failed: {why}; socket {path}, link {peer}",
            section=self._local.section,
            number=connection.number,
            why=why,
            path=self._local.path,
            peer=self._peer.name,
        )

    def refused(self, what: str) -> None:
        self.totals.failed += 1
        self._log.warn(
            "{section}: refused {what}: {limit} are open, which is max-connections; socket {path}",
            section=self._local.section,
            what=what,
            limit=self._local.max_connections,
            path=self._local.path,
        )

    def _over(self, bridge: Bridge, reason: Failure) -> None:
        connection = self._open.pop(bridge, None)
        if connection is None:
            return  # it was never joined, and that was said
        if connection.request is not None:
            connection.request.cancel()
            self.not_joined(connection, f"the local program is gone: {reason.getErrorMessage()}")
            return
        self.totals.sent += bridge.sent
        self.totals.received += bridge.received
        clean = reason.check(ConnectionDone) is not None
        if not clean:
            self.totals.failed += 1
        (self._log.info if clean else self._log.warn)(
            "{section}: connection {number} {how}, {sent} sent, {received} received, {seconds:.1f} s; {path}",
            section=self._local.section,
            number=connection.number,
            how="closed" if clean else f"ended as an error: {reason.getErrorMessage()}",
            sent=_amount(bridge.sent),
            received=_amount(bridge.received),
            seconds=self._reactor.seconds() - connection.began,
            path=self._local.path,
        )


class LocalListener(Factory):
    """The factory for a section's listening socket: one stream per connection, in order."""

    noisy = False

    def __init__(self, reactor: IReactorTime, peer: Peer, local: LocalSocket) -> None:
        self._peer = peer
        self._local = local
        self._connections = _Connections(reactor, peer, local)

    @property
    def totals(self) -> Totals:
        """What went through so far."""
        return self._connections.totals

    def buildProtocol(self, addr: IAddress | None) -> LocalEnd | None:
        """See C{IProtocolFactory.buildProtocol}."""
        if self._connections.full:
            self._connections.refused("a connection")
            return None
        return self._connections.on_connected(self._connected).local

    def _connected(self, connection: _Connection) -> None:
        request = self._peer.open_stream(self._local.service, self._local.open_timeout)
        connection.request = request
        request.addCallbacks(self._opened, self._failed, (connection,), {}, (connection,), {})

    def _opened(self, stream: StreamTransport, connection: _Connection) -> None:
        self._connections.joined(connection, stream)

    def _failed(self, reason: Failure, connection: _Connection) -> None:
        if connection.request is None or not connection.bridge.is_local_open:
            return
        connection.request = None
        self._connections.not_joined(connection, reason.getErrorMessage())
        connection.bridge.refuse(reason)


class LocalDialer:
    """The service behind a section with C{connect}: dials its socket for each of the peer's streams."""

    _log = Logger("relaymux.socket")

    def __init__(self, reactor: IReactorTime, peer: Peer, local: LocalSocket) -> None:
        self._reactor = reactor
        self._local = local
        self._connections = _Connections(reactor, peer, local)
        self._queue: deque[StreamTransport] = deque()  # at most the streams the peer may have
        self._dialling = False
        self._choosing = False

    @property
    def totals(self) -> Totals:
        """What went through so far."""
        return self._connections.totals

    def stream_opened(self, stream: StreamTransport) -> None:
        """See L{Service.stream_opened}."""
        self._queue.append(stream)
        self._next()

    def _next(self) -> None:
        """Dial for the next stream, unless one is being dialled for."""
        if self._choosing:
            return  # called from within the loop below, which goes on
        self._choosing = True
        try:
            while self._queue and not self._dialling:
                self._dial(self._queue.popleft())
        finally:
            self._choosing = False

    def _dial(self, stream: StreamTransport) -> None:
        if not stream.connected:
            return  # its opener has given up
        if self._connections.full:
            self._connections.refused("a stream of the peer")
            stream.refuse(
                ErrorCode.TOO_MANY_STREAMS,
                f"{self._local.section} has {self._local.max_connections} connections open",
            )
            return
        self._dialling = True
        connection = self._connections.add()
        dialled: Deferred[IProtocol] = connect_unix(
            self._reactor,
            self._local.path,
            connection.bridge.local,
            self._local.open_timeout,
            pool_for(self._reactor),
            others=self._local.others,
        )
        stream.when_given_up(dialled.cancel)
        dialled.addCallbacks(
            self._dialled, self._not_dialled, (connection, stream), {}, (connection, stream), {}
        )

    def _dialled(self, _: IProtocol, connection: _Connection, stream: StreamTransport) -> None:
        stream.accept()
        self._connections.joined(connection, stream)
        self._dialling = False
        self._next()

    def _not_dialled(self, reason: Failure, connection: _Connection, stream: StreamTransport) -> None:
        gave_up = reason.check(CancelledError)
        why = "the peer gave up meanwhile" if gave_up else reason.getErrorMessage()
        self._connections.not_joined(connection, why)
        told = why
        for path in (self._local.path, *self._local.others):
            told = told.replace(path, "its socket")  # no path travels to the peer
        stream.refuse(ErrorCode.CONNECT_FAILED, f"{self._local.section}: {told}")
        self._dialling = False
        self._next()


def _amount(count: float) -> str:
    """C{"1.5 MiB (1572864 bytes)"}: one to read, one to add up."""
    exact = f"{count} bytes"
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.1f} {_UNITS[unit]} ({exact})" if unit else exact
