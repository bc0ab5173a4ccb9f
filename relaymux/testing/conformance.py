"""
What every transport must do, as tests to mix into a C{TestCase} of Twisted's trial.

For a transport of your own::

    class MyTransportTests(TransportConformance, TestCase):
        transport = find_transport("mine")

        def server_settings(self): ...
        def client_settings(self, port): ...
        def unreachable_settings(self): ...

    class MyTransportBufferTests(BufferConformance, MyTransportTests):
        pass

The second class runs the same with a protocol that provides
L{IBufferReceiver}; it is of use for any transport, since links are such
protocols, and makes sure that one without L{IBufferTransport} still gets
C{dataReceived} right.

The tests use the installed reactor and real connections.  What they demand is
what links and streams rely on; docs/transports.md says why.
"""

from __future__ import annotations

import re
from typing import Any

from twisted.internet.defer import gatherResults, maybeDeferred
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IConsumer, IPushProducer, ITransport
from zope.interface import implementer
from zope.interface.verify import verifyObject

from relaymux.errors import TransportError
from relaymux.interfaces import IBufferTransport, IIdentifiedTransport, IRelayTransport
from relaymux.testing.connections import (
    LARGE,
    ConformanceBufferProtocol,
    ConformanceProtocol,
    Connections,
    abort,
    content,
)
from relaymux.testing.recording import Feeder

__all__ = ["BufferConformance", "TransportConformance"]


