"""Programs at streams whose links come and go: what is left behind, and what their failures do."""

from __future__ import annotations

import gc
import random
from collections import Counter
from functools import partial

from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import Protocol
from twisted.python.failure import Failure
from zope.interface import implementer

from relaymux.core.link import Link
from relaymux.core.stream import Stream
from relaymux.errors import ErrorCode, SessionLost, StreamReset
from relaymux.net.held import HeldSession
from relaymux.net.holder import ACCEPTOR_GRACE
from relaymux.net.link import LinkProtocol
from relaymux.net.stream import StreamTransport
from relaymux.net.streams import OpenRequest
from relaymux.testing.ends import MemoryTransport
from tests.resumecase import WINDOW, PeerTests
from tests.resuming import Hosts, Talker, stamped


class LeakTests(PeerTests):
    """What is left behind."""

    def setUp(self) -> None:
        gc.collect()
        gc.freeze()  # what other tests have left is not counted
        self.addCleanup(gc.unfreeze)

    KINDS = (Link, LinkProtocol, HeldSession, StreamTransport, MemoryTransport, OpenRequest, Stream, Failure)

    def is_up_again(self, hosts: Hosts, links: int) -> bool:
        """Whether there is a link beyond the first C{links}."""
        return len(hosts.wires) > links and hosts.a.peer.is_up

    def count(self) -> Counter[str]:
        gc.collect()
        return Counter(type(o).__name__ for o in gc.get_objects() if isinstance(o, self.KINDS))

    def test_thousand_resumes(self) -> None:
        """1000 links later there are as many objects and timers as before, and all bytes have arrived."""
        hosts = Hosts()
        self.serve(hosts.b)
        hosts.dial()
        near, far = self.open(hosts)
        expected = bytearray()
        sent: list[tuple[int, Counter[str]]] = []
        for number in range(1001):
            piece = stamped(number % 60_000, 200)
            expected += piece
            hosts.wire.stall(random.choice([hosts.wire.client, hosts.wire.server]))
            near.say(piece, finish=False)
            far.say(piece, finish=False)
            hosts.run(0.01)
            hosts.wire.cut(*random.choice([(), (hosts.wire.client,)]))
            hosts.run(5.0, partial(self.is_up_again, hosts, len(hosts.wires)))
            hosts.wires[:] = hosts.wires[-1:]
            if number in (0, 500, 1000):
                hosts.run(30.0)
                hosts.wires[:] = hosts.wires[-1:]
                sent.append((len(hosts.clock.getDelayedCalls()), self.count()))
        hosts.run(0.0)
        self.assert_same(near.received, bytes(expected))
        self.assert_same(far.received, bytes(expected))
        self.assertEqual(sent[0], sent[1])
        self.assertEqual(sent[0], sent[2])
        self.assertEqual(hosts.a.session.replay.held_bytes, 0)
        self.assertEqual(len(hosts.a.session._again), 0)

    def test_sessions_leave_nothing(self) -> None:
        """After sessions that expired, with streams in all states, no timer and no object is left."""
        hosts = Hosts()
        self.serve(hosts.b)
        counts = []
        for _ in range(4):
            hosts.up()
            self.open(hosts, Talker(stamped(1, 3000)))
            hosts.wire.stall()
            unanswered = hosts.a.peer.open_stream("vda", 1000.0)
            hosts.run(1.0)
            hosts.wire.cut()
            hosts.run(WINDOW + ACCEPTOR_GRACE + 1)
            self.failureResultOf(unanswered, SessionLost)
            self.assert_no_timers(hosts)
            self.served_by_b.talkers.clear()
            hosts.wires.clear()
            counts.append(self.count())
        self.assertEqual(counts[1], counts[3])


