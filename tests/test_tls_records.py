"""TLS 1.3 records that are protected by ourselves: what is in the RFC, and what a peer may do wrong."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import unittest
from collections import deque
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from OpenSSL import SSL
from twisted.trial.unittest import SynchronousTestCase

from relaymux.net import tlsrecords
from relaymux.net.buffers import BufferPool
from relaymux.net.compiled import native as compiled
from relaymux.net.tlsengine import CIPHER_BUFFER_SIZE, Engine, FastEngine
from relaymux.net.tlskeys import SUITES, TrafficSecret, take_secrets
from relaymux.net.tlsrecords import RecordEngine, take_over
from tests.sockets import DEADLINE
from tests.test_tls_engine import Wire, context

#: For type checkers: whoever uses it is skipped where there is none.
native: Any = compiled

RECORD = 16 * 1024
ALERT, HANDSHAKE, DATA = 21, 22, 23

#: RFC 8448, 3: of the client's data.
SECRET = bytes.fromhex("9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5")
KEY = bytes.fromhex("17422dda596ed5d9acd890e3c63f5051")
IV = bytes.fromhex("5b78923dee08579033e523d9")
RECORD_OF_50 = bytes.fromhex(
    "1703030043a23f7054b62c94d0affafe8228ba55cbefacea42f914aa66bcab3f2b9819a8a5b46b395bd54a9a20441e2b62974e1f"
    "5a6292a2977014bd1e3deae63aeebb21694915e4"
)

needs_compiled = unittest.skipIf(native is None, "not compiled here: make test-compiled")


class KeyTests(SynchronousTestCase):
    """What keys come from."""

    def test_derived(self) -> None:
        """Key and nonce of a secret are those of the example in RFC 8448."""
        secret = TrafficSecret(SUITES["TLS_AES_128_GCM_SHA256"], SECRET)
        self.assertEqual(secret.iv(), IV)
        plain = bytes(range(50)) + bytes([DATA])
        record = RECORD_OF_50
        self.assertEqual(secret.cipher().encrypt(IV, plain, record[:5]), record[5:])
        self.assertEqual(AESGCM(KEY).encrypt(IV, plain, record[:5]), record[5:])
        self.assertNotEqual(secret.updated().secret, SECRET)
        self.assertNotIn(repr(SECRET), repr(secret), "no log may show it")

    def test_taken_once(self) -> None:
        """Secrets are not kept once they were taken, nor where nobody asked for them."""
        wire = Wire(FastEngine, FastEngine)
        expected = native is not None
        self.assertEqual(take_secrets(wire.client.connection) is not None, expected)
        self.assertIsNone(take_secrets(wire.client.connection))

    def test_not_kept_in_vain(self) -> None:
        """Nor are they where an engine has no use for them."""
        wire = Wire(Engine, Engine)
        self.assertIs(take_over(wire.client, is_server=False), wire.client)
        self.assertIsNone(take_secrets(wire.client.connection))


@needs_compiled
class RecordTests(SynchronousTestCase):
    """Between an engine of ours and OpenSSL."""

    def setUp(self) -> None:
        self.seed = random.randrange(2**32)
        self.chance = random.Random(self.seed)

    def exchange(self, wire: Wire, size: int = 100_000) -> None:
        """Bytes arrive, both ways."""
        for sender, receiver in ((wire.client, wire.server), (wire.server, wire.client)):
            data = self.chance.randbytes(size)
            for view in sender.encrypt([data[:12], data[12:]]):
                receiver.feed(view)
            self.assertEqual(wire.read_views(receiver), data, f"seed {self.seed}")

    def test_suites(self) -> None:
        """Each cipher suite is understood by OpenSSL, whichever side is ours."""
        for suite in SUITES:
            for kinds in ((RecordEngine, FastEngine), (FastEngine, RecordEngine)):
                wire = Wire(kinds[0], kinds[1], suite.encode("ascii"))
                self.assertEqual(wire.client.connection.get_cipher_name(), suite)
                for _ in range(3):
                    self.exchange(wire)

    def test_example(self) -> None:
        """A record is the one of RFC 8448, 3, and is read again."""
        pool = BufferPool(CIPHER_BUFFER_SIZE)
        cipher = AESGCM(KEY)
        sealer = native.Sealer(cipher.encrypt_into, IV)
        (view,) = sealer.seal(pool, [bytes(range(20)), b"", bytes(range(20, 50))], DATA)
        self.assertEqual(bytes(view), RECORD_OF_50)
        self.assertEqual(sealer.records, 1)
        opener = native.Opener(cipher.decrypt_into, IV)
        views, used, alert, kind, message = opener.open(pool, RECORD_OF_50, InvalidTag)
        self.assertEqual((b"".join(views), used, alert, kind, message), (bytes(range(50)), 72, 0, 0, None))

    def test_numbers_of_records(self) -> None:
        """A record's number is part of its nonce in all of its 64 bits."""
        pool = BufferPool(CIPHER_BUFFER_SIZE)
        for number in (0, 1, 255, 256, 2**32 - 1, 2**40 + 5, 2**63):
            (view,) = native.Sealer(AESGCM(KEY).encrypt_into, IV, number).seal(pool, [b"x"], DATA)
            nonce = (int.from_bytes(IV, "big") ^ number).to_bytes(12, "big")
            self.assertEqual(AESGCM(KEY).decrypt(nonce, view[5:], view[:5]), bytes([ord("x"), DATA]))

    def test_lent_memory_is_as_before(self) -> None:
        """Encrypting views of a pool's buffers changes none of them, nor what lies between them."""
        pool, encrypted = BufferPool(256 * 1024), BufferPool(CIPHER_BUFFER_SIZE)
        room = pool.room(256 * 1024)
        room[:] = data = self.chance.randbytes(len(room))
        whole = pool.take(len(room))
        for cipher in (AESGCM(KEY).encrypt_into, lambda *_: 1 / 0):
            sealer = native.Sealer(cipher, IV)
            for pieces in (
                [whole],
                [whole[5:20_000], whole[20_000:90_000]],
                [whole[-RECORD:]],
                [whole[1:][:RECORD]],
            ):
                try:
                    records = b"".join(sealer.seal(encrypted, pieces, DATA))
                except ZeroDivisionError:
                    records = b""
                else:
                    opener = native.Opener(
                        AESGCM(KEY).decrypt_into, IV, sealer.records - -(-sum(map(len, pieces)) // RECORD)
                    )
                    views = opener.open(encrypted, records, InvalidTag)[0]
                    self.assertEqual(b"".join(views), b"".join(pieces), f"seed {self.seed}")
                self.assertEqual(bytes(whole), data, f"seed {self.seed}")

    def test_new_keys_of_ours(self) -> None:
        """Long before too much is sent with one key another one is taken, and OpenSSL follows."""
        self.patch(tlsrecords, "KEY_RECORDS", 5)
        for kinds in ((RecordEngine, FastEngine), (FastEngine, RecordEngine), (RecordEngine, RecordEngine)):
            wire = Wire(*kinds)
            for _ in range(10):
                self.exchange(wire, 50_000)
                for engine in (wire.client, wire.server):
                    if isinstance(engine, RecordEngine):
                        self.assertLess(engine._sealer.records, 10)

    def test_new_keys_of_the_peer(self) -> None:
        """A peer's new key is used for what follows; if ours is asked for, it comes first, once."""
        wire = Wire(RecordEngine, RecordEngine)
        client, server = wire.client, wire.server
        assert isinstance(client, RecordEngine) and isinstance(server, RecordEngine)
        before = server._writing
        sent = b"".join(client.encrypt([b"before"]))
        for _ in range(3):
            client._send(HANDSHAKE, b"\x18\0\0\1\1")
            client._writing = client._writing.updated()
            client._sealer = client._new_sealer()
        sent += b"".join(client.encrypt([b"behind"]))
        server.feed(memoryview(sent))
        self.assertEqual(wire.read_views(server), b"beforebehind")
        self.assertEqual(server.take(), [])
        for _ in range(3):
            self.exchange(wire)
        self.assertEqual(server._writing, before.updated())

    def test_data_right_behind_the_handshake(self) -> None:
        """What a client sends together with the end of its handshake is read, wherever it is cut."""
        pool = BufferPool(CIPHER_BUFFER_SIZE)
        for late in (0, 3, 20_000, 33_000):
            dialling, accepting = (SSL.Connection(context(b"TLS_AES_128_GCM_SHA256"), None) for _ in range(2))
            dialling.set_connect_state()
            accepting.set_accept_state()
            client, server = FastEngine(dialling, pool), FastEngine(accepting, pool)
            self.assertRaises(SSL.WantReadError, client.shake_hands)
            for view in client.take():
                server.feed(view)
            self.assertRaises(SSL.WantReadError, server.shake_hands)
            for view in server.take():
                client.feed(view)
            client.shake_hands()
            records = take_over(client, is_server=False)
            data = self.chance.randbytes(33_100)
            sent = memoryview(b"".join(records.take() + records.encrypt([data])))
            server.feed(sent[: len(sent) - late])
            server.shake_hands()
            taken = take_over(server, is_server=True)
            if late:
                taken.feed(sent[-late:])
            self.assertEqual(b"".join(taken.read(pool)), data)

    def test_lent(self) -> None:
        """Who has borrowed the keys may leave a record that is no data, and all behind it, to the engine."""
        wire = Wire(RecordEngine, RecordEngine)
        client, server = wire.client, wire.server
        assert isinstance(client, RecordEngine) and isinstance(server, RecordEngine)
        self.exchange(wire)
        self.assertTrue(server.at_rest)
        before = server._writing
        sent = b"".join(client.encrypt([b"before"]))
        client._send(HANDSHAKE, b"\x18\0\0\1\1")
        client._writing = client._writing.updated()
        client._sealer = client._new_sealer()
        sent += b"".join(client.encrypt([b"behind"]))
        _, opener, pool, wrong_tag = server.lend()
        plain, used, alert, kind, message = opener.open(pool, sent, wrong_tag)
        server.take_back(False, (alert, kind, message, [memoryview(sent)[used:]]))
        server.unread(plain)
        self.assertFalse(server.at_rest)
        self.assertEqual(wire.read_views(server), b"beforebehind")
        for _ in range(3):
            self.exchange(wire)
        self.assertEqual(server._writing, before.updated())
        self.assertTrue(server.at_rest)

    def test_lent_and_forged(self) -> None:
        """A record that may not be, found by who has borrowed the keys, ends the connection with an alert."""
        wire = Wire(RecordEngine, RecordEngine)
        client, server = wire.client, wire.server
        assert isinstance(client, RecordEngine) and isinstance(server, RecordEngine)
        self.exchange(wire)
        server.lend()
        server.take_back(False, (20, 0, None, [memoryview(b"more")]))
        server.unread([b"before"])
        self.assertEqual(wire.read_views(server), b"before")
        self.assertIn("bad record mac", str(self.assertRaises(SSL.Error, server.read, server.pool)))
        for view in server.take():
            client.feed(view)
        self.assertIn("bad record mac", str(self.assertRaises(SSL.Error, client.read, client.pool)))

    def test_lent_and_left_out(self) -> None:
        """Nothing follows what one who has borrowed the keys could not encrypt or decrypt."""
        wire = Wire(RecordEngine, RecordEngine)
        server = wire.server
        assert isinstance(server, RecordEngine)
        server.lend()
        server.take_back(True, None)
        self.assertRaises(SSL.Error, server.encrypt, [b"x"])
        self.assertFalse(server.at_rest)

    def test_not_at_rest(self) -> None:
        """Keys are not lent while there is anything else to say or to read."""
        view = memoryview(b"x")
        for name, value in (
            ("_outgoing", [view]),
            ("_fed", deque([view])),
            ("_plain", deque([view])),
            ("_message", bytearray(b"x")),
            ("_update_due", True),
            ("_closed", True),
            ("_broken", True),
            ("error", SSL.ZeroReturnError()),
        ):
            engine = Wire(RecordEngine, RecordEngine).client
            assert isinstance(engine, RecordEngine)
            self.exchange_once(engine)
            self.assertTrue(engine.at_rest)
            setattr(engine, name, value)
            self.assertFalse(engine.at_rest, name)
        engine = Wire(RecordEngine, RecordEngine).client
        assert isinstance(engine, RecordEngine)
        self.exchange_once(engine)
        self.patch(tlsrecords, "LENT_RECORDS", tlsrecords.KEY_RECORDS - 1)
        self.assertFalse(engine.at_rest)

    def exchange_once(self, engine: RecordEngine) -> None:
        """Take what is left of the handshake, and use the key once."""
        engine.read(engine.pool)
        engine.encrypt([b"x"])

    @unittest.skipIf(shutil.which("openssl") is None, "no openssl")
    def test_key_update_by_openssl(self) -> None:
        """OpenSSL's own client asks for new keys (K), and both go on with them."""
        listening = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listening.close)
        listening.settimeout(DEADLINE)
        port = listening.getsockname()[1]
        client = subprocess.Popen(
            ["openssl", "s_client", "-quiet", "-no_ign_eof", "-connect", f"127.0.0.1:{port}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.addCleanup(client.wait)
        self.addCleanup(client.kill)
        assert client.stdin is not None and client.stdout is not None
        self.addCleanup(client.stdout.close)
        self.addCleanup(client.stdin.close)
        sock, _ = listening.accept()
        self.addCleanup(sock.close)
        sock.settimeout(DEADLINE)
        connection = SSL.Connection(context(b"TLS_AES_256_GCM_SHA384"), None)
        connection.set_accept_state()
        pool = BufferPool(CIPHER_BUFFER_SIZE)
        shaking = FastEngine(connection, pool)
        while True:
            try:
                shaking.shake_hands()
            except SSL.WantReadError:
                sock.sendall(b"".join(shaking.take()))
                shaking.feed(memoryview(sock.recv(RECORD)))
            else:
                break
        engine = take_over(shaking, is_server=True)
        assert isinstance(engine, RecordEngine)
        reading, writing = engine._reading, engine._writing

        def receive(wanted: bytes) -> None:
            received = b""
            while received != wanted:
                received += b"".join(engine.read(pool))
                if received != wanted:
                    engine.feed(memoryview(sock.recv(RECORD)))

        def say(text: bytes) -> None:
            assert client.stdin is not None
            client.stdin.write(text)
            client.stdin.flush()

        for number in range(3):
            say(b"line %d\n" % number)
            receive(b"line %d\n" % number)
            sock.sendall(b"".join(engine.encrypt([b"answer %d\n" % number])))
            self.assertEqual((engine._reading, engine._writing), (reading, writing))
            self.assertEqual(client.stdout.readline(), b"answer %d\n" % number)
            say(b"K\n")
            reading, writing = reading.updated(), writing.updated()
            while engine._reading != reading:
                engine.feed(memoryview(sock.recv(RECORD)))
                self.assertEqual(engine.read(pool), [])


@needs_compiled
class WrongTests(SynchronousTestCase):
    """What a peer may do wrong, and how it ends."""

    def setUp(self) -> None:
        self.pool = BufferPool(CIPHER_BUFFER_SIZE)

    def pair(self) -> tuple[RecordEngine, RecordEngine]:
        """@return: who does wrong, and a server that is to find out."""
        wire = Wire(RecordEngine, RecordEngine)
        assert isinstance(wire.client, RecordEngine) and isinstance(wire.server, RecordEngine)
        self.good = b"".join(wire.client.encrypt([b"good"]))
        return wire.client, wire.server

    def records(self, engine: RecordEngine, *contents: bytes) -> bytes:
        """@return: what C{engine} would send with these in it: plain bytes, type and padding."""
        sealed = b""
        cipher, iv = engine._writing.cipher(), int.from_bytes(engine._writing.iv(), "big")
        for number, content in enumerate(contents, engine._sealer.records):
            header = b"\x17\3\3" + (len(content) + 16).to_bytes(2, "big")
            sealed += header + cipher.encrypt((iv ^ number).to_bytes(12, "big"), content, header)
        return sealed

    def refused(self, wrong: bytes, by: RecordEngine, to: RecordEngine, alert: int, text: str) -> None:
        """What is C{wrong} is refused with this alert, after what came before it, and nothing follows."""
        to.feed(memoryview(self.good + wrong + b"and so on"))
        self.assertEqual(b"".join(to.read(self.pool)), b"good")
        self.assertTrue(to.failed)
        for read in (lambda: to.read(self.pool), lambda: to.read_into(memoryview(bytearray(9)))):
            self.assertIn(text, str(self.assertRaises(SSL.Error, read)))
        self.assertRaises(SSL.Error, to.encrypt, [b"late"])
        by.feed(memoryview(b"".join(to.take())))
        error = self.assertRaises(SSL.Error, by.read, self.pool)
        self.assertIn(f"alert {tlsrecords._ALERTS[alert]}", str(error))
        self.assertEqual(by.take(), [], "an alert is not answered")

    def test_no_records(self) -> None:
        """What is not application data on the outside, or too long or short, is not waited for."""
        for header, alert, text in (
            (b"\x16\3\3\0\x20", 10, "unexpected message"),
            (b"\x14\3\3\0\1\1", 10, "unexpected message"),
            (b"\x15\3\3\0\2\2\x28", 10, "unexpected message"),
            (b"\x17\3\3\0\x10", 10, "unexpected message"),
            (b"\x17\3\3\x41\1", 22, "record overflow"),
            (b"\x17\3\3\xff\xff", 22, "record overflow"),
        ):
            self.refused(header, *self.pair(), alert, text)

    def test_changed(self) -> None:
        """No bit of a record can be changed."""
        for place in (1, 2, 5, 12, -1):
            by, to = self.pair()
            record = bytearray(self.records(by, b"what was said\x17"))
            record[place] ^= 1
            self.refused(bytes(record), by, to, 20, "bad record mac")

    def test_out_of_order(self) -> None:
        """Records cannot be left out, told again or swapped."""
        for order in ((1,), (0, 0), (1, 0)):
            by, to = self.pair()
            both = self.records(by, b"\x17", b"\x17")
            size = len(both) // 2
            shuffled = b"".join(both[size * number : size * (number + 1)] for number in order)
            self.refused(shuffled, by, to, 20, "bad record mac")

    def test_contents(self) -> None:
        """What a record must not hold."""
        for contents, alert, text in (
            ((b"\0" * 300,), 10, "unexpected message"),
            ((b"x" * (RECORD + 1) + b"\x17",), 22, "record overflow"),
            ((b"\x17" + b"\0" * (RECORD + 1),), 22, "record overflow"),
            ((b"?\x14",), 10, "unexpected record"),
            ((b"?\x18",), 10, "unexpected record"),
            ((b"\x16",), 10, "unexpected record"),
            ((b"\x15",), 50, "malformed alert"),
            ((b"\2\x15",), 50, "malformed alert"),
            ((b"\2\x28\2\x28\x15",), 50, "malformed alert"),
            ((b"\0\0\0\0\x16",), 10, "unexpected message behind the handshake"),
            ((b"\1\0\0\0\x16",), 10, "unexpected message behind the handshake"),
            ((b"\x0d\0\0\0\x16",), 10, "unexpected message behind the handshake"),
            ((b"\4\xff\xff\xff\x16",), 10, "unexpected message behind the handshake"),
            ((b"\4\0\0\x0e\x16",), 10, "a ticket from a client"),
            ((b"\x18\0\0\1\2\x16",), 47, "malformed key update"),
            ((b"\x18\0\0\0\x16",), 50, "malformed key update"),
            ((b"\x18\0\0\2\0\0\x16",), 50, "malformed key update"),
            ((b"\x18\0\0\1\0\x18\x16",), 10, "other records within a message"),
            ((b"\x18\0\0\x16", b"data\x17"), 10, "other records within a message"),
            ((b"\x18\0\0\x16", b"\1\0\x15"), 10, "other records within a message"),
        ):
            by, to = self.pair()
            self.refused(self.records(by, *contents), by, to, alert, text)

    def test_what_is_allowed(self) -> None:
        """Padding, empty records, user_canceled, messages in pieces: all without consequence."""
        by, to = self.pair()
        allowed = self.records(
            by,
            b"a\x17" + b"\0" * 200,
            b"\x17",
            b"\x17\0",
            b"\1\x5a\x15",
            b"x" * RECORD + b"\x17",
            b"\x18\0\x16",
            b"\0\1\0\x16",
        )
        to.feed(memoryview(self.good + allowed))
        self.assertEqual(b"".join(to.read(self.pool)), b"gooda" + b"x" * RECORD)
        by._writing = by._writing.updated()
        by._sealer = by._new_sealer()
        to.feed(memoryview(b"".join(by.encrypt([b"new key"]))))
        self.assertEqual(b"".join(to.read(self.pool)), b"new key")
        # Tickets are for clients.
        by.feed(
            memoryview(self.records(to, b"\4\0\x80\0" + b"t" * 768 + b"\x16", *[b"t" * 16_000 + b"\x16"] * 2))
        )
        self.assertEqual(by.read(self.pool), [])
        self.assertFalse(by.failed)

    def test_too_many_key_updates(self) -> None:
        """New keys, and nothing said with them, are no way to keep us busy."""
        by, to = self.pair()
        to.feed(memoryview(self.good))
        to.read(self.pool)
        for count in range(100):
            by._send(HANDSHAKE, b"\x18\0\0\1\0")
            by._writing = by._writing.updated()
            by._sealer = by._new_sealer()
            to.feed(memoryview(b"".join(by.take())))
            try:
                to.read(self.pool)
            except SSL.Error as error:
                self.assertIn("too many key updates", str(error))
                self.assertGreater(count, 8)
                return
        self.fail("they were all taken")

    def test_alerts(self) -> None:
        """An alert ends the connection under its name."""
        for code, text in ((48, "alert unknown ca"), (116, "alert certificate required"), (255, "alert 255")):
            for level in (1, 2):
                by, to = self.pair()
                to.feed(memoryview(self.good))
                to.read(self.pool)
                by._send(ALERT, bytes([level, code]))
                to.feed(memoryview(b"".join(by.take())))
                error = self.assertRaises(SSL.Error, to.read, self.pool)
                self.assertIn(text, str(error))
                self.assertTrue(to.failed)

    def test_ciphers_that_do_wrong(self) -> None:
        """A cipher that fails, does something else, or keeps what it was shown leaves nothing unusable."""
        kept: list[memoryview] = []

        def keeps(*buffers: Any) -> int:
            kept.append(memoryview(buffers[1]))
            return len(memoryview(buffers[3]))

        def nests(*_buffers: Any) -> int:
            for call in (lambda: self.pool.room(1), lambda: self.pool.take(0)):
                self.assertRaises(RuntimeError, call)
            raise LookupError

        ciphers: tuple[tuple[Any, type[Exception]], ...] = (
            (lambda *_: 1 / 0, ZeroDivisionError),
            (lambda *_: 1, RuntimeError),
            (lambda *_: None, TypeError),
            (nests, LookupError),
            (keeps, RuntimeError),
        )
        for cipher, error in ciphers:
            sealer, opener = native.Sealer(cipher, IV), native.Opener(cipher, IV)
            self.assertRaises(error, sealer.seal, self.pool, [bytes(100)], DATA)
            self.assertRaises(error, opener.open, self.pool, RECORD_OF_50, InvalidTag)
        del kept[:]
        right = native.Opener(AESGCM(KEY).decrypt_into, IV)
        self.assertEqual(b"".join(right.open(self.pool, RECORD_OF_50, InvalidTag)[0]), bytes(range(50)))

    def test_exception_while_encrypting(self) -> None:
        """What follows bytes that could not be encrypted never seems to follow those before them."""
        by, to = self.pair()

        def uses_the_pool(*_buffers: Any) -> int:
            self.assertRaises(RuntimeError, by.encrypt, [b"lost"])
            raise LookupError

        self.assertRaises(LookupError, native.Sealer(uses_the_pool, IV).seal, by.pool, [b"x"], DATA)
        self.assertRaises(SSL.Error, by.encrypt, [b"behind it"])
        by.close()
        to.feed(memoryview(self.good + b"".join(by.take())))
        self.assertEqual(b"".join(to.read(self.pool)), b"good")
        self.assertEqual(to.read(self.pool), [], "and no orderly end")

    def test_exception_while_decrypting(self) -> None:
        """Nor does what follows bytes that could not be decrypted."""
        _by, to = self.pair()
        to.feed(memoryview(self.good))
        right, to._opener = to._opener, native.Opener(lambda *_: 1 / 0, IV)
        self.assertRaises(ZeroDivisionError, to.read, self.pool)
        to._opener = right
        to.feed(memoryview(self.good))
        self.assertRaises(SSL.Error, to.read, self.pool)
        self.assertTrue(to.failed)

    def test_records_in_use(self) -> None:
        """A cipher lets other threads run: none of them can use what it is called by."""
        other = BufferPool(CIPHER_BUFFER_SIZE)

        def nests(*buffers: Any) -> int:
            if len(memoryview(buffers[1])) < len(memoryview(buffers[3])):
                self.assertRaises(RuntimeError, sealer.seal, other, [b"x"], DATA)
            else:
                self.assertRaises(RuntimeError, opener.open, other, RECORD_OF_50, InvalidTag)
            raise LookupError

        sealer, opener = native.Sealer(nests, IV), native.Opener(nests, IV)
        self.assertRaises(LookupError, sealer.seal, self.pool, [b"x"], DATA)
        self.assertRaises(LookupError, opener.open, self.pool, RECORD_OF_50, InvalidTag)
        # Neither is in use any more.
        self.assertRaises(LookupError, sealer.seal, self.pool, [b"x"], DATA)
        self.assertRaises(LookupError, opener.open, self.pool, RECORD_OF_50, InvalidTag)

    def test_from_the_pool_that_records_go_to(self) -> None:
        """Records may be put right behind what they are made of."""
        cipher = AESGCM(KEY)
        # One record: the byte behind it is the first of what is made of it.
        room = self.pool.room(3 * RECORD)
        room[:RECORD] = plain = random.randbytes(RECORD)
        room[RECORD] = 0
        records = native.Sealer(cipher.encrypt_into, IV).seal(self.pool, [self.pool.take(RECORD)], DATA)
        views = native.Opener(cipher.decrypt_into, IV).open(self.pool, b"".join(records), InvalidTag)[0]
        self.assertEqual(b"".join(views), plain)

    def test_arguments(self) -> None:
        """Nonsense is an exception."""
        cipher = AESGCM(KEY)
        for iv in (b"", bytes(11), bytes(13)):
            self.assertRaises(ValueError, native.Sealer, cipher.encrypt_into, iv)
        sealer, opener = native.Sealer(cipher.encrypt_into, IV), native.Opener(cipher.decrypt_into, IV)
        small = BufferPool(1000)
        for call in (
            lambda: sealer.seal(small, [b"x"], DATA),
            lambda: opener.open(small, b"x", InvalidTag),
        ):
            self.assertRaises(ValueError, call)
        for call in (
            lambda: sealer.seal(self.pool, [b"x"]),
            lambda: sealer.seal(self.pool, [None], DATA),
            lambda: sealer.seal(self.pool, None, DATA),
            lambda: sealer.seal(None, [], DATA),
            lambda: sealer.seal(self.pool, [b"x"], "data"),
            lambda: opener.open(self.pool, b"x"),
            lambda: opener.open(self.pool, None, InvalidTag),
            lambda: opener.open(None, b"x", InvalidTag),
        ):
            self.assertRaises(TypeError, call)
        self.assertEqual(sealer.seal(self.pool, [], DATA), [])
        self.assertEqual(opener.open(self.pool, b"", InvalidTag), ([], 0, 0, 0, None))
