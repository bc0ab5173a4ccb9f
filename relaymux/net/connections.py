"""
The connections of a local socket that are coupled to streams: numbered, bounded, counted, logged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger

from relaymux.core.nbd import Export
from relaymux.net.amounts import exact_amount, rate, rough_amount
from relaymux.net.apart import Apart
from relaymux.net.bridge import Bridge
from relaymux.net.diskwatch import DiskWatcher
from relaymux.net.endings import Endings
from relaymux.net.peer import Peer
from relaymux.net.stream import StreamTransport
from relaymux.net.streams import OpenRequest

__all__ = ["Connection", "Connections", "LocalSocket", "Totals"]

_log: Final = Logger("relaymux.socket")

#: Seconds that a connection has been open when that is said.  Of one that is over by then
#: there is one line, which says all that two would.
SAY_SECONDS: Final = 0.1

#: Bytes in one interval below which nothing is said of progress: libvirt's keepalive, and
#: what it says while a migration runs, stay below.
PROGRESS_LEAST: Final = 64 * 1024


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
    @ivar is_nbd: whether disks are what it carries: then their names are read along.
    @ivar ends_apart: whether connections that relaymux ends together are ended one after the other
        (L{Apart}).
    @ivar follow_links: whether what is dialled may be a symbolic link.
    """

    section: str
    service: str
    path: str
    open_timeout: float
    max_connections: int
    others: tuple[str, ...] = ()
    is_nbd: bool = False
    ends_apart: bool = False
    follow_links: bool = True


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
            f" {exact_amount(self.sent)} sent, {exact_amount(self.received)} received"
        )


@dataclass
class Connection:
    """
    @ivar number: counts the section's connections, for logs.
    @ivar began: when it was accepted, or dialled.
    @ivar request: the stream that it waits for, until it has it.
    @ivar path: the socket that it came to, or that was dialled.
    @ivar stream_id: its stream, when it has one.
    @ivar disk: what it turned out to carry; L{None} while that is not known.
    @ivar told: when progress was looked at last, and the bytes sent and received by then.
    """

    number: int
    bridge: Bridge
    began: float
    path: str
    stream_id: int = 0
    request: OpenRequest | None = None
    disk: Export | None = None
    told: tuple[float, int, int] = (0.0, 0, 0)

    def __str__(self) -> str:
        return (
            f"connection {self.number} (disk {self.disk.name})" if self.disk else f"connection {self.number}"
        )


