"""TLS between memory and memory: both engines, in all pairs."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from itertools import product

from OpenSSL import SSL
from twisted.trial.unittest import SynchronousTestCase

from relaymux.net import tlsengine
from relaymux.net.buffers import BufferPool
from relaymux.net.tlsengine import CIPHER_BUFFER_SIZE, Engine, FastEngine, make_engine
from tests.tls import SERVER

KINDS = (Engine, FastEngine)


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
        for kinds in product(KINDS, KINDS):
            wire = Wire(*kinds)
            for sender, receiver in ((wire.client, wire.server), (wire.server, wire.client)):
                sent = received = b""
                for _ in range(12):
                    data = self.chance.randbytes(self.chance.choice((1, 12, 16_384, 16_385, 300_000)))
                    sender.encrypt(data)
                    sent += data
                    for piece in pieces(sender.take(), self.chance):
                        receiver.feed(piece)
                        if self.chance.random() < 0.3:
                            received += wire.read(receiver)
                received += wire.read(receiver)
                self.assertEqual(received, sent, f"seed {self.seed}, {kinds}")

    def test_memory_comes_back(self) -> None:
        """What was fed is not kept once it was decrypted, and goes back to where it came from."""
        wire = Wire(FastEngine, FastEngine)
        buffer = bytearray(100_000)
        wire.client.encrypt(bytes(50_000))
        size = 0
        for view in wire.client.take():
            buffer[size : size + len(view)] = view
            size += len(view)
        wire.server.feed(memoryview(buffer)[:size])
        self.assertRaises(BufferError, buffer.append, 0)
        self.assertEqual(wire.read(wire.server), bytes(50_000))
        buffer.append(0)

    def test_wrong_bytes(self) -> None:
        """A record that was changed is an error, again and again; what came before it counts."""
        for kind in KINDS:
            wire = Wire(FastEngine, kind)
            wire.client.encrypt(b"good")
            good = b"".join(wire.client.take())
            wire.client.encrypt(b"bad")
            bad = bytearray(b"".join(wire.client.take()))
            bad[-1] ^= 1
            wire.server.feed(memoryview(good + bytes(bad)))
            self.assertEqual(wire.server.read_into(wire.room), 4)
            self.assertEqual(wire.room[:4], b"good")
            for _ in range(2):
                self.assertRaises(SSL.Error, wire.server.read_into, wire.room)
            self.assertTrue(wire.server.failed)

    def test_end(self) -> None:
        """The peer's goodbye is told behind its last bytes, and is no failure."""
        for kind in KINDS:
            wire = Wire(FastEngine, kind)
            wire.client.encrypt(b"last")
            wire.client.connection.shutdown()
            for view in wire.client.take():
                wire.server.feed(view)
            self.assertEqual(wire.server.read_into(wire.room), 4)
            self.assertRaises(SSL.ZeroReturnError, wire.server.read_into, wire.room)
            self.assertFalse(wire.server.failed)

    def test_garbage_collector(self) -> None:
        """
        Engines that failed while they held views can be collected.

        CPython crashed when the collector met, in a traceback's frames, a view
        and what C{from_buffer} had made of it.
        """
        for _ in range(20):
            wire = Wire(FastEngine, FastEngine)
            wire.server.feed(memoryview(bytes(1000)))
            try:
                wire.server.read_into(memoryview(bytearray(1000)))
            except SSL.Error as error:
                kept: list[object] = [error, wire]
                kept.append(kept)
            del wire, kept
            gc.collect()
