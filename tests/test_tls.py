"""TLS connections that are as they should be, and how they end."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from socket import SO_RCVLOWAT, SOL_SOCKET, socket
from typing import Any, cast
from unittest import SkipTest

from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IConsumer, IPushProducer, ITransport
from twisted.internet.task import Clock
from zope.interface.verify import verifyObject

from relaymux.core.frames import HEADER_BYTES
from relaymux.core.resume import EXPORTER_BYTES
from relaymux.core.schedule import SHARED_FRAME
from relaymux.interfaces import IBufferTransport, IExportingTransport, IIdentifiedTransport
from relaymux.net import tlssockets
from relaymux.net.compiled import native
from relaymux.net.link import FLUSH_BYTES, LinkProtocol
from relaymux.net.tlsengine import CIPHER_BUFFER_SIZE, FastEngine
from tests.sockets import DEADLINE, PlainRecorder, Producer, Recorder, RecorderFactory, content
from tests.tls import AUTHORITY, ENGINES, SERVER, TLSTestCase

LARGE = content(6_000_000)


class EstablishedTests(TLSTestCase):
    """Connections that are as they should be."""

    async def test_both_know_the_peer(self) -> None:
        """Each end's transport has the checked name before the protocol is connected."""
        seen = []
        for factory in (self.client, self.server):
            kind = type("Asking", (Recorder,), {})
            kind.connectionMade = lambda self: seen.append(self.transport.peerIdentity)  # type: ignore[attr-defined]
            factory.kind = kind
        port = self.listen()
        await self.connect(port)
        await self.until(lambda: len(seen) == 2, "both were connected")
        self.assertEqual(seen, ["dns:server.example", "dns:client.example"])

    async def test_addresses_as_names(self) -> None:
        """A certificate may be for an IP address, at both ends."""
        host = AUTHORITY.issue("a host", ["127.0.0.1", "2001:db8::1"])
        client = await self.connect(self.listen(host, "2001:DB8:0::1"), host, "127.0.0.1")
        await self.until(lambda: self.server.made, "the server knew its peer")
        self.assertEqual(client.transport.peerIdentity, "ip:127.0.0.1")
        self.assertEqual(self.server.made[0].transport.peerIdentity, "ip:2001:db8::1")

    async def test_server_with_a_wildcard(self) -> None:
        """To a client, a server's certificate may be for a whole domain, as everywhere with TLS."""
        host = AUTHORITY.issue("a whole domain", ["*.hosts.example"])
        client = await self.connect(self.listen(host), peer="hv-a.hosts.example")
        self.assertEqual(client.transport.peerIdentity, "dns:hv-a.hosts.example")

    async def test_intermediate_authority(self) -> None:
        """The certificate file may hold a chain, of which the peer believes only the root."""
        files = self.files(SERVER, "client.example")
        files.write("host.pem", SERVER.certificate_pem + AUTHORITY.certificate_pem)
        port = self.serve(files.identity())
        await self.connect(port)

    async def test_data_both_ways(self) -> None:
        """Much in both directions at once arrives as sent, as buffers and as bytes, by each engine."""
        back = content(len(LARGE), 7)
        for kind in (Recorder, PlainRecorder):
            for engine in ENGINES:
                self.use(engine)
                self.client = RecorderFactory(kind)
                self.server = RecorderFactory(kind)
                client, server = await self.pair()
                self.assertIs(type(client.transport._engine), engine)
                view = memoryview(LARGE)
                client.transport.write(b"")
                client.transport.write(bytes(view[:5]))
                client.transport.writeSequence([bytes(view[5:7]), bytes(view[7:2000])])
                client.transport.writeBuffers([view[2000:2016], view[2016:400_000], view[400_000:400_016]])
                client.transport.writeBuffers([view[400_016:]])
                server.transport.writeBuffers([back[i : i + 100_000] for i in range(0, len(back), 100_000)])
                await self.arrived(server, len(LARGE))
                await self.arrived(client, len(LARGE))
                self.assertEqual(server.received, LARGE)
                self.assertEqual(client.received, back)
                if kind is Recorder:
                    self.assertEqual(client.written, len(LARGE))
                self.assertEqual(client.transport.queuedBytes, 0)
                await self.all_closed()

    async def test_records_by_openssl(self) -> None:
        """A link whose section says so leaves all of TLS to OpenSSL; its peer need not."""
        files = self.files(SERVER, "client.example")
        files.options["tls-records"] = "openssl"
        client = await self.connect(self.serve(files.identity()))
        await self.until(lambda: self.server.made, "the server knew its peer")
        server = self.server.made[0]
        self.assertIs(type(server.transport._engine), FastEngine)
        self.assertIs(type(client.transport._engine), ENGINES[-1])
        client.transport.writeBuffers([LARGE])
        server.transport.writeBuffers([LARGE])
        await self.arrived(server, len(LARGE))
        await self.arrived(client, len(LARGE))
        self.assertEqual((client.received, server.received), (LARGE, LARGE))

    async def test_many_sizes(self) -> None:
        """Small and large buffers in any mixture come out as one stream."""
        client, server = await self.pair()
        seed = int.from_bytes(os.urandom(4), "big")
        rng = random.Random(seed)
        view, sent = memoryview(LARGE), 0
        while sent < len(view):
            buffers = []
            for _ in range(rng.randrange(1, 8)):
                size = rng.choice((0, 1, 16, 2047, 2048, 2049, 16_384, 100_000, 300_000))
                buffers.append(view[sent : sent + size])
                sent += size
            client.transport.writeBuffers(buffers)
        await self.arrived(server, len(LARGE))
        self.assertEqual(server.received, LARGE, f"seed {seed}")

    async def test_one_frame_in_one_piece(self) -> None:
        """What a link hands over at once is handed to the kernel at once: no few bytes follow it alone."""
        client, _ = await self.pair()
        offered: list[int] = []

        class Offered(socket):
            """Notes how much it was given at once."""

            def send(self, data: Any, *options: Any) -> int:
                offered.append(len(data))
                return super().send(data, *options)

            def sendmsg(self, buffers: Any, *options: Any) -> int:
                data = list(buffers)
                offered.append(sum(map(len, data)))
                return super().sendmsg(data, *options)

        below = client.transport._socket
        below.socket = Offered(fileno=below.socket.detach())
        payload = memoryview(LARGE)[: FLUSH_BYTES + SHARED_FRAME]
        client.transport.writeBuffers([bytes(HEADER_BYTES), payload])
        self.assertGreater(offered[0], FLUSH_BYTES + SHARED_FRAME, offered)

    async def test_pause(self) -> None:
        """A paused protocol gets nothing more, not even what was decrypted with it; resuming brings it."""
        client, server = await self.pair()
        server.on_data = server.transport.pauseProducing
        client.transport.writeBuffers([LARGE])
        before = 0
        while len(server.received) < len(LARGE):
            await self.arrived(server, before + 1)
            deliveries = server.deliveries
            await self.turns(3)
            self.assertEqual(server.deliveries, deliveries)
            before = len(server.received)
            server.transport.resumeProducing()
        self.assertEqual(server.received, LARGE)

    async def test_stalled_reader_holds_the_producer(self) -> None:
        """A peer that does not read pauses our producer, and resumes it when it has read everything."""
        client, server = await self.pair()
        server.transport.pauseProducing()
        producer = Producer()
        client.transport.registerProducer(producer, True)
        with self.assertRaises(RuntimeError):
            client.transport.registerProducer(producer, True)
        client.transport.writeBuffers([LARGE] * 3)
        self.assertEqual(producer.calls, ["pause"])
        await self.turns(20)
        self.assertGreater(client.transport.queuedBytes, 0)
        waiting = client.transport._socket.queuedBytes
        self.assertLess(waiting, 2 * CIPHER_BUFFER_SIZE, "only what the kernel will take next is encrypted")
        self.assertEqual(producer.calls, ["pause"])
        server.transport.resumeProducing()
        await self.until(lambda: producer.calls == ["pause", "resume"], "the producer was resumed")
        await self.arrived(server, 3 * len(LARGE))
        self.assertEqual(server.received, LARGE * 3)
        client.transport.abortConnection()
        await self.until(lambda: producer.calls[2:] == ["stop"], "the producer was stopped")
        client.transport.registerProducer(late := Producer(), True)
        self.assertEqual(late.calls, ["stop"])

    async def test_as_others_call_it(self) -> None:
        """Callers that say 1 and 0, and that write views, are understood: compiled or not."""
        client, server = await self.pair()
        transport: Any = client.transport
        producer: Any = Producer()
        transport.registerProducer(producer, 1)
        transport.write(memoryview(LARGE))
        await self.arrived(server, len(LARGE))
        self.assertEqual(server.received, LARGE)
        transport.unregisterProducer()
        pulled: Any = Producer()
        transport.registerProducer(pulled, 0)
        await self.until(lambda: pulled.calls == ["resume"], "it was asked")

    async def test_producer_registered_late(self) -> None:
        """Who registers while bytes wait is paused at once."""
        client, server = await self.pair()
        server.transport.pauseProducing()
        client.transport.writeBuffers([LARGE] * 3)
        producer = Producer()
        client.transport.registerProducer(producer, True)
        self.assertEqual(producer.calls, ["pause"])
        server.transport.resumeProducing()
        await self.until(lambda: producer.calls == ["pause", "resume"], "the producer was resumed")

    async def test_pull_producer(self) -> None:
        """A pull producer is asked until it is done, and only then the connection is closed."""
        client, server = await self.pair()
        left = [LARGE[i : i + 400_000] for i in range(0, len(LARGE), 400_000)]

        class Pulled:
            def resumeProducing(self) -> None:
                client.transport.write(left.pop(0))
                if not left:
                    client.transport.unregisterProducer()

            def stopProducing(self) -> None:
                raise AssertionError("stopped before it was done")

        client.transport.registerProducer(Pulled(), False)
        client.transport.loseConnection()
        self.patch(tlssockets, "CLOSE_SECONDS", DEADLINE)
        self.assertIsInstance(await self.lost(server), ConnectionDone)
        self.assertEqual(server.received, LARGE)

    async def test_exporter(self) -> None:
        """Both ends derive the same bytes from the connection, others for another label or connection."""
        client, server = await self.pair()
        ours = client.transport.exporter("EXPORTER-test", 32)
        self.assertEqual(len(ours), 32)
        self.assertEqual(ours, server.transport.exporter("EXPORTER-test", 32))
        self.assertNotEqual(ours, client.transport.exporter("EXPORTER-other", 32))
        other, _ = await self.pair()
        self.assertNotEqual(ours, other.transport.exporter("EXPORTER-test", 32))

    async def test_link_is_tied_to_its_connection(self) -> None:
        """What a link puts into the proof of a resume is of this connection, and the same at both ends."""

        def tie(end: Recorder) -> bytes:
            unused = cast(Any, None)
            link = LinkProtocol(Clock(), unused, unused, 1)
            link.transport = end.transport
            return link.exporter

        client, server = await self.pair()
        self.assertEqual(len(tie(client)), EXPORTER_BYTES)
        self.assertEqual(tie(client), tie(server))
        other, _ = await self.pair()
        self.assertNotEqual(tie(client), tie(other))

    async def test_what_it_provides(self) -> None:
        """It is a transport for bytes and for buffers whose peer is known, and it has no half-close."""
        client, server = await self.pair()
        for interface in (
            ITransport,
            IConsumer,
            IPushProducer,
            IBufferTransport,
            IExportingTransport,
            IIdentifiedTransport,
        ):
            verifyObject(interface, client.transport)
        self.assertEqual(client.transport.getHost(), server.transport.getPeer())
        self.assertFalse(hasattr(client.transport, "loseWriteConnection"))
        with self.assertRaises(TypeError):
            client.transport.write("text")

    async def test_renewed_certificate(self) -> None:
        """A new certificate is used by the next connection; a broken one is not, and that is logged."""
        files = self.files(SERVER, "client.example")
        port = self.serve(files.identity())
        renewed = AUTHORITY.issue("server.example")

        async def serial() -> int:
            protocol = await self.connect(port)
            certificate = protocol.transport._engine.connection.get_peer_certificate()
            number: int = certificate.to_cryptography().serial_number
            return number

        self.assertEqual(await serial(), SERVER.certificate.serial_number)
        files.write("host.pem", b"rubbish")
        self.assertEqual(await serial(), SERVER.certificate.serial_number)
        self.assertIn("keeping the certificate read before", "".join(self.log))
        files.write("host.pem", renewed.certificate_pem)
        files.write("host.key", renewed.key_pem)
        self.assertEqual(await serial(), renewed.certificate.serial_number)


