"""Two peers whose link is lost: what waits, what goes on, what ends, and when."""

from __future__ import annotations

import random
from typing import Any

from twisted.internet.defer import CancelledError
from twisted.python.failure import Failure

from relaymux.core.handshake import Hello
from relaymux.core.link import CLOSED_SECONDS, HANDSHAKE_SECONDS
from relaymux.errors import ErrorCode, LocalError, SessionLost, StreamReset
from relaymux.net import inbox
from relaymux.net.holder import ACCEPTOR_GRACE
from relaymux.net.stream import StreamTransport
from tests.resumecase import WINDOW, Logged, PeerTests, changed
from tests.resuming import SMALL, Hosts, Talker, begin, stamped
from tests.wire import HELLO, REJECT, frame, hello, u16


class WaitingTests(PeerTests):
    """While the link is down."""

    def test_nothing_happens(self) -> None:
        """Streams wait: up to the end of the window none of them is told anything."""
        hosts = self.pair()
        talkers = [*self.open(hosts), *self.open(hosts, end="b")]
        hosts.wire.cut()
        hosts.run(WINDOW - 0.01)
        self.assert_untouched(*talkers)
        self.assertFalse(hosts.a.peer.is_up or hosts.b.peer.is_up)
        hosts.connect()
        hosts.run(0.0)
        self.assert_untouched(*talkers)
        self.assert_works(hosts)

    def test_transport_that_fails(self) -> None:
        """What a transport could not take is said again on the next connection; a program notices nothing."""
        for buffers in (True, False):
            hosts = self.pair(buffers=buffers)
            near, far = self.open(hosts)
            transport: Any = hosts.a.link.transport
            name = "writeBuffers" if buffers else "writeSequence"
            original = getattr(transport, name)

            def fail(_: object, transport: Any = transport, name: str = name, write: Any = original) -> None:
                setattr(transport, name, write)
                raise MemoryError("once")

            setattr(transport, name, fail)
            near.say(stamped(1, 20_000), finish=False)
            hosts.run(1.0)
            self.assertEqual(len(self.flushLoggedErrors(MemoryError)), 1)
            self.assertFalse(hosts.a.peer.is_up or hosts.b.peer.is_up)
            hosts.up()
            hosts.run(1.0)
            self.assert_same(far.received, stamped(1, 20_000))
            self.assert_untouched(near, far)

    def test_no_memory_to_wait_in(self) -> None:
        """A stream whose bytes cannot be kept ends as an error: nobody says them again."""
        hosts = self.pair()
        near, far = self.open(hosts)
        far.transport.pauseProducing()

        # In place of a MemoryError, which nobody can have raised in what is compiled.
        self.patch(inbox, "WAITING_PIECE", None)
        near.say(stamped(1, 100), finish=False)
        hosts.run(1.0)
        self.assertEqual(len(self.flushLoggedErrors(TypeError)), 1)
        for talker in (near, far):
            self.assertEqual(talker.events[-1], "lost")
        self.assertEqual(far.received, b"")
        self.assert_works(hosts)

    def test_producers_pause(self) -> None:
        """Whoever writes is paused, takes no harm, and goes on when there is a link again: both flavours."""
        data = stamped(1, 40_000)
        for buffers in (True, False):
            hosts = self.pair(buffers=buffers)
            near, far = self.open(hosts)
            hosts.wire.cut()
            near.say(data)
            far.say(data)
            hosts.run(30.0)
            for talker in (near, far):
                self.assertEqual(talker.pauses, 1)
                self.assertEqual(talker.written, 700, "one write")
                self.assert_untouched(talker)
            hosts.connect()
            hosts.run(2 * CLOSED_SECONDS)
            for talker in (near, far):
                self.assert_same(talker.received, data)
                self.assertEqual(sorted(talker.events), ["lost", "made", "read lost", "write lost"])

    def test_full_buffer_pauses(self) -> None:
        """
        With the link up and nothing acknowledged, producers pause at a full replay buffer, and only
        they.
        """
        limits = changed(SMALL, window=100_000)
        hosts = self.pair(limits=limits)
        near, far = self.open(hosts)
        hosts.wire.stall(hosts.wire.server)
        near.say(stamped(1, 50_000), finish=False)
        hosts.run(1.0)
        self.assertLessEqual(hosts.a.session.replay.held_bytes, limits.replay)
        self.assertGreater(hosts.a.session.replay.held_bytes, limits.replay // 2)
        self.assertGreater(near.unwritten, 40_000)
        written = near.written
        far.say(stamped(2, 300), finish=False)
        hosts.run(1.0)
        self.assert_same(near.received, stamped(2, 300))
        self.assertEqual(near.written, written)
        self.assert_untouched(near, far)
        hosts.wire.cut()
        hosts.run(5.0)
        self.assertEqual(near.written, written)
        hosts.connect()
        hosts.run(1.0)
        self.assert_same(far.received, stamped(1, 50_000))

    def test_memory_is_bounded(self) -> None:
        """
        However many streams write against no link: what is kept stays within the replay buffer and
        one write each.
        """
        hosts = self.pair()
        talkers = [self.open(hosts)[0] for _ in range(10)]
        hosts.wire.stall()
        for talker in talkers:
            talker.say(stamped(1, 10_000))
        hosts.run(5.0)
        hosts.wire.cut()
        hosts.run(40.0)
        queued = sum(stream.send.queued for stream in hosts.a.session.streams.values())
        self.assertLessEqual(queued, 10 * 700)
        self.assertLessEqual(hosts.a.session.replay.held_bytes, SMALL.replay)
        self.assertLessEqual(sum(talker.written for talker in talkers), 10 * 700 + SMALL.replay)

    def test_paused_readers(self) -> None:
        """A reader that was paused all the time gets all of it when it goes on."""
        data = stamped(1, 6000)
        hosts = self.pair()
        near, far = self.open(hosts)
        far.transport.pauseProducing()
        near.say(data)
        hosts.run(0.0)
        for _ in range(3):
            hosts.wire.cut()
            hosts.run(1.0)
            hosts.connect()
            hosts.run(0.0)
        self.assertEqual(far.received, b"")
        far.transport.resumeProducing()
        hosts.run(0.0)
        self.assert_same(far.received, data)

    def test_half_closed_streams(self) -> None:
        """A stream of which one direction has ended keeps the other, over any number of links."""
        hosts = self.pair()
        near, far = self.open(hosts, Talker(stamped(1, 100)))
        self.assertEqual(far.events, ["made", "read lost"])
        for _ in range(5):
            hosts.wire.cut()
            hosts.run(10.0)
            hosts.connect()
            hosts.run(20.0)
        self.assertEqual((near.events, far.events), (["made", "write lost"], ["made", "read lost"]))
        far.say(stamped(2, 5000))
        hosts.run(0.0)
        self.assert_same(near.received, stamped(2, 5000))
        self.assertEqual(near.events, ["made", "write lost", "read lost", "lost"])
        self.assertEqual(near.outcome[2], "ConnectionDone")

    def test_ends_while_down(self) -> None:
        """What ends while there is no link ends at the other side as soon as there is one."""
        hosts = self.pair()
        pairs = [self.open(hosts) for _ in range(3)]
        hosts.wire.cut()
        pairs[0][0].transport.loseWriteConnection()
        pairs[1][0].transport.abortConnection()
        pairs[2][0].transport.loseConnection()
        hosts.run(5.0)
        self.assert_untouched(*(far for _, far in pairs))
        hosts.connect()
        hosts.run(0.0)
        self.assertEqual(pairs[0][1].events, ["made", "read lost"])
        self.assertEqual(pairs[1][1].outcome, (b"", ["lost", "made"], "StreamReset 22"))
        self.assertEqual(
            pairs[2][1].outcome, (b"", ["lost", "made", "read lost", "write lost"], "ConnectionDone")
        )

    def test_goaway_outlives_links(self) -> None:
        """A farewell that was said stays said, and one that was under way arrives."""
        hosts = self.pair()
        near, _ = self.open(hosts)
        hosts.wire.stall()
        hosts.b.session.goaway(ErrorCode.SHUTTING_DOWN, "bye")
        hosts.b.peer.flush()
        hosts.wire.cut()
        hosts.connect()
        hosts.run(0.0)
        failure = self.failureResultOf(hosts.a.peer.open_stream("vda", 10.0), LocalError)
        self.assertIn("ending", failure.getErrorMessage())
        self.assert_untouched(near)

    def test_said(self) -> None:
        """
        The log says that the link is down, and for how long; then that it is back, and that nothing
        was lost.
        """
        hosts = self.pair()
        near, _ = self.open(hosts)
        with Logged() as log:
            hosts.wire.cut()
            near.say(stamped(1, 500), finish=False)
            hosts.run(3.0)
            hosts.connect()
            hosts.run(0.0)
        [down] = [line for line in log.having(": down:") if "up to 60 s" in line]
        self.assertIn("1 streams wait", down)
        resumed = log.having("resumed after 3.0 s")
        self.assertEqual(len(resumed), 2)
        for line in resumed:
            self.assertIn("1 streams go on", line)
            self.assertIn("0 lost", line)


class OpeningTests(PeerTests):
    """Streams that are wanted while the link is down."""

    def test_in_order(self) -> None:
        """They wait, and reach the other side in the order in which they were wanted."""
        for end in ("a", "b"):
            hosts = self.pair()
            host, other = (hosts.a, hosts.b) if end == "a" else (hosts.b, hosts.a)
            services = [f"disk{number}" for number in range(8)]
            order: list[str] = []
            for service in random.sample(services, len(services)):
                self.serve(other, service=service)
            for service in services:
                server = other.peer._services[service]
                original = server.stream_opened

                def note(stream: StreamTransport, original: Any = original, order: list[str] = order) -> None:
                    order.append(stream.service)
                    original(stream)

                server.stream_opened = note  # type: ignore[method-assign]
            hosts.wire.cut()
            hosts.run(1.0)
            talkers = [Talker(stamped(1, 100)) for _ in services]
            results = []
            for service, talker in zip(services, talkers, strict=True):
                results.append(begin(host.peer, service, talker, 10.0))
                hosts.run(0.5)
            for result in results:
                self.assertNoResult(result)
            hosts.connect()
            hosts.run(0.0)
            self.assertEqual(order, services)
            for result in results:
                self.successResultOf(result)

    def test_time_is_up(self) -> None:
        """One that waits for longer than it may fails then, says why, and the peer never hears of it."""
        hosts = self.pair()
        hosts.wire.cut()
        late = hosts.a.peer.open_stream("vda", 5.0)
        patient = begin(hosts.a.peer, "vda", Talker(stamped(1, 10)), 20.0)
        hosts.run(4.99)
        self.assertNoResult(late)
        hosts.run(0.02)
        failure = self.failureResultOf(late, StreamReset)
        self.assertEqual(failure.value.code, ErrorCode.OPEN_TIMEOUT)
        self.assertIn("not up within 5 s", failure.getErrorMessage())
        hosts.connect()
        hosts.run(0.0)
        self.successResultOf(patient)
        self.assertEqual(hosts.a.peer.open_streams, 1)
        self.assertEqual([talker.reason is None for talker in self.served_by_b.talkers], [True])
        self.assert_works(hosts)

    def test_cancelled(self) -> None:
        """One that is not wanted any more is not opened for good."""
        hosts = self.pair()
        hosts.wire.cut()
        result = hosts.a.peer.open_stream("vda", 30.0)
        result.cancel()
        self.failureResultOf(result, CancelledError, StreamReset)
        hosts.connect()
        hosts.run(0.0)
        self.assertEqual(hosts.a.session.streams, {})
        self.assertEqual(hosts.b.session.streams, {})
        self.assert_works(hosts)

    def test_too_many(self) -> None:
        """More than the other side allows are refused when there is a link; given up ones do not count."""
        hosts = self.pair()
        hosts.wire.cut()
        late = [hosts.a.peer.open_stream("vda", 1.0) for _ in range(SMALL.max_streams)]
        hosts.run(2.0)
        for result in late:
            self.failureResultOf(result, StreamReset)
        results = [hosts.a.peer.open_stream("vda", 30.0) for _ in range(SMALL.max_streams + 1)]
        hosts.connect()
        hosts.run(0.0)
        self.failureResultOf(results.pop(), LocalError)
        for result in results:
            self.successResultOf(result).abortConnection()
        hosts.run(0.0)
        self.assert_works(hosts)

    def test_cut_in_the_answer(self) -> None:
        """A stream whose OPEN or whose answer was lost with the link is there all the same, once."""
        for stalled in ("client", "server"):
            hosts = self.pair()
            hosts.wire.stall(getattr(hosts.wire, stalled))
            talker = Talker(stamped(1, 3000))
            result = begin(hosts.a.peer, "vda", talker, 10.0)
            hosts.run(1.0)
            self.assertNoResult(result)
            hosts.wire.cut()
            hosts.run(1.0)
            hosts.connect()
            hosts.run(0.0)
            self.successResultOf(result)
            self.assertEqual(len(self.served_by_b.talkers), 1)
            self.assert_same(self.served_by_b.talkers[0].received, stamped(1, 3000))

    def test_session_that_the_dialer_never_had(self) -> None:
        """
        A WELCOME that is lost makes a session of which only the accepting side
        knows.  What it opened there is opened again in the next one.
        """
        for limits in (SMALL, changed(SMALL, resume_window=0.0)):
            hosts = Hosts(limits=limits)
            self.serve(hosts.a)
            wanted = [begin(hosts.b.peer, "vda", Talker(stamped(n, 2000)), 30.0) for n in range(3)]
            given_up = hosts.b.peer.open_stream("vda", 3.0)
            cancelled = hosts.b.peer.open_stream("vda", 30.0)
            hosts.plan = [lambda wire: wire.stall(wire.client)]
            hosts.connect()
            hosts.run(1.0)
            self.assertTrue(hosts.b.peer.is_up)
            self.assertFalse(hosts.a.peer.is_up)
            hosts.wire.cut()
            hosts.run(3.0)
            self.failureResultOf(given_up, StreamReset)
            cancelled.cancel()
            self.failureResultOf(cancelled, CancelledError, StreamReset)
            for result in wanted:
                self.assertNoResult(result)
            hosts.connect()
            hosts.run(0.0)
            for number, result in enumerate(wanted):
                self.successResultOf(result)
                self.assert_same(self.served_by_a.talkers[-3 + number].received, stamped(number, 2000))

    def test_too_late_for_a_welcome(self) -> None:
        """The same when the dialling side gives the link up, and says so."""
        hosts = Hosts()
        self.serve(hosts.a)
        wanted = begin(hosts.b.peer, "vda", Talker(stamped(1, 2000)), 30.0)
        hosts.plan = [lambda wire: wire.stall(wire.client)]
        hosts.connect()
        hosts.run(HANDSHAKE_SECONDS + 1)
        self.assertNoResult(wanted)
        self.assertFalse(hosts.b.peer.is_up)
        hosts.connect()
        hosts.run(0.0)
        self.successResultOf(wanted)


class ExpiryTests(PeerTests):
    """Time alone ends a session."""

    def test_both_sides(self) -> None:
        """
        The dialling side gives up after the window, the accepting one a little later: all streams
        are errors.
        """
        for buffers in (True, False):
            hosts = self.pair(buffers=buffers)
            pairs = [self.open(hosts), self.open(hosts, end="b")]
            finished, half_closed = self.open(hosts, Talker(stamped(1, 10)))
            pairs[0][0].say(stamped(1, 3000))
            hosts.run(0.0)
            unanswered = hosts.a.peer.open_stream("vda", 1000.0)
            hosts.wire.cut()
            pairs[0][1].say(stamped(1, 3000))
            near = [pairs[0][0], pairs[1][1]]
            far = [pairs[0][1], pairs[1][0]]
            before = [list(talker.events) for talker in near + far]
            hosts.run(WINDOW - 0.01)
            self.assertEqual([talker.events for talker in near + far], before)
            hosts.run(0.02)
            for talker, events in zip(near, before[:2], strict=True):
                self.assertEqual(talker.outcome[1:], (sorted([*events, "lost"]), "SessionLost"))
            self.assertEqual(finished.outcome[2], "SessionLost")
            self.failureResultOf(unanswered, SessionLost)
            self.assertEqual([talker.events for talker in far], before[2:])
            hosts.run(ACCEPTOR_GRACE - 0.02)
            self.assertEqual([talker.events for talker in far], before[2:])
            hosts.run(0.02)
            for talker, events in zip(far, before[2:], strict=True):
                self.assertEqual(talker.outcome[1:], (sorted([*events, "lost"]), "SessionLost"))
            self.assertEqual(half_closed.outcome[2], "SessionLost")
            for host in hosts.ends:
                self.assertIsNone(host.peer._held)
            self.assert_no_timers(hosts)
            hosts.connect()
            hosts.run(0.0)
            self.assert_works(hosts)

    def test_prefix(self) -> None:
        """What was received of a stream that failed is a part of what was sent, from its beginning."""
        data = stamped(1, 30_000)
        hosts = self.pair()
        near, far = self.open(hosts)
        hosts.wire.cut_after(9000, hosts.wire.server)
        near.say(data)
        hosts.run(100.0)
        self.assertEqual((near.events, far.events), (["made", "lost"], ["made", "lost"]))
        self.assertGreater(len(far.received), 4000)
        self.assert_same(far.received, data[: len(far.received)])
        self.assertGreaterEqual(hosts.a.peer.undelivered, near.written - len(far.received))

    def test_window_is_the_lesser_one(self) -> None:
        """
        Both keep to the lesser of what they announced; with 0 at either side sessions end with
        their links.
        """
        for one, other in ((10.0, 60.0), (60.0, 10.0)):
            hosts = self.pair(
                limits=changed(SMALL, resume_window=one), other=changed(SMALL, resume_window=other)
            )
            near, far = self.open(hosts)
            hosts.wire.cut()
            hosts.run(9.99)
            self.assert_untouched(near, far)
            hosts.run(0.02)
            self.assert_failed(near, ErrorCode.SESSION_EXPIRED)
            hosts.run(ACCEPTOR_GRACE)
            self.assert_failed(far, ErrorCode.SESSION_EXPIRED)
        for one, other in ((0.0, 60.0), (60.0, 0.0), (0.0, 0.0)):
            hosts = self.pair(
                limits=changed(SMALL, resume_window=one), other=changed(SMALL, resume_window=other)
            )
            near, far = self.open(hosts)
            hosts.wire.cut()
            hosts.run(0.0)
            self.assert_failed(near, ErrorCode.NO_ERROR)
            self.assert_failed(far, ErrorCode.NO_ERROR)
            self.assert_no_timers(hosts)
            hosts.connect()
            hosts.run(0.0)
            self.assert_works(hosts)

    def test_each_loss_has_its_own_time(self) -> None:
        """The window begins anew with each link that is lost, and no timer of an earlier loss is left."""
        hosts = self.pair()
        near, far = self.open(hosts)
        for _ in range(4):
            hosts.wire.cut()
            hosts.run(WINDOW - 1)
            hosts.connect()
            hosts.run(2.0)
        self.assert_untouched(near, far)
        hosts.run(300.0)
        self.assert_untouched(near, far)

    def test_failed_attempts_are_no_links(self) -> None:
        """Attempts that come to nothing do not lengthen the dialling side's window."""
        hosts = self.pair()
        near, _ = self.open(hosts)
        hosts.wire.cut()
        for _ in range(9):
            hosts.run(6.0)
            hosts.plan = [lambda wire: wire.stall(wire.server)]
            hosts.connect()
            hosts.run(0.5)
            hosts.wire.cut()
        self.assert_untouched(near)
        hosts.run(WINDOW - 9 * 6.5 - 0.01)
        self.assert_untouched(near)
        hosts.run(0.02)
        self.assert_failed(near, ErrorCode.SESSION_EXPIRED)

    def test_too_late(self) -> None:
        """
        The answer to a RESUME comes after the session's end: the link is refused, the next one
        begins anew.
        """
        hosts = self.pair()
        near, far = self.open(hosts)
        hosts.wire.cut()
        hosts.run(WINDOW - 1)
        hosts.plan = [lambda wire: wire.stall(wire.client)]
        hosts.connect()
        hosts.run(2.0)
        self.assert_failed(near, ErrorCode.SESSION_EXPIRED)
        hosts.wire.release()
        hosts.run(0.0)
        self.assertFalse(hosts.a.peer.is_up)
        hosts.connect()
        hosts.run(0.0)
        self.assert_failed(far, ErrorCode.LINK_REPLACED)
        self.assert_works(hosts)

    def test_programs_that_come_back(self) -> None:
        """
        A program that wants a stream as soon as it has lost one waits for the next session, and
        gets it there.
        """
        hosts = self.pair()
        again = Talker(stamped(3, 2000))
        near, _ = self.open(hosts)
        results = []

        def come_back(reason: Failure) -> None:
            results.append(begin(hosts.a.peer, "vda", again, 100.0))

        near.connectionLost = come_back  # type: ignore[method-assign, assignment]
        hosts.wire.cut()
        hosts.run(WINDOW + 1)
        [result] = results
        self.assertNoResult(result)
        hosts.connect()
        hosts.run(0.0)
        self.successResultOf(result)
        self.assert_same(self.served_by_b.talkers[-1].received, stamped(3, 2000))


class DrainTests(PeerTests):
    """Shutting down while the link is down."""

    def test_link_comes_back(self) -> None:
        """Draining goes on over the next link, delivers everything, and says goodbye."""
        for end in ("a", "b"):
            hosts = self.pair()
            near, far = self.open(hosts, end=end)
            host = getattr(hosts, end)
            hosts.wire.cut()
            near.say(stamped(1, 5000))
            drained = host.peer.drain(30.0)
            hosts.run(10.0)
            self.assertNoResult(drained)
            self.assertTrue(host.peer.wants_link)
            hosts.connect()
            hosts.run(1.0)
            self.assertNoResult(drained)
            self.assert_same(far.received, stamped(1, 5000))
            far.transport.loseConnection()
            hosts.run(1.0)
            self.assertEqual(self.successResultOf(drained), 0)
            self.assertFalse(host.peer.wants_link)
            self.assertFalse(hosts.a.peer.is_up or hosts.b.peer.is_up)
            hosts.run(100.0)
            self.assert_no_timers(hosts)

    def test_link_stays_away(self) -> None:
        """
        Else the streams end as errors when the time is over, and the bytes that were not delivered
        are told.
        """
        hosts = self.pair()
        near, far = self.open(hosts)
        hosts.wire.cut()
        near.say(stamped(1, 5000))
        drained = hosts.a.peer.drain(30.0)
        hosts.run(29.9)
        self.assertNoResult(drained)
        self.assert_untouched(near, far)
        hosts.run(0.2)
        self.assertEqual(self.successResultOf(drained), 700, "what was taken from the program")
        self.assert_failed(near, ErrorCode.SHUTTING_DOWN)
        self.assertFalse(hosts.a.peer.wants_link)
        hosts.run(100.0)
        self.assert_failed(far, ErrorCode.SESSION_EXPIRED)
        self.assert_no_timers(hosts)

    def test_nothing_to_wait_for(self) -> None:
        """Without streams, and with nothing left to say, draining needs no link."""
        hosts = self.pair()
        hosts.run(1.0)
        hosts.wire.cut()
        drained = hosts.a.peer.drain(30.0)
        hosts.run(31.0)
        self.assertEqual(self.successResultOf(drained), 0)

    def test_new_streams(self) -> None:
        """A daemon that drains opens none, wherever its link is."""
        hosts = self.pair()
        self.open(hosts)
        hosts.wire.cut()
        hosts.b.peer.drain(30.0)
        self.failureResultOf(hosts.b.peer.open_stream("vda", 10.0), LocalError)
        result = hosts.a.peer.open_stream("vda", 10.0)
        hosts.connect()
        hosts.run(0.0)
        failure = self.failureResultOf(result, StreamReset)
        self.assertEqual(failure.value.code, ErrorCode.SHUTTING_DOWN)


class RestartTests(PeerTests):
    """The daemon at the other end is another process."""

    def test_dialer(self) -> None:
        """It says HELLO with another instance: the old streams fail at once, with or without a link."""
        for lost in (True, False):
            hosts = self.pair()
            pairs = [self.open(hosts), self.open(hosts, end="b")]
            if lost:
                hosts.wire.cut()
            else:
                hosts.wire.cut(hosts.wire.client)
            hosts.a.restart()
            self.serve(hosts.a)
            hosts.run(1.0)
            hosts.connect()
            hosts.run(0.0)
            self.assert_failed(pairs[0][1], ErrorCode.PEER_RESTARTED)
            self.assert_failed(pairs[1][0], ErrorCode.PEER_RESTARTED)
            self.assert_works(hosts)

    def test_acceptor(self) -> None:
        """
        It knows no session: the dialler ends its streams, begins anew by itself, and that works,
        within 2 s.  What was wanted meanwhile is opened then.
        """
        hosts = Hosts()
        self.serve(hosts.b)
        hosts.dial()
        near, _ = self.open(hosts)
        waiting = []
        hosts.refusing = True
        hosts.wire.cut()
        hosts.b.restart()
        self.serve(hosts.b)
        hosts.run(20.0)
        self.assert_untouched(near)
        waiting.append(begin(hosts.a.peer, "vda", Talker(stamped(1, 100)), 30.0))
        hosts.refusing = False
        hosts.run(5.0, lambda: near.reason is not None)
        self.assert_failed(near, ErrorCode.UNKNOWN_SESSION)
        self.assertNoResult(waiting[0])
        start = hosts.clock.seconds()
        hosts.run(2.0, lambda: hosts.a.peer.is_up)
        self.assertLess(hosts.clock.seconds() - start, 2.0)
        hosts.run(0.0)
        self.successResultOf(waiting[0])
        self.assert_works(hosts)

    def test_other_daemon(self) -> None:
        """A daemon of another name is told BUSY, and does no harm to a session that waits for its link."""
        hosts = self.pair()
        near, far = self.open(hosts)
        hosts.wire.cut()
        hosts.run(1.0)
        [(kind, _, payload)] = self.raw(hosts, hello(name=b"hv-c")).frames()
        self.assertEqual((kind, payload[:2]), (REJECT, u16(ErrorCode.BUSY)))
        self.assert_untouched(near, far)
        hosts.connect()
        hosts.run(0.0)
        [(kind, _, payload)] = self.raw(hosts, hello(name=b"hv-c")).frames()
        self.assertEqual((kind, payload[:2]), (REJECT, u16(ErrorCode.BUSY)))
        self.assert_untouched(near, far)
        self.assert_works(hosts)

    def test_late_hello(self) -> None:
        """A HELLO that was under way for long, on a connection that was given up since, ends nothing."""
        for cut in (False, True):
            hosts = Hosts()
            self.serve(hosts.b)
            hosts.plan = [lambda wire: wire.stall(wire.server)]
            hosts.connect()
            late = hosts.wire
            hosts.run(HANDSHAKE_SECONDS - 0.1)
            late.cut(late.client)
            hosts.connect()
            hosts.run(0.0)
            near, far = self.open(hosts)
            if cut:
                hosts.wire.cut()
            [said] = [bytes(frame(HELLO, 0, self.hello_of(hosts)))]
            late.server.protocol.buffersReceived([memoryview(said)])  # type: ignore[attr-defined]
            hosts.run(0.0)
            self.assert_untouched(near, far)
            if cut:
                hosts.connect()
                hosts.run(0.0)
            self.assert_works(hosts)

    def hello_of(self, hosts: Hosts) -> bytes:
        identity = hosts.a.peer._identity
        return Hello(identity.name, identity.instance, hosts.a.limits).encode()

    def test_both(self) -> None:
        """Both were restarted: nothing is left, and they find one another."""
        hosts = self.pair()
        hosts.wire.cut()
        for host in hosts.ends:
            host.restart()
            self.serve(host)
        hosts.connect()
        hosts.run(0.0)
        self.assert_works(hosts)
