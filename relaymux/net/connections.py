"""
The connections of a local socket that are coupled to streams: numbered, bounded, counted, logged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from relaymux.net.bridge import Bridge
from relaymux.net.peer import Peer
from relaymux.net.stream import StreamTransport

__all__ = ["Connection", "Connections", "LocalSocket", "Totals"]

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
class Connection:
    number: int
    bridge: Bridge
    began: float
    request: Deferred[StreamTransport] | None = field(default=None)


class Connections:
    """The connections of one section: numbered, bounded, logged."""

    _log = Logger("relaymux.socket")

    def __init__(self, reactor: IReactorTime, peer: Peer, local: LocalSocket) -> None:
        self.totals = Totals()
        self._reactor = reactor
        self._peer = peer
        self._local = local
        self._number = 0
        self._open: dict[Bridge, Connection] = {}  # at most max_connections

    @property
    def full(self) -> bool:
        return len(self._open) >= self._local.max_connections

    def add(self) -> Connection:
        return self._number_one(Bridge(self._over))

    def on_connected(self, connected: Callable[[Connection], None]) -> Bridge:
        """@return: a bridge that becomes a connection when its local end is there."""
        bridge = Bridge(self._over, lambda: connected(self._number_one(bridge)))
        return bridge

    def _number_one(self, bridge: Bridge) -> Connection:
        self._number += 1
        connection = Connection(self._number, bridge, self._reactor.seconds())
        self._open[bridge] = connection
        return connection

    def joined(self, connection: Connection, stream: StreamTransport) -> None:
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

    def not_joined(self, connection: Connection, why: str) -> None:
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


def _amount(count: float) -> str:
    """C{"1.5 MiB (1572864 bytes)"}: one to read, one to add up."""
    exact = f"{count} bytes"
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.1f} {_UNITS[unit]} ({exact})" if unit else exact
