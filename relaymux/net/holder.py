"""
Holds one session with the other daemon, and at most one link of it.

A session without a link is held for the resume window: its streams stay open and
notice nothing but that nobody takes their bytes.  A new link takes it on where the
old one broke off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from relaymux.core.budget import Account, Budget, link_beginning
from relaymux.core.handshake import Hello, Identity, Limits
from relaymux.core.resume import Ticket
from relaymux.core.session import Session
from relaymux.errors import ErrorCode, LocalError, SessionLost
from relaymux.net.fastpath import FastPath
from relaymux.net.held import HeldSession
from relaymux.net.link import LinkListener, LinkProtocol
from relaymux.net.opening import WaitingRoom
from relaymux.net.quietlog import QuietLog
from relaymux.net.streams import Service, SessionStreams

__all__ = ["ACCEPTOR_GRACE", "SessionHolder"]

_log: Final = Logger("relaymux.link")

#: Seconds that the accepting side holds a session beyond the window, so that the
#: dialling side, which knows whether it is still trying, is the one to give up.
ACCEPTOR_GRACE: Final = 5.0


class SessionHolder:
    """
    @ivar name: the name of the configuration's C{[link]} section, for logs.
    @ivar daemon: the name the other daemon gave itself; empty before the first link.
    @ivar expected_daemon: the name that it should give itself, because paths on both
        hosts contain it; empty if that does not matter.  Another name is logged.
    @ivar finder: asked for services that nobody has registered, by their names.
    @ivar undelivered: bytes of streams that are over, which were taken from local
        programs and not reported as delivered by the other side, or taken from
        the other side and not by the local program.
    """

    def __init__(
        self,
        reactor: IReactorTime,
        name: str,
        identity: Identity,
        limits: Limits,
        *,
        dialing: bool,
        budget: Budget | None = None,
    ) -> None:
        """
        @param limits: what this side accepts.
        @param dialing: whether this side makes the connections.
        @param budget: what the link draws from for as long as this lives, and its
            sessions for as long as they last; L{None} if nobody counts, and nothing
            grows.
        @raise LocalError: the budget has not what a link needs to begin with.
        """
        if budget is not None and not budget.begin(link_beginning(limits.replay)):
            raise LocalError(f"there is no memory left for link {name}")
        self._budget = budget
        self.name = name
        self.daemon = ""
        self.expected_daemon = ""
        self.undelivered = 0
        self.listener: LinkListener | None = None
        self.finder: Callable[[str], Service | None] | None = None
        self._reactor = reactor
        self._identity = identity
        self._limits = limits
        self._dialing = dialing
        self._fast_path: FastPath | None = getattr(reactor, "fast_path", None)
        self._link: LinkProtocol | None = None
        self._held: HeldSession | None = None
        self._services: dict[str, Service] = {}
        self._waiting = WaitingRoom(name)  # empty with a link
        self._draining = False
        self._quiet_log = QuietLog(_log, reactor.seconds)

    @property
    def held(self) -> HeldSession | None:
        """The session, with a link or without."""
        return self._held

    @property
    def is_up(self) -> bool:
        """Whether there is a link whose handshake is done."""
        return self._link is not None

    @property
    def wants_link(self) -> bool:
        """Whether a new link would be of use: while shutting down only for streams that wait for it."""
        return self._link is None and (self._held is not None or not self._draining)

    @property
    def open_streams(self) -> int:
        """Streams that are not over."""
        return len(self._held.streams) if self._held is not None else 0

    def flush(self) -> None:
        """Send what was said, as far as there is a link and it takes it."""
        if self._link is not None:
            self._link.flush()

    def flush_soon(self) -> None:
        """As L{flush}, at the end of the reactor's turn."""
        if self._link is not None:
            self._link.flush_soon()

    # Begin, go on

    def _find_service(self, name: str) -> Service | None:
        service = self._services.get(name)
        if service is None and self.finder is not None:
            service = self.finder(name)
        return service

    def _begin_session(self, link: LinkProtocol, remote: Hello, ticket: Ticket) -> None:
        account = Account(self._budget) if self._budget is not None else None
        session = Session(dialing=self._dialing, local=self._limits, remote=remote.limits, account=account)
        streams = SessionStreams(
            session, self.name, self._find_service, self.flush, self.flush_soon, self._quiet_log
        )
        window = min(self._limits.resume_window, remote.limits.resume_window)
        held = HeldSession(ticket, remote, streams, link.peer_identity, window)
        self._held = held
        self.daemon = remote.name
        _log.info(
            "link {peer}: up, daemon {daemon}{identity}, connection {number}",
            peer=self.name,
            daemon=remote.name,
            identity=f" ({link.peer_identity})" if link.peer_identity else "",
            number=link.number,
        )
        if self.expected_daemon not in ("", remote.name):
            _log.error(
                "link {peer}: the other daemon is called {daemon}, and the sockets of [vm] sections"
                " will not meet; call the section [link {daemon}], or that daemon {expected}",
                peer=self.name,
                daemon=remote.name,
                expected=self.expected_daemon,
            )
        self._attach(link, held)

    def _resumed(self, link: LinkProtocol, held: HeldSession, again: int) -> None:
        away = self._reactor.seconds() - held.lost_at if held.lost_at is not None else 0.0
        _log.info(
            "link {peer}: resumed after {seconds:.1f} s, connection {number}, generation {generation};"
            " {streams} streams go on, {again} bytes sent again, 0 lost",
            peer=self.name,
            seconds=away,
            number=link.number,
            generation=held.generation,
            streams=len(held.streams),
            again=again,
        )
        self._attach(link, held)

    def _attach(self, link: LinkProtocol, held: HeldSession) -> None:
        held.stop_timer()
        held.lost_at = None
        held.connection = link.number
        self._link = link
        link.link.attach(held.streams.session, held.remote.limits, self._reactor.seconds())
        if self._fast_path is not None:
            self._fast_path.add(link, held.streams)
        if self.listener is not None:
            self.listener.link_up(link)
        self._waiting.open_all(held.streams)
        link.flush()

    def _drop_link(self) -> None:
        """The peer is on another link now: what the old one still brings is void."""
        old, self._link = self._link, None
        if old is not None and self._held is not None:
            self._held.lost_at = self._reactor.seconds()
            old.link.detach()
            old.abort()

    # Break, end

    def _link_down(self, link: LinkProtocol, code: int, text: str) -> None:
        """A link is over, and the session, if it carried one, need not be."""
        was_up, held = link is self._link, self._held
        if was_up and held is not None:
            self._link = None
            if held.window:
                self._hold(held, text)
            else:
                self._end_session(held, code, text)
        self._tell_down(link, code, text, again=was_up)

    def _tell_down(self, link: LinkProtocol, code: int, text: str, *, again: bool) -> None:
        if self.listener is not None:
            self.listener.link_down(link, code, text, again=again)
        elif not again:
            self._quiet_log.warn(
                ("refused", code),
                "link {peer}: a new connection came to nothing: {why}",
                peer=self.name,
                why=text,
            )

    def _hold(self, held: HeldSession, text: str) -> None:
        seconds = held.window + (0.0 if self._dialing else ACCEPTOR_GRACE)
        held.lost_at = self._reactor.seconds()
        held.timer = self._reactor.callLater(seconds, self._expired, held, seconds)
        session = held.streams.session
        session.park()
        _log.warn(
            "link {peer}: down: {text}; {streams} streams wait for the next connection, up to {seconds:g} s,"
            " {held} bytes from here not acknowledged",
            peer=self.name,
            text=text,
            streams=len(held.streams),
            seconds=seconds,
            held=session.replay.held_bytes,
        )

    def _expired(self, held: HeldSession, seconds: float) -> None:
        self._end_session(held, ErrorCode.SESSION_EXPIRED, f"no connection for {seconds:g} s")

    def _end_session(self, held: HeldSession, code: int, text: str) -> None:
        held.stop_timer()
        self._held = None
        streams = held.streams
        if streams.session.untouched and not self._draining:
            # The peer may never have heard of it: what was wanted waits for the next one.
            self._waiting.put_back(streams.take_back())
        lost = streams.session.undelivered_bytes
        stuck = streams.session.unconsumed_bytes
        self.undelivered += lost + stuck + streams.undelivered
        log = _log.warn if len(streams) else _log.info
        log(
            "link {peer}: session over: {text};"
            " {streams} streams ended with it, {lost} bytes from here and {stuck} for here not delivered",
            peer=self.name,
            code=code,
            text=text,
            streams=len(streams),
            lost=lost,
            stuck=stuck,
        )
        streams.fail_all(SessionLost(f"link {self.name}: {text}", code))
        streams.session.close()
