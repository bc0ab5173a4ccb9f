"""
A link as a Twisted protocol, over whatever transport carries it.

It moves bytes between the transport and the L{Link} of the core and decides
nothing: what happened goes to the owner.  Over a transport that provides
L{IBufferTransport} buffers pass through as they are; over any other the same
happens with C{dataReceived} and C{writeSequence}.

Backpressure: the transport pauses this protocol (an IPushProducer) while it
has bytes that the kernel did not take.  Nothing is then taken out of the
session; its streams fill, and pause their own producers.  Receiving never
pauses, or two daemons waiting for one another's credit would wait for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final
from typing import Protocol as Contract

from twisted.internet.interfaces import IDelayedCall, IProtocol, IPushProducer, IReactorTime
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import classImplements

from relaymux.core.events import Event, LinkEnded
from relaymux.core.frames import Buffer
from relaymux.core.link import NEVER, Link
from relaymux.core.resume import EXPORTER_BYTES, EXPORTER_LABEL
from relaymux.interfaces import (
    IBufferReceiver,
    IBufferTransport,
    IExpectingTransport,
    IExportingTransport,
    IIdentifiedTransport,
)
from relaymux.net.sockets import SocketTransport
from relaymux.net.tlssockets import TLSTransport
from relaymux.net.turns import turns_for

__all__ = ["LinkListener", "LinkOwner", "LinkProtocol"]

_log: Final = Logger("relaymux.link")

#: Data handed to the transport at once.  What the kernel does not take of it is all
#: that can be in front of an urgent frame in this process.
FLUSH_BYTES: Final = 512 * 1024

#: Seconds for the last frame (the reason) to leave before the connection is aborted.
CLOSE_SECONDS: Final = 5.0


class LinkOwner(Contract):
    """Whoever holds the session: told in order, synchronously."""

    def link_event(self, link: LinkProtocol, event: Event) -> None:
        """Something happened on C{link}."""

    def link_lost(self, link: LinkProtocol, reason: Failure) -> None:
        """The connection is gone; the last call for C{link}."""

    def link_flushed(self, link: LinkProtocol) -> None:
        """Frames were handed to the transport: streams may have drained."""


class LinkListener(Contract):
    """Whoever keeps the link up, and wants to know how it goes."""

    def link_up(self, link: LinkProtocol) -> None:
        """The handshake is done."""

    def link_down(self, link: LinkProtocol, code: int, text: str, *, again: bool) -> None:
        """
        The link is over, or never came up; once for each link.

        @param again: whether to dial again at once: it was up, or the peer told
            us to begin anew.
        """


class LinkProtocol:
    """
    One link's connection.

    @ivar link: the state machine, owned by this protocol; made with the connection.
    @ivar number: rises with every connection of its owner, for logs.
    """

    link: Link

    def __init__(
        self,
        reactor: IReactorTime,
        make_link: Callable[[LinkProtocol], Link],
        owner: LinkOwner,
        number: int,
    ) -> None:
        """@param make_link: called when the connection is usable: the handshake's time begins."""
        self.number = number
        self.connected = False
        self.transport: Any = None  # ITransport and IConsumer, which Twisted has no one interface for
        self._make_link = make_link
        self._reactor = reactor
        self._turns = turns_for(reactor)
        self._owner = owner
        self._receiving = False
        self._flushing = False
        self._paused = False
        self._closing = False
        self._lost = False
        self._told = False
        self._buffer_transport: IBufferTransport | None = None
        self._lender: SocketTransport | TLSTransport | None = None
        self._expecting_transport: IExpectingTransport | None = None
        self._timer: IDelayedCall | None = None
        self._timer_at = NEVER
        self._close_timer: IDelayedCall | None = None
        # The daemon's own reactor has a short way; others, and clocks, do not.
        self._at_turns_end: Callable[[Callable[[], None]], object] = getattr(
            reactor, "callAtTurnsEnd", partial(reactor.callLater, 0)
        )
        self._soon = False

    @property
    def peer_identity(self) -> str:
        """The name the transport has checked; empty if it checks none."""
        transport = self.transport
        return str(transport.peerIdentity) if IIdentifiedTransport.providedBy(transport) else ""

    @property
    def exporter(self) -> bytes:
        """What ties a proof to this very connection; empty where the transport has nothing of the kind."""
        transport = self.transport
        if not IExportingTransport.providedBy(transport):
            return b""
        return bytes(transport.exporter(EXPORTER_LABEL, EXPORTER_BYTES))

    # IProtocol

    def makeConnection(self, transport: Any) -> None:
        self.transport = transport
        self.connected = True
        self.connectionMade()

    def connectionMade(self) -> None:
        self.link = self._make_link(self)
        if IBufferTransport.providedBy(self.transport):
            self._buffer_transport = self.transport
        if isinstance(self.transport, (SocketTransport, TLSTransport)):
            self._lender = self.transport
        if IExpectingTransport.providedBy(self.transport):
            self._expecting_transport = self.transport
        self.transport.registerProducer(self, True)
        self.flush()
        self._schedule()

    def dataReceived(self, data: Buffer) -> None:
        self.buffersReceived((memoryview(data),))

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if not self.connected:
            return  # it never was
        self._closing = self._lost = True
        for timer in (self._timer, self._close_timer):
            if timer is not None and timer.active():
                timer.cancel()
        self._timer = self._close_timer = None
        self._owner.link_lost(self, reason)

    # IBufferReceiver

    def buffersReceived(self, buffers: Sequence[memoryview]) -> None:
        self._receiving = True
        try:
            for event in self.link.receive(buffers, self._reactor.seconds()):
                self._happened(event)
        finally:
            self._receiving = False
        if self._expecting_transport is not None:
            # A frame is given out as a whole: one wake-up for it is enough.
            self._expecting_transport.expectBytes(self.link.missing)
        self.flush()
        self._schedule()

    def buffersWritten(self, count: int) -> None:
        """Nothing depends on it: what the peer has is known from its acks."""

    # IPushProducer, for the transport

    def pauseProducing(self) -> None:
        self._paused = True

    def resumeProducing(self) -> None:
        self._paused = False
        self.flush()

    def stopProducing(self) -> None:
        self._paused = True

    # For the owner

    def flush(self) -> None:
        """
        Hand to the transport what there is to send, as far as it takes it.

        Called whenever something was said; while received bytes are being
        worked through it waits for the end of that.
        """
        if self._receiving or self._flushing or self._closing or self.transport is None:
            return
        self._flushing = True
        now = self._reactor.seconds()
        try:
            while self._can_send and self._write_some(now):
                # May write to streams again: their bytes leave in the next round.
                self._owner.link_flushed(self)
        finally:
            self._flushing = False

    def flush_soon(self) -> None:
        """
        As L{flush}, at the end of the reactor's turn, for what is small and often not alone.

        A program that closes a connection and opens the next causes both within one
        turn: two frames, which then leave at once and wake the peer once.
        """
        if self._soon or self._receiving or self._closing:
            return
        self._soon = True
        self._at_turns_end(self._turn_over)

    def _turn_over(self) -> None:
        self._soon = False
        self.flush()

    @property
    def lends(self) -> bool:
        """Whether the fast path can ever read and write in place of its transport."""
        lender = self._lender
        return lender is not None and (isinstance(lender, SocketTransport) or lender.lends)

    def lend(self) -> SocketTransport | TLSTransport | None:
        """@return: its transport, if the fast path may read and write in its place now."""
        lender = self._lender
        if lender is None or self._receiving or self._flushing or self._closing or self._soon:
            return None
        return lender if lender.is_read and lender.is_written and self.link.at_rest else None

    def carried(self, events: Sequence[Event], *, much: bool) -> None:
        """
        The fast path has done what we would have; C{events} came of it.

        @param much: whether that was so much that an ACK more does not matter, while the timer for one
            would soon interrupt the fast path.
        """
        for event in events:
            self._happened(event)
        if much and not self._paused:
            self.link.acknowledge()
        self.flush()
        self._schedule()

    def end(self, event: LinkEnded) -> None:
        """Tell the owner, send the reason why, and close the connection: within L{CLOSE_SECONDS}."""
        if self._told or self.transport is None:
            return
        self._told = True
        self._owner.link_event(self, event)
        if self._closing:
            return
        self._closing = True
        self._write_some(self._reactor.seconds())
        self.transport.unregisterProducer()
        self.transport.loseConnection()
        if not self._lost:
            self._close_timer = self._reactor.callLater(CLOSE_SECONDS, self.abort)

    def abort(self) -> None:
        """Close the connection at once."""
        self._closing = True
        if self.transport is not None and not self._lost:
            abort = getattr(self.transport, "abortConnection", self.transport.loseConnection)
            abort()

    # Inside

    @property
    def _can_send(self) -> bool:
        """Whether the transport takes something and there may be something."""
        return not self._paused and not self._closing and self.link.has_something

    def _happened(self, event: Event) -> None:
        if isinstance(event, LinkEnded):
            self.end(event)
        else:
            self._owner.link_event(self, event)

    def _write_some(self, now: float) -> bool:
        """
        Hand over what there is to send, about L{FLUSH_BYTES}.

        If that fails (there may be no memory), frames have left the session and not this
        process, and the peer would take what follows them for what they were: so the
        connection ends, and the next one repeats them.  Whoever wrote is not to blame.

        @return: whether there was anything.
        """
        try:
            buffers = self.link.data_to_send(FLUSH_BYTES, now, beside_talk=self._turns.somebody_talks(now))
            if buffers:
                self._write(buffers)
        except Exception:
            _log.failure("connection {number}: cannot send, closing it", number=self.number)
            self.abort()
            return False
        return bool(buffers)

    def _write(self, buffers: list[Buffer]) -> None:
        if self._buffer_transport is not None:
            self._buffer_transport.writeBuffers(buffers)
        else:
            self.transport.writeSequence([bytes(buffer) for buffer in buffers])

    def _schedule(self) -> None:
        """See that C{handle_timer} is called in time; an earlier call than needed does no harm."""
        due = self.link.next_timer()
        if due == NEVER or self._closing:
            return
        if self._timer is not None:
            if self._timer_at <= due:
                return
            self._timer.cancel()
        self._timer_at = due
        self._timer = self._reactor.callLater(max(0.0, due - self._reactor.seconds()), self._time_is_up)

    def _time_is_up(self) -> None:
        self._timer = None
        if self._expecting_transport is not None:
            # On a slow link the rest of a frame may take longer than the silence that is
            # allowed: what has arrived of it until now counts as a sign of life.
            self._expecting_transport.expectBytes(0)
        for event in self.link.handle_timer(self._reactor.seconds()):
            self._happened(event)
        self.flush()
        self._schedule()


classImplements(LinkProtocol, IBufferReceiver, IProtocol, IPushProducer)
