"""
The fast path: bulk that moves without Python (F{_fastpath.c}).

While nothing but bulk moves between a link and local sockets, the reactor leaves them to C for
a moment: a L{Lease} of the link and of those of its streams that may be.  Before Python sees
the next event the lease is settled, so that nobody can tell that it was not Python who did it.

What may be left to it is what needs no decision: a link of a plain socket, or of one with TLS whose
records are ours (L{relaymux.net.tlsrecords}), on which nothing waits to be said; streams whose bytes
nobody has to see; sockets that carry bulk and are not held up.  With somebody who talks
(L{relaymux.net.turns}) there is no lease.  Without what is compiled, or in another reactor, all
this is never used.
"""

from __future__ import annotations

from typing import Any, Final

from twisted.logger import Logger

from relaymux.core.events import Event
from relaymux.core.growth import TURN_SECONDS, WIDE_TURN_SECONDS
from relaymux.core.link import ACK_SECONDS, Link
from relaymux.core.replay import FRAME_COST
from relaymux.core.session import Session
from relaymux.core.window import GRANT_SHARE
from relaymux.errors import ErrorCode
from relaymux.net.buffers import pool_for
from relaymux.net.compiled import native
from relaymux.net.link import LinkProtocol
from relaymux.net.pages import PageStock
from relaymux.net.sockets import SocketTransport
from relaymux.net.stream import StreamTransport
from relaymux.net.streams import SessionStreams
from relaymux.net.tlssockets import TLSTransport
from relaymux.net.turns import LONG_TURN, turns_for

__all__ = ["FastPath", "lease_of"]

_log: Final = Logger("relaymux.link")

#: Seconds for which a lease lasts at most.  What is decided between two of them (the sizes of windows, who
#: may be read) can wait so long, and a lease and its end cost some 20 microseconds.
LEASE_SECONDS: Final = 0.01

#: The same where pages are passed on: what is not delivered in the end is copied; and where they are passed
#: on to the link as well, on a short line: so is what is not acknowledged.
PAGES_LEASE_SECONDS: Final = 0.02
SENT_PAGES_LEASE_SECONDS: Final = 0.1

#: Bytes to read of a link at once.  Without Python a turn costs little, and so few bytes are still in the
#: second-level cache when they are written, and when the program reads them.
LINK_TURN: Final = 128 * 1024

#: The same where it is encrypted: what a turn costs is more then.
ENCRYPTED_LINK_TURN: Final = 256 * 1024

#: The same where pages are passed on, and no cache has anything to do with it.
PAGES_LINK_TURN: Final = 512 * 1024

#: How many times as many bytes as else an ACK is for: each one wakes the other daemon.
ACK_FACTOR: Final = 2

#: The same where pages are passed on.  With L{relaymux.core.outbox.ACK_SHARE} that is half of what the peer
#: keeps, at most.
PAGES_ACK_FACTOR: Final = 4

#: Seconds of a round trip within one site, and the share of a window for which credit waits there.
SHORT_LINE: Final = 0.001
SHORT_LINE_SHARE: Final = 2

#: Leases that copy after one whose pages had few bytes each (small packets, or programs that write little at
#: a time), as that costs less then.
COPIED_LEASES: Final = 256

#: Bytes that a lease has to carry to have been worth it.
WORTHWHILE: Final = 2 * LONG_TURN

#: Times that bulk was seen and no lease made, at most, after one that was not worth it.
LONGEST_PAUSE: Final = 64

#: Times that a lease is tried before more bulk was seen.
MOST_TRIES: Final = 64


class _Way:
    """A lease, and whose it is."""

    def __init__(
        self,
        lease: Any,
        link: LinkProtocol,
        transport: SocketTransport | TLSTransport,
        streams: dict[int, tuple[StreamTransport, SocketTransport]],
        pages: Any = None,
        seconds: float = LEASE_SECONDS,
    ) -> None:
        self.lease = lease
        self.link = link
        self.transport = transport
        self.streams = streams
        self.pages = pages
        self.seconds = seconds
        # What it came to.
        self.events: list[Event] = []
        self.read_ends: list[tuple[SocketTransport, int]] = []
        self.left: list[memoryview] = []
        self.read_end = 0
        self.carried = 0
        self.failed = False

    def feed(self) -> bool:
        """
        Give the lease what has not left yet, and what has arrived.

        @return: whether it can go on with that.  It is to be settled in any case.
        """
        owed, taken = self.transport.hand_over(), False
        try:
            taken = self.lease.owe(owed)
        finally:
            if not taken:
                self.transport.take_over(owed, 0)
        return taken and bool(self.lease.feed(self.link.link.suspend()))


def is_short(session: Session) -> bool:
    """@return: whether the line is known to stay within one site."""
    round_trip = session.growth.round_trip if session.growth is not None else None
    return round_trip is not None and round_trip < SHORT_LINE


