"""A link's connection, alone."""

from __future__ import annotations

from typing import Any, cast

from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from relaymux.core.budget import Account, Budget
from relaymux.core.events import Event, HelloReceived
from relaymux.core.flight import FLIGHT_BYTES
from relaymux.core.frames import Kind, encode
from relaymux.core.handshake import Limits, Welcome
from relaymux.core.link import HANDSHAKE_SECONDS, Link
from relaymux.core.schedule import SHARED_FRAME
from relaymux.core.session import Session
from relaymux.interfaces import IExpectingTransport
from relaymux.net.link import LinkOwner, LinkProtocol
from relaymux.net.turns import TALK_SECONDS, turns_for
from tests.wire import DATA, INSTANCE, PING, PONG, frame, hello, opening, parse


@implementer(IExpectingTransport)
class ExpectingTransport(StringTransport):
    """Notes what it is told to expect."""

    def __init__(self) -> None:
        super().__init__()
        self.expected: list[int] = []

    def expectBytes(self, count: int) -> None:
        self.expected.append(count)


class Owner:
    """Takes no notice."""

    def link_event(self, link: LinkProtocol, event: Event) -> None:
        pass

    def link_flushed(self, link: LinkProtocol) -> None:
        pass


class ExpectationTests(SynchronousTestCase):
    """What the transport is told about the bytes that are still to come."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.link = LinkProtocol(
            self.clock, lambda _: Link(local=Limits(), now=0.0), cast(LinkOwner, Owner()), 1
        )
        self.transport = ExpectingTransport()
        verifyObject(IExpectingTransport, self.transport)
        self.link.makeConnection(cast(Any, self.transport))

    def test_rest_of_a_frame(self) -> None:
        """Within a frame it expects the rest, and nothing in particular within a header or between frames."""
        frame = encode(Kind.HELLO, 0, bytes(100))
        for piece, expected in ((frame[:5], 0), (frame[5:12], 100), (frame[12:40], 72), (frame[40:111], 1)):
            self.link.dataReceived(piece)
            self.assertEqual(self.transport.expected[-1], expected)
        self.link.dataReceived(frame[111:])
        self.assertEqual(self.transport.expected[-1], 0)

    def test_signs_of_life(self) -> None:
        """Whenever time matters it asks for whatever has arrived: part of a frame is a sign of life."""
        self.link.dataReceived(encode(Kind.HELLO, 0, bytes(100))[:20])
        self.clock.advance(HANDSHAKE_SECONDS)
        self.assertEqual(self.transport.expected, [92, 0])


class Acceptor(Owner):
    """Takes every peer."""

    def __init__(self) -> None:
        self.budget = Budget(1 << 30)

    def link_event(self, link: LinkProtocol, event: Event) -> None:
        if isinstance(event, HelloReceived):
            limits, remote = Limits(), event.hello.limits
            link.link.welcome(Welcome("near", INSTANCE, limits))
            session = Session(dialing=False, local=limits, remote=remote, account=Account(self.budget))
            link.link.attach(session, remote, 0.0)


class BesideTalkTests(SynchronousTestCase):
    """How much of a full stream is handed over at once."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.link = LinkProtocol(
            self.clock, lambda _: Link(local=Limits(), now=0.0), cast(LinkOwner, Acceptor()), 1
        )
        self.transport = StringTransport()
        self.link.makeConnection(cast(Any, self.transport))
        self.link.dataReceived(hello(window=1 << 24, replay=1 << 24, max_payload=1 << 20))
        [ping] = [payload for kind, _, payload in parse(self.transport.value()) if kind == PING]
        self.link.dataReceived(frame(PONG, 0, ping) + opening(1))
        session = self.link.link.session
        assert session is not None
        session.accept(1)
        self.link.flush()
        self.transport.clear()
        for _ in range(64):
            session.write(1, bytes(SHARED_FRAME))

    def sent(self) -> int:
        """@return: bytes of DATA so far."""
        self.link.flush()
        return sum(len(payload) for kind, _, payload in parse(self.transport.value()) if kind == DATA)

    def test_nobody_talks(self) -> None:
        """All of it, as far as the peer's credit goes."""
        self.assertEqual(self.sent(), 64 * SHARED_FRAME)

    def test_somebody_talks(self) -> None:
        """So much that little is in front of the next message, and the rest when nobody talks any more."""
        turns_for(self.clock).shorten(self.clock.seconds())
        first = self.sent()
        self.assertTrue(FLIGHT_BYTES // 2 <= first <= FLIGHT_BYTES + 2 * SHARED_FRAME, first)
        self.assertEqual(self.sent(), first)
        self.clock.advance(TALK_SECONDS)
        self.assertEqual(self.sent(), 64 * SHARED_FRAME)
