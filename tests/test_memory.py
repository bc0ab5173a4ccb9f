"""The memory transport behaves like a socket, and does the faults it is told to."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IConsumer, IPullProducer, IPushProducer, ITransport
from twisted.internet.task import Clock
from twisted.trial.unittest import SkipTest, SynchronousTestCase
from zope.interface import implementer
from zope.interface.verify import verifyObject

from relaymux.interfaces import IBufferTransport, IHalfReadTransport, IIdentifiedTransport
from relaymux.testing import memory
from relaymux.testing.memory import MemoryConnection
from relaymux.testing.recording import BufferRecorder, Feeder, HalfCloseRecorder, Recorder, over_seeds

CAPACITY = 1000


class PieceRecorder(Recorder):
    """Also remembers the size of each piece."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[int] = []

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)
        self.pieces.append(len(data))


def some_bytes(size: int) -> bytes:
    """@return: bytes of which no two stretches are the same."""
    return random.Random(size).randbytes(size)


class Pair:
    """A connection and its two protocols."""

    def __init__(
        self,
        kind: Callable[[], Recorder] = HalfCloseRecorder,
        *,
        clock: Clock | None = None,
        seed: int | None = None,
        buffers: bool = True,
        identities: tuple[str, str] | None = None,
    ) -> None:
        self.near, self.far = kind(), kind()
        self.connection = MemoryConnection(
            self.near,
            self.far,
            clock=clock,
            seed=seed,
            capacity=CAPACITY,
            buffers=buffers,
            identities=identities,
        )
        self.client, self.server = self.connection.client, self.connection.server
        self.settle = self.connection.settle


class MemoryTests(SynchronousTestCase):
    """What all tests here use."""

    def assert_lost(self, protocol: Recorder, kind: type[Exception]) -> None:
        """The protocol was told once that its connection is lost, because of C{kind}."""
        assert protocol.reason is not None, f"not lost: {protocol.events}"
        self.assertIs(protocol.reason.type, kind)
        self.assertEqual(protocol.events[-1], "lost")

    def assert_connected(self, *protocols: Recorder) -> None:
        """None of them was told of a loss."""
        for protocol in protocols:
            self.assertIsNone(protocol.reason)


