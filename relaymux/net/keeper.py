"""
Keeps one session with the other daemon, over any number of links.

It makes the protocol for each new link and decides about the handshake: what
session begins, goes on (L{relaymux.net.holder}) or ends with it.  Only a goodbye,
a protocol error, another process at the other end, or time ends a session; then
all its streams end as errors, on both sides, so that nobody takes a cut stream
for a finished one.
"""

from __future__ import annotations

import os
from typing import Final

from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from relaymux.core.budget import Budget
from relaymux.core.events import (
    Event,
    GoawayReceived,
    HelloReceived,
    LinkEnded,
    ResumedReceived,
    ResumeReceived,
    WelcomeReceived,
)
from relaymux.core.handshake import Hello, Identity, Limits, Welcome
from relaymux.core.link import Link
from relaymux.core.resume import Resume, Ticket
from relaymux.errors import ErrorCode, TransportError, describe_code
from relaymux.net.held import HeldSession
from relaymux.net.holder import SessionHolder
from relaymux.net.link import LinkListener, LinkProtocol

__all__ = ["Identity", "LinkListener", "SessionKeeper"]

_log: Final = Logger("relaymux.link")

#: Events that are not about a stream.
_OF_A_LINK: Final = (
    HelloReceived,
    WelcomeReceived,
    ResumeReceived,
    ResumedReceived,
    LinkEnded,
    GoawayReceived,
)

#: Connections that may be in their handshake at a time: an honest peer has one, and
#: a stranger on a plain TCP port cannot use up the descriptors of those that are up.
MAX_HANDSHAKES: Final = 32

#: Refusals of a RESUME after which the session cannot go on.
_SESSION_GONE: Final = frozenset({ErrorCode.UNKNOWN_SESSION, ErrorCode.OFFSET_MISMATCH})


