"""Who keeps the link up: when it dials, where, how often, and what it says of it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectError, ConnectingCancelledError
from twisted.internet.interfaces import IProtocolFactory, IStreamClientEndpoint, IStreamServerEndpoint
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from zope.interface import implementer

from relaymux.errors import TransportError
from relaymux.net.dialer import (
    FIRST_DELAY,
    JITTER,
    MAX_DELAY,
    PERMANENT_DELAY,
    REPEAT_SECONDS,
    Dialer,
    LinkFactory,
    LinkPort,
)
from relaymux.net.peer import Identity, Peer
from relaymux.testing.memory import MemoryConnection
from relaymux.testing.recording import Recorder
from tests.peers import LIMITS, EndsTestCase
from tests.wire import REJECT, frame, u16

REFUSED = TransportError("connection refused")
WRONG = TransportError("the certificate is for hv-x, not hv-b", retry=False)


@implementer(IStreamClientEndpoint)
class Endpoint:
    """
    An endpoint that does as C{answer} says.

    @ivar attempts: when it was asked to connect.
    """

    def __init__(self, clock: Clock, answer: Callable[[IProtocolFactory], Deferred[Any]]) -> None:
        self.clock = clock
        self.answer = answer
        self.attempts: list[float] = []

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[Any]:
        """Note the time, and answer."""
        self.attempts.append(self.clock.seconds())
        return self.answer(protocolFactory)

    @property
    def delays(self) -> list[float]:
        """Seconds between the attempts."""
        return [b - a for a, b in pairwise(self.attempts)]


class DialerTests(EndsTestCase):
    """A dialer, a clock, and endpoints that do what a test wants."""

    def setUp(self) -> None:
        logged = capturedLogs()
        self.events: Any = logged.__enter__()
        self.addCleanup(logged.__exit__, None, None, None)
        self.clock = Clock()
        self.peer = Peer(self.clock, "hv-b", Identity("hv-a", b"a" * 16), LIMITS, dialing=True)
        self.far = Peer(self.clock, "hv-a", Identity("hv-b", b"b" * 16), LIMITS, dialing=False)
        self.connections: list[MemoryConnection] = []

    def endpoint(self, answer: Callable[[IProtocolFactory], Deferred[Any]]) -> Endpoint:
        return Endpoint(self.clock, answer)

    def failing(self, error: Exception = REFUSED) -> Endpoint:
        return self.endpoint(lambda _: fail(error))

    def dialer(self, *ways: Endpoint, seed: int = 1) -> Dialer:
        named = [(f"way-{number}", way) for number, way in enumerate(ways)]
        return Dialer(self.clock, self.peer, named, Random(seed))

    def connect(self, factory: IProtocolFactory) -> Deferred[Any]:
        """Connect to the other daemon."""
        near, far = factory.buildProtocol(None), self.far.build_link()  # type: ignore[arg-type]
        assert near is not None and far is not None
        self.connections.append(MemoryConnection(near, far, clock=self.clock))
        return succeed(near)

    def advance(self, seconds: float) -> None:
        until = self.clock.seconds() + seconds
        while self.clock.seconds() < until - 1e-9:
            self.clock.advance(min(0.01, until - self.clock.seconds()))

    def lines(self, *words: str) -> list[str]:
        lines = [formatEvent(event) for event in self.events if event["log_level"].name != "debug"]
        return [line for line in lines if all(word in line for word in words)]


class BackoffTests(DialerTests):
    """When to try again."""

    def test_delays_grow(self) -> None:
        """From FIRST_DELAY each is twice the last, up to MAX_DELAY, all within the jitter."""
        way = self.failing()
        self.dialer(way).start()
        self.advance(60)
        expected = FIRST_DELAY
        for delay in way.delays:
            self.assertGreaterEqual(delay, expected * (1 - JITTER) - 1e-6)
            self.assertLessEqual(delay, expected * (1 + JITTER) + 0.011)
            expected = min(2 * expected, MAX_DELAY)
        self.assertGreater(len(way.delays), 12)

    def test_jitter(self) -> None:
        """Two dialers that lose their link together do not dial in step."""
        times = []
        for seed in (1, 2):
            self.setUp()
            way = self.failing()
            self.dialer(way, seed=seed).start()
            self.advance(20)
            times.append(way.attempts)
        self.assertNotEqual(times[0][1:5], times[1][1:5])

    def test_permanent(self) -> None:
        """What somebody has to change first is tried at most twice a minute, and told once a minute."""
        way = self.failing(WRONG)
        self.dialer(way).start()
        self.advance(200)
        for delay in way.delays:
            self.assertGreaterEqual(delay, PERMANENT_DELAY * (1 - JITTER) - 1e-6)
        self.assertGreaterEqual(len(way.attempts), 5)
        lines = self.lines("hv-x")
        self.assertLessEqual(len(lines), 200 / REPEAT_SECONDS + 1)
        self.assertIn("until somebody has changed that", lines[0])
        self.assertIn("way-0", lines[0])

    def test_told_once(self) -> None:
        """A failure that repeats is told at first and then once a minute; another one at once."""
        way = self.failing()
        self.dialer(way).start()
        self.advance(50)
        self.assertEqual(len(self.lines("connection refused")), 1)
        self.assertIn("link hv-b", self.lines("connection refused")[0])
        way.answer = lambda _: fail(TransportError("no route to host"))
        self.advance(8)
        self.assertEqual(len(self.lines("no route to host")), 1)
        self.advance(50)
        self.assertEqual(len(self.lines("no route to host")), 1)
        self.advance(20)
        self.assertEqual(len(self.lines("no route to host")), 2)

    def test_foreign_errors(self) -> None:
        """An endpoint of somebody else may fail with anything; that is tried again."""
        way = self.failing(ConnectError(string="something of Twisted's"))
        self.dialer(way).start()
        self.advance(2)
        self.assertGreater(len(way.attempts), 2)
        self.assertEqual(len(self.lines("something of Twisted's")), 1)

    def test_endpoint_raises(self) -> None:
        """One that raises, as when memory is short, has failed like any other and is tried again."""

        def answer(_: IProtocolFactory) -> Deferred[Any]:
            raise MemoryError

        way = self.endpoint(answer)
        self.dialer(way).start()
        self.advance(5)
        self.assertGreater(len(way.attempts), 3)
        self.assertEqual(len(self.lines("no connection to way-0: MemoryError")), 1)
        way.answer = self.connect
        self.advance(20)
        self.assertTrue(self.peer.is_up)

    def test_one_attempt_at_a_time(self) -> None:
        """While an attempt is under way there is no other."""
        way = self.endpoint(lambda _: Deferred())
        self.dialer(way).start()
        self.advance(60)
        self.assertEqual(len(way.attempts), 1)


class WaysTests(DialerTests):
    """Several addresses of one peer."""

    def test_in_turn(self) -> None:
        """All are tried, one after the other, before the delay grows."""
        ways = [self.failing(TransportError(f"refused by {i}")) for i in range(3)]
        self.dialer(*ways).start()
        self.advance(2)
        order = sorted((at, i) for i, way in enumerate(ways) for at in way.attempts)
        self.assertEqual([i for _, i in order][:6], [0, 1, 2, 0, 1, 2])
        gaps = [b[0] - a[0] for a, b in pairwise(order)]
        for gap in gaps[:3]:
            self.assertLessEqual(gap, FIRST_DELAY * (1 + JITTER) + 0.011)

    def test_each_is_told_once(self) -> None:
        """Ways that fail differently do not fill the log in alternation."""
        ways = [self.failing(TransportError(f"refused by {i}")) for i in range(3)]
        self.dialer(*ways).start()
        self.advance(50)
        for i in range(3):
            self.assertEqual(len(self.lines(f"refused by {i}", f"way-{i}")), 1)

    def test_the_one_that_worked_is_tried_first(self) -> None:
        """After a loss dialling begins with the way that was up."""
        bad, good = self.failing(), self.endpoint(self.connect)
        self.dialer(bad, good).start()
        self.advance(2)
        self.assertTrue(self.peer.is_up)
        self.assertEqual((len(bad.attempts), len(good.attempts)), (1, 1))
        self.advance(10)
        self.connections[-1].cut()
        self.advance(1)
        self.assertTrue(self.peer.is_up)
        self.assertEqual((len(bad.attempts), len(good.attempts)), (1, 2))

    def test_hopeless_way(self) -> None:
        """A way that needs somebody's hand does not keep the others from being tried soon."""
        hopeless, good = self.failing(WRONG), self.endpoint(self.connect)
        self.dialer(hopeless, good).start()
        self.advance(1)
        self.assertTrue(self.peer.is_up)
        good.answer = lambda _: fail(REFUSED)
        self.advance(10)
        self.connections[-1].cut()
        self.advance(60)
        self.assertGreater(len(good.attempts), 10)
        self.assertLessEqual(len(hopeless.attempts), 4, "at most twice a minute")


