"""Connected sockets as transports: nothing lost, nothing delivered twice, every end told as what it is."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from typing import Any
from unittest import SkipTest

from twisted.internet.address import IPv4Address, UNIXAddress
from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import (
    IConsumer,
    IHalfCloseableDescriptor,
    IPushProducer,
    ISystemHandle,
    ITCPTransport,
    ITransport,
)
from twisted.internet.main import CONNECTION_LOST
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from zope.interface.verify import verifyObject

from relaymux.core.budget import STREAM_WRITES
from relaymux.interfaces import IBufferTransport
from relaymux.net import sockets
from relaymux.net.buffers import BufferPool, PythonBufferPool
from relaymux.net.families import MOST_EXPECTED, NOTSENT_LOWAT, transport_for, tune_link
from relaymux.net.sockets import SocketTransport
from relaymux.net.turns import TALK_SECONDS
from tests.sockets import (
    HalfCloser,
    PlainRecorder,
    Producer,
    Recorder,
    SocketTestCase,
    content,
    reactor,
    reset,
    tcp_pair,
    unix_pair,
)

LARGE = content(6_000_000)


class Endless:
    """A socket whose peer has always sent what Linux lets it: each read brings up to 208 KiB."""

    def fileno(self) -> int:
        return -1

    def recv_into(self, room: memoryview) -> int:
        """See C{socket.recv_into}."""
        return min(len(room), 208 * 1024)


class Both(SocketTestCase):
    """Runs for each kind of socket in a subclass."""

    def pair(self) -> tuple[socket.socket, socket.socket]:
        raise SkipTest("of use in subclasses only")

    def setUp(self) -> None:
        self.patch(sockets, "LINGER_SECONDS", 0.2)

    def connect(self, protocol: Any, **options: Any) -> tuple[SocketTransport, socket.socket]:
        """C{protocol} on one end of a pair.  @return: its transport, and the other end."""
        ours, peer = self.pair()
        self.addCleanup(peer.close)
        transport = transport_for(reactor, ours, protocol, BufferPool(), **options)
        self.addCleanup(self.ended, protocol, transport)
        transport.begin()
        return transport, peer

    async def ended(self, protocol: Any, transport: SocketTransport) -> None:
        """Every test leaves the connection closed, and told so exactly once."""
        transport.abortConnection()
        await self.lost(protocol)
        await self.turns(3)
        self.assertEqual(protocol.events.count("lost"), 1)
        self.assertEqual(transport.fileno(), -1)
        self.assertEqual(transport.queuedBytes, 0)


class DataTests:
    """Bytes in both directions, and who is paused when."""

    pair: Any
    connect: Any

    async def test_receives_buffers(self: Any) -> None:
        """All that the peer sends arrives as views, in order."""
        protocol = Recorder()
        _, peer = self.connect(protocol)
        await self.send(peer, LARGE)
        await self.until(lambda: len(protocol.received) >= len(LARGE), "all arrived")
        self.assertEqual(protocol.received, LARGE)

    async def test_receives_bytes(self: Any) -> None:
        """A protocol that knows no buffers gets the same bytes through dataReceived."""
        protocol = PlainRecorder()
        _, peer = self.connect(protocol)
        await self.send(peer, LARGE)
        await self.until(lambda: len(protocol.received) >= len(LARGE), "all arrived")
        self.assertEqual(protocol.received, LARGE)

    async def test_writes(self: Any) -> None:
        """Buffers of every size leave in order, through each of the ways to write."""
        protocol = Recorder()
        transport, peer = self.connect(protocol)
        view = memoryview(LARGE)
        transport.write(bytes(view[:10]))
        transport.writeSequence([bytes(view[10:20]), b"", bytes(view[20:1000])])
        transport.writeBuffers([view[1000:1001], view[1001:5_000_000], b"", view[5_000_000:]])
        transport.writeBuffers([])
        self.assertGreater(transport.queuedBytes, 0)
        self.assertEqual(await self.read(peer, len(LARGE)), LARGE)
        await self.until(lambda: protocol.written == len(LARGE), "all was reported as written")
        self.assertEqual(transport.queuedBytes, 0)

    async def test_many_small_buffers(self: Any) -> None:
        """More buffers than one system call takes are no trouble."""
        transport, peer = self.connect(Recorder())
        data = content(5000)
        transport.writeBuffers([data[i : i + 1] for i in range(len(data))])
        self.assertEqual(await self.read(peer, len(data)), data)

    async def test_both_directions(self: Any) -> None:
        """What comes in and what goes out do not disturb one another."""
        protocol = Recorder()
        transport, peer = self.connect(protocol)
        transport.writeBuffers([LARGE])
        back = content(len(LARGE), 7)
        sending = self.send(peer, back)
        echoed = await self.read(peer, len(LARGE))
        await sending
        await self.until(lambda: len(protocol.received) >= len(back), "all arrived")
        self.assertEqual(echoed, LARGE)
        self.assertEqual(protocol.received, back)

    async def test_faster_than_its_reader(self: Any) -> None:
        """However fast a peer writes, no more is handed on at once than a stream may have written."""
        # Turns are short as long as somebody has talked just before, such as in another test.
        await deferLater(reactor, TALK_SECONDS)
        protocol = Recorder()
        transport, _ = self.connect(protocol)
        transport.stopReading()
        transport._pool = PythonBufferPool()  # the compiled one reads descriptors only
        connected, transport.socket = transport.socket, Endless()
        try:
            for _ in range(5):
                before = len(protocol.received)
                transport.doRead()
                self.assertEqual(len(protocol.received) - before, STREAM_WRITES)
        finally:
            transport.socket = connected

    async def test_pause_inside_delivery(self: Any) -> None:
        """A protocol that pauses is not given one more buffer, even if it was already there to be read."""
        for protocol in (PlainRecorder(), Recorder()):
            transport, peer = self.connect(protocol)
            protocol.on_data = transport.pauseProducing
            await self.send(peer, content(180_000))
            await self.until(lambda p=protocol: p.received, "some arrived")
            await self.turns()
            self.assertEqual(protocol.deliveries, 1)
            while len(protocol.received) < 180_000:
                before = protocol.deliveries
                transport.resumeProducing()
                await self.until(lambda p=protocol, n=before: p.deliveries > n, "more arrived")
                await self.turns(3)
                self.assertEqual(protocol.deliveries, before + 1)
            self.assertEqual(protocol.received, content(180_000))

    async def test_pause_stops_the_sender(self: Any) -> None:
        """While reading is paused the peer can send what the kernel holds, and nothing of it is taken."""
        protocol = Recorder()
        protocol.on_made = lambda: protocol.transport.pauseProducing()
        transport, peer = self.connect(protocol)
        sent = self.fill(peer)
        await self.turns()
        sent += self.fill(peer)
        await self.turns()
        with self.assertRaises(BlockingIOError):
            peer.send(b"x")
        self.assertEqual(protocol.deliveries, 0)
        transport.resumeProducing()
        await self.until(lambda: len(protocol.received) >= len(sent), "all arrived")
        self.assertEqual(protocol.received, sent)

    async def test_producer_paused_while_queued(self: Any) -> None:
        """The producer is paused once when bytes wait, and resumed once when none do."""
        transport, peer = self.connect(Recorder())
        producer = Producer()
        transport.registerProducer(producer, True)
        transport.writeBuffers([b"small"])
        self.assertEqual(producer.calls, [])
        transport.writeBuffers([LARGE])
        transport.writeBuffers([b"more"])
        self.assertEqual(producer.calls, ["pause"])
        await self.read(peer, 5 + len(LARGE) + 4)
        await self.until(lambda: producer.calls == ["pause", "resume"], "the producer was resumed")
        transport.writeBuffers([LARGE])
        self.assertEqual(producer.calls, ["pause", "resume", "pause"])
        transport.abortConnection()
        await self.until(lambda: producer.calls[3:] == ["stop"], "the producer was stopped")

    async def test_as_others_call_it(self: Any) -> None:
        """Callers that say 1 and 0, and that write views, are understood: compiled or not."""
        transport, _ = self.connect(Recorder())
        producer: Any = Producer()
        transport.registerProducer(producer, 1)
        while not producer.calls:
            transport.write(memoryview(LARGE))
        self.assertEqual(producer.calls, ["pause"])
        transport.unregisterProducer()
        pulled: Any = Producer()
        transport.registerProducer(pulled, 0)
        self.assertEqual(pulled.calls, ["resume"])
        if transport.socket.family == socket.AF_INET:
            transport.setTcpNoDelay(1)
            transport.setTcpKeepAlive(0)
            self.assertEqual((transport.getTcpNoDelay(), transport.getTcpKeepAlive()), (True, False))

    async def test_producer_registered_late(self: Any) -> None:
        """Who registers while bytes wait is paused at once, whatever became of the one before."""
        transport, peer = self.connect(Recorder())
        first, second = Producer(), Producer()
        transport.registerProducer(first, True)
        transport.writeBuffers([LARGE])
        transport.unregisterProducer()
        transport.registerProducer(second, True)
        self.assertEqual([first.calls, second.calls], [["pause"], ["pause"]])
        await self.read(peer, len(LARGE))
        await self.until(lambda: second.calls == ["pause", "resume"], "the producer was resumed")
        self.assertEqual(first.calls, ["pause"])

    async def test_pull_producer(self: Any) -> None:
        """A pull producer is asked again and again, and the connection is not closed before it is done."""
        protocol = Recorder()
        transport, peer = self.connect(protocol)
        left = [LARGE[i : i + 300_000] for i in range(0, len(LARGE), 300_000)]

        class Pulled:
            def resumeProducing(self) -> None:
                transport.write(left.pop(0))
                if not left:
                    transport.unregisterProducer()

            def stopProducing(self) -> None:
                raise AssertionError("stopped before it was done")

        transport.registerProducer(Pulled(), False)
        transport.loseConnection()
        self.assertEqual(await self.read(peer), LARGE)
        peer.close()
        self.assertIsInstance(await self.lost(protocol), ConnectionDone)

    async def test_only_bytes(self: Any) -> None:
        """What may change after it was written is refused, since it would be queued by reference."""
        transport, _ = self.connect(Recorder())
        for wrong in ("text", bytearray(b"changing"), 7):
            with self.assertRaises(TypeError):
                transport.write(wrong)


class EndTests:
    """How connections end."""

    pair: Any
    connect: Any

    async def test_end_of_input(self: Any) -> None:
        """The peer's end is a clean end for a protocol that knows no half-close."""
        protocol = Recorder()
        _, peer = self.connect(protocol)
        peer.sendall(b"last words")
        peer.close()
        self.assertIsInstance(await self.lost(protocol), ConnectionDone)
        self.assertEqual(protocol.received, b"last words")

    async def test_end_of_input_with_bytes_queued(self: Any) -> None:
        """An end that costs bytes which nobody took is no clean one."""
        protocol = Recorder()
        transport, peer = self.connect(protocol)
        transport.writeBuffers([LARGE])
        peer.shutdown(socket.SHUT_WR)
        self.assertIsInstance(await self.lost(protocol), ConnectionLost)

    async def test_half_closed_by_the_peer(self: Any) -> None:
        """After the peer's end we can still write, and the connection ends when both directions have."""
        protocol = HalfCloser()
        transport, peer = self.connect(protocol)
        peer.sendall(b"question")
        peer.shutdown(socket.SHUT_WR)
        await self.until(lambda: "read lost" in protocol.events, "the end was told")
        transport.writeBuffers([LARGE])
        transport.loseWriteConnection()
        self.assertEqual(await self.read(peer), LARGE)
        self.assertIsInstance(await self.lost(protocol), ConnectionDone)
        self.assertEqual(protocol.events, ["made", "data", "read lost", "lost"])

    async def test_half_closed_by_us(self: Any) -> None:
        """After our end the peer's bytes still arrive."""
        protocol = HalfCloser()
        transport, peer = self.connect(protocol)
        transport.writeBuffers([LARGE])
        transport.loseWriteConnection()
        transport.write(b"too late")
        self.assertEqual(await self.read(peer), LARGE)
        await self.until(lambda: "write lost" in protocol.events, "our own end was told")
        await self.send(peer, LARGE)
        peer.close()
        self.assertIsInstance(await self.lost(protocol), ConnectionDone)
        self.assertEqual(protocol.received, LARGE)
        self.assertEqual(protocol.events, ["made", "write lost", "data", "read lost", "lost"])

    async def test_closes_after_the_flush(self: Any) -> None:
        """All that was written before loseConnection is delivered, then a clean end."""
        protocol = Recorder()
        transport, peer = self.connect(protocol)
        transport.writeBuffers([LARGE])
        transport.loseConnection()
        transport.loseConnection()
        self.assertEqual(await self.read(peer), LARGE)
        peer.close()
        self.assertIsInstance(await self.lost(protocol), ConnectionDone)

    async def test_close_is_no_reset_for_a_talking_peer(self: Any) -> None:
        """A peer that is sending while we close reads all we sent and then an end, not a reset."""
        for paused in (False, True):
            protocol = Recorder()
            transport, peer = self.connect(protocol)
            self.fill(peer)
            transport.writeBuffers([LARGE])
            if paused:
                transport.pauseProducing()
                await self.turns(3)
            transport.loseConnection()
            await self.send(peer, LARGE)
            self.assertEqual(await self.read(peer), LARGE)
            peer.close()
            self.assertIsInstance(await self.lost(protocol), ConnectionDone)
            self.assertEqual(protocol.received, b"")

    async def test_close_does_not_wait_for_ever(self: Any) -> None:
        """A peer that never ends its output does not keep a closed connection."""
        protocol = HalfCloser()
        transport, peer = self.connect(protocol)
        transport.write(b"bye")
        transport.loseConnection()
        self.assertIsInstance(await self.lost(protocol), ConnectionDone)
        self.assertEqual(await self.read(peer), b"bye")
        self.assertEqual(protocol.events, ["made", "lost"])

    async def test_close_after_half_close(self: Any) -> None:
        """Closing when our own end is sent already waits for the peer's end, and not for ever."""
        protocol = HalfCloser()
        transport, peer = self.connect(protocol)
        transport.loseWriteConnection()
        await self.until(lambda: "write lost" in protocol.events, "our own end was told")
        peer.send(b"dropped")
        transport.loseConnection()
        self.assertIsInstance(await self.lost(protocol), ConnectionDone)
        self.assertEqual(protocol.events, ["made", "write lost", "lost"])

    async def test_idle_when_nothing_can_be_sent(self: Any) -> None:
        """Producers that come and go when the output is over do not make the reactor spin."""
        protocol = HalfCloser()
        transport, _ = self.connect(protocol)
        transport.loseWriteConnection()
        await self.until(lambda: "write lost" in protocol.events, "our own end was told")
        transport.loseConnection()
        transport.registerProducer(Producer(), True)
        transport.unregisterProducer()
        await self.turns(3)
        self.assertNotIn(transport, reactor.getWriters())

    async def test_flush_deadline(self: Any) -> None:
        """Where a deadline was set, a peer that does not read is aborted."""
        protocol = Recorder()
        transport, _ = self.connect(protocol, flush_seconds=0.05)
        transport.writeBuffers([LARGE])
        transport.loseConnection()
        self.assertIsInstance(await self.lost(protocol), ConnectionAborted)

    async def test_flush_deadline_not_needed(self: Any) -> None:
        """The deadline is for the flush alone: a peer that took everything is not aborted."""
        protocol = Recorder()
        transport, peer = self.connect(protocol, flush_seconds=0.05)
        transport.write(b"bye")
        transport.loseConnection()
        self.assertIsInstance(await self.lost(protocol), ConnectionDone)
        self.assertEqual(await self.read(peer), b"bye")

    async def test_abort(self: Any) -> None:
        """An abort is at once, drops what is queued, delivers nothing more, and says so."""
        protocol = Recorder()
        transport, peer = self.connect(protocol)
        transport.writeBuffers([LARGE])
        peer.send(b"unread")
        transport.abortConnection()
        transport.abortConnection()
        transport.write(b"dropped")
        transport.loseConnection()
        self.assertEqual(transport.fileno(), -1)
        self.assertEqual(protocol.events, ["made"])
        self.assertIsInstance(await self.lost(protocol), ConnectionAborted)
        with self.assertRaises(ConnectionResetError):
            await self.read(peer)

    async def test_calls_from_inside(self: Any) -> None:
        """From every callback the protocol may close, abort, pause or write."""
        for ending in ("loseConnection", "abortConnection"):
            for hook in ("on_made", "on_data", "on_written", "on_read_lost"):
                protocol = HalfCloser()

                def act(protocol: Any = protocol, ending: str = ending) -> None:
                    protocol.on_written = lambda: None
                    protocol.transport.write(b"from inside")
                    protocol.transport.pauseProducing()
                    getattr(protocol.transport, ending)()
                    protocol.transport.resumeProducing()
                    protocol.transport.write(b"ignored or sent, but no error")

                setattr(protocol, hook, act)
                transport, peer = self.connect(protocol)
                if hook == "on_written":
                    transport.write(b"x")
                with contextlib.suppress(OSError):  # already closed
                    peer.send(b"hello")
                    peer.shutdown(socket.SHUT_WR)
                reason = await self.lost(protocol)
                clean = ConnectionDone if ending == "loseConnection" else ConnectionAborted
                self.assertIsInstance(reason, clean, f"{ending} in {hook}")

    async def test_exception_of_the_protocol(self: Any) -> None:
        """A protocol that raises loses its connection for that reason."""
        for hook in ("on_made", "on_data", "on_read_lost", "on_write_lost"):
            protocol = HalfCloser()

            def fail() -> None:
                raise RuntimeError("bug")

            setattr(protocol, hook, fail)
            transport, peer = self.connect(protocol)
            if hook == "on_write_lost":
                transport.loseWriteConnection()
            elif hook != "on_made":
                peer.send(b"hello")
                peer.shutdown(socket.SHUT_WR)
            self.assertIsInstance(await self.lost(protocol), RuntimeError, hook)
            self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)

    async def test_reactor_stops(self: Any) -> None:
        """When the reactor stops it ends the connection, though nothing is wrong with it."""
        protocol = Recorder()
        transport, _ = self.connect(protocol)
        transport.connectionLost(Failure(CONNECTION_LOST))
        self.assertEqual(protocol.events, ["made", "lost"])

    async def test_stale_hang_up(self: Any) -> None:
        """A hang-up reported for an earlier socket of the same number harms nothing."""
        protocol = Recorder()
        transport, peer = self.connect(protocol)
        for report in (transport.connectionLost, transport.readConnectionLost):
            reactor.removeReader(transport)
            report(Failure(ConnectionLost()))
            peer.send(b"alive")
            await self.until(lambda: protocol.received.endswith(b"alive"), "it still reads")
            protocol.received.clear()
        transport.writeBuffers([LARGE])
        reactor.removeReader(transport)
        reactor.removeWriter(transport)
        transport.connectionLost(Failure(ConnectionLost()))
        self.assertEqual(await self.read(peer, len(LARGE)), LARGE)

    async def test_short_of_memory(self: Any) -> None:
        """A kernel that has no memory at the moment is asked again; no byte is lost."""
        for code in (errno.ENOBUFS, errno.ENOMEM):
            protocol = Recorder()
            transport, peer = self.connect(protocol)
            real = transport.socket
            transport._pool = PythonBufferPool()
            transport.socket = Failing(real, code)
            transport.writeBuffers([b"one", b"two"])
            transport.write(b"three")
            peer.send(b"reply")
            self.assertEqual(await self.read(peer, 11), b"onetwothree")
            await self.until(lambda p=protocol: p.received == b"reply", "the reply arrived")

    async def test_short_of_memory_while_paused(self: Any) -> None:
        """A protocol that pauses while the kernel is short of memory stays paused afterwards."""
        self.patch(sockets, "MEMORY_PAUSE", 0.01)
        protocol = Recorder()
        transport, peer = self.connect(protocol)
        transport._pool = PythonBufferPool()
        transport.socket = Failing(transport.socket, errno.ENOMEM)
        peer.send(b"later")
        await self.until(lambda: transport.socket._failed, "reading failed")
        transport.pauseProducing()
        await self.turns(30)
        self.assertEqual(protocol.received, b"")
        transport.resumeProducing()
        await self.arrived(protocol, 5)

    async def test_what_it_provides(self: Any) -> None:
        """It is a Twisted transport in every respect, and one for buffers."""
        transport, _ = self.connect(Recorder())
        for interface in (ITransport, IConsumer, IPushProducer, IHalfCloseableDescriptor, ISystemHandle):
            verifyObject(interface, transport)
        verifyObject(IBufferTransport, transport)
        self.assertIs(transport.getHandle(), transport.socket)


