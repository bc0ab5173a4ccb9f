"""TLS between memory and memory: all engines, in all pairs."""

from __future__ import annotations

import gc
import random
import sys
from collections.abc import Iterator
from itertools import product

from OpenSSL import SSL
from twisted.trial.unittest import SynchronousTestCase

from relaymux.net import tlsengine
from relaymux.net.buffers import BufferPool
from relaymux.net.tlsengine import CIPHER_BUFFER_SIZE, Engine, FastEngine, make_engine
from relaymux.net.tlsrecords import RecordEngine, prepare, take_over
from tests.tls import ENGINES, SERVER


def context(suite: bytes) -> SSL.Context:
    """@return: of either side, with one cipher suite."""
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_tls13_ciphersuites(suite)
    prepare(context)
    context.use_certificate(SERVER.certificate)
    context.use_privatekey(SERVER.key)
    return context


class Wire:
    """
    Two engines that have shaken hands, and what is on its way between them.

    @ivar room: where decrypted bytes go.
    """

    def __init__(
        self, client: type[Engine], server: type[Engine], suite: bytes = b"TLS_AES_128_GCM_SHA256"
    ) -> None:
        self.pool = BufferPool(CIPHER_BUFFER_SIZE)
        self.room = memoryview(bytearray(64 * 1024))
        dialling, accepting = (SSL.Connection(context(suite), None) for _ in range(2))
        dialling.set_connect_state()
        accepting.set_accept_state()
        self.client, self.server = self._begin(client, dialling), self._begin(server, accepting)
        client_shakes = server_shakes = True
        while client_shakes or server_shakes:
            if client_shakes and self._is_through(self.client):
                self.client, client_shakes = self._go_on(self.client, client, is_server=False), False
            for view in self.client.take():
                self.server.feed(view)
            if server_shakes and self._is_through(self.server):
                self.server, server_shakes = self._go_on(self.server, server, is_server=True), False
            for view in self.server.take():
                self.client.feed(view)
        # Tickets, which the server sends behind the handshake.
        self.read(self.client)

    def _begin(self, kind: type[Engine], connection: SSL.Connection) -> Engine:
        return (Engine if kind is Engine else FastEngine)(connection, self.pool)

    def _is_through(self, engine: Engine) -> bool:
        try:
            engine.shake_hands()
        except SSL.WantReadError:
            return False
        return True

    def _go_on(self, engine: Engine, kind: type[Engine], *, is_server: bool) -> Engine:
        if kind is not RecordEngine:
            return engine
        taken = take_over(engine, is_server=is_server)
        assert type(taken) is RecordEngine, taken
        return taken

    def read(self, engine: Engine) -> bytes:
        """@return: all that C{engine} can decrypt of what it was fed."""
        received = b""
        while count := engine.read_into(self.room):
            received += self.room[:count]
        return received

    def read_views(self, engine: Engine) -> bytes:
        """The same, as views."""
        return b"".join(engine.read(self.pool))


def pieces(views: list[memoryview], chance: random.Random) -> Iterator[memoryview]:
    """Cut C{views} anywhere."""
    for view in views:
        left = view
        while left:
            size = chance.choice((1, 4, 5, 100, 16_000, 70_000))
            yield left[:size]
            left = left[size:]


