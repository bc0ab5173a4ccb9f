"""Two daemons and their streams: opening, refusing, losing, draining."""

from __future__ import annotations

import time
from typing import Any

from twisted.internet.error import ConnectionDone

from relaymux.errors import ErrorCode, LocalError, SessionLost, StreamReset
from relaymux.net.link import CLOSE_SECONDS
from relaymux.net.stream import StreamTransport
from relaymux.testing.recording import Feeder, HalfCloseRecorder, Recorder
from tests.peers import LARGE, LIMITS, WINDOW, Acceptor, Ends, PeerTestCase, Undecided, stamped


class OpeningTests(PeerTestCase):
    """Asking for streams."""

    def test_accepted(self) -> None:
        """Either daemon may open; streams have ids of their own side."""
        ends = Ends()
        for opener, server in ((ends.near, ends.far), (ends.far, ends.near)):
            service = Acceptor()
            server.register("vda", service)
            stream = ends.open(HalfCloseRecorder(), opener=opener)
            self.assertEqual(stream.stream_id, service.streams[0].stream_id)
            self.assertEqual(stream.stream_id % 2, opener is ends.near)
            self.assertEqual((stream.outgoing, service.streams[0].outgoing), (True, False))

    def test_refused(self) -> None:
        """A refusal's code and text reach who asked; nothing is left of the stream."""

        class Refusing:
            def stream_opened(self, stream: StreamTransport) -> None:
                stream.refuse(ErrorCode.CONNECT_FAILED, "stream ram: there is no such socket")

        ends = Ends()
        ends.far.register("ram", Refusing())
        request = ends.near.open_stream("ram", 10.0)
        ends.settle()
        error = self.failed(request)
        self.assertIsInstance(error, StreamReset)
        self.assertEqual(error.code, ErrorCode.CONNECT_FAILED)
        self.assertEqual(str(error), "stream ram: there is no such socket")
        self.assert_idle(ends)

    def test_unknown_service(self) -> None:
        """A service that nobody offers is refused by name, and logged where it was asked for."""
        ends = Ends()
        request = ends.near.open_stream("vdz", 10.0)
        ends.settle()
        error = self.failed(request)
        self.assertEqual(error.code, ErrorCode.UNKNOWN_SERVICE)
        self.assertIn("vdz", str(error))
        self.assertEqual(len(self.lines("link near", "vdz")), 1)
        self.assert_idle(ends)

    def test_services(self) -> None:
        """A name is registered once; unregistered, it is refused again."""
        ends = Ends()
        ends.far.register("vda", Acceptor())
        with self.assertRaises(LocalError):
            ends.far.register("vda", Acceptor())
        ends.far.unregister("vda")
        request = ends.near.open_stream("vda", 10.0)
        ends.settle()
        self.assertEqual(self.failed(request).code, ErrorCode.UNKNOWN_SERVICE)

    def test_no_service_name(self) -> None:
        """A name that could not travel is the caller's mistake."""
        ends = Ends()
        self.assertIsInstance(self.failed(ends.near.open_stream("../run", 10.0)), LocalError)

    def test_order(self) -> None:
        """Streams are opened in the order in which they were asked for, and before the link is there."""
        ends = Ends(connect=False)
        service = Undecided()
        for name in "abcdef":
            ends.far.register(name, service)
        for name in "abc":
            ends.near.open_stream(name, 10.0)
        ends.connect()
        for name in "de":
            ends.near.open_stream(name, 10.0)
        ends.settle()
        ends.near.open_stream("f", 10.0)
        ends.settle()
        self.assertEqual([stream.service for stream in service.streams], list("abcdef"))

    def test_no_answer(self) -> None:
        """Without an answer in time the request fails and the peer's end is told."""
        ends = Ends()
        service = Undecided()
        ends.far.register("vda", service)
        request = ends.near.open_stream("vda", 10.0)
        ends.advance(9.9)
        self.assertNoResult(request)
        ends.advance(0.2)
        error = self.failed(request)
        self.assertEqual(error.code, ErrorCode.OPEN_TIMEOUT)
        self.assertIn("hv-far", str(error))
        self.assertIn("10 s", str(error))
        self.assertFalse(service.streams[0].connected)
        # A late answer is nobody's business any more.
        service.streams[0].accept()
        service.streams[0].refuse(1, "late")
        ends.settle()
        self.assertTrue(ends.near.is_up)
        self.assert_idle(ends)

    def test_answer_crosses_the_timeout(self) -> None:
        """An answer that is under way when time is up does no harm."""
        for refused in (False, True):
            ends = Ends()
            service = Undecided()
            ends.far.register("vda", service)
            request = ends.near.open_stream("vda", 10.0)
            ends.settle()
            ends.connection.stall()
            if refused:
                service.streams[0].refuse(ErrorCode.CONNECT_FAILED, "no")
            else:
                service.streams[0].accept()
            ends.advance(10.1)
            self.assertEqual(self.failed(request).code, ErrorCode.OPEN_TIMEOUT)
            ends.connection.release()
            ends.settle()
            self.assertTrue(ends.near.is_up)
            self.assert_idle(ends)

    def test_no_link(self) -> None:
        """Without a link in time the request fails and says so."""
        ends = Ends(connect=False)
        request = ends.near.open_stream("vda", 10.0)
        ends.clock.advance(9.9)
        self.assertNoResult(request)
        ends.clock.advance(0.2)
        error = self.failed(request)
        self.assertEqual(error.code, ErrorCode.OPEN_TIMEOUT)
        self.assertIn("link far was not up", str(error))
        ends.far.register("vda", Undecided())
        ends.connect()
        ends.settle()
        self.assert_idle(ends)

    def test_cancelled(self) -> None:
        """A request may be taken back before there is a link, and after the question was asked."""
        ends = Ends(connect=False)
        service = Undecided()
        ends.far.register("vda", service)
        first = ends.near.open_stream("vda", 10.0)
        first.cancel()
        self.failed(first)
        ends.connect()
        ends.settle()
        self.assertEqual(service.streams, [])
        second = ends.near.open_stream("vda", 10.0)
        ends.settle()
        second.cancel()
        self.failed(second)
        ends.settle()
        self.assertFalse(service.streams[0].connected)
        self.assert_idle(ends)
        ends.advance(20)

    def test_too_many_waiting(self) -> None:
        """What waits for a link is bounded."""
        ends = Ends(connect=False)
        waiting = [ends.near.open_stream("vda", 10.0) for _ in range(1024)]
        self.assertIsInstance(self.failed(ends.near.open_stream("vda", 10.0)), LocalError)
        self.assertNoResult(waiting[0])
        for request in waiting:
            request.addErrback(lambda _: None)
        ends.clock.advance(10.1)

    def test_too_many_open(self) -> None:
        """More streams than the peer allows fail here, with its number; a closed one makes room."""
        ends = Ends()
        service = Acceptor()
        ends.far.register("vda", service)
        streams = [ends.open(HalfCloseRecorder()) for _ in range(LIMITS.max_streams)]
        error = self.failed(ends.near.open_stream("vda", 10.0))
        self.assertIn(str(LIMITS.max_streams), str(error))
        streams[3].abortConnection()
        ends.settle()
        ends.open(HalfCloseRecorder())

    def test_sequence_of_many(self) -> None:
        """Far more streams than may be open at once, one after the other."""
        ends = Ends()
        ends.far.register("vda", Acceptor(Recorder))
        for number in range(300):
            protocol = HalfCloseRecorder()
            stream = ends.open(protocol)
            stream.write(b"x")
            if number % 3:
                stream.loseConnection()
            else:
                stream.abortConnection()
            ends.settle()
        self.assert_idle(ends)


