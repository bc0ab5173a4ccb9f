"""Streams as transports of Twisted's: what ordinary protocols, producers and consumers may rely on."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from twisted.internet.interfaces import IConsumer, IPullProducer, IPushProducer, ITransport
from twisted.protocols.basic import FileSender, LineReceiver
from zope.interface import implementer
from zope.interface.verify import verifyObject

from relaymux.core.frames import FrameDecoder, Kind
from relaymux.core.handshake import Limits
from relaymux.errors import ErrorCode
from relaymux.interfaces import IBufferTransport, IHalfReadTransport
from relaymux.net.stream import StreamAddress, StreamTransport
from relaymux.testing.recording import BufferRecorder, Feeder, HalfCloseRecorder, Recorder, over_seeds
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


class TransportTests(StreamTestCase):
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

    def test_one_send_for_one_turn(self) -> None:
        """A stream that is finished and one that is opened in the same turn of the reactor leave at once."""
        stream, *_ = self.connect()
        link: Any = self.ends.near._link
        written: list[bytes] = []
        send = link.transport.writeBuffers

        def note(buffers: list[Any]) -> None:
            written.append(b"".join(buffers))
            send(buffers)

        self.patch(link.transport, "writeBuffers", note)
        stream.loseWriteConnection()
        opening = self.ends.near.open_stream("vda", 10.0)
        self.assertEqual(written, [])
        self.ends.clock.advance(0)
        frames = FrameDecoder(1024).feed(memoryview(written[0]))
        self.assertEqual([frame.kind for frame in frames], [Kind.OPEN, Kind.FIN])
        self.assertEqual(len(written), 1)
        self.settle()
        self.successResultOf(opening).abortConnection()

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


class BackpressureTests(StreamTestCase):
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


class ProducerTests(StreamTestCase):
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

    def test_as_others_call_it(self) -> None:
        """Twisted's own Chargen and FilePager say 1 and 0, and some write views: compiled or not."""
        near, _, far, far_protocol = self.connect()
        far.pauseProducing()
        producer: Any = Producer()
        streaming: Any = 1
        near.registerProducer(producer, streaming)
        near.write(memoryview(bytes(WINDOW)))
        near.write(b"x")
        self.assertEqual(producer.calls, ["pause"])
        far.resumeProducing()
        self.settle()
        self.assertEqual(far_protocol.received, bytes(WINDOW) + b"x")
        near.unregisterProducer()
        streaming = 0
        producer.resumeProducing = lambda: near.unregisterProducer()
        near.registerProducer(producer, streaming)
        near.registerProducer(Producer(), True)

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