def grant_share(session: Session) -> int:
    """
    @return: the share of a window for which new credit waits.  Half of it on a short line, as each CREDIT
        wakes the other daemon; on a long one windows grow by what is heard of in time (L{Meter}).
    """
    return SHORT_LINE_SHARE if is_short(session) else GRANT_SHARE


def sends_pages(transport: SocketTransport, session: Session) -> bool:
    """
    @return: whether pages are passed on to a link, too, and not only from it.  On a long line most of what is
        sent within a lease is not acknowledged when it ends, and would be copied after all.
    """
    return transport.is_local or is_short(session)


def lease_of(
    link: Link,
    session: Session,
    pool: Any,
    descriptor: int,
    epoll: int,
    places: int,
    link_turn: int = LINK_TURN,
) -> Any:
    """
    @param places: for how many streams.
    @param link_turn: bytes to read of the link at once.
    @return: a lease of C{link}, without its streams and its keys as yet.
    """
    replay = session.replay
    assert native is not None
    return native.Lease(
        pool,
        descriptor,
        epoll,
        (replay.end, replay.acknowledged, replay.slack, replay.most_held, FRAME_COST, replay.ends),
        (session.rx_next, session.rx_acknowledged, ACK_FACTOR * session.ack_bytes, link.max_payload),
        (min(LONG_TURN, session.longest_payload), link_turn),
        places,
    )


