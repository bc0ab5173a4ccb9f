"""Streams as transports of Twisted's: what ordinary protocols, producers and consumers may rely on."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet.error import ConnectionAborted, ConnectionDone
from twisted.internet.interfaces import IConsumer, IPullProducer, IPushProducer, ITransport
from twisted.internet.protocol import Protocol
from twisted.protocols.basic import FileSender, LineReceiver
from zope.interface import implementer
from zope.interface.verify import verifyObject

from relaymux.core.handshake import Limits
from relaymux.errors import ErrorCode, SessionLost, StreamReset
from relaymux.interfaces import IBufferReceiver, IBufferTransport, IHalfReadTransport
from relaymux.net.stream import StreamAddress, StreamTransport
from relaymux.testing.recording import BufferRecorder, Feeder, HalfCloseRecorder, Recorder, over_seeds
from tests.peers import LARGE, WINDOW, Acceptor, Ends, EndsTestCase, Undecided, stamped


class Echo(Protocol):
    """Sends back what it gets, and closes when the other side does."""

    def dataReceived(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)


class Producer:
    """A producer that records what it is told."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pauseProducing(self) -> None:
        self.calls.append("pause")

    def resumeProducing(self) -> None:
        self.calls.append("resume")

    def stopProducing(self) -> None:
        self.calls.append("stop")


class StreamTests(EndsTestCase):
    """One stream from near to far."""

    def connect(
        self,
        near_protocol: Any = None,
        far_protocol: Callable[[], Any] = HalfCloseRecorder,
        **options: Any,
    ) -> tuple[StreamTransport, Any, StreamTransport, Any]:
        """@return: transport and protocol of the near end, then of the far end."""
        self.ends = Ends(**options)
        service = Acceptor(far_protocol)
        self.ends.far.register("vda", service)
        near_protocol = near_protocol or HalfCloseRecorder()
        stream = self.ends.open(near_protocol)
        return stream, near_protocol, service.streams[0], service.protocols[0]

    def settle(self) -> None:
        self.ends.settle()


class TransportTests(StreamTests):
    """What it is, and that bytes arrive."""

    def test_interfaces(self) -> None:
        """A stream provides what it says."""
        stream, *_ = self.connect()
        for interface in (ITransport, IConsumer, IPushProducer, IBufferTransport, IHalfReadTransport):
            verifyObject(interface, stream)

    def test_addresses(self) -> None:
        """A stream's peer is a service of the other daemon."""
        stream, _, far, _ = self.connect()
        self.assertEqual(stream.getPeer(), StreamAddress("far", "vda"))
        self.assertEqual(str(stream.getPeer()), "vda via far")
        self.assertEqual(far.getHost(), StreamAddress("near", "stream 1"))

    def test_ordinary_protocols(self) -> None:
        """Protocols that know nothing of streams talk through one."""
        lines = []

        class Client(LineReceiver):
            def lineReceived(self, line: bytes) -> None:
                lines.append(line)

        client = Client()
        self.connect(client, Echo)
        client.sendLine(b"hello")
        client.sendLine(b"world")
        self.settle()
        self.assertEqual(lines, [b"hello", b"world"])

    @over_seeds(2)
    def test_bulk(self, seed: int) -> None:
        """Much more than any limit goes through, both ways at once, over either kind of link."""
        for buffers in (True, False):
            near, near_protocol, far, far_protocol = self.connect(seed=seed, buffers=buffers)
            there, back = stamped(LARGE, 1), stamped(LARGE, 2)
            feeders = [Feeder(near, there), Feeder(far, back)]
            for feeder in feeders:
                feeder.start()
            self.settle()
            self.assert_bytes(far_protocol.received, there)
            self.assert_bytes(near_protocol.received, back)
            self.assertTrue(all(feeder.done and feeder.pauses for feeder in feeders))

    @over_seeds(2)
    def test_bulk_in_small_writes(self, seed: int) -> None:
        """The same, written in pieces of every size."""
        near, _, _, far_protocol = self.connect(seed=seed)
        data = stamped(LARGE)
        Feeder(near, data, self.ends.connection.portion).start()
        self.settle()
        self.assert_bytes(far_protocol.received, data)

    @over_seeds(2)
    def test_buffers(self, seed: int) -> None:
        """A protocol that takes buffers gets them, and what it returned from counts as taken."""
        near, _, _, far_protocol = self.connect(far_protocol=BufferRecorder, seed=seed)
        data = stamped(LARGE)
        Feeder(near, data).start()
        self.settle()
        self.assert_bytes(far_protocol.received, data)

    def test_writes_in_all_ways(self) -> None:
        """write, writeSequence and writeBuffers keep their order."""
        near, _, _, far_protocol = self.connect()
        near.write(b"ab")
        near.writeSequence([b"cd", b"", b"ef"])
        near.writeBuffers([memoryview(b"gh"), b"ij"])
        near.writeSequence(iter([b"k", b"l"]))
        self.settle()
        self.assertEqual(far_protocol.received, b"abcdefghijkl")

    def test_data_before_begin_waits(self) -> None:
        """What arrives before there is a protocol is kept, within the window, and given to it."""
        ends = Ends()
        service = Undecided()
        ends.far.register("vda", service)
        opened: list[StreamTransport] = []
        ends.near.open_stream("vda", 10.0).addCallback(opened.append)
        ends.settle()
        [far] = service.streams
        far.accept()
        ends.settle()
        [near] = opened
        near.write(b"before the far end has begun")
        ends.settle()
        protocol = HalfCloseRecorder()
        far.begin(protocol)
        self.assertEqual(protocol.received, b"before the far end has begun")
        far.write(b"and back")
        ends.settle()
        other = HalfCloseRecorder()
        near.begin(other)
        self.assertEqual(other.received, b"and back")


