"""TLS between memory and memory: all engines, in all pairs."""

from __future__ import annotations

import gc
import random
import sys
import unittest
from collections.abc import Iterator
from itertools import product

from OpenSSL import SSL
from twisted.trial.unittest import SynchronousTestCase

from relaymux.net import tlsengine
from relaymux.net.buffers import BufferPool
from relaymux.net.compiled import native
from relaymux.net.tlsengine import CIPHER_BUFFER_SIZE, Engine, FastEngine, NativeEngine, make_engine
from tests.tls import SERVER

# `make test-compiled` has them all.
KINDS = (Engine, FastEngine) if native is None else (Engine, FastEngine, NativeEngine)


def context() -> SSL.Context:
    context = SSL.Context(SSL.TLS_METHOD)
    context.use_certificate(SERVER.certificate)
    context.use_privatekey(SERVER.key)
    return context


class Wire:
    """
    Two engines that have shaken hands, and what is on its way between them.

    @ivar room: where decrypted bytes go.
    """

    def __init__(self, client: type[Engine], server: type[Engine]) -> None:
        self.pool = BufferPool(CIPHER_BUFFER_SIZE)
        self.room = memoryview(bytearray(64 * 1024))
        dialling, accepting = (SSL.Connection(context(), None) for _ in range(2))
        dialling.set_connect_state()
        accepting.set_accept_state()
        self.client, self.server = client(dialling, self.pool), server(accepting, self.pool)
        while not all([self._shake(self.client, self.server), self._shake(self.server, self.client)]):
            pass
        # Tickets, which the server sends behind the handshake.
        self.read(self.client)

    def _shake(self, engine: Engine, other: Engine) -> bool:
        try:
            engine.shake_hands()
        except SSL.WantReadError:
            return False
        else:
            return True
        finally:
            for view in engine.take():
                other.feed(view)

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
        self.assertIs(type(make_engine(connection, BufferPool())), KINDS[-1])
        self.patch(tlsengine, "_FUNCTIONS", None)
        self.assertIs(type(make_engine(connection, BufferPool())), FastEngine)
        self.patch(tlsengine, "_BINDINGS", (*tlsengine._BINDINGS, "SSL_of_the_future"))
        self.assertIs(type(make_engine(connection, BufferPool())), Engine)

    def test_bytes_arrive(self) -> None:
        """What one engine encrypts the other decrypts, however it is cut and however much is fed at once."""
        for kinds in product(KINDS, KINDS):
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
        for kind in KINDS[1:]:
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
        for kind in KINDS:
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
        for kind in KINDS:
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
        for kind in KINDS:
            for read in (Wire.read, Wire.read_views):
                wire = Wire(FastEngine, kind)
                views = wire.client.encrypt([b"last"])
                wire.client.connection.shutdown()
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
        for kind in KINDS:
            wire = Wire(kind, kind)
            wire.client.connection.shutdown()
            self.assertRaises(SSL.Error, wire.client.encrypt, [b"late", bytes(100_000)])

    def test_small_pieces_share_a_record(self) -> None:
        """A frame's header does not cost a record of its own: 22 bytes and a call on either side."""
        overhead = 22
        for kind in KINDS:
            wire = Wire(kind, kind)
            for sizes, records in (((12, 100), 1), ((12, 16_384 - 12), 1), ((12, 32_768), 3), ((5,) * 9, 1)):
                data = [self.chance.randbytes(size) for size in sizes]
                encrypted = b"".join(wire.client.encrypt(data))
                self.assertEqual(len(encrypted), sum(sizes) + overhead * records, f"{kind}, {sizes}")
                wire.server.feed(memoryview(encrypted))
                self.assertEqual(wire.read_views(wire.server), b"".join(data))

    def test_nothing_is_left(self) -> None:
        """Records leave no objects behind."""
        for kind in KINDS:
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

    @unittest.skipIf(native is None, "not compiled here: make test-compiled")
    def test_pool_in_use(self) -> None:
        """Who is asked for more records cannot use the pool that they are decrypted into."""
        wire = Wire(NativeEngine, NativeEngine)
        server = wire.server
        assert isinstance(server, NativeEngine)
        (view,) = wire.client.encrypt([b"good"])
        server.feed(memoryview(bytes(view)))

        def has_read() -> bool:
            for call in (
                lambda: wire.pool.room(CIPHER_BUFFER_SIZE),
                lambda: wire.pool.take(0),
                lambda: server.read(wire.pool),
                lambda: server.encrypt([b"more"]),
            ):
                self.assertRaises(RuntimeError, call)
            return server._has_read()

        views, result = server._records.read(wire.pool, has_read)
        self.assertEqual((b"".join(views), result), (b"good", 1))
        # It can be used again, also after a call that failed.
        server.feed(memoryview(b"".join(wire.client.encrypt([b"lost"]))))
        self.assertRaises(ZeroDivisionError, server._records.read, wire.pool, lambda: 1 / 0)
        self.assertRaises(TypeError, server._records.write, wire.pool, [None])
        server.feed(memoryview(b"".join(wire.client.encrypt([b"again"]))))
        self.assertEqual(wire.read_views(wire.server), b"again")

    def test_garbage_collector(self) -> None:
        """
        Engines that failed while they held views can be collected.

        CPython crashed when the collector met, in a traceback's frames, a view
        and what C{from_buffer} had made of it.
        """
        for kind in KINDS[1:] * 20:
            wire = Wire(kind, kind)
            wire.server.feed(memoryview(bytes(1000)))
            try:
                self.chance.choice((wire.read, wire.read_views))(wire.server)
            except SSL.Error as error:
                kept: list[object] = [error, wire]
                kept.append(kept)
            del wire, kept
            gc.collect()