class LinkTests(DialerTests):
    """What becomes of connections."""

    def test_up_and_lost(self) -> None:
        """A link that was up is dialled again at once, with the first delay."""
        way = self.endpoint(self.connect)
        self.dialer(way).start()
        self.advance(10)
        self.assertTrue(self.peer.is_up)
        lost_at = self.clock.seconds()
        self.connections[-1].cut()
        self.advance(1)
        self.assertTrue(self.peer.is_up)
        [again] = [at for at in way.attempts if at > lost_at]
        self.assertLessEqual(again - lost_at, FIRST_DELAY * (1 + JITTER) + 0.011)
        self.assertEqual(self.lines("no connection"), [])

    def test_delay_begins_anew(self) -> None:
        """Having been up, the delays begin with the first one."""
        way = self.failing()
        self.dialer(way).start()
        self.advance(30)
        way.answer = self.connect
        self.advance(10)
        self.assertTrue(self.peer.is_up)
        way.answer = lambda _: fail(REFUSED)
        self.connections[-1].cut()
        lost_at = self.clock.seconds()
        self.advance(2)
        self.assertGreaterEqual(len([at for at in way.attempts if at > lost_at]), 3)

    def test_lost_in_the_handshake(self) -> None:
        """A connection that ends before the handshake counts as a failure: the delays grow."""

        def connect(factory: IProtocolFactory) -> Deferred[Any]:
            done = self.connect(factory)
            self.connections[-1].cut()
            return done

        way = self.endpoint(connect)
        self.dialer(way).start()
        self.advance(30)
        self.assertLess(len(way.attempts), 15)
        self.assertEqual(len(self.lines("no connection", "connection lost")), 1)

    def test_silent_in_the_handshake(self) -> None:
        """A peer that says nothing is left after the handshake's time, and tried again."""

        def connect(factory: IProtocolFactory) -> Deferred[Any]:
            done = self.connect(factory)
            self.connections[-1].stall()
            return done

        way = self.endpoint(connect)
        self.dialer(way).start()
        self.advance(13)
        self.assertIn(len(way.attempts), (2, 3))
        self.assertEqual(len(self.lines("link hv-b", "HANDSHAKE_TIMEOUT")), 1)

    def test_rejected_for_good(self) -> None:
        """A peer that speaks another version is tried at most twice a minute."""

        class Rejecting(Recorder):
            def dataReceived(self, data: bytes) -> None:
                self.transport.write(frame(REJECT, 0, u16(32) + u16(7) + b"this side speaks version 7"))

            transport: Any

        def connect(factory: IProtocolFactory) -> Deferred[Any]:
            link = factory.buildProtocol(None)  # type: ignore[arg-type]
            assert link is not None
            MemoryConnection(link, Rejecting(), clock=self.clock)
            return succeed(link)

        way = self.endpoint(connect)
        self.dialer(way).start()
        self.advance(100)
        self.assertLessEqual(len(way.attempts), 5)
        self.assertIn(
            "until somebody has changed that", self.lines("VERSION_UNSUPPORTED", "no connection")[0]
        )

    def test_two_daemons_of_one_name(self) -> None:
        """Two that put one another out do so more and more seldom, not five times a second for ever."""
        way = self.endpoint(self.connect)
        self.dialer(way).start()
        twin = Peer(self.clock, "hv-b", Identity("hv-a", b"t" * 16), LIMITS, dialing=True)
        other = self.endpoint(self.connect)
        Dialer(self.clock, twin, [("way", other)], Random(7)).start()
        self.advance(60)
        self.assertLess(len(way.attempts) + len(other.attempts), 60)


