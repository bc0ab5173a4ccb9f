"""
Who makes the links: one side dials, and dials again; the other listens.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from twisted.internet.defer import CancelledError, Deferred, DeferredList, maybeDeferred
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IListeningPort,
    IReactorTime,
    IStreamClientEndpoint,
    IStreamServerEndpoint,
)
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.python.failure import Failure

from relaymux.errors import ErrorCode, TransportError
from relaymux.net.link import LinkProtocol
from relaymux.net.peer import Peer

__all__ = ["Dialer", "LinkFactory", "LinkPort"]

#: Seconds until the first try after a loss: enough for a daemon that is being
#: restarted to have its socket again, too little for a guest to notice.
FIRST_DELAY = 0.2

#: Seconds at most between two tries; each delay is twice the one before.  A path
#: that comes back is found within 5 s, and nobody minds a connection every 5 s.
MAX_DELAY = 5.0

#: Seconds at most while streams wait for a link: an outage is to end for them within
#: 2 s of the path's return.
HELD_DELAY = 2.0

#: Seconds for one attempt while streams wait.  TCP repeats a lost first packet after
#: 1 and 3 s, then ever later: a new attempt is sooner.
HELD_ATTEMPT = 4.0

#: Seconds for which a link must have been up for the next delay to be the first one
#: again: two daemons of one name, which put one another out, must not do so 5 times
#: a second for ever.
SETTLED_SECONDS = 0.25

#: Delays vary by this share, so that many links do not dial in step.
JITTER = 0.2

#: Seconds between two tries when dialling again cannot help by itself: a wrong
#: certificate, another version.  Somebody has to do something first.
PERMANENT_DELAY = 30.0

#: What the peer says of such a link.
PERMANENT_CODES = frozenset({ErrorCode.NOT_AUTHORISED, ErrorCode.VERSION_UNSUPPORTED})

#: Seconds after which a failure that goes on is logged again.
REPEAT_SECONDS = 60.0


class LinkFactory(Factory):
    """Gives each connection a link's protocol."""

    noisy = False

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    # It has no attribute for its factory, which Twisted's own buildProtocol would set.
    def buildProtocol(self, addr: IAddress | None) -> LinkProtocol | None:  # type: ignore[override]
        """See C{IProtocolFactory.buildProtocol}."""
        return None if self._peer.turns_away() else self._peer.build_link()