class LossTests(PeerTestCase):
    """The link goes away."""

    def streams(self, **options: Any) -> tuple[Ends, list[Any]]:
        """@return: two ends with a busy, a half-closed and an unanswered stream; all protocols."""
        ends = Ends(**options)
        service = Acceptor()
        ends.far.register("vda", service)
        ends.far.register("later", Undecided())
        protocols = [HalfCloseRecorder(), HalfCloseRecorder()]
        busy, half = [ends.open(protocol) for protocol in protocols]
        half.loseWriteConnection()
        service.streams[0].pauseProducing()
        Feeder(busy, stamped(LARGE)).start()
        self.request = ends.near.open_stream("later", 1000.0)
        ends.settle()
        return ends, [*protocols, *service.protocols]

    def check_lost(self, ends: Ends, protocols: list[Any], *words: str) -> None:
        """All ended as an error that says C{words}, none in order, and nothing is left."""
        for protocol in protocols:
            error = self.assert_lost(protocol, SessionLost)
            for word in words:
                self.assertIn(word, str(error))
        self.assertNotIn("read lost", protocols[0].events)
        self.assertNotIn("read lost", protocols[2].events)
        self.assertIsInstance(self.failed(self.request), SessionLost)
        self.assertFalse(ends.near.is_up or ends.far.is_up)
        self.assert_idle(ends)
        self.assert_no_timers(ends)

    def test_cut(self) -> None:
        """A lost connection is an error for each of its streams, on both sides."""
        ends, protocols = self.streams()
        ends.connection.cut()
        self.check_lost(ends, protocols, "connection lost")
        self.assertEqual(len(self.lines("link far", "3 streams")), 1)
        self.assertEqual(len(self.lines("link near", "3 streams")), 1)

    def test_cancelled_by_another(self) -> None:
        """Who hears that one request has failed may take back the next; that one is told once, too."""
        ends, _ = self.streams()
        told: list[Any] = []
        first, second = self.request, ends.near.open_stream("later", 1000.0)
        first.addErrback(lambda _: second.cancel())
        second.addErrback(told.append)
        ends.settle()
        ends.connection.cut()
        self.assertEqual(len(told), 1)
        self.assertEqual(self.lines("exception from"), [])
        self.assertEqual(self.flushLoggedErrors(), [])
        self.assert_idle(ends)
        self.assert_no_timers(ends)

    def test_closed(self) -> None:
        """A connection that the network ends in order is no clean end for any stream."""
        ends, protocols = self.streams()
        ends.connection.client.loseConnection()
        ends.settle()
        self.check_lost(ends, protocols)

    def test_silence(self) -> None:
        """A peer that has fallen silent is given up after that time, on both sides, each by itself."""
        ends, protocols = self.streams()
        ends.connection.stall()
        ends.advance(14.5)
        self.assertTrue(ends.near.is_up and ends.far.is_up)
        ends.advance(0.6)
        self.assertFalse(ends.near.is_up or ends.far.is_up)
        ends.advance(CLOSE_SECONDS)
        self.check_lost(ends, protocols, "KEEPALIVE_TIMEOUT", "15 s")
        self.assertEqual(len(self.lines("KEEPALIVE_TIMEOUT", "link far")), 1)

    def test_silence_in_one_direction(self) -> None:
        """A network that swallows one direction costs both sides the link, one after the other."""
        ends, protocols = self.streams()
        ends.connection.stall(ends.connection.client)
        ends.advance(15.1)
        self.assertFalse(ends.near.is_up)
        ends.advance(15.1)
        self.check_lost(ends, protocols)

    def test_idle(self) -> None:
        """A link with nothing to say stays up for ever."""
        ends = Ends()
        ends.advance(300)
        self.assertTrue(ends.near.is_up and ends.far.is_up)

    def test_slow(self) -> None:
        """A line on which pings wait behind data for longer than the silence is no dead one."""
        ends = Ends(capacity=200)
        service = Acceptor()
        ends.far.register("vda", service)
        stream = ends.open(HalfCloseRecorder())
        data = stamped(60_000)
        Feeder(stream, data).start()
        Feeder(service.streams[0], data).start()
        connection = ends.connection
        connection.stall()
        for _ in range(400):
            # A kilobit per second: 200 bytes each way, then nothing for a while.
            connection.release()
            connection.pump()
            connection.stall()
            ends.clock.advance(1.5)
        self.assertTrue(ends.near.is_up and ends.far.is_up)
        connection.release()
        ends.settle()
        ends.advance(1)
        self.assert_bytes(service.protocols[0].received, data)

    def test_time_of_day(self) -> None:
        """A clock that somebody sets has no influence: only the reactor's counts."""
        self.patch(time, "time", lambda: 2_000_000_000.0)
        ends = Ends()
        self.patch(time, "time", lambda: 1_000_000_000.0)
        ends.advance(60)
        self.patch(time, "time", lambda: 3_000_000_000.0)
        ends.advance(60)
        self.assertTrue(ends.near.is_up and ends.far.is_up)

    def test_comes_back(self) -> None:
        """A new link begins a new session; the streams of the old one do not return."""
        ends, protocols = self.streams()
        ends.connection.cut()
        ends.connect()
        ends.settle()
        self.assertTrue(ends.near.is_up and ends.far.is_up)
        self.check_gone = protocols[0].reason
        late = Acceptor()
        ends.far.register("vdb", late)
        protocol = HalfCloseRecorder()
        stream = ends.open(protocol, "vdb")
        data = stamped(LARGE)
        Feeder(stream, data).start()
        ends.settle()
        self.assert_bytes(late.protocols[0].received, data)
        self.failed(self.request)

    def test_undelivered(self) -> None:
        """The bytes that a lost session did not deliver are counted and logged."""
        ends, _ = self.streams()
        ends.connection.cut()
        self.request.addErrback(lambda _: None)
        self.assertGreaterEqual(ends.near.undelivered, WINDOW)
        self.assertEqual(len(self.lines("link far", "not delivered")), 1)

    def test_close_is_enforced(self) -> None:
        """A connection that cannot get rid of its last frame is aborted."""
        ends = Ends(capacity=1)
        ends.connection.stall(ends.connection.server)
        ends.near.open_stream("vda", 100.0).addErrback(lambda _: None)
        drained = ends.near.drain(1.0)
        ends.advance(1.1)
        self.successResultOf(drained)
        self.assertTrue(ends.connection.client.connected)
        ends.advance(CLOSE_SECONDS)
        self.assertFalse(ends.connection.client.connected)