class SessionKeeper(SessionHolder):
    """A session that is held, the links to the other daemon, and how each of them begins and ends."""

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
        """See L{SessionHolder.__init__}."""
        super().__init__(reactor, name, identity, limits, dialing=dialing, budget=budget)
        self._number = 0
        self._handshaking: set[LinkProtocol] = set()  # at most MAX_HANDSHAKES

    # Links

    def build_link(self) -> LinkProtocol:
        """@return: the protocol for a new connection to this peer."""
        self._number += 1
        return LinkProtocol(self._reactor, self._make_link, self, self._number)

    def turns_away(self) -> bool:
        """Whether a new connection is to be closed: too many have not said who they are.  Logged if so."""
        if len(self._handshaking) < MAX_HANDSHAKES:
            return False
        self._quiet_log.warn(
            "handshakes",
            "link {peer}: closing a new connection: {count} others have not said who they are",
            peer=self.name,
            count=len(self._handshaking),
        )
        return True

    def _make_link(self, protocol: LinkProtocol) -> Link:
        self._handshaking.add(protocol)
        now = self._reactor.seconds()
        if not self._dialing:
            return Link(local=self._limits, now=now)
        if self._held is not None:
            return Link(local=self._limits, now=now, resume=self._held.ask(protocol.exporter))
        hello = Hello(self._identity.name, self._identity.instance, self._limits)
        return Link(local=self._limits, now=now, hello=hello)

    def _attach(self, link: LinkProtocol, held: HeldSession) -> None:
        self._handshaking.discard(link)
        super()._attach(link, held)

    def link_event(self, link: LinkProtocol, event: Event) -> None:
        """See L{LinkOwner.link_event}."""
        if isinstance(event, _OF_A_LINK):
            self._link_said(link, event)
        elif link is self._link and self._held is not None:
            self._held.streams.handle((event,))

    def _link_said(self, link: LinkProtocol, event: Event) -> None:
        if isinstance(event, HelloReceived):
            self._on_hello(link, event.hello)
        elif isinstance(event, WelcomeReceived):
            self._on_welcome(link, event.welcome)
        elif isinstance(event, ResumeReceived):
            self._on_resume(link, event.resume)
        elif isinstance(event, ResumedReceived):
            self._on_resumed(link, event.resume)
        elif isinstance(event, LinkEnded):
            self._on_ended(link, event)
        elif isinstance(event, GoawayReceived):
            _log.info("link {peer}: the peer takes no new streams: {text}", peer=self.name, text=event.text)

    def link_flushed(self, link: LinkProtocol) -> None:
        """See L{LinkOwner.link_flushed}."""
        if link is self._link and self._held is not None:
            self._held.streams.drained()

    def link_lost(self, link: LinkProtocol, reason: Failure) -> None:
        """See L{LinkOwner.link_lost}."""
        self._handshaking.discard(link)
        if self._fast_path is not None:
            self._fast_path.remove(link)
        if link.link.ended:
            return  # that was told already
        link.link.detach()
        # TLS 1.3 tells a client that its certificate is not wanted after its handshake.
        permanent = isinstance(reason.value, TransportError) and not reason.value.retry
        code = ErrorCode.NOT_AUTHORISED if permanent else ErrorCode.NO_ERROR
        self._link_down(link, code, f"connection lost: {reason.getErrorMessage()}")

    # The handshake: accepting

    def _on_hello(self, link: LinkProtocol, hello: Hello) -> None:
        if self._draining:
            link.end(link.link.reject(ErrorCode.SHUTTING_DOWN, "shutting down"))
            return
        if self._held is not None and hello.name != self.daemon:
            text = (
                f"refused daemon {hello.name}, as daemon {self.daemon} has the session;"
                " give each a [link] section of its own"
            )
            link.end(link.link.reject(ErrorCode.BUSY, text))
            return
        if self._held is not None and link.number < self._held.connection:
            # It was under way for long: the dialling daemon has given that connection up since.
            text = f"daemon {hello.name} is connected already, by a newer connection"
            link.end(link.link.reject(ErrorCode.BUSY, text))
            return
        if self._held is not None:
            self._replace_session(self._held, hello)
        welcome = Welcome(
            self._identity.name,
            self._identity.instance,
            self._limits,
            session_id=os.urandom(16),
            resume_key=os.urandom(32),
        )
        link.link.welcome(welcome)
        ticket = Ticket(welcome.session_id, welcome.resume_key, hello.instance, self._identity.instance)
        self._begin_session(link, hello, ticket)

    def _replace_session(self, held: HeldSession, hello: Hello) -> None:
        """The dialling daemon begins anew: it has given up the session, or was restarted."""
        if hello.instance == held.remote.instance:
            code, text = ErrorCode.LINK_REPLACED, "the peer began another session"
        else:
            code, text = ErrorCode.PEER_RESTARTED, f"daemon {hello.name} was restarted"
        if self._link is not None:
            self._link.end(self._link.link.goodbye(code, text))
        else:
            self._end_session(held, code, text)

    def _on_resume(self, link: LinkProtocol, resume: Resume) -> None:
        held = self._held
        if held is None:
            # The same words as for a wrong proof: they tell a stranger nothing.
            link.end(
                link.link.reject(ErrorCode.UNKNOWN_SESSION, "there is no such session here; begin a new one")
            )
            return
        refusal = held.refusal(resume, link.peer_identity, link.exporter)
        if refusal is not None:
            link.end(link.link.reject(*refusal))
            if refusal[0] == ErrorCode.OFFSET_MISMATCH:
                self._drop_link()
                self._end_session(held, *refusal)
            return
        self._drop_link()
        payload, again = held.agree(resume, link.exporter)
        link.link.resumed(payload)
        self._resumed(link, held, again)

    # The handshake: dialling

    def _on_welcome(self, link: LinkProtocol, welcome: Welcome) -> None:
        if self._draining:
            link.end(link.link.goodbye(ErrorCode.SHUTTING_DOWN, "shutting down"))
            return
        ticket = Ticket(welcome.session_id, welcome.resume_key, self._identity.instance, welcome.instance)
        self._begin_session(link, welcome, ticket)

    def _on_resumed(self, link: LinkProtocol, resume: Resume) -> None:
        held = self._held
        if held is None or not held.is_answered_by(resume, link.exporter):
            text = "the answer to RESUME is not the other daemon's"
            link.end(link.link.reject(ErrorCode.PROTOCOL_ERROR, text))
        elif not held.streams.session.replay.can_continue_at(resume.rx_next):
            text = f"sending cannot go on at offset {resume.rx_next}"
            link.end(link.link.reject(ErrorCode.OFFSET_MISMATCH, text))
            self._end_session(held, ErrorCode.OFFSET_MISMATCH, text)
        else:
            self._resumed(link, held, held.streams.session.resume(resume.rx_next))

    def _on_ended(self, link: LinkProtocol, event: LinkEnded) -> None:
        who = "the peer says" if event.by_peer else "this side says"
        text = f"{who} {describe_code(event.code)}: {event.text}"
        held = self._held
        if link is self._link and event.session_over and held is not None:
            self._link = None
            self._end_session(held, event.code, text)
            self._tell_down(link, event.code, text, again=True)
        elif link is not self._link and held is not None and event.by_peer and event.code in _SESSION_GONE:
            self._end_session(held, event.code, text)
            self._tell_down(link, event.code, text, again=True)
        else:
            self._link_down(link, event.code, text)
