"""Streams that end: half-closed, closed, broken, or with a user that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.error import ConnectionAborted, ConnectionDone
from zope.interface import implementer

from relaymux.errors import ErrorCode, SessionLost, StreamReset
from relaymux.interfaces import IBufferReceiver
from relaymux.net.stream import StreamTransport
from relaymux.testing.recording import Feeder, HalfCloseRecorder, Recorder
from tests.peers import (
    LARGE,
    WINDOW,
    Acceptor,
    Echo,
    Ends,
    Producer,
    StreamTestCase,
    Undecided,
    stamped,
)


class HalfCloseTests(StreamTestCase):
    """Each direction ends by itself."""

    def test_near_first(self) -> None:
        """The side that has finished still receives; the stream is over when both have."""
        near, near_protocol, far, far_protocol = self.connect()
        near.write(b"question")
        near.loseWriteConnection()
        self.settle()
        self.assertEqual(far_protocol.received, b"question")
        self.assertEqual(far_protocol.events, ["made", "read lost"])
        self.assertEqual(near_protocol.events, ["made", "write lost"])
        self.ends.advance(600)
        far.write(b"answer")
        far.loseWriteConnection()
        self.settle()
        self.assertEqual(near_protocol.received, b"answer")
        self.assertEqual(near_protocol.events, ["made", "write lost", "read lost", "lost"])
        self.assertEqual(far_protocol.events, ["made", "read lost", "write lost", "lost"])
        for protocol in (near_protocol, far_protocol):
            self.assert_lost(protocol, ConnectionDone)
        self.assert_idle(self.ends)

    def test_both_at_once(self) -> None:
        """Ends that cross are no trouble."""
        near, near_protocol, far, far_protocol = self.connect()
        for stream in (near, far):
            stream.write(b"bye")
            stream.loseWriteConnection()
        self.settle()
        for protocol in (near_protocol, far_protocol):
            self.assertEqual(protocol.received, b"bye")
            self.assertEqual(sorted(protocol.events[1:3]), ["read lost", "write lost"])
            self.assert_lost(protocol, ConnectionDone)

    def test_write_connection_lost_comes_when_all_is_sent(self) -> None:
        """As from TCP's transports: told when the last byte and the end have left, not before, once."""
        near, near_protocol, far, _ = self.connect()
        far.pauseProducing()
        near.write(stamped(2 * WINDOW))
        near.loseWriteConnection()
        self.settle()
        self.assertEqual(near_protocol.events, ["made"])
        far.resumeProducing()
        self.settle()
        self.assertEqual(near_protocol.events, ["made", "write lost"])
        near.loseWriteConnection()
        self.settle()
        self.assertEqual(near_protocol.events, ["made", "write lost"])

    def test_empty_direction(self) -> None:
        """A direction may end without a byte."""
        near, near_protocol, far, far_protocol = self.connect()
        near.loseWriteConnection()
        far.loseWriteConnection()
        self.settle()
        self.assert_lost(near_protocol, ConnectionDone)
        self.assert_lost(far_protocol, ConnectionDone)

    def test_protocol_without_half_close(self) -> None:
        """A protocol that knows no half-close is closed by the peer's, after what it has written."""
        near, near_protocol, far, far_protocol = self.connect(far_protocol=Recorder)
        far.write(b"a last word")
        near.loseWriteConnection()
        self.settle()
        self.assert_lost(far_protocol, ConnectionDone)
        self.assertEqual(near_protocol.received, b"a last word")
        self.assert_lost(near_protocol, ConnectionDone)

    def test_protocol_without_half_close_and_its_producer(self) -> None:
        """... and its producer is stopped, as nobody would ever unregister it."""
        near, near_protocol, far, far_protocol = self.connect(far_protocol=Recorder)
        producer = Producer()
        far.registerProducer(producer, True)
        near.loseWriteConnection()
        self.settle()
        self.assertEqual(producer.calls, ["stop"])
        self.assert_lost(far_protocol, ConnectionDone)
        self.assert_lost(near_protocol, ConnectionDone)

    def test_end_is_told_before_the_loss(self) -> None:
        """A paused protocol hears first of the end of input, then that all is over."""
        near, _, far, far_protocol = self.connect()
        far.loseWriteConnection()
        self.settle()
        far.pauseProducing()
        near.write(b"late")
        near.loseWriteConnection()
        self.settle()
        far.resumeProducing()
        self.settle()
        self.assertEqual(far_protocol.received, b"late")
        self.assertEqual(far_protocol.events, ["made", "write lost", "read lost", "lost"])

    def test_stopping_the_peer(self) -> None:
        """loseReadConnection ends the peer's direction only; it is told."""
        near, near_protocol, far, far_protocol = self.connect()
        far.loseReadConnection()
        self.settle()
        self.assertEqual(near_protocol.events, ["made", "write lost"])
        near.write(b"into the void")
        far.write(b"still here")
        far.loseWriteConnection()
        self.settle()
        self.assertEqual(near_protocol.received, b"still here")
        self.assertEqual(near_protocol.events, ["made", "write lost", "read lost", "lost"])
        self.assertEqual(far_protocol.received, b"")
        self.assert_lost(far_protocol, ConnectionDone)
        self.assert_lost(near_protocol, ConnectionDone)
        self.assert_idle(self.ends)

    def test_stopping_while_paused(self) -> None:
        """What waited when reading was given up is not delivered later, its end neither."""
        near, _, far, far_protocol = self.connect()
        far.pauseProducing()
        near.write(b"too late")
        near.loseWriteConnection()
        self.settle()
        far.loseReadConnection()
        far.resumeProducing()
        self.settle()
        self.assertEqual(far_protocol.received, b"")
        self.assertEqual(far_protocol.events, ["made"])

    def test_stopped_before_it_began(self) -> None:
        """A protocol that comes after the peer's stop is told when it comes."""

        class Deaf(HalfCloseRecorder):
            transport: Any

            def connectionMade(self) -> None:
                super().connectionMade()
                self.transport.loseReadConnection()

        _, near_protocol, _, far_protocol = self.connect(far_protocol=Deaf)
        self.assertEqual(near_protocol.events, ["made", "write lost"])
        _, near_protocol, _, _ = self.connect(Recorder(), far_protocol=Deaf)
        self.settle()
        self.assert_lost(near_protocol, ConnectionDone)
        self.assertEqual(far_protocol.events, ["made"])