class TransferTests(MemoryTests):
    """Bytes arrive, in what pieces, and when."""

    @over_seeds(3)
    def test_both_directions(self, seed: int) -> None:
        """Both directions at once carry many times their capacity exactly, in each flavour."""
        one, two = some_bytes(20 * CAPACITY), some_bytes(21 * CAPACITY)
        kinds: list[tuple[Callable[[], Recorder], bool]] = [
            (Recorder, False),
            (Recorder, True),
            (HalfCloseRecorder, True),
            (BufferRecorder, True),
        ]
        for kind, buffers in kinds:
            pair = Pair(kind, seed=seed, buffers=buffers)
            first = pair.connection.transfer(pair.client, one)
            pair.connection.stall(pair.server)
            second = pair.connection.transfer(pair.client, one)
            third = pair.connection.transfer(pair.server, two)
            pair.connection.release()
            pair.settle()
            self.assertEqual(pair.far.received, one + one)
            self.assertEqual(pair.near.received, two)
            self.assertTrue(first.done and second.done and third.done)
            self.assertEqual(pair.server.received_bytes, 2 * len(one))

    @over_seeds(3)
    def test_seed_decides(self, seed: int) -> None:
        """One seed gives the same pieces each time, of all sizes; another seed gives others."""

        def pieces(seed: int | None) -> list[int]:
            pair = Pair(PieceRecorder, seed=seed)
            pair.connection.transfer(pair.client, some_bytes(100 * CAPACITY))
            assert isinstance(pair.far, PieceRecorder)
            return pair.far.pieces

        self.assertEqual(pieces(seed), pieces(seed))
        self.assertNotEqual(pieces(seed), pieces(seed + 1))
        self.assertIn(1, pieces(seed))
        self.assertGreater(max(pieces(seed)), CAPACITY // 2)
        self.assertEqual(set(pieces(None)), {CAPACITY})

    def test_buffers(self) -> None:
        """A receiver of buffers is given several at once, may keep them, and is told what it got rid of."""
        pair = Pair(BufferRecorder, seed=1)
        near, far = pair.near, pair.far
        assert isinstance(near, BufferRecorder) and isinstance(far, BufferRecorder)
        data = some_bytes(10 * CAPACITY)
        self.assertTrue(IBufferTransport.providedBy(pair.client))
        pair.client.writeBuffers([data[:10], memoryview(data)[10:]])  # type: ignore[attr-defined]
        self.assertEqual(near.written, CAPACITY)
        self.assertEqual(pair.client.queuedBytes, 9 * CAPACITY)
        pair.settle()
        self.assertEqual(b"".join(far.buffers), data)
        self.assertEqual((near.written, pair.client.queuedBytes), (len(data), 0))
        self.assertGreater(len(far.buffers), 10)

    def test_plain_flavour(self) -> None:
        """Without buffers nothing shows their interface; a receiver of them is called as others are."""
        pair = Pair(buffers=False)
        self.assertFalse(IBufferTransport.providedBy(pair.client))
        self.assertFalse(hasattr(pair.client, "writeBuffers"))
        strange = Pair(BufferRecorder, buffers=False)
        strange.client.write(b"x")
        with self.assertRaisesRegex(AssertionError, "dataReceived was called"):
            strange.settle()

    def test_queued_by_reference(self) -> None:
        """What found no room is not copied: who changes it too early is found out."""
        pair = Pair()
        memory_of_writer = bytearray(b"a" * 2 * CAPACITY)
        pair.client.writeBuffers([memoryview(memory_of_writer)])  # type: ignore[attr-defined]
        memory_of_writer[:] = b"b" * len(memory_of_writer)
        pair.settle()
        self.assertEqual(pair.far.received, b"a" * CAPACITY + b"b" * CAPACITY)

    def test_interfaces(self) -> None:
        """Both flavours are what they say."""
        for buffers in (False, True):
            transport = Pair(buffers=buffers).client
            for interface in (ITransport, IConsumer, IPushProducer, IHalfReadTransport):
                verifyObject(interface, transport)
        verifyObject(IBufferTransport, transport)

    def test_writes_bytes_only(self) -> None:
        """Anything else is refused as other transports do, and nothing is sent."""
        pair = Pair()
        for data in ("text", bytearray(b"x"), None):
            self.assertRaises(TypeError, pair.client.write, data)
        pair.client.writeSequence([b"in", b"", b"order"])
        pair.settle()
        self.assertEqual(pair.far.received, b"inorder")

    def test_clock(self) -> None:
        """With a clock nothing moves before its next turn, and then everything does."""
        clock = Clock()
        pair = Pair(clock=clock)
        feeder = Feeder(pair.client, some_bytes(10 * CAPACITY))
        feeder.start()
        self.assertEqual(pair.far.received, b"")
        clock.advance(0)
        self.assertEqual(pair.far.received, some_bytes(10 * CAPACITY))
        pair.server.pauseProducing()
        pair.client.write(b"more")
        clock.advance(1)
        self.assertEqual(pair.server.received_bytes, 10 * CAPACITY)
        pair.server.resumeProducing()
        clock.advance(0)
        self.assertEqual(pair.far.received[-4:], b"more")
        self.assertEqual(clock.getDelayedCalls(), [])
        pair.client.write(b"after a rest")
        clock.advance(0)
        self.assertEqual(pair.far.received[-12:], b"after a rest")
        self.assertEqual(clock.getDelayedCalls(), [])

    def test_settle_runs_what_is_due(self) -> None:
        """What protocols have put on the clock for now happens, what is for later does not."""
        clock = Clock()
        pair = Pair(clock=clock)
        clock.callLater(0, lambda: clock.callLater(0, pair.client.write, b"now"))
        clock.callLater(1, pair.client.write, b"later")
        pair.settle()
        self.assertEqual(pair.far.received, b"now")

    def test_endless_exchange(self) -> None:
        """Two ends that never come to rest fail the test instead of stopping it."""

        class Echo(Recorder):
            def dataReceived(self, data: bytes) -> None:
                assert self.transport is not None
                self.transport.write(data)

        self.patch(memory, "MAX_TURNS", 1000)
        for clock in (None, Clock()):
            pair = Pair(Echo, clock=clock, seed=5)
            pair.client.write(b"ping")
            with self.assertRaisesRegex(AssertionError, "seed=5.*does not settle"):
                pair.settle()

    def test_identities(self) -> None:
        """Each end knows the other's name, if there are names."""
        pair = Pair(identities=("dns:client", "dns:server"))
        for end, name in ((pair.client, "dns:server"), (pair.server, "dns:client")):
            self.assertTrue(IIdentifiedTransport.providedBy(end))
            self.assertEqual(end.peerIdentity, name)
        anonymous = Pair().client
        self.assertFalse(IIdentifiedTransport.providedBy(anonymous))
        self.assertNotEqual(anonymous.getHost(), anonymous.getPeer())


class BackpressureTests(MemoryTests):
    """Pausing in either direction, and producers."""

    def test_full_pauses_the_producer(self) -> None:
        """A producer is paused when there is no room, and resumed when its bytes have left."""
        pair = Pair()
        pair.connection.stall(pair.server)
        feeder = pair.connection.transfer(pair.client, some_bytes(5 * CAPACITY))
        self.assertEqual(feeder.pauses, 1)
        self.assertFalse(feeder.done and pair.client.queuedBytes == 0)
        self.assertEqual(pair.client.queuedBytes, 4 * CAPACITY)
        self.assertEqual(pair.far.received, b"")
        pair.connection.release(pair.server)
        pair.settle()
        self.assertEqual(pair.far.received, some_bytes(5 * CAPACITY))

    @over_seeds(3)
    def test_paused_reader_stops_the_writer(self, seed: int) -> None:
        """While a reader is paused nothing is delivered, and a writer that obeys stops with it."""
        pair = Pair(seed=seed)
        pair.server.pauseProducing()
        data = some_bytes(50 * CAPACITY)
        feeder = pair.connection.transfer(pair.client, data)
        self.assertFalse(feeder.done)
        self.assertEqual(pair.far.received, b"")
        while not feeder.done or pair.client.queuedBytes:
            before = len(pair.far.received)
            pair.server.resumeProducing()
            pair.connection.pump()
            pair.server.pauseProducing()
            pair.settle()
            self.assertLessEqual(len(pair.far.received) - before, CAPACITY)
        pair.server.resumeProducing()
        pair.settle()
        self.assertEqual(pair.far.received, data)
        self.assertGreater(feeder.pauses, 1)

    def test_registered_while_full(self) -> None:
        """A producer registered late is told at once that there is no room."""
        pair = Pair()
        pair.connection.stall()
        pair.client.write(some_bytes(CAPACITY + 1))
        feeder = Feeder(pair.client, b"later")
        feeder.start()
        self.assertEqual((feeder.pauses, feeder.done), (1, False))
        pair.connection.release()
        pair.settle()
        self.assertEqual(pair.far.received, some_bytes(CAPACITY + 1) + b"later")

    def test_pull_producer(self) -> None:
        """A pull producer is asked whenever there is room."""

        @implementer(IPullProducer)
        class Puller:
            left = 7

            def resumeProducing(self) -> None:
                self.left -= 1
                pair.client.write(b"x" * CAPACITY)
                if not self.left:
                    pair.client.unregisterProducer()

            def stopProducing(self) -> None:
                raise AssertionError("it was not asked to stop")

        pair = Pair()
        pair.connection.stall()
        puller = Puller()
        pair.client.registerProducer(puller, False)
        pair.settle()
        self.assertLess(7 - puller.left, 4)
        pair.connection.release()
        pair.settle()
        self.assertEqual(len(pair.far.received), 7 * CAPACITY)

    def test_registration_errors(self) -> None:
        """A second producer is refused; one for a lost connection is stopped."""
        pair = Pair()
        pair.connection.stall()
        first = pair.connection.transfer(pair.client, some_bytes(5 * CAPACITY))
        pair.client.registerProducer(Feeder(pair.client, b""), True)
        self.assertRaises(RuntimeError, pair.client.registerProducer, first, True)
        pair.connection.cut()
        late = Feeder(pair.client, b"x")
        late.start()
        self.assertTrue(late.stopped)

    def test_loss_stops_the_producer(self) -> None:
        """Who was writing is told that the connection is gone."""
        pair = Pair(seed=3)
        pair.connection.stall()
        feeder = pair.connection.transfer(pair.client, some_bytes(50 * CAPACITY))
        self.assertFalse(feeder.done)
        pair.connection.cut()
        self.assertTrue(feeder.stopped)


class ClosingTests(MemoryTests):
    """Ends in good order, and not."""

    @over_seeds(3)
    def test_half_close(self, seed: int) -> None:
        """One direction ends after all its bytes while the other goes on; then both are closed."""
        for first, second in (("client", "server"), ("server", "client")):
            pair = Pair(seed=seed)
            one, two = getattr(pair, first), getattr(pair, second)
            one.write(some_bytes(3 * CAPACITY))
            one.loseWriteConnection()
            one.write(b"too late")
            pair.settle()
            self.assertEqual(one.protocol.events, ["made", "write lost"])
            self.assertEqual(two.protocol.events, ["made", "read lost"])
            self.assertEqual(two.protocol.received, some_bytes(3 * CAPACITY))
            pair.connection.transfer(two, some_bytes(4 * CAPACITY))
            two.loseWriteConnection()
            pair.settle()
            self.assertEqual(one.protocol.received, some_bytes(4 * CAPACITY))
            self.assertEqual(one.protocol.events, ["made", "write lost", "read lost", "lost"])
            for end in (one, two):
                self.assert_lost(end.protocol, ConnectionDone)

    def test_end_without_half_close(self) -> None:
        """A protocol that knows no half-close loses the whole connection at the peer's end."""
        pair = Pair(Recorder)
        pair.client.write(b"last words")
        pair.client.loseWriteConnection()
        pair.settle()
        self.assertEqual(pair.far.received, b"last words")
        self.assert_lost(pair.far, ConnectionDone)
        self.assert_lost(pair.near, ConnectionDone)

    @over_seeds(3)
    def test_close_flushes(self, seed: int) -> None:
        """What was written before closing arrives, then a clean end; nothing is delivered meanwhile."""
        pair = Pair(Recorder, seed=seed)
        pair.client.write(some_bytes(9 * CAPACITY))
        pair.client.loseConnection()
        self.assert_connected(pair.near)
        pair.settle()
        self.assertEqual(pair.far.received, some_bytes(9 * CAPACITY))
        self.assert_lost(pair.near, ConnectionDone)
        self.assert_lost(pair.far, ConnectionDone)

    def test_close_with_unread_input(self) -> None:
        """The peer of somebody who closes without having read reads what it was sent, then sees a loss."""
        pair = Pair()
        pair.server.write(b"never read")
        pair.client.write(b"goodbye")
        pair.client.loseConnection()
        pair.settle()
        self.assertEqual((pair.near.received, pair.far.received), (b"", b"goodbye"))
        self.assert_lost(pair.near, ConnectionDone)
        self.assert_lost(pair.far, ConnectionLost)
        self.assertNotIn("read lost", pair.far.events)

    def test_nothing_arrives_while_closing(self) -> None:
        """Who has closed but not yet flushed is given nothing any more; its peer still gets everything."""
        pair = Pair()
        pair.connection.stall(pair.server)
        pair.client.write(some_bytes(2 * CAPACITY))
        pair.client.loseConnection()
        pair.server.write(b"too late")
        pair.settle()
        self.assert_connected(pair.near, pair.far)
        pair.connection.release()
        pair.settle()
        self.assertEqual((pair.near.received, pair.far.received), (b"", some_bytes(2 * CAPACITY)))
        self.assert_lost(pair.near, ConnectionDone)
        self.assert_lost(pair.far, ConnectionLost)

    def test_close_waits_for_a_paused_producer(self) -> None:
        """A producer that was paused may finish, though the connection is to be closed."""
        pair = Pair(seed=11)
        data = some_bytes(30 * CAPACITY)
        feeder = Feeder(pair.client, data, pair.connection.portion)
        feeder.start()
        pair.client.loseConnection()
        pair.settle()
        self.assertTrue(feeder.done)
        self.assertEqual(pair.far.received, data)
        self.assert_lost(pair.near, ConnectionDone)

    def test_stop_producing_closes(self) -> None:
        """As a producer that is told to stop, a transport closes."""
        pair = Pair(Recorder)
        pair.client.stopProducing()
        pair.settle()
        self.assert_lost(pair.far, ConnectionDone)

    def test_abort(self) -> None:
        """Aborting drops what is under way and is a loss for the peer; it is told in the next turn."""
        pair = Pair()
        pair.client.write(some_bytes(3 * CAPACITY))
        pair.client.abortConnection()
        pair.client.write(b"dropped")
        self.assert_connected(pair.near, pair.far)
        pair.settle()
        self.assertEqual(pair.far.received, b"")
        self.assert_lost(pair.near, ConnectionAborted)
        self.assert_lost(pair.far, ConnectionLost)
        for end in (pair.client, pair.server):
            end.abortConnection()
            end.loseConnection()
            end.loseWriteConnection()
            end.loseReadConnection()
            end.write(b"dropped")
        pair.settle()
        self.assertEqual(pair.near.events.count("lost"), 1)

    def test_closed_input(self) -> None:
        """Who writes to a peer that closed its input learns it a turn later, and may go on reading."""
        pair = Pair()
        pair.server.loseReadConnection()
        pair.settle()
        self.assert_connected(pair.near, pair.far)
        pair.client.write(b"in vain")
        self.assertNotIn("write lost", pair.near.events)
        pair.settle()
        self.assertEqual(pair.near.events, ["made", "write lost"])
        self.assertEqual((pair.far.received, pair.far.events), (b"", ["made"]))
        pair.connection.transfer(pair.server, some_bytes(2 * CAPACITY))
        pair.server.loseWriteConnection()
        pair.settle()
        self.assertEqual(pair.near.received, some_bytes(2 * CAPACITY))
        self.assert_lost(pair.near, ConnectionLost)
        self.assert_lost(pair.far, ConnectionDone)

    def test_closed_input_without_half_close(self) -> None:
        """A protocol that knows no half-close gets what was sent to it before, then the loss."""
        pair = Pair(Recorder)
        pair.client.pauseProducing()
        pair.server.write(b"before")
        pair.server.loseReadConnection()
        pair.client.write(b"in vain")
        pair.settle()
        self.assert_connected(pair.near)
        pair.client.resumeProducing()
        pair.settle()
        self.assertEqual(pair.near.received, b"before")
        self.assert_lost(pair.near, ConnectionLost)

    def test_both_inputs_and_outputs_closed(self) -> None:
        """An end that has closed its own input and output is done."""
        pair = Pair()
        pair.client.loseWriteConnection()
        pair.settle()
        pair.client.loseReadConnection()
        self.assert_lost(pair.near, ConnectionDone)

    def test_closing_from_within(self) -> None:
        """A protocol may close or abort from each of its callbacks, and is told of the loss once."""

        class Closer(HalfCloseRecorder):
            where = how = ""

            def act(self, where: str) -> None:
                if where == self.where:
                    getattr(self.transport, self.how)()

            def dataReceived(self, data: bytes) -> None:
                super().dataReceived(data)
                self.act("data")

            def readConnectionLost(self) -> None:
                super().readConnectionLost()
                self.act("read")

            def writeConnectionLost(self) -> None:
                super().writeConnectionLost()
                self.act("write")

        for how, kind in (("loseConnection", ConnectionDone), ("abortConnection", ConnectionAborted)):
            for where in ("data", "read", "write"):
                for clock in (None, Clock()):
                    pair = Pair(Closer, clock=clock)
                    near, far = pair.near, pair.far
                    assert isinstance(near, Closer) and isinstance(far, Closer)
                    near.where, near.how = where, how
                    pair.client.loseWriteConnection() if where == "write" else pair.server.write(b"x")
                    pair.settle()
                    if where == "read":
                        pair.server.loseWriteConnection()
                        pair.settle()
                    self.assert_lost(near, kind)
                    self.assertIn("lost" if how == "abortConnection" else "read lost", far.events)


class FaultTests(MemoryTests):
    """Cutting and stalling."""

    @over_seeds(3)
    def test_cut_after(self, seed: int) -> None:
        """Exactly so many bytes arrive, in either direction, and then both ends are told at once."""
        data = some_bytes(3 * CAPACITY)
        for count in (0, 1, 999, 1000, 1001, 2999, 3000):
            for end in ("server", "client"):
                pair = Pair(seed=seed)
                reader, writer = pair.server, pair.client
                if end == "client":
                    reader, writer = writer, reader
                pair.connection.cut_after(count, reader)
                pair.connection.transfer(writer, data)
                assert isinstance(reader.protocol, Recorder)
                self.assertEqual(reader.protocol.received, data[:count])
                self.assert_lost(pair.near, ConnectionLost)
                self.assert_lost(pair.far, ConnectionLost)

    def test_cut_after_what_has_passed(self) -> None:
        """A place in the past is a mistake of the test."""
        pair = Pair()
        pair.connection.transfer(pair.client, b"12345")
        self.assertRaises(ValueError, pair.connection.cut_after, 4, pair.server)
        pair.connection.cut_after(5, pair.server)
        self.assert_lost(pair.far, ConnectionLost)

    def test_cut_drops_what_is_under_way(self) -> None:
        """Nothing arrives after a cut, not even for a paused reader, and a second one does nothing."""
        pair = Pair()
        pair.server.pauseProducing()
        pair.client.write(b"lost")
        pair.settle()
        pair.connection.cut()
        self.assert_lost(pair.near, ConnectionLost)
        self.assert_lost(pair.far, ConnectionLost)
        pair.connection.cut()
        pair.connection.release()
        pair.server.resumeProducing()
        pair.settle()
        self.assertEqual(pair.far.received, b"")

    def test_cut_of_one_end(self) -> None:
        """Half open: one end is told, for the other there is silence, until the network is back."""
        pair = Pair()
        pair.connection.cut(pair.client)
        self.assert_lost(pair.near, ConnectionLost)
        pair.server.write(some_bytes(5 * CAPACITY))
        pair.settle()
        self.assert_connected(pair.far)
        pair.connection.release()
        pair.settle()
        self.assert_lost(pair.far, ConnectionLost)

    def test_stall_one_way(self) -> None:
        """One direction holds its bytes while the other goes on; released, they arrive."""
        pair = Pair()
        pair.connection.stall(pair.server)
        pair.client.write(b"held")
        pair.server.write(b"through")
        pair.settle()
        self.assertEqual((pair.near.received, pair.far.received), (b"through", b""))
        pair.connection.release()
        pair.settle()
        self.assertEqual(pair.far.received, b"held")

    def test_stall_hides_the_end(self) -> None:
        """In silence neither a close nor a loss is noticed, by a writer neither, until it is over."""
        for how, kind in (("loseConnection", ConnectionDone), ("abortConnection", ConnectionLost)):
            pair = Pair(Recorder)
            pair.connection.stall()
            getattr(pair.client, how)()
            pair.settle()
            pair.server.write(b"is anybody there?" if kind is ConnectionLost else b"")
            pair.settle()
            self.assert_connected(pair.far)
            pair.connection.release()
            pair.settle()
            self.assert_lost(pair.far, kind)


class SeedTests(SynchronousTestCase):
    """L{over_seeds}."""

    def run_with(self, value: str | None, method: Callable[[SeedTests, int], None]) -> None:
        """Run C{method} over seeds, with the environment variable set to C{value}."""
        environment = dict(os.environ)
        environment.pop("RELAYMUX_SEED", None)
        if value is not None:
            environment["RELAYMUX_SEED"] = value
        self.patch(os, "environ", environment)
        over_seeds(5)(method)(self)

    def test_runs(self) -> None:
        """Each run has a seed of its own; the environment variable is the only one if it is set."""
        seen: list[int] = []
        self.run_with(None, lambda _, seed: seen.append(seed))
        self.assertEqual(len(set(seen)), 5)
        self.run_with("77", lambda _, seed: seen.append(seed))
        self.assertEqual(seen[5:], [77])

    def test_failure(self) -> None:
        """A failure says how to repeat it, whatever it is; a skip stays one."""

        def fail(test: SeedTests, seed: int) -> None:
            test.assertEqual(seed, -1, "no such seed")

        def skip(test: SeedTests, seed: int) -> None:
            raise SkipTest("not here")

        with self.assertRaisesRegex(AssertionError, "no such seed.*RELAYMUX_SEED=77"):
            self.run_with("77", fail)
        self.assertRaises(SkipTest, self.run_with, None, skip)


class RecorderTests(SynchronousTestCase):
    """The recorders find transports that are not in order themselves."""

    def test_out_of_order(self) -> None:
        """Bytes or ends before the beginning, after an end, or twice are failures."""
        for calls in (
            ("read",),
            ("made", "read", "data"),
            ("made", "read", "read"),
            ("made", "write", "write"),
            ("made", "lost", "data"),
            ("made", "lost", "lost"),
        ):
            recorder = HalfCloseRecorder()
            actions: dict[str, Callable[[], None]] = {
                "made": recorder.connectionMade,
                "data": lambda recorder=recorder: recorder.dataReceived(b"x"),  # type: ignore[misc]
                "read": recorder.readConnectionLost,
                "write": recorder.writeConnectionLost,
                "lost": recorder.connectionLost,
            }
            for call in calls[:-1]:
                actions[call]()
            with self.assertRaises(AssertionError, msg=calls):
                actions[calls[-1]]()

    def test_feeder_needs_a_consumer(self) -> None:
        """Feeding what takes no producer is a mistake of the test."""
        self.assertRaises(TypeError, Feeder(object(), b"").start)  # type: ignore[arg-type]
