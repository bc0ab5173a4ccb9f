"""A link's connection, alone."""

from __future__ import annotations

from typing import Any, cast

from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from relaymux.core.events import Event
from relaymux.core.frames import Kind, encode
from relaymux.core.handshake import Limits
from relaymux.core.link import HANDSHAKE_SECONDS, Link
from relaymux.interfaces import IExpectingTransport
from relaymux.net.link import LinkOwner, LinkProtocol


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