class StopTests(DialerTests):
    """An end to it."""

    def test_stop_while_waiting(self) -> None:
        """Nothing is dialled any more."""
        way = self.failing()
        dialer = self.dialer(way)
        dialer.start()
        dialer.stop()
        self.advance(60)
        self.assertEqual(len(way.attempts), 1)
        self.assertEqual(self.clock.getDelayedCalls(), [])

    def test_stop_while_dialling(self) -> None:
        """The attempt is cancelled, whatever the endpoint says then; nothing is logged of it."""
        cancellations: list[Exception | None] = []
        for error in (None, ConnectingCancelledError(None), TransportError("cancelled")):

            def cancelled(attempt: Deferred[Any], error: Exception | None = error) -> None:
                cancellations.append(error)
                if error is not None:
                    attempt.errback(error)

            way = self.endpoint(lambda _, cancelled=cancelled: Deferred(cancelled))  # type: ignore[misc]
            dialer = self.dialer(way)
            dialer.start()
            dialer.stop()
            self.advance(60)
            self.assertEqual(len(way.attempts), 1, error)
            self.assertEqual(self.clock.getDelayedCalls(), [])
        self.assertEqual(len(cancellations), 3)
        self.assertEqual(self.lines(), [])

    def test_stop_with_a_link(self) -> None:
        """A link that is up stays, and is not dialled again when it ends."""
        way = self.endpoint(self.connect)
        dialer = self.dialer(way)
        dialer.start()
        self.advance(1)
        dialer.stop()
        self.advance(30)
        self.assertTrue(self.peer.is_up)
        self.connections[-1].cut()
        self.advance(30)
        self.assertEqual(len(way.attempts), 1)