class CloseTests(StreamTestCase):
    """Closing and breaking a stream as a whole."""

    def test_lose_connection(self) -> None:
        """What was written still arrives; both sides end in order."""
        near, near_protocol, _, far_protocol = self.connect()
        data = stamped(2 * WINDOW)
        near.write(data)
        near.loseConnection()
        near.loseConnection()
        near.write(b"not any more")
        self.settle()
        self.assert_bytes(far_protocol.received, data)
        self.assertIn("read lost", far_protocol.events)
        self.ends.clock.advance(0)
        self.assert_lost(far_protocol, ConnectionDone)
        self.assert_lost(near_protocol, ConnectionDone)
        self.assertNotIn("write lost", near_protocol.events)
        self.assert_idle(self.ends)

    def test_nothing_is_delivered_after_lose_connection(self) -> None:
        """A protocol that closes gets nothing more, be it there already, in the same call even."""

        class Closing(Recorder):
            transport: Any

            def dataReceived(self, data: bytes) -> None:
                super().dataReceived(data)
                self.pieces += 1
                self.transport.loseConnection()

            pieces = 0

        near, _, _, far_protocol = self.connect(far_protocol=Closing, seed=5)
        near.write(bytes(WINDOW))
        self.settle()
        self.assertEqual(far_protocol.pieces, 1)
        near, _, far, far_protocol = self.connect(far_protocol=Closing, capacity=4 * WINDOW)
        far.pauseProducing()
        waiting = [memoryview(bytes(size)) for size in (70_000, 70_000, 10)]
        for piece in waiting:
            near.write(bytes(piece[: WINDOW // 4]))
            self.settle()
        far._inbox.add(waiting)  # long ones are not gathered
        far.resumeProducing()
        self.assertEqual(far_protocol.pieces, 1)
        self.assertFalse(far._inbox)

    def test_undelivered_is_no_clean_end(self) -> None:
        """Bytes that the peer did not take before it closed are a loss to who wrote them."""
        near, near_protocol, far, far_protocol = self.connect()
        far.pauseProducing()
        near.write(b"nobody will ever read this")
        near.loseWriteConnection()
        self.settle()
        far.loseConnection()
        self.settle()
        self.assert_lost(far_protocol, ConnectionDone)
        self.assertEqual(self.assert_lost(near_protocol, StreamReset).code, ErrorCode.LOCAL_CLOSED)
        self.assert_idle(self.ends)

    def test_undelivered_while_closing(self) -> None:
        """The same for a side that has closed, too, and waits for the rest to be taken."""
        near, near_protocol, far, _ = self.connect()
        far.pauseProducing()
        near.write(stamped(2 * WINDOW))
        near.loseConnection()
        self.settle()
        far.loseConnection()
        self.settle()
        self.assert_lost(near_protocol, StreamReset)
        self.assert_idle(self.ends)

    def test_abort(self) -> None:
        """An abort is an error on both sides, at once here, and voids what was not taken."""
        near, near_protocol, far, far_protocol = self.connect()
        far.pauseProducing()
        near.write(b"void")
        self.settle()
        near.abortConnection()
        near.abortConnection()
        self.assert_lost(near_protocol, ConnectionAborted)
        self.settle()
        self.assertEqual(self.assert_lost(far_protocol, StreamReset).code, ErrorCode.ABORTED)
        far.resumeProducing()
        self.assertEqual(far_protocol.received, b"")
        self.assertNotIn("read lost", far_protocol.events)
        self.assert_idle(self.ends)

    def test_abort_with_a_code(self) -> None:
        """The other side learns the code."""
        near, near_protocol, _, far_protocol = self.connect()
        near.abort(ErrorCode.LOCAL_RESET)
        self.assertEqual(self.assert_lost(near_protocol, StreamReset).code, ErrorCode.LOCAL_RESET)
        self.settle()
        self.assertEqual(self.assert_lost(far_protocol, StreamReset).code, ErrorCode.LOCAL_RESET)

    def test_abort_of_what_is_nearly_over(self) -> None:
        """Giving up on bytes that wait to be read is an error even if all else has ended."""
        near, near_protocol, far, far_protocol = self.connect()
        near.loseWriteConnection()
        near.pauseProducing()
        far.write(b"unread")
        far.loseWriteConnection()
        self.settle()
        near.abortConnection()
        self.settle()
        self.assert_lost(near_protocol, ConnectionAborted)
        self.assert_lost(far_protocol, StreamReset)

    def test_after_the_end(self) -> None:
        """Calls on a stream that is over do nothing and raise nothing."""
        near, near_protocol, _, _ = self.connect()
        near.abortConnection()
        self.settle()
        near.write(b"x")
        near.writeSequence([b"x"])
        near.writeBuffers([b"x"])
        near.loseWriteConnection()
        near.loseReadConnection()
        near.loseConnection()
        near.abortConnection()
        near.consumed(5)
        near.pauseProducing()
        near.resumeProducing()
        near.stopProducing()
        near.accept()
        near.refuse(1, "x")
        self.settle()
        self.assertFalse(near.writable or near.readable)
        self.assertEqual(near.queuedBytes, 0)
        self.assertEqual(near_protocol.events.count("lost"), 1)

    def test_link_lost(self) -> None:
        """With the link all its streams end, as errors, on both sides, whatever state they are in."""
        near, near_protocol, _, far_protocol = self.connect()
        near.loseWriteConnection()
        self.settle()
        second = HalfCloseRecorder()
        self.ends.open(second)
        self.ends.connection.cut()
        for protocol in (near_protocol, far_protocol, second):
            self.assert_lost(protocol, SessionLost)
        self.assert_idle(self.ends)

    def test_begun_too_late(self) -> None:
        """A protocol that is connected to a stream that has ended meanwhile is told so."""
        ends = Ends()
        service = Undecided()
        ends.far.register("vda", service)
        ends.near.open_stream("vda", 10.0).addErrback(lambda _: None)
        ends.settle()
        [stream] = service.streams
        stream.accept()
        ends.connection.cut()
        protocol = HalfCloseRecorder()
        stream.begin(protocol)
        self.assertEqual(protocol.events, ["made", "lost"])
        self.assert_lost(protocol, SessionLost)


class Bang(Exception):
    """What the protocols below raise."""


class FaultyProtocolTests(StreamTestCase):
    """A protocol with a bug costs its own stream, and nothing else."""

    def faulty(self, method: str) -> Callable[[], Any]:
        """A kind of protocol that raises in C{method}."""

        def raise_it(self: HalfCloseRecorder, *args: object) -> None:
            getattr(HalfCloseRecorder, method)(self, *args)
            raise Bang(method)

        return lambda: type("Faulty", (HalfCloseRecorder,), {method: raise_it})()

    def healthy(self) -> None:
        """A new stream works."""
        service = Acceptor(Echo)
        self.ends.far.register("other", service)
        protocol = HalfCloseRecorder()
        stream = self.ends.open(protocol, "other")
        data = stamped(LARGE)
        Feeder(stream, data).start()
        self.settle()
        self.assert_bytes(protocol.received, data)

    def test_receiving(self) -> None:
        """An exception while receiving resets the stream and is logged."""
        for method, act in (
            ("dataReceived", lambda near: near.write(b"x")),
            ("readConnectionLost", lambda near: near.loseWriteConnection()),
        ):
            near, near_protocol, _, far_protocol = self.connect(far_protocol=self.faulty(method))
            act(near)
            self.settle()
            self.assertEqual([f.value.args for f in self.flushLoggedErrors(Bang)], [(method,)])
            self.assertEqual(self.assert_lost(near_protocol, StreamReset).code, ErrorCode.INTERNAL_ERROR)
            self.assert_lost(far_protocol, Bang)
            self.healthy()

    def test_buffers(self) -> None:
        """The same for a protocol that takes buffers."""

        @implementer(IBufferReceiver)
        class Faulty(HalfCloseRecorder):
            def buffersReceived(self, buffers: Sequence[memoryview]) -> None:
                raise Bang("buffersReceived")

            def buffersWritten(self, count: int) -> None:
                pass

        near, near_protocol, _, _ = self.connect(far_protocol=Faulty)
        near.write(b"x")
        self.settle()
        self.assertEqual(len(self.flushLoggedErrors(Bang)), 1)
        self.assert_lost(near_protocol, StreamReset)
        self.healthy()

    def test_connection_lost(self) -> None:
        """An exception from connectionLost is logged; other streams are told all the same."""
        near, _, _, _ = self.connect(far_protocol=self.faulty("connectionLost"))
        other = HalfCloseRecorder()
        self.ends.open(other)
        near.abortConnection()
        self.settle()
        self.assertEqual(len(self.flushLoggedErrors(Bang)), 1)
        self.healthy()
        third = self.ends.open(HalfCloseRecorder())
        self.assertTrue(third.connected)
        self.ends.connection.cut()
        self.assertEqual(len(self.flushLoggedErrors(Bang)), 2)
        self.assert_lost(other, SessionLost)

    def test_connection_made(self) -> None:
        """A protocol that cannot be connected has its stream reset."""
        _, near_protocol, _, _ = self.connect(far_protocol=self.faulty("connectionMade"))
        self.settle()
        self.assertEqual(len(self.flushLoggedErrors(Bang)), 1)
        self.assert_lost(near_protocol, StreamReset)
        self.healthy()

    def test_producer(self) -> None:
        """A producer with a bug costs its stream."""
        near, near_protocol, far, far_protocol = self.connect()
        far.pauseProducing()
        producer: Any = Producer()

        def bang() -> None:
            raise Bang("resumeProducing")

        producer.resumeProducing = bang
        near.registerProducer(producer, True)
        near.write(bytes(2 * WINDOW))
        self.settle()
        far.resumeProducing()
        self.settle()
        self.assertEqual(len(self.flushLoggedErrors(Bang)), 1)
        self.assert_lost(near_protocol, Bang)
        self.assert_lost(far_protocol, StreamReset)
        self.healthy()

    def test_service(self) -> None:
        """A service that cannot take a stream refuses it."""

        class Faulty:
            def stream_opened(self, stream: StreamTransport) -> None:
                raise Bang("stream_opened")

        self.ends = Ends()
        self.ends.far.register("vda", Faulty())
        request = self.ends.near.open_stream("vda", 10.0)
        self.settle()
        self.assertEqual(len(self.flushLoggedErrors(Bang)), 1)
        self.assertEqual(self.failed(request).code, ErrorCode.INTERNAL_ERROR)
        self.healthy()