class TransportConformance(Connections):
    """The suite, with protocols that know nothing of buffers."""

    def test_plugin(self) -> None:
        """The plugin has a name that can stand in a file, and a line of help for each of its keys."""
        verifyObject(IRelayTransport, self.transport)
        self.assertTrue(re.fullmatch("[a-z][a-z0-9-]*", self.transport.name), self.transport.name)
        for key, meaning in self.transport.keys.items():
            self.assertTrue(re.fullmatch("[a-z][a-z0-9-]*", key), key)
            self.assertTrue(meaning)

    async def test_connects(self) -> None:
        """Both ends are told once, have a transport that is complete, and know who the peer is if at all."""
        client, server = await self.pair()
        for protocol in (client, server):
            self.assertEqual(protocol.events, ["made"])
            for interface in (ITransport, IConsumer, IPushProducer):
                verifyObject(interface, protocol.transport)
            self.assertEqual(bool(protocol.identity), IIdentifiedTransport.providedBy(protocol.transport))
            self.assertTrue(protocol.transport.getPeer())
            self.assertTrue(protocol.transport.getHost())

    async def test_order_of_beginning(self) -> None:
        """What a server sends at once reaches a client that was told of its connection before."""
        self.on_accept = lambda protocol: setattr(
            protocol, "on_made", lambda: protocol.transport.write(b"speaks first")
        )
        client = await self.connect(await self.listen())
        self.assertEqual(client.events, ["made"])
        await self.arrived(client, 12)
        self.same(client.received, b"speaks first")

    async def test_writes_when_connected(self) -> None:
        """What is written in C{connectionMade} arrives first, at both ends."""
        self.on_accept = lambda protocol: setattr(
            protocol, "on_made", lambda: protocol.transport.writeSequence([b"server", b""])
        )
        client = self.make()
        client.on_made = lambda: client.transport.write(b"client")
        await self.connect(await self.listen(), client)
        client.transport.write(b" and more")
        await self.until(lambda: self.accepted and len(self.accepted[0].received) >= 15, "it arrived")
        await self.arrived(client, 6)
        self.same(self.accepted[0].received, b"client and more")
        self.same(client.received, b"server")

    async def test_both_directions(self) -> None:
        """Much in both directions at once arrives as it was sent."""
        client, server = await self.pair()
        there, back = content(LARGE), content(LARGE, 7)
        Feeder(client.transport, there, lambda left: min(left, 300_000)).start()
        Feeder(server.transport, back, lambda left: min(left, 70_000)).start()
        await self.arrived(server, len(there))
        await self.arrived(client, len(back))
        self.same(server.received, there)
        self.same(client.received, back)

    async def test_many_small_writes(self) -> None:
        """Bytes one by one are in order, however they are put together on the way."""
        client, server = await self.pair()
        data = content(20_000)
        for i in range(len(data)):
            client.transport.write(data[i : i + 1])
        await self.arrived(server, len(data))
        self.same(server.received, data)

    async def test_stalled_reader(self) -> None:
        """
        A peer that pauses gets nothing more, the sender is paused after a
        bounded number of bytes, and all goes on when the peer resumes.
        """
        client, server = await self.pair()
        data = content(LARGE)
        feeder = Feeder(client.transport, data, lambda left: min(left, 100_000))
        server.on_data = server.transport.pauseProducing
        feeder.start()
        await self.until(lambda: server.received, "something arrived")
        before = len(server.received)
        await self.quiet(lambda: (len(server.received), feeder.pauses))
        self.assertLessEqual(len(server.received) - before, self.late_bytes)
        self.assertGreater(feeder.pauses, 0, "the sender must be paused")
        self.assertFalse(feeder.done, f"{len(data)} bytes were taken though nobody reads them")
        server.on_data = lambda: None
        server.transport.resumeProducing()
        await self.arrived(server, len(data))
        self.same(server.received, data)
        await self.until(lambda: feeder.done, "the sender was resumed")

    async def test_pausing_in_every_delivery(self) -> None:
        """Pausing and resuming as often as there is anything to read loses nothing."""
        client, server = await self.pair()
        data = content(2_000_000)
        pauses = 0

        def pause() -> None:
            nonlocal pauses
            pauses += 1
            server.transport.pauseProducing()
            self.reactor.callLater(0, server.transport.resumeProducing)

        server.on_data = pause
        Feeder(client.transport, data).start()
        await self.arrived(server, len(data))
        self.same(server.received, data)
        self.assertGreater(pauses, 1)

    async def test_paused_from_the_beginning(self) -> None:
        """A protocol that pauses in C{connectionMade} gets nothing until it resumes."""
        self.on_accept = lambda protocol: setattr(
            protocol, "on_made", lambda: protocol.transport.pauseProducing()
        )
        client = await self.connect(await self.listen())
        client.transport.write(b"patience")
        await self.until(lambda: self.accepted and self.accepted[0].events, "it was accepted")
        server = self.accepted[0]
        await self.quiet(lambda: len(server.received))
        self.assertLessEqual(len(server.received), self.late_bytes)
        server.transport.resumeProducing()
        await self.arrived(server, 8)
        self.same(server.received, b"patience")

    async def test_close_delivers(self) -> None:
        """All that was written before C{loseConnection} arrives, and the peer sees a clean end."""
        client, server = await self.pair()
        data = content(4_000_000)
        client.transport.write(data)
        client.transport.loseConnection()
        self.assertIsInstance(await self.lost(server), ConnectionDone)
        self.assertIsInstance(await self.lost(client), ConnectionDone)
        self.same(server.received, data)

    async def test_close_while_the_peer_sends(self) -> None:
        """Closing against the stream: what the peer reads is the beginning of what was sent, or all."""
        client, server = await self.pair()
        data = content(4_000_000)
        Feeder(server.transport, content(LARGE)).start()
        await self.until(lambda: client.received, "the peer was sending")
        client.transport.write(data)
        client.transport.loseConnection()
        await self.lost(server)
        await self.lost(client)
        if self.gentle_close:
            self.same(server.received, data)
        else:
            self.same(server.received, data[: len(server.received)])

    async def test_abort(self) -> None:
        """An aborted connection is no clean end for the peer, who had sent what was never read."""
        client, server = await self.pair()
        client.transport.pauseProducing()
        server.transport.write(b"never read")
        await self.quiet(lambda: len(client.received))
        abort(client.transport)
        self.assertNotIsInstance(await self.lost(server), ConnectionDone)
        await self.lost(client)
        self.same(client.received, b"")

    async def test_after_the_end(self) -> None:
        """Whatever is called after a connection was lost does nothing, and nobody is told twice."""
        client, server = await self.pair()
        client.transport.loseConnection()
        for protocol in (client, server):
            await self.lost(protocol)
        for protocol in (client, server):
            transport = protocol.transport
            transport.write(b"into the void")
            transport.writeSequence([b"into", b"the void"])
            transport.pauseProducing()
            transport.resumeProducing()
            transport.loseConnection()
            abort(transport)
        await self.quiet(lambda: [p.events for p in (client, server)])
        self.assertEqual([p.events for p in (client, server)], [["made", "lost"], ["made", "lost"]])

    async def test_stalled_peer_is_aborted(self) -> None:
        """An abort is at once, though bytes wait for a peer that does not read."""
        client, server = await self.pair()
        server.transport.pauseProducing()
        client.transport.write(content(LARGE))
        await self.quiet(lambda: len(server.received))
        abort(client.transport)
        await self.lost(client)
        server.transport.resumeProducing()
        # As what, depends: a UNIX socket can tell an abort only to who had sent something.
        await self.lost(server)

    async def test_calls_from_inside(self) -> None:
        """Within C{dataReceived} a protocol may write, pause, close and abort."""
        port = await self.listen()
        for ending in ("loseConnection", "abortConnection"):
            client, server = await self.pair(port)

            def act(server: ConformanceProtocol = server, ending: str = ending) -> None:
                server.transport.write(b"reply")
                server.transport.pauseProducing()
                getattr(server.transport, ending, server.transport.loseConnection)()
                server.transport.resumeProducing()

            server.on_data = act
            client.transport.write(b"request")
            await self.lost(server)
            await self.lost(client)
            if ending == "loseConnection":
                self.same(client.received, b"reply")

    async def test_many_connections(self) -> None:
        """Connections at the same time do not mix, and listening ends without ending them."""
        port = await self.listen()
        clients = await gatherResults([self.connect(port) for _ in range(8)])
        await self.until(lambda: len(self.accepted) == 8, "all were accepted")
        await maybeDeferred(port.stopListening)
        for number, client in enumerate(clients):
            client.transport.write(bytes([number]) * 100_000)
        await self.until(lambda: all(len(p.received) >= 100_000 for p in self.accepted), "all arrived")
        numbers = sorted(set(protocol.received).pop() for protocol in self.accepted)
        self.assertEqual(numbers, list(range(8)))
        self.assertTrue(all(len(set(protocol.received)) == 1 for protocol in self.accepted))

    async def test_unreachable(self) -> None:
        """Where nobody listens, connecting fails with an error that says where, and that may pass."""
        settings = self.unreachable_settings()
        error = await self.assertFailure(self._dial(settings, self.make()), TransportError)
        self.assertTrue(error.retry)
        self.assertIn(settings.address.rpartition("/")[2].rpartition(":")[2], str(error))

    async def test_stopped(self) -> None:
        """After C{stopListening} nobody is let in any more."""
        port = await self.listen()
        settings = self.client_settings(port)
        await maybeDeferred(port.stopListening)
        await self.assertFailure(self._dial(settings, self.make()), TransportError)
        self.assertEqual(self.accepted, [])

    async def test_cancel(self) -> None:
        """An attempt that is given up leaves nothing behind."""
        port = await self.listen()
        attempt = self.connect(port)
        attempt.addErrback(lambda _reason: None)
        attempt.cancel()
        await self.quiet(lambda: len(self.accepted))