class Connections:
    """The connections of one section: numbered, bounded, logged."""

    def __init__(self, reactor: IReactorTime, peer: Peer, local: LocalSocket, *, listens: bool) -> None:
        """@param listens: whether the local programs dial, as clients do, or are dialled."""
        self.totals = Totals()
        self._apart = Apart(reactor) if local.ends_apart else None
        self._listens = listens
        self._reactor = reactor
        self._peer = peer
        self._local = local
        self._number = 0
        self._open: dict[Bridge, Connection] = {}  # at most max_connections
        self._unsaid: dict[Bridge, Connection] = {}  # of those, the joined ones not logged yet
        self._saying: IDelayedCall | None = None
        self._endings = Endings(reactor, local.section, _say)

    @property
    def full(self) -> bool:
        return len(self._open) >= self._local.max_connections

    @property
    def open_connections(self) -> tuple[Connection, ...]:
        """Those that are not over, oldest first."""
        return tuple(self._open.values())

    @property
    def open_count(self) -> int:
        """Connections that are not over."""
        return len(self._open)

    def add(self) -> Connection:
        return self._number_one(Bridge(self._over, apart=self._apart))

    def on_connected(self, connected: Callable[[Connection], None]) -> Bridge:
        """@return: a bridge that becomes a connection when its local end is there."""
        return Bridge(self._over, lambda bridge: connected(self._number_one(bridge)), self._apart)

    def hurry(self) -> None:
        """The daemon stops: what relaymux ends from now on it ends at once."""
        if self._apart is not None:
            self._apart.hurry()

    def rest(self) -> None:
        """Say what was not said yet: no more connections will come, and those that there are may not end."""
        self._say_open()
        self._endings.rest()

    def _number_one(self, bridge: Bridge) -> Connection:
        self._number += 1
        now = self._reactor.seconds()
        connection = Connection(self._number, bridge, now, self._local.path, told=(now, 0, 0))
        self._open[bridge] = connection
        return connection

    def joined(self, connection: Connection, stream: StreamTransport) -> None:
        connection.request = None
        connection.stream_id = stream.stream_id
        self.totals.opened += 1
        self._unsaid[connection.bridge] = connection
        if self._saying is None:
            self._saying = self._reactor.callLater(SAY_SECONDS, self._say_lasting)
        if self._local.is_nbd:
            DiskWatcher(
                connection.bridge, lambda disk: self._is_disk(connection, disk), client_is_local=self._listens
            )
        # Who dialled has waited for the answer of the other end, and clients mostly speak first.
        connection.bridge.join(stream, local_speaks=self._listens)

    def _say_lasting(self) -> None:
        """
        Log the connections that have been open for L{SAY_SECONDS}, or twice that.

        While others come and go the timer goes on: one for each of them would cost more than
        they do.
        """
        self._saying = None
        late = self._reactor.seconds() - SAY_SECONDS
        for bridge, connection in list(self._unsaid.items()):
            if connection.began <= late:
                del self._unsaid[bridge]
                self._say_one(connection)
        if self._unsaid:
            self._saying = self._reactor.callLater(SAY_SECONDS, self._say_lasting)

    def _say_open(self) -> None:
        """Log the connections that are open and not logged yet."""
        if self._saying is not None and self._saying.active():
            self._saying.cancel()
        self._saying = None
        unsaid, self._unsaid = self._unsaid, {}
        for connection in unsaid.values():
            self._say_one(connection)

    def _say_one(self, connection: Connection) -> None:
        _say(
            f"{self._local.section}: connection {connection.number} open, {connection.path},"
            f" {self._stream_of(connection)}"
        )

    def _stream_of(self, connection: Connection) -> str:
        return f"stream {connection.stream_id} of link {self._peer.name}"

    def _is_disk(self, connection: Connection, disk: Export) -> None:
        connection.disk = disk
        self._say_open()
        _log.info(
            "{section}: connection {number} is disk {disk}, {size}",
            section=self._local.section,
            number=connection.number,
            disk=disk.name,
            size=exact_amount(disk.size),
        )

    def tell_progress(self) -> None:
        """Log what each connection carried since the last call, if it was more than a little."""
        self._say_open()
        now = self._reactor.seconds()
        for connection in self._open.values():
            bridge = connection.bridge
            then, sent, received = connection.told
            connection.told = (now, bridge.sent, bridge.received)
            moved = bridge.sent - sent + bridge.received - received
            if moved >= PROGRESS_LEAST:
                _log.info(
                    "{section}: {connection}: {carried}, {rate}",
                    section=self._local.section,
                    connection=connection,
                    carried=self._carried(connection),
                    rate=rate(moved, now - then),
                )

    def _carried(self, connection: Connection) -> str:
        """How far it is, as far as that can be told without looking at what the bytes are."""
        bridge, disk = connection.bridge, connection.disk
        if disk is None or not disk.size:
            return f"{rough_amount(bridge.sent)} sent, {rough_amount(bridge.received)} received"
        carried = bridge.sent if self._listens else bridge.received
        share = f"{100 * carried // disk.size} %"
        return f"{rough_amount(carried)} carried to a disk of {rough_amount(disk.size)} ({share})"

    def not_joined(self, connection: Connection, why: str) -> None:
        self._open.pop(connection.bridge, None)
        self.totals.failed += 1
        _log.warn(
            "{section}: connection {number} failed: {why}; socket {path}, link {peer}",
            section=self._local.section,
            number=connection.number,
            why=why,
            path=self._local.path,
            peer=self._peer.name,
        )

    def refused(self, what: str) -> None:
        self.totals.failed += 1
        _log.warn(
            "{section}: refused {what}: {limit} are open, which is max-connections; socket {path}",
            section=self._local.section,
            what=what,
            limit=self._local.max_connections,
            path=self._local.path,
        )

    def _over(self, bridge: Bridge) -> None:
        connection = self._open.pop(bridge, None)
        if connection is None:
            return  # it was never joined, and that was said
        unsaid = self._unsaid.pop(bridge, None) is not None
        ending = bridge.ending
        if connection.request is not None:
            connection.request.cancel()
            self.not_joined(connection, f"meanwhile {ending}")
            return
        self.totals.sent += bridge.sent
        self.totals.received += bridge.received
        if not ending.is_clean:
            self.totals.failed += 1
            _log.warn("{text}", text=self._ended(connection, unsaid))
        elif connection.disk is not None or not unsaid or bridge.undelivered or bridge.untaken:
            _say(self._ended(connection, unsaid))
        else:
            self._endings.add(lambda: self._ended(connection, unsaid), bridge.sent, bridge.received)

    def _ended(self, connection: Connection, unsaid: bool) -> str:
        """@param unsaid: whether its beginning was not logged."""
        bridge = connection.bridge
        seconds = self._reactor.seconds() - connection.began
        return (
            f"{self._local.section}: {connection} {bridge.ending},"
            f" {exact_amount(bridge.sent)} sent, {exact_amount(bridge.received)} received,"
            f" {seconds:.1f} s, {rate(bridge.sent + bridge.received, seconds)};"
            f" {_left_over(bridge)}; {connection.path}"
            + (f", {self._stream_of(connection)}" if unsaid else "")
        )


def _say(text: str) -> None:
    # Twisted takes long to put many fields together.
    _log.info("{text}", text=text)


def _left_over(bridge: Bridge) -> str:
    """What relaymux had taken and did not hand over.  What a program leaves unread is its own business."""
    parts = []
    if bridge.undelivered:
        parts.append(f"{bridge.undelivered} bytes are not known to have been delivered at the other end")
    if bridge.untaken:
        parts.append(f"{bridge.untaken} bytes were not taken by the program here")
    return ", ".join(parts) or "relaymux has delivered all it had"