class EngineTests(SynchronousTestCase):
    """What an engine does for a connection."""

    def setUp(self) -> None:
        self.seed = random.randrange(2**32)
        self.chance = random.Random(self.seed)

    def test_choice(self) -> None:
        """Without the bindings it uses, the fast engine is not chosen."""
        connection = SSL.Connection(SSL.Context(SSL.TLS_METHOD), None)
        self.assertIs(type(make_engine(connection, BufferPool())), FastEngine)
        self.patch(tlsengine, "_BINDINGS", (*tlsengine._BINDINGS, "SSL_of_the_future"))
        self.assertIs(type(make_engine(connection, BufferPool())), Engine)

    def test_bytes_arrive(self) -> None:
        """What one engine encrypts the other decrypts, however it is cut and however much is fed at once."""
        for kinds in product(ENGINES, ENGINES):
            wire = Wire(*kinds)
            for sender, receiver in ((wire.client, wire.server), (wire.server, wire.client)):
                sent = received = b""
                for _ in range(12):
                    data = self.chance.randbytes(self.chance.choice((1, 12, 16_384, 16_385, 300_000)))
                    sent += data
                    encrypted = sender.encrypt(list(pieces([memoryview(data)], self.chance)))
                    for piece in pieces(encrypted, self.chance):
                        receiver.feed(piece)
                        if self.chance.random() < 0.3:
                            received += self.chance.choice((wire.read, wire.read_views))(receiver)
                received += wire.read_views(receiver)
                self.assertEqual(received, sent, f"seed {self.seed}, {kinds}")

    def test_memory_comes_back(self) -> None:
        """What was fed is not kept once it was decrypted, and goes back to where it came from."""
        for kind in ENGINES[1:]:
            wire = Wire(kind, kind)
            buffer = bytearray(100_000)
            size = 0
            for view in wire.client.encrypt([bytes(50_000)]):
                buffer[size : size + len(view)] = view
                size += len(view)
            wire.server.feed(memoryview(buffer)[:size])
            self.assertRaises(BufferError, buffer.append, 0)
            self.assertEqual(wire.read_views(wire.server), bytes(50_000))
            buffer.append(0)

    def test_wrong_bytes(self) -> None:
        """A record that was changed is an error, again and again; what came before it counts."""
        for kind in ENGINES:
            wire = Wire(FastEngine, kind)
            good = b"".join(wire.client.encrypt([b"good"]))
            bad = bytearray(b"".join(wire.client.encrypt([b"bad"])))
            bad[-1] ^= 1
            wire.server.feed(memoryview(good + bytes(bad)))
            self.assertEqual(wire.read_views(wire.server), b"good")
            self.assertTrue(wire.server.failed)
            for _ in range(2):
                self.assertRaises(SSL.Error, wire.server.read_into, wire.room)
                self.assertRaises(SSL.Error, wire.server.read, wire.pool)

    def test_wrong_bytes_alone(self) -> None:
        """With nothing before it the error is told at once, and another connection hears nothing of it."""
        for kind in ENGINES:
            wire, other = Wire(FastEngine, kind), Wire(kind, kind)
            bad = bytearray(b"".join(wire.client.encrypt([b"bad"])))
            bad[-1] ^= 1
            wire.server.feed(memoryview(bytes(bad)))
            self.assertRaises(SSL.Error, wire.server.read, wire.pool)
            for view in other.client.encrypt([b"good"]):
                other.server.feed(view)
            self.assertEqual(other.read_views(other.server), b"good")

    def test_end(self) -> None:
        """The peer's goodbye is told behind its last bytes, and is no failure."""
        for kind in ENGINES:
            for read in (Wire.read, Wire.read_views):
                wire = Wire(FastEngine, kind)
                views = wire.client.encrypt([b"last"])
                wire.client.close()
                for view in views + wire.client.take():
                    wire.server.feed(view)
                if read is Wire.read:
                    self.assertEqual(wire.server.read_into(wire.room), 4)
                else:
                    self.assertEqual(wire.read_views(wire.server), b"last")
                self.assertRaises(SSL.ZeroReturnError, read, wire, wire.server)
                self.assertFalse(wire.server.failed)

    def test_after_the_end(self) -> None:
        """What cannot be encrypted any more is an error."""
        for kind in ENGINES:
            wire = Wire(kind, kind)
            wire.client.close()
            self.assertRaises(SSL.Error, wire.client.encrypt, [b"late", bytes(100_000)])

    def test_small_pieces_share_a_record(self) -> None:
        """A frame's header does not cost a record of its own: 22 bytes and a call on either side."""
        overhead = 22
        for kind in ENGINES:
            wire = Wire(kind, kind)
            for sizes, records in (((12, 100), 1), ((12, 16_384 - 12), 1), ((12, 32_768), 3), ((5,) * 9, 1)):
                data = [self.chance.randbytes(size) for size in sizes]
                encrypted = b"".join(wire.client.encrypt(data))
                self.assertEqual(len(encrypted), sum(sizes) + overhead * records, f"{kind}, {sizes}")
                wire.server.feed(memoryview(encrypted))
                self.assertEqual(wire.read_views(wire.server), b"".join(data))

    def test_nothing_is_left(self) -> None:
        """Records leave no objects behind."""
        for kind in ENGINES:
            wire = Wire(kind, kind)
            data = [bytes(12), bytes(100_000)]

            def use(wire: Wire = wire, data: list[bytes] = data) -> None:
                for _ in range(50):
                    for view in wire.client.encrypt(data):
                        wire.server.feed(view)
                    wire.server.read(wire.pool)

            use()
            gc.collect()
            before = sys.getallocatedblocks()
            use()
            gc.collect()
            self.assertLess(sys.getallocatedblocks() - before, 40, kind)

    def test_garbage_collector(self) -> None:
        """
        Engines that failed while they held views can be collected.

        CPython crashed when the collector met, in a traceback's frames, a view
        and what C{from_buffer} had made of it.
        """
        for kind in ENGINES[1:] * 20:
            wire = Wire(kind, kind)
            wire.server.feed(memoryview(bytes(1000)))
            try:
                self.chance.choice((wire.read, wire.read_views))(wire.server)
            except SSL.Error as error:
                kept: list[object] = [error, wire]
                kept.append(kept)
            del wire, kept
            gc.collect()