class BufferConformance(TransportConformance):
    """The suite with protocols that take buffers, and what is asked of L{IBufferTransport} beside."""

    protocol = ConformanceBufferProtocol

    async def test_buffers(self) -> None:
        """Buffers of all sizes arrive in order, are reported once, and stay as they were received."""
        client, server = await self.pair()
        if not IBufferTransport.providedBy(client.transport):
            return
        assert isinstance(client, ConformanceBufferProtocol)
        assert isinstance(server, ConformanceBufferProtocol)
        verifyObject(IBufferTransport, client.transport)
        data = content(LARGE)
        view = memoryview(data)
        sizes = (16, 250_000, 0, 16, 1, 65_536, 2048, 700_000)
        sent = 0
        pieces: list[memoryview] = []
        while sent < len(data):
            size = sizes[len(pieces) % len(sizes)]
            pieces.append(view[sent : sent + size])
            sent += size
        server.transport.pauseProducing()
        for i in range(0, len(pieces), 3):
            client.transport.writeBuffers(pieces[i : i + 3])
        self.assertEqual(client.written + client.transport.queuedBytes, len(data))
        self.assertGreater(client.transport.queuedBytes, 0)
        server.transport.resumeProducing()
        await self.arrived(server, len(data))
        await self.until(lambda: client.written == len(data), "all was reported as written")
        self.assertEqual(client.transport.queuedBytes, 0)
        self.same(server.received, data)
        self.assertTrue(server.unchanged(), "buffers were written to while they were lent")

    async def test_producer(self) -> None:
        """The producer is paused exactly while bytes are queued."""
        client, server = await self.pair()
        if not IBufferTransport.providedBy(client.transport):
            return
        producer = _Told()
        transport: Any = client.transport
        transport.registerProducer(producer, True)
        transport.writeBuffers([b"small"])
        self.assertEqual(producer.calls, [])
        server.transport.pauseProducing()
        transport.writeBuffers([content(LARGE)])
        transport.writeBuffers([b"more"])
        self.assertEqual(producer.calls, ["pause"])
        server.transport.resumeProducing()
        await self.until(lambda: producer.calls == ["pause", "resume"], "the producer was resumed")
        self.assertEqual(transport.queuedBytes, 0)
        transport.unregisterProducer()
        await self.arrived(server, LARGE + 9)


@implementer(IPushProducer)
class _Told:
    """A producer that remembers what it was told."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pauseProducing(self) -> None:
        self.calls.append("pause")

    def resumeProducing(self) -> None:
        self.calls.append("resume")

    def stopProducing(self) -> None:
        self.calls.append("stop")
