"""
The other daemon, as this one knows it: its link, its session, who waits for it.

Everything that outlives a single connection meets here.  A L{Peer} makes the
protocol for each new link, decides about the handshake, and opens streams for
whoever asks, waiting for a link if there is none.

One session at a time.  It ends with its link, and all its streams with it: as
errors, on both sides, so that nobody takes a cut stream for a finished one.
"""

from __future__ import annotations

import os
from collections import deque
from dataclasses import dataclass
from typing import Protocol as Contract

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from relaymux.core.events import Event, GoawayReceived, HelloReceived, LinkEnded, WelcomeReceived
from relaymux.core.handshake import Hello, Limits, Welcome
from relaymux.core.link import Link
from relaymux.core.session import Session
from relaymux.errors import ErrorCode, LocalError, SessionLost, StreamReset, describe_code
from relaymux.net.link import LinkProtocol
from relaymux.net.stream import StreamTransport
from relaymux.net.streams import OpenRequest, Service, SessionStreams

__all__ = ["Identity", "LinkListener", "Peer"]

#: Local connections that wait for a link, per peer.  Each holds one descriptor and
#: is closed after its open timeout; more than this is refused at once.
MAX_WAITING = 1024

#: Seconds between two looks at whether everything was delivered, while draining.
DRAIN_INTERVAL = 0.05


@dataclass(frozen=True)
class Identity:
    """
    This daemon, as it introduces itself.

    @ivar name: the configured name.
    @ivar instance: 16 random bytes, new with every start.
    """

    name: str
    instance: bytes


class LinkListener(Contract):
    """Whoever keeps the link up, and wants to know how it goes."""

    def link_up(self, link: LinkProtocol) -> None:
        """The handshake is done."""

    def link_down(self, link: LinkProtocol, code: int, text: str, *, was_up: bool) -> None:
        """The link is over, or never came up; once for each link."""