def flip_one_bit_at(place: int) -> Callable[[bytes, bool], bytes]:
    """@return: a wire that changes one bit of what the client sends."""
    passed = 0

    def flip(data: bytes, from_client: bool) -> bytes:
        nonlocal passed
        if from_client:
            start, passed = passed, passed + len(data)
            if start <= place < passed:
                wrong = bytearray(data)
                wrong[place - start] ^= 4
                return bytes(wrong)
        return data

    return flip


class EndTests(TLSTestCase):
    """How TLS connections end."""

    async def test_clean_end(self) -> None:
        """All written before loseConnection arrives, and both ends know that it was all."""
        client, server = await self.pair()
        self.patch(tlssockets, "CLOSE_SECONDS", DEADLINE)
        client.transport.writeBuffers([LARGE])
        client.transport.loseConnection()
        client.transport.loseConnection()
        self.assertIsInstance(await self.lost(server), ConnectionDone)
        self.assertIsInstance(await self.lost(client), ConnectionDone)
        self.assertEqual(server.received, LARGE)

    async def test_written_behind_the_end(self) -> None:
        """What is written behind loseConnection is dropped, as Twisted does, also when the end is said."""
        client, server = await self.pair()
        client.transport.write(b"last")
        client.transport.loseConnection()
        await self.turns(2)
        client.transport.write(b"too late")
        self.assertIsInstance(await self.lost(server), ConnectionDone)
        self.assertEqual(server.received, b"last")

    async def test_lent(self) -> None:
        """Who has sent and read in place of a TLS transport hands back what the kernel did not take."""
        if native is None:
            raise SkipTest("needs what is compiled: make test-compiled")
        client, server = await self.pair()
        transport = client.transport
        producer = Producer()
        transport.registerProducer(producer, True)
        server.transport.write(b"so that all of the handshake is read")
        await self.until(lambda: client.received, "it arrived")
        self.assertTrue(transport.lends and transport.is_read and transport.is_written)
        transport.pauseProducing()
        self.assertFalse(transport.is_read)
        transport.resumeProducing()
        transport.expectBytes(200_000)
        sock = transport._socket.socket
        self.assertGreater(sock.getsockopt(SOL_SOCKET, SO_RCVLOWAT), 100_000)
        sealer, _, pool, _ = transport.keys()
        self.assertEqual(transport.hand_over(), [])
        self.assertEqual(sock.getsockopt(SOL_SOCKET, SO_RCVLOWAT), 1)
        transport.take_over(sealer.seal(pool, [b"lent"], 23), 0)
        transport.take_back_keys(False, None)
        self.assertEqual((producer.calls, transport.queuedBytes > 0), (["pause"], True))
        transport.go_on()
        self.assertEqual(producer.calls, ["pause"])
        await self.until(lambda: server.received == b"lent", "it was sent")
        self.assertEqual((producer.calls, transport.queuedBytes), (["pause", "resume"], 0))
        # No memory in the kernel is no reason to end anything.
        transport.take_over(sealer.seal(pool, [b", later"], 23), errno.ENOBUFS)
        transport.take_back_keys(False, None)
        await self.until(lambda: server.received == b"lent, later", "it was sent again")
        transport.write(b", ours")
        await self.until(lambda: server.received == b"lent, later, ours", "it goes on")
        transport.unregisterProducer()
        transport.loseConnection()
        self.assertFalse(transport.is_written)
        await self.lost(server)

    async def test_end_while_both_send(self) -> None:
        """A peer that is still sending when we close gets all that we sent."""
        client, server = await self.pair()
        self.patch(tlssockets, "CLOSE_SECONDS", DEADLINE)
        server.transport.writeBuffers([LARGE] * 3)
        client.transport.writeBuffers([LARGE])
        client.transport.loseConnection()
        await self.lost(server)
        self.assertEqual(server.received, LARGE)
        self.assertIsInstance(await self.lost(client), ConnectionDone)

    async def test_cut(self) -> None:
        """An end of the TCP connection is no end of what was said in it."""
        client, server = await self.pair(wire=True)
        client.transport.write(b"and then he")
        await self.until(lambda: server.received, "it arrived")
        self.wire.cut()
        for protocol in (client, server):
            reason = await self.lost(protocol)
            self.assertIsInstance(reason, ConnectionLost)
            self.assertIn("incomplete", str(reason))

    async def test_one_wrong_bit(self) -> None:
        """A changed bit ends the connection with that reason, and nothing changed is delivered."""
        for engine in ENGINES:
            self.use(engine)
            self.client, self.server = RecorderFactory(), RecorderFactory()
            client, server = await self.pair(wire=True)
            self.wire.mangle = flip_one_bit_at(1_000_000)
            client.transport.writeBuffers([LARGE])
            reason = await self.lost(server)
            self.assertIsInstance(reason, ConnectionLost)
            self.assertIn("bad record mac", str(reason))
            self.assertEqual(server.received, LARGE[: len(server.received)])
            self.assertGreater(len(server.received), 900_000)
            self.assertIsInstance(await self.lost(client), ConnectionLost)

    async def test_answer_to_what_came_before_a_wrong_bit(self) -> None:
        """Writing, while what is wrong was found and not told yet, does not hide it."""
        for engine in ENGINES:
            self.use(engine)
            self.client, self.server = RecorderFactory(), RecorderFactory()
            client, server = await self.pair(wire=True)
            server.on_data = lambda server=server: server.transport.write(b"answer")
            self.wire.mangle = flip_one_bit_at(1_000_000)
            client.transport.writeBuffers([LARGE])
            self.assertIn("bad record mac", str(await self.lost(server)))
            self.assertEqual(server.received, LARGE[: len(server.received)])
            self.assertIsInstance(await self.lost(client), ConnectionLost)

    async def test_closing_when_a_wrong_bit_was_found(self) -> None:
        """A connection that its protocol closes while what is wrong is not told yet closes all the same."""
        for engine in ENGINES:
            self.use(engine)
            self.client, self.server = RecorderFactory(), RecorderFactory()
            client, server = await self.pair(wire=True)

            def close(server: Any = server) -> None:
                if server.transport._engine.failed:
                    server.transport.loseConnection()

            server.on_data = close
            self.wire.mangle = flip_one_bit_at(1_000_000)
            client.transport.writeBuffers([LARGE])
            await self.lost(server)
            await self.lost(client)
            self.assertEqual(server.received, LARGE[: len(server.received)])

    async def test_answer_to_the_last_words(self) -> None:
        """What a peer says and then closes can still be answered, and its end stays a clean one."""
        client, server = await self.pair()
        server.on_data = lambda: server.transport.write(b"answer")
        client.transport.write(b"last words")
        client.transport.loseConnection()
        self.assertIsInstance(await self.lost(server), ConnectionDone)
        self.assertIsInstance(await self.lost(client), ConnectionDone)

    async def test_peer_that_does_not_read(self) -> None:
        """Closing takes no longer than its deadline, whatever the peer does."""
        client, server = await self.pair()
        server.transport.pauseProducing()
        client.transport.writeBuffers([LARGE] * 3)
        client.transport.loseConnection()
        self.assertIsInstance(await self.lost(client), ConnectionAborted)
        self.assertIn("does not read", "".join(self.log))
        server.transport.resumeProducing()
        self.assertIsInstance(await self.lost(server), ConnectionLost)

    async def test_abort(self) -> None:
        """An abort is told at both ends as what it is."""
        client, server = await self.pair()
        client.transport.writeBuffers([LARGE] * 3)
        client.transport.abortConnection()
        client.transport.write(b"dropped")
        client.transport.loseConnection()
        self.assertIsInstance(await self.lost(client), ConnectionAborted)
        self.assertIsInstance(await self.lost(server), ConnectionLost)

    async def test_closed_with_bytes_queued(self) -> None:
        """A peer's orderly end that costs bytes of ours is told as a loss."""
        client, server = await self.pair()
        server.transport.pauseProducing()
        client.transport.writeBuffers([LARGE] * 3)
        await self.turns()
        server.transport.loseConnection()
        self.assertIsInstance(await self.lost(server), ConnectionDone)
        self.assertIsInstance(await self.lost(client), ConnectionLost)

    async def test_calls_from_inside(self) -> None:
        """From every callback the protocol may close, abort, pause or write."""
        for ending, expected in (("loseConnection", ConnectionDone), ("abortConnection", ConnectionAborted)):
            for hook in ("on_made", "on_data", "on_written"):

                class Acting(Recorder):
                    def __init__(self, hook: str = hook, ending: str = ending) -> None:
                        super().__init__()
                        self._ending = ending
                        setattr(self, hook, self.act)

                    def act(self) -> None:
                        self.on_written = lambda: None
                        self.transport.write(b"from inside")
                        self.transport.pauseProducing()
                        getattr(self.transport, self._ending)()
                        self.transport.resumeProducing()
                        self.transport.write(b"ignored or sent, but no error")

                self.server, self.client = RecorderFactory(Acting), RecorderFactory()
                client, server = await self.pair()
                client.transport.write(b"hello")
                if hook == "on_written" and server.transport.connected:
                    server.transport.write(b"x")
                self.assertIsInstance(await self.lost(server), expected, f"{ending} in {hook}")
                await self.lost(client)

    async def test_exception_of_the_protocol(self) -> None:
        """A protocol that raises loses its connection for that reason, also for what waited decrypted."""
        self.server = RecorderFactory(PlainRecorder)
        client, server = await self.pair()

        def fail() -> None:
            raise RuntimeError("bug")

        def pause() -> None:
            server.transport.pauseProducing()
            server.on_data = fail

        server.on_data = pause
        client.transport.writeBuffers([LARGE])
        await self.until(lambda: server.deliveries, "the first bytes arrived")
        server.transport.resumeProducing()
        self.assertIsInstance(await self.lost(server), RuntimeError)
        self.assertEqual(server.deliveries, 2)
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)