class Failing:
    """A socket whose first send and first receive fail."""

    def __init__(self, real: socket.socket, code: int) -> None:
        self._real = real
        self._code = code
        self._failed: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        if name in ("send", "sendmsg", "recv_into"):
            side = name[:4]
            if side not in self._failed:
                self._failed.add(side)

                def fail(*_: object) -> None:
                    raise OSError(self._code, os.strerror(self._code))

                return fail
        return getattr(self._real, name)


class UNIXDataTests(DataTests, Both):
    """UNIX sockets."""

    pair = staticmethod(unix_pair)


class TCPDataTests(DataTests, Both):
    """TCP sockets."""

    pair = staticmethod(tcp_pair)


class UNIXEndTests(EndTests, Both):
    """UNIX sockets, whose peer can close completely with bytes still unread."""

    pair = staticmethod(unix_pair)

    async def test_hung_up(self) -> None:
        """A peer that has closed is seen behind bytes that nobody reads; half of an end is none."""
        protocol = HalfCloser()
        transport, peer = self.connect(protocol)
        transport.pauseProducing()
        for _ in range(3):
            peer.send(b"x")
            await self.turns()
            self.assertFalse(transport.hung_up)
        peer.shutdown(socket.SHUT_WR)
        await self.turns()
        self.assertFalse(transport.hung_up)
        peer.close()
        self.assertTrue(transport.hung_up)
        transport.abortConnection()
        self.assertTrue(transport.hung_up)

    async def test_hang_up_while_paused(self) -> None:
        """A peer that sent and closed while we neither read nor could write loses none of what it sent."""
        protocol = HalfCloser()
        protocol.on_made = lambda: protocol.transport.pauseProducing()
        transport, peer = self.connect(protocol)
        transport.writeBuffers([LARGE])
        await self.turns()
        sent = self.fill(peer)
        peer.close()
        await self.until(lambda: "write lost" in protocol.events, "the failed write was told")
        await self.turns()
        self.assertEqual(protocol.events, ["made", "write lost"])
        transport.resumeProducing()
        self.assertIsInstance(await self.lost(protocol), ConnectionLost)
        self.assertEqual(protocol.received, sent)

    async def test_failed_write_keeps_what_was_sent(self) -> None:
        """A write to a closed peer fails once, and what the peer had sent is still delivered to its end."""
        protocol = HalfCloser()
        protocol.on_made = lambda: protocol.transport.pauseProducing()
        transport, peer = self.connect(protocol)
        producer = Producer()
        transport.registerProducer(producer, True)
        sent = self.fill(peer)
        peer.close()
        transport.write(b"nobody reads this")
        transport.write(b"nor this")
        self.assertEqual(protocol.events, ["made"], "not told from within write")
        await self.until(lambda: "write lost" in protocol.events, "the failed write was told")
        transport.resumeProducing()
        self.assertIsInstance(await self.lost(protocol), ConnectionLost)
        self.assertEqual(protocol.received, sent)
        self.assertEqual(protocol.events, ["made", "write lost", "data", "read lost", "lost"])
        self.assertEqual(producer.calls, ["stop"])

    async def test_failed_write_of_a_pull_producer(self) -> None:
        """A pull producer whose bytes nobody takes is not asked for more of them."""
        protocol = HalfCloser()
        transport, peer = self.connect(protocol)
        transport.pauseProducing()
        peer.close()
        asked: list[None] = []

        class Pulled:
            def resumeProducing(self) -> None:
                asked.append(None)
                transport.write(b"nobody reads this")

            def stopProducing(self) -> None:
                asked.append(None)

        transport.registerProducer(Pulled(), False)
        await self.until(lambda: "write lost" in protocol.events, "the failed write was told")
        await self.turns(3)
        self.assertEqual(len(asked), 1)
        self.assertNotIn(transport, reactor.getWriters())

    async def test_failed_write_without_half_close(self) -> None:
        """A protocol that knows no half-close gets the peer's last words too, then the loss."""
        protocol = Recorder()
        transport, peer = self.connect(protocol)
        peer.send(b"because")
        peer.close()
        transport.write(b"nobody reads this")
        self.assertIsInstance(await self.lost(protocol), ConnectionLost)
        self.assertEqual(protocol.received, b"because")

    async def test_failed_write_while_paused_without_half_close(self) -> None:
        """A protocol that reads nothing and knows no half-close learns of a failed write all the same."""
        protocol = Recorder()
        transport, peer = self.connect(protocol)
        transport.pauseProducing()
        peer.close()
        transport.write(b"nobody reads this")
        self.assertIsInstance(await self.lost(protocol), ConnectionLost)

    async def test_failed_write_after_end_of_input(self) -> None:
        """When the peer's end was told already, a failed write is the end of the connection."""
        protocol = HalfCloser()
        transport, peer = self.connect(protocol)
        peer.close()
        await self.until(lambda: "read lost" in protocol.events, "the end was told")
        transport.write(b"nobody reads this")
        self.assertIsInstance(await self.lost(protocol), ConnectionLost)

    async def test_hang_up_after_end_of_input(self) -> None:
        """A peer that ends its output, and later closes without reading, is noticed by what waits."""
        protocol = HalfCloser()
        transport, peer = self.connect(protocol)
        transport.writeBuffers([LARGE])
        peer.shutdown(socket.SHUT_WR)
        await self.until(lambda: "read lost" in protocol.events, "the end was told")
        peer.close()
        self.assertIsInstance(await self.lost(protocol), ConnectionLost)
        self.assertEqual(protocol.events, ["made", "read lost", "lost"])

    async def test_closed_with_unread_bytes(self) -> None:
        """A peer that closes without reading what it was sent is a reset, after what it had sent itself."""
        protocol = HalfCloser()
        transport, peer = self.connect(protocol)
        transport.write(b"unread")
        peer.send(b"last words")
        peer.close()
        self.assertIsInstance(await self.lost(protocol), ConnectionLost)
        self.assertEqual(protocol.received, b"last words")
        self.assertEqual(protocol.events, ["made", "data", "lost"])

    async def test_lose_read_connection(self) -> None:
        """After we stop reading, the peer's writes fail while ours arrive."""
        protocol = HalfCloser()
        transport, peer = self.connect(protocol)
        transport.loseReadConnection()
        transport.loseReadConnection()
        with self.assertRaises(BrokenPipeError):
            peer.send(b"nobody reads this")
        transport.resumeProducing()
        transport.writeBuffers([LARGE])
        transport.loseWriteConnection()
        self.assertEqual(await self.read(peer), LARGE)
        self.assertIsInstance(await self.lost(protocol), ConnectionDone)
        self.assertEqual(protocol.events, ["made", "lost"])

    async def test_lose_read_connection_last(self) -> None:
        """Stopping to read after our own end closes the connection."""
        protocol = HalfCloser()
        transport, _ = self.connect(protocol)
        transport.loseWriteConnection()
        await self.until(lambda: "write lost" in protocol.events, "our own end was told")
        transport.loseReadConnection()
        self.assertIsInstance(await self.lost(protocol), ConnectionDone)

    async def test_addresses(self) -> None:
        """Unnamed sockets have addresses too."""
        transport, _ = self.connect(Recorder())
        self.assertEqual(transport.getHost(), UNIXAddress(None))
        self.assertEqual(transport.getPeer(), UNIXAddress(None))