class Peer:
    """
    @ivar name: the name of the configuration's C{[link]} section, for logs.
    @ivar daemon: the name the other daemon gave itself; empty before the first link.
    @ivar undelivered: bytes taken from local producers of streams that are over,
        which the other side did not report as delivered.
    """

    _log = Logger("relaymux.link")

    def __init__(
        self, reactor: IReactorTime, name: str, identity: Identity, limits: Limits, *, dialing: bool
    ) -> None:
        """
        @param limits: what this side accepts.
        @param dialing: whether this side makes the connection.
        """
        self.name = name
        self.daemon = ""
        self.undelivered = 0
        self.listener: LinkListener | None = None
        self._reactor = reactor
        self._identity = identity
        self._limits = limits
        self._dialing = dialing
        self._generation = 0
        self._link: LinkProtocol | None = None
        self._streams: SessionStreams | None = None
        self._remote_instance = b""
        self._services: dict[str, Service] = {}
        self._waiting: deque[OpenRequest] = deque()  # at most MAX_WAITING; empty with a session
        self._draining = False

    # Links

    def build_link(self) -> LinkProtocol:
        """@return: the protocol for a new connection to this peer."""
        self._generation += 1
        return LinkProtocol(self._reactor, self._make_link, self, self._generation)

    def _make_link(self) -> Link:
        hello = Hello(self._identity.name, self._identity.instance, self._limits) if self._dialing else None
        return Link(local=self._limits, now=self._reactor.seconds(), hello=hello)

    @property
    def is_up(self) -> bool:
        """Whether there is a link whose handshake is done."""
        return self._link is not None

    @property
    def open_streams(self) -> int:
        """Streams that are not over."""
        return len(self._streams) if self._streams is not None else 0

    def link_event(self, link: LinkProtocol, event: Event) -> None:
        """See L{LinkOwner.link_event}."""
        if isinstance(event, HelloReceived):
            self._on_hello(link, event.hello)
        elif isinstance(event, WelcomeReceived):
            self._on_welcome(link, event.welcome)
        elif isinstance(event, LinkEnded):
            who = "the peer says" if event.by_peer else "this side says"
            self._link_over(link, event.code, f"{who} {describe_code(event.code)}: {event.text}")
        elif isinstance(event, GoawayReceived):
            self._log.info(
                "link {peer}: the peer takes no new streams: {text}", peer=self.name, text=event.text
            )
        elif link is self._link and self._streams is not None:
            self._streams.handle((event,))

    def link_flushed(self, link: LinkProtocol) -> None:
        """See L{LinkOwner.link_flushed}."""
        if link is self._link and self._streams is not None:
            self._streams.drained()

    def link_lost(self, link: LinkProtocol, reason: Failure) -> None:
        """See L{LinkOwner.link_lost}."""
        if not link.link.ended:
            self._link_over(link, ErrorCode.NO_ERROR, f"connection lost: {reason.getErrorMessage()}")

    def _on_hello(self, link: LinkProtocol, hello: Hello) -> None:
        if self._draining:
            link.end(link.link.reject(ErrorCode.SHUTTING_DOWN, "shutting down"))
            return
        if self._link is not None:
            if hello.name != self.daemon:
                self._log.warn(
                    "link {peer}: refused daemon {daemon}, as daemon {current} is connected;"
                    " give each a [link] section of its own",
                    peer=self.name,
                    daemon=hello.name,
                    current=self.daemon,
                )
                link.end(link.link.reject(ErrorCode.BUSY, f"daemon {self.daemon} is connected already"))
                return
            self._replace_link(self._link, hello)
        link.link.welcome(
            Welcome(
                self._identity.name,
                self._identity.instance,
                self._limits,
                session_id=os.urandom(16),
                resume_key=os.urandom(32),
            )
        )
        self._begin_session(link, hello)

    def _replace_link(self, old: LinkProtocol, hello: Hello) -> None:
        """The dialling daemon is here again: it has given up the old link, or was restarted."""
        if hello.instance == self._remote_instance:
            old.end(old.link.goodbye(ErrorCode.LINK_REPLACED, "the peer has dialled again"))
        else:
            old.end(old.link.goodbye(ErrorCode.PEER_RESTARTED, "the peer was restarted"))

    def _on_welcome(self, link: LinkProtocol, welcome: Welcome) -> None:
        if self._draining:
            link.end(link.link.goodbye(ErrorCode.SHUTTING_DOWN, "shutting down"))
        else:
            self._begin_session(link, welcome)

    def _begin_session(self, link: LinkProtocol, remote: Hello) -> None:
        session = Session(dialing=self._dialing, local=self._limits, remote=remote.limits)
        link.link.attach(session, remote.limits, self._reactor.seconds())
        self._link = link
        self._streams = SessionStreams(session, self.name, self._services, link.flush)
        self.daemon = remote.name
        self._remote_instance = remote.instance
        self._log.info(
            "link {peer}: up, daemon {daemon}{identity}, generation {generation}",
            peer=self.name,
            daemon=remote.name,
            identity=f" ({link.peer_identity})" if link.peer_identity else "",
            generation=link.generation,
        )
        if self.listener is not None:
            self.listener.link_up(link)
        while self._waiting:
            self._streams.open(self._waiting.popleft())
        link.flush()

    def _link_over(self, link: LinkProtocol, code: int, text: str) -> None:
        streams = self._streams
        was_up = link is self._link and streams is not None
        if was_up:
            assert streams is not None
            open_streams = len(streams)
            lost = sum(count for _, count in streams.session.undelivered())
            log = self._log.warn if open_streams else self._log.info
            log(
                "link {peer}: down, generation {generation}: {text};"
                " {streams} streams ended with it, {lost} bytes from here not delivered",
                peer=self.name,
                generation=link.generation,
                text=text,
                streams=open_streams,
                lost=lost,
            )
            self._link = self._streams = None
            self.undelivered += lost + streams.undelivered
            streams.fail_all(SessionLost(f"link {self.name}: {text}", code))
        if self.listener is not None:
            self.listener.link_down(link, code, text, was_up=was_up)

    # Streams

    def register(self, name: str, service: Service) -> None:
        """Hand streams that the peer opens to service C{name} to C{service}."""
        if name in self._services:
            raise LocalError(f"service {name!r} is registered already")
        self._services[name] = service

    def unregister(self, name: str) -> None:
        """Refuse streams to service C{name} from now on."""
        del self._services[name]

    def open_stream(self, service: str, seconds: float) -> Deferred[StreamTransport]:
        """
        Open a stream to the peer's C{service}; without a link, as soon as there is one.

        Streams are opened in the order of the calls.

        @param seconds: how long to wait for a link and for the peer's answer.
        @return: fires with the stream once the peer's end is connected: call its
            C{begin}.  Fails with L{StreamReset}, L{SessionLost} or L{LocalError}.
            May be cancelled.
        """
        request = OpenRequest(service, self._waiting.remove)
        if self._draining:
            request.fail(LocalError("this daemon is shutting down"))
        elif self._streams is not None:
            request.timer = self._reactor.callLater(seconds, self._too_late, request, seconds)
            self._streams.open(request)
            self._streams.flush()
        elif len(self._waiting) >= MAX_WAITING:
            request.fail(LocalError(f"{MAX_WAITING} connections wait for link {self.name} already"))
        else:
            request.timer = self._reactor.callLater(seconds, self._too_late, request, seconds)
            self._waiting.append(request)
        return request.result

    def _too_late(self, request: OpenRequest, seconds: float) -> None:
        if request.stream is None:
            self._waiting.remove(request)
            text = f"link {self.name} was not up within {seconds:g} s"
        else:
            text = f"no answer from daemon {self.daemon} within {seconds:g} s"
        request.fail(StreamReset(ErrorCode.OPEN_TIMEOUT, text))
        if request.stream is not None:
            request.stream.abort(ErrorCode.OPEN_TIMEOUT)

    # The end

    def drain(self, seconds: float) -> Deferred[int]:
        """
        Take no new streams, let those there are come to their end, then say goodbye.

        @param seconds: how long; streams that are open then are ended as errors.
        @return: fires with the number of bytes of this drain that were taken from
            local producers and not delivered.
        """
        self._draining = True
        while self._waiting:
            self._waiting.popleft().fail(LocalError("this daemon is shutting down"))
        if self._streams is None:
            return succeed(0)
        self._streams.session.goaway(
            ErrorCode.SHUTTING_DOWN, f"daemon {self._identity.name} is shutting down"
        )
        self._streams.flush()
        before = self.undelivered + self._streams.undelivered
        done: Deferred[int] = Deferred()
        self._drain_step(done, before, self._reactor.seconds() + seconds)
        return done

    def _drain_step(self, done: Deferred[int], before: int, until: float) -> None:
        link, streams = self._link, self._streams
        if link is not None and streams is not None:
            settled = streams.session.settled
            if not settled and self._reactor.seconds() < until:
                self._reactor.callLater(DRAIN_INTERVAL, self._drain_step, done, before, until)
                return
            text = "everything was delivered" if settled else f"{len(streams)} streams were still open"
            link.end(link.link.goodbye(ErrorCode.SHUTTING_DOWN, text))
        done.callback(self.undelivered - before)