class FastPath:
    """
    What one reactor may leave to it.

    @ivar turns: who tells whether bulk moves, and whether somebody talks.
    @ivar carried: bytes of streams that came this way, in either direction.
    """

    def __init__(self, reactor: Any) -> None:
        self.turns = turns_for(reactor)
        self.carried = 0
        self._reactor = reactor
        # Links that are up or were just now; those of closed connections are removed.
        self._links: dict[LinkProtocol, SessionStreams] = {}
        self._stock = PageStock()
        # How many of the next leases of a link are to copy; of links in _links alone.
        self._copying: dict[LinkProtocol, int] = {}
        self._tries = 0
        self._skip = 0
        self._pause = 0

    def add(self, link: LinkProtocol, streams: SessionStreams) -> None:
        """C{link} carries a session, with C{streams}."""
        if native is not None and link.lends:
            self._links[link] = streams

    def remove(self, link: LinkProtocol) -> None:
        """C{link}'s connection is gone."""
        self._links.pop(link, None)
        self._copying.pop(link, None)

    def wait(self, epoll: int, timeout: float) -> list[tuple[int, int]] | None:
        """
        Have bulk carried until something else happens, for some milliseconds at most.

        @param epoll: the descriptor of what the reactor waits for.
        @param timeout: seconds at most, or negative.
        @return: what C{epoll.poll} would; L{None} if there is nothing to carry.
        """
        self.turns.bulk = False
        if not self._links:
            return None
        now = self._reactor.seconds()
        if self._skip or self.turns.somebody_talks(now):
            self._skip = max(0, self._skip - 1)
            return None
        ways: list[_Way] = []
        refused: list[_Way] = []
        happened: list[tuple[int, int]] | None = None
        try:
            # Settled is none before all are: what comes of that may concern the others.
            for link in self._links:
                way = self._lease(link, epoll)
                if way is None:
                    continue
                refused.append(way)  # also if what follows fails: what it was given is taken back
                if way.feed():
                    ways.append(refused.pop())
            if ways:
                assert native is not None
                longest = min(way.seconds for way in ways)
                leases = [way.lease for way in ways]
                happened = native.wait(epoll, timeout, longest, ACK_SECONDS / 2, leases)
        finally:
            carried = self._settle(ways + refused, now)
            self.carried += carried
            self._judge(bool(ways), carried)
        return happened

    def _judge(self, leased: bool, carried: int) -> None:
        """Decide when the next lease is tried, after one or none that has C{carried} bytes."""
        if not leased:
            # What is in its way may be gone with the next event.
            self._tries += 1
            self.turns.bulk = self._tries % MOST_TRIES > 0
            return
        self._tries = 0
        self.turns.bulk = carried > 0
        self._pause = 0 if carried >= WORTHWHILE else min(LONGEST_PAUSE, 2 * self._pause + 1)
        self._skip = self._pause

    def _lease(self, link: LinkProtocol, epoll: int) -> _Way | None:
        """@return: a lease of C{link}, which is not fed yet, if there is something to carry."""
        transport, streams = link.lend(), self._links[link]
        session = link.link.session
        if transport is None or session is None or session is not streams.session:
            return None
        found = streams.carried()
        if not found:
            return None
        tls = transport if isinstance(transport, TLSTransport) else None
        lease = lease_of(
            link.link,
            session,
            pool_for(self._reactor),
            transport.fileno(),
            epoll,
            len(found),
            LINK_TURN if tls is None else ENCRYPTED_LINK_TURN,
        )
        members = {}
        share = grant_share(session)
        for carried, local in found:
            stream = session.streams.get(carried.stream_id)
            if stream is None:
                continue
            reads = carried.takes_directly and local.is_read
            writes = carried.gives_directly and local.takes_more
            if not (reads or writes):
                continue
            send, window = stream.send, stream.receive.window
            if not lease.add(
                carried.stream_id,
                local.fileno(),
                reads,
                writes,
                bool(local.queuedBytes),
                (send.window.sent, send.window.limit, send.delivered),
                (window.received, window.consumed, window.granted, window.size, window.size // share),
            ):
                break
            members[carried.stream_id] = (carried, local)
        if not members:
            return None
        if tls is not None:
            lease.encrypt(*tls.keys())
            if session.growth is not None:
                session.growth.turn = WIDE_TURN_SECONDS
            return _Way(lease, link, transport, members)
        can_pass = all(local.is_local for _, local in members.values())
        pages = self._pages_for(link) if can_pass else None
        assert isinstance(transport, SocketTransport)
        sends = pages is not None and sends_pages(transport, session)
        transport.expectPages(sends)
        if session.growth is not None:
            session.growth.turn = WIDE_TURN_SECONDS if sends else TURN_SECONDS
        if pages is None:
            return _Way(lease, link, transport, members)
        lease.pass_on(pages, PAGES_LINK_TURN, PAGES_ACK_FACTOR * session.ack_bytes, sends)
        seconds = SENT_PAGES_LEASE_SECONDS if sends else PAGES_LEASE_SECONDS
        return _Way(lease, link, transport, members, pages, seconds)

    def _pages_for(self, link: LinkProtocol) -> Any:
        """@return: what a lease of C{link} is to pass pages on by, if it is to."""
        leases = self._copying.get(link, 0)
        if not leases:
            return self._stock.take()
        self._copying[link] = leases - 1
        return None

    def _settle(self, ways: list[_Way], began: float) -> int:
        """
        Let everybody know what was carried: first what each of them is to know of itself, and
        then, as that may have any consequences, what is to be said to others.

        @param began: seconds, when the leases began.
        @return: bytes that were.
        """
        now = self._reactor.seconds()
        # In a tenth of a second everybody says more than little: who talks is judged by a turn of a lease.
        turn = LEASE_SECONDS / max(LEASE_SECONDS, now - began)
        for way in ways:
            try:
                self._take(way, now, turn)
            except BaseException:
                # Nobody knows any more what was said and heard: there is no memory.  (A panic of the cipher's
                # is no Exception.)
                _log.failure("connection {number}: cannot go on behind the fast path", number=way.link.number)
                way.failed = True
                if way.pages is not None:
                    self._stock.lose()
        for way in ways:
            if way.failed:
                way.link.abort()
                way.link.end(way.link.link.goodbye(ErrorCode.INTERNAL_ERROR, "out of memory"))
                continue
            try:
                self._tell(way)
            except BaseException:
                # What was received and not understood may be lost: the next connection brings it again.
                _log.failure("connection {number}: closing it", number=way.link.number)
                way.link.abort()
        return sum(way.carried for way in ways)

    def _tell(self, way: _Way) -> None:
        """Tell others what has happened in a lease, and have Python go on with the rest."""
        for local, read_end in way.read_ends:
            local.take_back((), read_end)
        way.transport.go_on()
        way.link.carried(way.events, much=way.carried >= WORTHWHILE)
        way.transport.take_back(way.left, way.read_end)

    def _take(self, way: _Way, now: float, turn: float) -> None:
        """
        Nothing that is called here calls anybody else.

        @param turn: the part of a lease that counts as one turn.
        """
        end, acknowledged, rx_next, told, sent, unsent, left, read_end, streams, write_end, carried, keys = (
            way.lease.settle()
        )
        if way.pages is not None:
            if way.pages.was_full:
                self._copying[way.link] = COPIED_LEASES
            self._stock.give_back(way.pages)
            way.pages = None
        link = way.link
        session = link.link.session
        assert session is not None
        for stream_id, out, limit, delivered, received, consumed, granted, _, _, _ in streams:
            session.carried_stream(stream_id, out, limit, delivered, received, consumed, granted, now)
        way.events = link.link.carried(sent, end, acknowledged, rx_next, told, now)
        # Before anybody can have something to say: what is left of a frame comes first.
        way.transport.take_over(unsent, write_end)
        if isinstance(way.transport, TLSTransport):
            way.transport.take_back_keys(*keys)
        for stream_id, out, _, _, _, consumed, _, untaken, read, write in streams:
            stream, local = way.streams[stream_id]
            assert stream.carrier is not None
            stream.carrier.carried(out, consumed, int((out + consumed) * turn))
            local.take_over(untaken, write)
            if read:
                way.read_ends.append((local, read))
        way.left, way.read_end, way.carried = left, read_end, int(carried)