class TCPEndTests(EndTests, Both):
    """TCP sockets, which can be reset."""

    pair = staticmethod(tcp_pair)

    async def test_reset(self) -> None:
        """A reset is never a clean end."""
        for protocol in (Recorder(), HalfCloser()):
            _, peer = self.connect(protocol)
            reset(peer)
            reason = await self.lost(protocol)
            self.assertIsInstance(reason, ConnectionLost)
            self.assertIn("127.0.0.1", str(reason))
            self.assertEqual(protocol.events, ["made", "lost"])

    async def test_reset_noticed_by_a_write(self) -> None:
        """A reset that a write learns of first does not look like an end of input to the reader."""
        protocol = HalfCloser()
        protocol.on_made = lambda: protocol.transport.pauseProducing()
        transport, peer = self.connect(protocol)
        reset(peer)
        transport.write(b"nobody reads this")
        await self.until(lambda: "write lost" in protocol.events, "the failed write was told")
        transport.resumeProducing()
        self.assertIsInstance(await self.lost(protocol), ConnectionLost)
        self.assertEqual(protocol.events, ["made", "write lost", "lost"])

    async def test_reset_while_paused_with_bytes_queued(self) -> None:
        """A reset while we neither read nor can write is told as a failed write, then as a loss."""
        protocol = HalfCloser()
        protocol.on_made = lambda: protocol.transport.pauseProducing()
        transport, peer = self.connect(protocol)
        transport.writeBuffers([LARGE])
        await self.turns()
        reset(peer)
        await self.until(lambda: "write lost" in protocol.events, "the failed write was told")
        transport.resumeProducing()
        self.assertIsInstance(await self.lost(protocol), ConnectionLost)
        self.assertEqual(protocol.events, ["made", "write lost", "lost"])

    async def test_reset_before_closing(self) -> None:
        """A connection that was reset before it was closed has no clean end, though nothing was queued."""
        protocol = Recorder()
        protocol.on_made = lambda: protocol.transport.pauseProducing()
        transport, peer = self.connect(protocol)
        reset(peer)
        transport.loseConnection()
        self.assertIsInstance(await self.lost(protocol), ConnectionLost)

    async def test_reset_while_closing(self) -> None:
        """A peer that resets what we were still sending makes it no clean end."""
        protocol = Recorder()
        transport, peer = self.connect(protocol)
        transport.writeBuffers([LARGE])
        transport.loseConnection()
        reset(peer)
        self.assertIsInstance(await self.lost(protocol), ConnectionLost)

    async def test_addresses_and_options(self) -> None:
        """What a TCP transport has beside: addresses, and the options of a link."""
        transport, peer = self.connect(Recorder())
        verifyObject(ITCPTransport, transport)
        self.assertEqual(transport.getPeer(), IPv4Address("TCP", *peer.getsockname()))
        self.assertEqual(transport.getHost(), IPv4Address("TCP", *peer.getpeername()))
        tcp: Any = transport
        for get, set_ in (
            (tcp.getTcpNoDelay, tcp.setTcpNoDelay),
            (tcp.getTcpKeepAlive, tcp.setTcpKeepAlive),
        ):
            for wanted in (True, False):
                set_(wanted)
                self.assertIs(get(), wanted)
        tune_link(transport.socket)
        self.assertTrue(tcp.getTcpNoDelay() and tcp.getTcpKeepAlive())
        lowat = transport.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
        self.assertEqual(lowat, NOTSENT_LOWAT)

    async def test_expected_bytes(self) -> None:
        """The kernel is asked to wake us for as many bytes as are wanted, within reason, or for any."""
        transport, _ = self.connect(Recorder())
        for expected, asked in ((100_000, 100_000), (10, 1), (10**9, MOST_EXPECTED), (0, 1), (-1, 1)):
            transport.expectBytes(expected)
            self.assertEqual(transport.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT), asked)


del Both