@implementer(IStreamServerEndpoint)
class Listening:
    """An endpoint to listen on, that records."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[str] = []

    def listen(self, protocolFactory: IProtocolFactory) -> Deferred[Any]:
        """Listen, or fail."""
        self.calls.append("listen")
        done: Deferred[Any] = Deferred()
        if self.error is not None:
            done.errback(self.error)
        else:
            done.callback(self)
        return done

    def stopListening(self) -> None:
        """As a port."""
        self.calls.append("stop")


class LinkPortTests(DialerTests):
    """The listening side."""

    def test_listens_on_all(self) -> None:
        """All addresses are listened on, and left."""
        ways = [Listening(), Listening()]
        port = LinkPort(self.far, [("way-a", ways[0]), ("way-b", ways[1])])
        self.successResultOf(port.start())
        self.assertEqual([len(self.lines("listening on", f"way-{name}")) for name in "ab"], [1, 1])
        self.successResultOf(port.stop())
        self.assertEqual([way.calls for way in ways], [["listen", "stop"]] * 2)
        self.successResultOf(port.stop())

    def test_cannot_listen(self) -> None:
        """One that cannot be had fails the start."""
        port = LinkPort(self.far, [("a", Listening()), ("b", Listening(TransportError("taken")))])
        self.assertEqual(str(self.failed(port.start())), "taken")

    def test_too_many_strangers(self) -> None:
        """Connections that do not say who they are are bounded; one that ends makes room."""
        factory = LinkFactory(self.far)
        connections = []
        for _ in range(32):
            link = factory.buildProtocol(None)
            assert link is not None
            connections.append(MemoryConnection(Recorder(), link, clock=self.clock))
        self.assertIsNone(factory.buildProtocol(None))
        self.assertEqual(len(self.lines("link hv-a", "32 others")), 1)
        connections[3].cut()
        self.assertIsNotNone(factory.buildProtocol(None))
