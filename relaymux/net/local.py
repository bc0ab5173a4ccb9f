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
from functools import partial

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IAddress, IProtocol, IProtocolFactory, IReactorTime
from twisted.python.failure import Failure
from zope.interface import classImplements

from relaymux.errors import ErrorCode
from relaymux.net.addresses import describe
from relaymux.net.bridge import LocalEnd
from relaymux.net.buffers import pool_for
from relaymux.net.connect import connect_unix, connect_unix_at_once
from relaymux.net.connections import Connection, Connections, LocalSocket, Totals
from relaymux.net.peer import Peer
from relaymux.net.stream import StreamTransport
from relaymux.net.streams import OpenRequest

__all__ = ["LocalDialer", "LocalListener"]


class LocalListener:
    """The factory for a section's listening socket: one stream per connection, in order."""

    def __init__(self, reactor: IReactorTime, peer: Peer, local: LocalSocket) -> None:
        self._peer = peer
        self._local = local
        self.connections = Connections(reactor, peer, local, listens=True)

    @property
    def totals(self) -> Totals:
        """What went through so far."""
        return self.connections.totals

    def doStart(self) -> None:
        """See C{IProtocolFactory.doStart}."""

    def doStop(self) -> None:
        """See C{IProtocolFactory.doStop}."""

    def buildProtocol(self, addr: IAddress | None) -> LocalEnd | None:
        """See C{IProtocolFactory.buildProtocol}."""
        if self.connections.full:
            self.connections.refused("a connection")
            return None
        return self.connections.on_connected(self._connected).local

    def _connected(self, connection: Connection) -> None:
        connection.request = OpenRequest(
            self._local.service,
            partial(self.connections.joined, connection),
            partial(self._failed, connection),
            connection.bridge.greeting,
        )
        self._peer.open(connection.request, self._local.open_timeout)

    def _failed(self, connection: Connection, reason: Failure) -> None:
        if connection.request is None or not connection.bridge.is_local_open:
            return
        connection.request = None
        self.connections.not_joined(connection, reason.getErrorMessage())
        connection.bridge.refuse(reason)


classImplements(LocalListener, IProtocolFactory)


class LocalDialer:
    """The service behind a section with C{connect}: dials its socket for each of the peer's streams."""

    def __init__(self, reactor: IReactorTime, peer: Peer, local: LocalSocket) -> None:
        self._reactor = reactor
        self._local = local
        self._pool = pool_for(reactor)
        self.connections = Connections(reactor, peer, local, listens=False)
        self._queue: deque[StreamTransport] = deque()  # at most the streams the peer may have
        self._dialling = False
        self._choosing = False

    @property
    def totals(self) -> Totals:
        """What went through so far."""
        return self.connections.totals

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
        if self.connections.full:
            self.connections.refused("a stream of the peer")
            stream.refuse(
                ErrorCode.TOO_MANY_STREAMS,
                f"{self._local.section} has {self._local.max_connections} connections open",
            )
            return
        connection = self.connections.add()
        if connect_unix_at_once(
            self._reactor,
            self._local.path,
            connection.bridge.local,
            self._pool,
            follow_links=self._local.follow_links,
        ):
            self._connected(connection, stream)
            return
        self._dialling = True
        dialled: Deferred[IProtocol] = connect_unix(
            self._reactor,
            self._local.path,
            connection.bridge.local,
            self._local.open_timeout,
            self._pool,
            others=self._local.others,
            follow_links=self._local.follow_links,
        )
        stream.when_given_up(dialled.cancel)
        dialled.addCallbacks(
            self._dialled, self._not_dialled, (connection, stream), {}, (connection, stream), {}
        )

    def _connected(self, connection: Connection, stream: StreamTransport) -> None:
        stream.accept()
        connection.path = describe(connection.bridge.local.transport.getPeer())
        self.connections.joined(connection, stream)

    def _dialled(self, _: IProtocol, connection: Connection, stream: StreamTransport) -> None:
        self._connected(connection, stream)
        self._dialling = False
        self._next()

    def _not_dialled(self, reason: Failure, connection: Connection, stream: StreamTransport) -> None:
        gave_up = reason.check(CancelledError)
        why = "the peer gave up meanwhile" if gave_up else reason.getErrorMessage()
        self.connections.not_joined(connection, why)
        told = why
        for path in (self._local.path, *self._local.others):
            told = told.replace(path, "its socket")  # no path travels to the peer
        stream.refuse(ErrorCode.CONNECT_FAILED, f"{self._local.section}: {told}")
        self._dialling = False
        self._next()