@implementer(IHalfCloseableProtocol)
class Faulty(Protocol):
    """Fails where it is told to."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.seen: list[str] = []
        self.received = b""

    def _at(self, where: str) -> None:
        self.seen.append(where)
        if where == self.where:
            raise ZeroDivisionError(where)

    def connectionMade(self) -> None:
        self._at("made")

    def dataReceived(self, data: bytes) -> None:
        self._at("data")
        self.received += data

    def readConnectionLost(self) -> None:
        self._at("read lost")

    def writeConnectionLost(self) -> None:
        self._at("write lost")

    def connectionLost(self, reason: Failure) -> None:  # type: ignore[override]
        self._at("lost")


class FaultyProgramTests(PeerTests):
    """
    Programs behind streams that raise exceptions.

    The link cannot be what such a failure ends: the next one would go on behind
    the bytes that the program has not got, and nobody would notice.
    """

    def test_each_place(self) -> None:
        """
        The stream fails, at both ends, whatever its program failed in; the link and others do not
        notice.
        """
        for where in ("made", "data", "read lost", "write lost"):
            hosts = self.pair()
            faulty = Faulty(where)
            bystander, other = self.open(hosts)
            hosts.a.peer.open_stream("vda", 10.0).addCallback(StreamTransport.begin, faulty)
            hosts.run(0.0)
            far = self.served_by_b.talkers[-1]
            far.say(stamped(1, 3000))
            if where == "write lost" and far.reason is None:
                far.transport.loseReadConnection()
            hosts.run(0.0)
            self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1, where)
            self.assertEqual(faulty.seen[-1], "lost", where)
            self.assertIn("StreamReset", far.outcome[2], where)
            self.assertEqual(len(hosts.wires), 1)
            self.assertTrue(hosts.a.peer.is_up)
            self.assert_untouched(bystander, other)
            self.assert_works(hosts)

    def test_end_of_the_session(self) -> None:
        """
        One that fails in its last call does not keep the others from theirs, nor the link from
        coming back.
        """
        hosts = Hosts()
        self.serve(hosts.b)
        hosts.dial()
        faulty = [Faulty("lost") for _ in range(3)]
        others = []
        for protocol in faulty:
            hosts.a.peer.open_stream("vda", 10.0).addCallback(StreamTransport.begin, protocol)
            others.append(self.open(hosts)[0])
        hosts.refusing = True
        hosts.wire.cut()
        hosts.run(WINDOW + 1)
        for protocol in faulty:
            self.assertEqual(protocol.seen, ["made", "lost"])
        for talker in others:
            self.assert_failed(talker, ErrorCode.SESSION_EXPIRED)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 3)
        hosts.refusing = False
        hosts.run(10.0, lambda: hosts.a.peer.is_up)
        self.assert_works(hosts)

    def test_services(self) -> None:
        """A service that fails when asked: its stream fails, and the link does not."""
        hosts = self.pair()

        class Broken:
            def stream_opened(self, stream: StreamTransport) -> None:
                raise ZeroDivisionError("stream_opened")

        hosts.b.peer.register("broken", Broken())
        result = hosts.a.peer.open_stream("broken", 10.0)
        hosts.run(0.0)
        self.failureResultOf(result, StreamReset)
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual(len(hosts.wires), 1)
        self.assert_works(hosts)


def pause(talker: Talker) -> None:
    """Take nothing for now."""
    talker.transport.pauseProducing()


class EndsTests(PeerTests):
    """Ends that are told in the right order."""

    def test_pause_and_end(self) -> None:
        """
        A half-closeable program that pauses with its last bytes hears of the end of input before
        the end of all.
        """
        for early in (True, False):
            hosts = self.pair()
            near, far = self.open(hosts, Talker(stamped(1, 100), after=None if early else 100, then=pause))
            if early:
                pause(near)
            far.say(stamped(2, 100))
            hosts.run(0.0)
            if early:
                near.transport.resumeProducing()
                hosts.run(0.0)
            self.assert_same(near.received, stamped(2, 100))
            self.assertEqual(near.events, ["made", "write lost", "read lost", "lost"])
            self.assertEqual(near.outcome[2], "ConnectionDone")