class DrainTests(PeerTestCase):
    """Shutting down, and the truth about it."""

    def two(self, **options: Any) -> tuple[Ends, StreamTransport, Any, StreamTransport, Any]:
        ends = Ends(**options)
        service = Acceptor()
        ends.far.register("vda", service)
        protocol = HalfCloseRecorder()
        stream = ends.open(protocol)
        return ends, stream, protocol, service.streams[0], service.protocols[0]

    def test_nothing_to_do(self) -> None:
        """Without a link, and with an idle one, a drain is done at once and nothing is undelivered."""
        ends = Ends(connect=False)
        self.assertEqual(self.successResultOf(ends.near.drain(30.0)), 0)
        ends = Ends()
        drained = ends.near.drain(30.0)
        ends.advance(0.2)
        self.assertEqual(self.successResultOf(drained), 0)
        self.assertFalse(ends.near.is_up or ends.far.is_up)
        self.assertEqual(len(self.lines("link near", "SHUTTING_DOWN", "everything was delivered")), 1)
        ends.advance(CLOSE_SECONDS)
        self.assert_no_timers(ends)

    def test_waits_for_streams(self) -> None:
        """Streams that are open come to their end, and the drain with the last of them."""
        ends, near, near_protocol, far, far_protocol = self.two()
        drained = ends.near.drain(30.0)
        ends.advance(1)
        data = stamped(LARGE)
        Feeder(near, data).start()
        Feeder(far, data).start()
        ends.advance(1)
        self.assertNoResult(drained)
        near.loseWriteConnection()
        far.loseWriteConnection()
        ends.advance(0.2)
        self.assertEqual(self.successResultOf(drained), 0)
        self.assert_bytes(far_protocol.received, data)
        self.assert_bytes(near_protocol.received, data)
        for protocol in (near_protocol, far_protocol):
            self.assert_lost(protocol, ConnectionDone)

    def test_takes_nothing_new(self) -> None:
        """While draining nothing is opened on either side, and the peer knows why."""
        ends, near, *_ = self.two()
        waiting = Ends(connect=False)
        request = waiting.near.open_stream("vda", 10.0)
        waiting.near.drain(1.0)
        self.assertIsInstance(self.failed(request), LocalError)
        ends.near.register("vdb", Acceptor())
        drained = ends.near.drain(30.0)
        self.assertIsInstance(self.failed(ends.near.open_stream("vda", 10.0)), LocalError)
        crossing = ends.far.open_stream("vdb", 10.0)
        ends.settle()
        self.assertEqual(self.failed(crossing).code, ErrorCode.SHUTTING_DOWN)
        self.assertIsInstance(self.failed(ends.far.open_stream("vdb", 10.0)), LocalError)
        self.assertEqual(len(self.lines("link near", "takes no new streams")), 1)
        near.abortConnection()
        ends.advance(0.2)
        self.successResultOf(drained)

    def test_undelivered(self) -> None:
        """Time is up: what was not delivered is counted, and the streams end as errors on both sides."""
        ends, near, near_protocol, far, far_protocol = self.two()
        far.pauseProducing()
        near.write(stamped(3000))
        drained = ends.near.drain(5.0)
        ends.advance(4.9)
        self.assertNoResult(drained)
        ends.advance(0.2)
        self.assertEqual(self.successResultOf(drained), 3000)
        for protocol in (near_protocol, far_protocol):
            self.assertEqual(self.assert_lost(protocol, SessionLost).code, ErrorCode.SHUTTING_DOWN)
        self.assertNotIn("read lost", far_protocol.events)
        self.assertEqual(len(self.lines("link near", "1 streams were still open")), 1)

    def test_undelivered_of_a_stream_that_ended_meanwhile(self) -> None:
        """A stream that ends during the drain without its last bytes having been taken counts."""
        ends, near, _, far, _ = self.two()
        far.pauseProducing()
        near.write(stamped(3000))
        near.loseWriteConnection()
        drained = ends.near.drain(5.0)
        ends.advance(1)
        far.loseConnection()
        ends.advance(1)
        self.assertEqual(self.successResultOf(drained), 3000)

    def test_bytes_for_here(self) -> None:
        """What the peer sent and was not taken here counts, too."""
        ends, near, _, far, _ = self.two()
        near.pauseProducing()
        far.write(stamped(2000))
        ends.settle()
        drained = ends.near.drain(5.0)
        ends.advance(5.1)
        self.assertEqual(self.successResultOf(drained), 2000)

    def test_delivered_on_a_stream_that_stays_open(self) -> None:
        """Bytes that were all taken are not undelivered because their stream is still open."""
        ends, near, _, far, far_protocol = self.two()
        near.write(b"a few bytes, far from a quarter of the window")
        far.write(b"and some back")
        ends.settle()
        drained = ends.near.drain(5.0)
        ends.advance(1)
        near.write(b"and more meanwhile")
        ends.advance(4.2)
        self.assertTrue(far_protocol.received.endswith(b"meanwhile"))
        self.assertEqual(self.successResultOf(drained), 0)

    def test_link_lost_meanwhile(self) -> None:
        """A link that is lost while draining ends the drain, with what it cost."""
        ends, near, _, far, _ = self.two()
        far.pauseProducing()
        near.write(stamped(3000))
        ends.settle()
        drained = ends.near.drain(30.0)
        ends.advance(1)
        ends.connection.cut()
        ends.advance(0.2)
        self.assertEqual(self.successResultOf(drained), 3000)

    def test_dialled_while_draining(self) -> None:
        """A link that comes while draining is sent away, by either side."""
        for draining in ("near", "far"):
            ends = Ends(connect=False)
            ends.connect()
            getattr(ends, draining).drain(30.0)
            ends.settle()
            self.assertFalse(ends.near.is_up or ends.far.is_up)
            self.assertTrue(self.lines("SHUTTING_DOWN") or draining == "far")

    def test_earlier_losses_do_not_count(self) -> None:
        """What was lost with an earlier session is no matter of this drain."""
        ends, near, _, far, _ = self.two()
        far.pauseProducing()
        near.write(stamped(3000))
        ends.settle()
        ends.connection.cut()
        self.assertEqual(ends.near.undelivered, 3000)
        ends.connect()
        ends.settle()
        drained = ends.near.drain(30.0)
        ends.advance(0.2)
        self.assertEqual(self.successResultOf(drained), 0)

    def test_names(self) -> None:
        """Who goes away is named to the other side."""
        ends = Ends()
        ends.near.drain(1.0)
        ends.advance(0.2)
        self.assertEqual(len(self.lines("link near", "daemon hv-near is shutting down")), 1)