class Dialer:
    """
    Keeps a link to a peer up.

    One attempt at a time; addresses are tried in turn, beginning with the one
    that worked last.
    """

    _log = Logger("relaymux.link")

    def __init__(
        self,
        reactor: IReactorTime,
        peer: Peer,
        ways: Sequence[tuple[str, IStreamClientEndpoint]],
        random: Random | None = None,
    ) -> None:
        """
        @param ways: addresses, for logs, and how to connect to each.
        @param random: for the jitter.
        """
        self._reactor = reactor
        self._peer = peer
        self._ways = ways
        self._random = random or Random()
        self._factory = LinkFactory(peer)
        self._running = False
        self._way = 0
        self._delay = FIRST_DELAY
        self._attempt: Deferred[Any] | None = None
        self._timer: IDelayedCall | None = None
        self._barred: dict[int, float] = {}  # ways that need somebody's hand, and until when
        self._said: dict[int, tuple[str, float]] = {}  # by way: the last failure told, and when
        self._up_at = float("-inf")
        peer.listener = self

    def start(self) -> None:
        """Begin to dial."""
        self._running = True
        self._dial()

    def stop(self) -> None:
        """Dial no more.  A link that is up stays."""
        self._running = False
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        if self._attempt is not None:
            self._attempt.cancel()

    def link_up(self, link: LinkProtocol) -> None:
        """See L{LinkListener.link_up}."""
        self._up_at = self._reactor.seconds()
        self._said.clear()

    def link_down(self, link: LinkProtocol, code: int, text: str, *, again: bool) -> None:
        """See L{LinkListener.link_down}."""
        if not self._running:
            return
        permanent = code in PERMANENT_CODES
        if again and self._reactor.seconds() - self._up_at >= SETTLED_SECONDS:
            self._delay = FIRST_DELAY
        if again:
            self._wait(self._delay)
            self._delay = min(2 * self._delay, HELD_DELAY if self._peer.open_streams else MAX_DELAY)
        else:
            self._say(text, permanent=permanent)
            self._again(permanent=permanent)

    def _dial(self) -> None:
        self._timer = None
        if not self._peer.wants_link:
            return
        address, endpoint = self._ways[self._way]
        self._log.debug("link {peer}: dialling {address}", peer=self._peer.name, address=address)
        # An endpoint that raises has failed as one that says so: there may be no memory just now.
        attempt: Deferred[Any] = maybeDeferred(endpoint.connect, self._factory)
        self._attempt = attempt
        if self._peer.open_streams:
            attempt.addTimeout(HELD_ATTEMPT, self._reactor, self._overdue)
        # From then on the link itself says what becomes of it.
        attempt.addCallbacks(self._connected, self._failed)

    def _connected(self, _: object) -> None:
        self._attempt = None

    def _overdue(self, result: object, seconds: float) -> object:
        if isinstance(result, Failure) and result.check(CancelledError) and self._running:
            raise TransportError(f"no connection within {seconds:g} s")
        return result

    def _failed(self, reason: Failure) -> None:
        self._attempt = None
        if not self._running:
            return  # stopped: it was cancelled, or came to its end by itself just then
        error = reason.value
        permanent = isinstance(error, TransportError) and not error.retry
        self._say(reason.getErrorMessage() or type(error).__name__, permanent=permanent)
        self._again(permanent=permanent)

    def _again(self, *, permanent: bool) -> None:
        """Dial the next address after a while; the delay grows when all were tried."""
        now = self._reactor.seconds()
        if permanent:
            self._barred[self._way] = now + PERMANENT_DELAY
        else:
            self._barred.pop(self._way, None)
        count = len(self._ways)
        order = [(self._way + step) % count for step in range(1, count + 1)]
        free = [way for way in order if self._barred.get(way, now) <= now]
        if not free:
            self._way = min(order, key=self._barred.__getitem__)
            self._wait(self._barred[self._way] - now)
            return
        self._wait(self._delay)
        if free[0] <= self._way:
            longest = HELD_DELAY if self._peer.open_streams else MAX_DELAY
            self._delay = min(2 * self._delay, longest)
        self._way = free[0]

    def _wait(self, seconds: float) -> None:
        if self._timer is not None and self._timer.active():
            return  # two reports of one failure
        delay = seconds * self._random.uniform(1 - JITTER, 1 + JITTER)
        self._timer = self._reactor.callLater(delay, self._dial)

    def _say(self, text: str, *, permanent: bool) -> None:
        """Log a failure: once, and again when it is another one or goes on for long."""
        now = self._reactor.seconds()
        said, said_at = self._said.get(self._way, ("", now))
        if text == said and now - said_at < REPEAT_SECONDS:
            return
        self._said[self._way] = (text, now)
        self._log.warn(
            "link {peer}: no connection to {address}: {text}; {next}",
            peer=self._peer.name,
            address=self._ways[self._way][0],
            text=text,
            next=(
                f"trying every {PERMANENT_DELAY:g} s until somebody has changed that"
                if permanent
                else f"dialling again, at most {MAX_DELAY:g} s apart"
            ),
        )


class LinkPort:
    """Listens for a peer's links, on one or more addresses."""

    _log = Logger("relaymux.link")

    def __init__(self, peer: Peer, ways: Sequence[tuple[str, IStreamServerEndpoint]]) -> None:
        """@param ways: addresses, for logs, and how to listen on each."""
        self._peer = peer
        self._ways = ways
        self._factory = LinkFactory(peer)
        self._ports: list[IListeningPort] = []

    def start(self) -> Deferred[None]:
        """@return: fires when all addresses are listened on, fails if one cannot be."""
        return Deferred.fromCoroutine(self._start())

    async def _start(self) -> None:
        for address, endpoint in self._ways:
            port: Any = await endpoint.listen(self._factory)
            self._ports.append(port)
            self._log.info("link {peer}: listening on {address}", peer=self._peer.name, address=address)

    def stop(self) -> Deferred[Any]:
        """Listen no more.  A link that is up stays."""
        ports, self._ports = self._ports, []
        return DeferredList([Deferred.fromCoroutine(_stop(port)) for port in ports])


async def _stop(port: IListeningPort) -> None:
    stopped = port.stopListening()
    if stopped is not None:
        await stopped