class BackpressureTests(StreamTests):
    """A consumer that stalls stops its producer at the other end, and nobody else."""

    def stalled(self, **options: Any) -> tuple[Any, Feeder, Any, Any]:
        """Far has paused while near sends.  @return: near's stream, its producer; far's and its protocol."""
        near, _, far, far_protocol = self.connect(**options)
        far.pauseProducing()
        feeder = Feeder(near, stamped(LARGE), lambda size: min(size, 1000))
        feeder.start()
        self.settle()
        return near, feeder, far, far_protocol

    def test_pause(self) -> None:
        """A paused end gets nothing; the producer at the other one is paused after one window."""
        near, feeder, far, far_protocol = self.stalled()
        self.assertEqual(far_protocol.received, b"")
        self.assertEqual((feeder.pauses, feeder.done), (1, False))
        self.assertLessEqual(near.queuedBytes, 1000)
        self.assertEqual(sum(map(len, far._inbox._pieces)), WINDOW)
        self.ends.advance(60)
        self.assertEqual(far_protocol.received, b"")
        self.assertEqual(feeder.pauses, 1)
        far.resumeProducing()
        self.settle()
        self.assert_bytes(far_protocol.received, stamped(LARGE))
        self.assertTrue(feeder.done)

    def test_pause_in_the_middle(self) -> None:
        """A protocol that pauses from within dataReceived gets nothing more, and later the rest in order."""

        class Dozing(HalfCloseRecorder):
            transport: Any

            def dataReceived(self, data: bytes) -> None:
                assert not asleep
                super().dataReceived(data)
                asleep.append(True)
                self.transport.pauseProducing()

        asleep: list[bool] = []
        near, _, far, far_protocol = self.connect(far_protocol=Dozing, seed=1)
        data = stamped(LARGE)
        Feeder(near, data).start()
        self.settle()
        naps = 0
        while asleep:
            naps += 1
            asleep.clear()
            far.resumeProducing()
            self.settle()
        self.assert_bytes(far_protocol.received, data)
        self.assertGreater(naps, 10)

    def test_others_go_on(self) -> None:
        """A stalled stream costs its window, and no other stream anything."""
        _, feeder, _, far_protocol = self.stalled()
        other, other_protocol = HalfCloseRecorder(), HalfCloseRecorder
        service = Acceptor(other_protocol)
        self.ends.far.register("vdb", service)
        stream = self.ends.open(other, "vdb")
        data = stamped(LARGE, 2)
        Feeder(stream, data).start()
        Feeder(service.streams[0], data).start()
        self.settle()
        self.assert_bytes(service.protocols[0].received, data)
        self.assert_bytes(other.received, data)
        self.assertFalse(feeder.done)
        self.assertEqual(far_protocol.received, b"")

    def test_all_stalled_both_ways(self) -> None:
        """With every stream stalled in both directions pings still pass, and all goes on afterwards."""
        ends = Ends()
        service = Acceptor()
        ends.far.register("vda", service)
        near = [HalfCloseRecorder() for _ in range(8)]
        streams = [ends.open(protocol) for protocol in near]
        both = [*streams, *service.streams]
        for stream in both:
            stream.pauseProducing()
        feeders = [Feeder(stream, stamped(LARGE, i)) for i, stream in enumerate(both)]
        for feeder in feeders:
            feeder.start()
        ends.settle()
        ends.advance(60)
        self.assertTrue(ends.near.is_up and ends.far.is_up)
        for stream in both:
            stream.resumeProducing()
        ends.settle()
        ends.advance(0.1)
        for i in range(8):
            self.assert_bytes(service.protocols[i].received, stamped(LARGE, i))
            self.assert_bytes(near[i].received, stamped(LARGE, 8 + i))

    def test_stalled_link(self) -> None:
        """A link that takes nothing pauses the producers; little is queued in front of it."""
        roomy = Limits(window=1 << 20, replay=1 << 21)
        near, _, _, far_protocol = self.connect(near=roomy, far=roomy, capacity=2000)
        connection = self.ends.connection
        connection.stall(connection.server)
        feeder = Feeder(near, stamped(LARGE), lambda size: min(size, 1000))
        feeder.start()
        self.settle()
        self.assertEqual(feeder.pauses, 1)
        self.assertLessEqual(near.queuedBytes, 1000)
        self.assertLessEqual(connection.client.queuedBytes, 2000)
        connection.release()
        self.settle()
        self.assert_bytes(far_protocol.received, stamped(LARGE))

    def test_manual_credit(self) -> None:
        """A receiver that takes buffers later gives credit when it says so."""
        self.ends = Ends()
        service = Acceptor(BufferRecorder, manual_credit=True)
        self.ends.far.register("vda", service)
        near = self.ends.open(HalfCloseRecorder())
        [far], [protocol] = service.streams, service.protocols
        data = stamped(LARGE)
        feeder = Feeder(near, data)
        feeder.start()
        self.settle()
        self.assertEqual(len(protocol.received), WINDOW)
        self.ends.advance(30)
        self.assertEqual(len(protocol.received), WINDOW)
        taken = 0
        while len(protocol.received) > taken:
            count = min(len(protocol.received) - taken, WINDOW // 3)
            taken += count
            far.consumed(count)
            self.settle()
            self.assertLessEqual(len(protocol.received) - taken, WINDOW)
        self.assert_bytes(protocol.received, data)

    def test_paused_end_keeps_its_end_to_itself(self) -> None:
        """A paused protocol is not told of the end before it has had what came before."""
        near, _, far, far_protocol = self.connect()
        far.pauseProducing()
        near.write(b"the last words")
        near.loseWriteConnection()
        self.settle()
        self.assertEqual(far_protocol.events, ["made"])
        far.resumeProducing()
        self.assertEqual(far_protocol.received, b"the last words")
        self.assertEqual(far_protocol.events, ["made", "read lost"])


class ProducerTests(StreamTests):
    """Producers of every kind, registered with a stream."""

    def test_never_told_twice(self) -> None:
        """A producer is paused once, and resumed once, however much was written meanwhile."""
        near, _, far, far_protocol = self.connect()
        far.pauseProducing()
        producer = Producer()
        near.registerProducer(producer, True)
        near.write(bytes(WINDOW))
        self.assertEqual(producer.calls, [])
        near.write(b"x")
        near.write(b"y")
        self.settle()
        self.assertEqual(producer.calls, ["pause"])
        far.resumeProducing()
        self.settle()
        self.assertEqual(producer.calls, ["pause", "resume"])
        self.assertEqual(far_protocol.received, bytes(WINDOW) + b"xy")

    def test_registered_late(self) -> None:
        """A producer that is registered while bytes wait is paused at once."""
        near, _, far, _ = self.connect()
        far.pauseProducing()
        near.write(bytes(WINDOW + 1))
        self.settle()
        producer = Producer()
        near.registerProducer(producer, True)
        self.assertEqual(producer.calls, ["pause"])

    def test_one_at_a_time(self) -> None:
        """A second producer is refused as IConsumer says."""
        near, *_ = self.connect()
        near.registerProducer(Producer(), True)
        with self.assertRaises(RuntimeError):
            near.registerProducer(Producer(), True)
        near.unregisterProducer()
        near.registerProducer(Producer(), True)

    def test_too_late(self) -> None:
        """A producer of a direction that has ended is stopped."""
        near, *_ = self.connect()
        near.loseWriteConnection()
        producer = Producer()
        near.registerProducer(producer, True)
        self.assertEqual(producer.calls, ["stop"])

    def test_pull_producer(self) -> None:
        """A producer that is asked for each piece is asked until it has no more."""
        near, _, _, far_protocol = self.connect(seed=3)
        data = stamped(LARGE)
        sender = FileSender()
        sender.CHUNK_SIZE = 5000
        done = sender.beginFileTransfer(io.BytesIO(data), near)
        self.settle()
        self.assertEqual(self.successResultOf(done), data[-1:])
        self.assert_bytes(far_protocol.received, data)

    def test_pull_producer_is_not_called_from_its_own_write(self) -> None:
        """One piece is asked for at a time: the next one only after the call for the last has returned."""
        near, *_ = self.connect()
        depth, deepest, pieces = 0, 0, 0

        @implementer(IPullProducer)
        class Pull:
            def resumeProducing(self) -> None:
                nonlocal depth, deepest, pieces
                depth += 1
                deepest = max(deepest, depth)
                pieces += 1
                near.write(b"x" * 100)
                if pieces == 50:
                    near.unregisterProducer()
                depth -= 1

            def stopProducing(self) -> None:
                pass

        near.registerProducer(Pull(), False)
        self.settle()
        self.assertEqual((deepest, pieces), (1, 50))

    def test_lose_connection_waits_for_producers(self) -> None:
        """loseConnection lets a registered producer of either kind come to its end, as ITransport says."""
        data = stamped(LARGE)
        near, _, _, far_protocol = self.connect()
        Feeder(near, data).start()
        near.loseConnection()
        self.settle()
        self.assert_bytes(far_protocol.received, data)
        near, _, _, far_protocol = self.connect()
        FileSender().beginFileTransfer(io.BytesIO(data), near)
        near.loseConnection()
        self.settle()
        self.assert_bytes(far_protocol.received, data)
        self.assertIn("read lost", far_protocol.events)

    def test_stopped_with_the_stream(self) -> None:
        """A producer is told when its stream is over, however that came."""
        endings: list[Callable[[StreamTransport, StreamTransport], object]] = [
            lambda near, far: near.abortConnection(),
            lambda near, far: far.abortConnection(),
            lambda near, far: far.stop_receiving(ErrorCode.LOCAL_CLOSED),
            lambda near, far: self.ends.connection.cut(),
        ]
        for end in endings:
            for protocol in (HalfCloseRecorder, Recorder):
                near, _, far, _ = self.connect(protocol())
                producer = Producer()
                near.registerProducer(producer, True)
                end(near, far)
                self.settle()
                self.assertEqual(producer.calls, ["stop"])


class HalfCloseTests(StreamTests):
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


class CloseTests(StreamTests):
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


class FaultyProtocolTests(StreamTests):
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
