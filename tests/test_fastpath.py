"""Bulk without Python for each turn: the same bytes, the same ends, the same faults."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import SkipTest

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from twisted.logger import capturedLogs, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from relaymux.core.budget import Budget
from relaymux.core.frames import CREDIT, Kind, data_header, encode
from relaymux.core.growth import WIDE_TURN_SECONDS
from relaymux.core.handshake import Limits
from relaymux.errors import TransportError
from relaymux.net import tlsrecords
from relaymux.net.buffers import BufferPool, pool_for
from relaymux.net.compiled import native
from relaymux.net.connections import LocalSocket
from relaymux.net.disks import bind_unix
from relaymux.net.families import transport_for, tune_link
from relaymux.net.link import LinkProtocol
from relaymux.net.listen import listen_on
from relaymux.net.local import LocalDialer, LocalListener
from relaymux.net.peer import Identity, Peer
from relaymux.net.reactor import RelayReactor
from relaymux.net.tlscontext import TLSIdentity
from relaymux.net.tlsengine import CIPHER_BUFFER_SIZE
from relaymux.net.tlssockets import TLSTransport
from tests.sockets import content
from tests.tls import AUTHORITY, CLIENT, SERVER, Files
from tests.wire import join, parse, u64

MIB = 1024 * 1024

#: Seconds after which a test is given up.
DEADLINE = 60.0

#: Windows do not grow beyond this, so that a test moves many of them.
LIMITS = Limits(window=256 * 1024, replay=4 * MIB, silence=15.0, resume_window=30.0)

#: More than four windows, even grown, and than two replay buffers; no multiple of anything.
BULK = content(48 * MIB + 4711)
LESS = content(20 * MIB + 13, 5)


def tcp_pair(congestion: bytes = b"") -> tuple[socket.socket, socket.socket]:
    """@return: two sockets that are connected by TCP, with C{congestion} as its control, or the system's."""
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as failing:
        near = failing.enter_context(socket.socket())
        for sock in (server, near) if congestion else ():  # before they are connected, as it may leave traces
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion)
        near.connect(server.getsockname())
        far, _ = server.accept()
        failing.pop_all()
    return near, far


class Program(threading.Thread):
    """
    A program at one end, as QEMU would be: it blocks.

    @ivar received: what it has read.
    @ivar ended: how its input ended: 0 for an end, or an error; L{None} as long as it did not.
    @ivar broke: the error of its writing, or 0.
    """

    def __init__(self, sock: socket.socket, says: bytes = b"") -> None:
        super().__init__(daemon=True)
        self.sock = sock
        self.received = bytearray()
        self.ended: int | None = None
        self.broke = 0
        self.pace: Callable[[], object] = lambda: None
        self.wants = 1 << 62
        self._says = says
        sock.setblocking(True)
        sock.settimeout(DEADLINE)
        self._speaker = threading.Thread(target=self._speak, daemon=True)

    def run(self) -> None:
        self._speaker.start()
        try:
            while len(self.received) < self.wants:
                piece = self.sock.recv(256 * 1024)
                if not piece:
                    self.ended = 0
                    break
                self.received += piece
                self.pace()
        except OSError as error:
            self.ended = error.errno or -1
        self._speaker.join(DEADLINE)

    def _speak(self) -> None:
        try:
            self.sock.sendall(self._says)
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.broke = error.errno or -1


class Records:
    """One side's keys of a TLS connection: that of a lease, or of its peer."""

    def __init__(self, sends: int, receives: int, cipher: Any = None) -> None:
        """
        @param sends: the number of the key to send with.
        @param cipher: to encrypt and decrypt with, instead of the right one.
        """
        assert native is not None
        ciphers = [AESGCM(bytes([number]) * 16) for number in (sends, receives)]
        self.pool = BufferPool(CIPHER_BUFFER_SIZE)
        self.sealer = native.Sealer(cipher or ciphers[0].encrypt_into, bytes([sends]) * 12)
        self.opener = native.Opener(cipher or ciphers[1].decrypt_into, bytes([receives]) * 12)

    def seal(self, data: bytes, kind: int = 23) -> bytes:
        return b"".join(self.sealer.seal(self.pool, [data], kind))

    def open(self, data: bytes) -> bytes:
        plain, used, alert, kind, _ = self.opener.open(self.pool, data, InvalidTag)
        assert (used, alert, kind) == (len(data), 0, 0)
        return b"".join(plain)


class LeaseTestCase(SynchronousTestCase):
    """
    Two pairs of sockets, with a lease in the middle.

    @ivar pages: what the lease passes pages on by, or L{None}.
    @ivar pool: of the last lease.
    """

    def setUp(self) -> None:
        if native is None:
            raise SkipTest("needs what is compiled: make test-compiled")
        self.pages: Any = None
        self.pool = BufferPool()
        self.epoll = select.epoll()
        self.addCleanup(self.epoll.close)
        self.link, self.peer = self.link_sockets()
        self.local, self.program = self.sockets()
        for sock in (self.link, self.local):
            self.epoll.register(sock, select.EPOLLIN)

    def sockets(self) -> tuple[socket.socket, socket.socket]:
        pair = socket.socketpair()
        for sock in pair:
            sock.setblocking(False)
            self.addCleanup(sock.close)
        return pair

    def link_sockets(self) -> tuple[socket.socket, socket.socket]:
        return self.sockets()

    def lease(
        self,
        credit: int,
        *,
        writes: bool = True,
        queued: bool = False,
        before: tuple[int, ...] = (),
        most_held: int = 1 << 30,
        window: tuple[int, int, int, int, int] = (0, 0, 4000, 4000, 2000),
        ack_bytes: int = 1 << 19,
        keys: Records | None = None,
        ciphers: BufferPool | None = None,
        turn: int = 1 << 19,
    ) -> Any:
        """
        @param credit: bytes that may be sent for stream 3.
        @param before: where frames end that were sent before, and not acknowledged.
        @param most_held: bytes that may be unacknowledged.
        @param window: what was received for it, and consumed; the credit for that, its window, and a step.
        @param keys: by which the link is encrypted, in C{ciphers}.
        @param turn: bytes to read of the local socket at once.
        """
        assert native is not None
        self.pool = BufferPool()
        lease = native.Lease(
            self.pool,
            self.link.fileno(),
            self.epoll.fileno(),
            (before[-1] if before else 0, 0, 1 << 30, most_held, 256, list(before)),
            (0, 0, ack_bytes, 1 << 20),
            (turn, 1 << 19),
            1,
        )
        if keys is not None:
            lease.encrypt(keys.sealer, keys.opener, ciphers or BufferPool(CIPHER_BUFFER_SIZE), InvalidTag)
        if self.pages is not None:
            lease.pass_on(self.pages, 1 << 19, ack_bytes, True)
        self.assertTrue(lease.add(3, self.local.fileno(), True, writes, queued, (0, credit, 0), window))
        return lease

    def wait(self, lease: Any, seconds: float = 0.05, ack_delay: float = 60.0) -> list[tuple[int, int]]:
        assert native is not None
        return list(native.wait(self.epoll.fileno(), -1.0, seconds, ack_delay, [lease]))

    def left(self, settled: Any) -> bytes:
        """What a lease has left to Python: of what was received, and what still is to be."""
        with contextlib.suppress(BlockingIOError):
            return join(settled[6]) + self.link.recv(1 << 20)
        return join(settled[6])


class LeaseTests(LeaseTestCase):
    """What one lease does, and leaves behind."""

    def test_no_more_than_credit(self) -> None:
        """What exceeds the credit stays where it is, and its socket is watched again when all is over."""
        self.program.send(content(3000))
        lease = self.lease(1000)
        self.assertEqual(self.wait(lease), [])
        self.assertEqual(self.peer.recv(4000), data_header(3, 1000) + content(3000)[:1000])
        self.assertEqual(lease.settle()[0], 1012)
        self.assertEqual(self.epoll.poll(1), [(self.local.fileno(), select.EPOLLIN)])
        self.assertEqual(self.local.recv(4000), content(3000)[1000:])

    def test_credit_within_a_lease(self) -> None:
        """New credit is used at once, within what it allows."""
        self.program.send(content(3000))
        self.peer.send(encode(Kind.CREDIT, 3, CREDIT.pack(2500, 0)))
        lease = self.lease(1000)
        self.assertEqual(self.wait(lease), [])
        sent = parse(self.peer.recv(9000))
        self.assertEqual(b"".join(payload for _, _, payload in sent), content(3000)[:2500])
        self.assertEqual(lease.settle()[8][0][2:4], (2500, 0))

    def test_others_wait_for_the_socket(self) -> None:
        """Python may wait until the socket takes what it has queued: it is told, whatever happened here."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.local.send(bytes(65536))
        self.epoll.modify(self.local, select.EPOLLIN | select.EPOLLOUT)
        self.program.send(content(3000))
        lease = self.lease(1000, writes=False, queued=True)
        self.assertEqual(self.wait(lease), [])
        self.local.recv(9000)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.program.recv(1 << 20)
        self.assertEqual(self.epoll.poll(1), [(self.local.fileno(), select.EPOLLOUT)])

    def more_than_fits(self) -> bytes:
        """Have frames arrive of which the socket takes a fifth at a time.  @return: their payload."""
        self.local.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
        data = content(120_000)
        for start in range(0, len(data), 40_000):
            self.peer.send(data_header(3, 40_000) + data[start : start + 40_000])
        return data

    def test_program_goes_on(self) -> None:
        """A program whose socket is full is waited for, and may itself send meanwhile."""
        for _ in range(50):  # it is not waited for so long that a busy machine could not take longer
            self.setUp()
            data = self.more_than_fits()
            got = bytearray()
            self.program.settimeout(DEADLINE)

            def read(size: int = len(data), got: bytearray = got) -> None:
                with contextlib.suppress(ConnectionError):  # closed below, if it took too long
                    got += self.program.recv(1)
                    self.program.send(b"said")
                    while len(got) < size and (more := self.program.recv(1 << 20)):
                        got += more
                self.peer.send(encode(Kind.PING, 0, bytes(8)))  # which ends the lease

            reader = threading.Thread(target=read)
            lease = self.lease(4, window=(0, 0, 1 << 20, 1 << 20, 1 << 19))
            reader.start()
            happened = self.wait(lease, DEADLINE)
            settled = lease.settle()
            stream = settled[8][0]
            if stream[5] == len(data):
                break
            self.local.close()
            reader.join()
        reader.join()
        self.assertEqual((happened, stream[4:6]), ([], (len(data), len(data))))
        self.assertEqual(got, data)
        self.assertEqual((stream[1], join(stream[7])), (4, b""))
        said = [(kind, payload) for kind, _, payload in parse(self.peer.recv(1 << 20))]
        self.assertIn((Kind.DATA, b"said"), said)
        self.assertEqual(self.left(settled), encode(Kind.PING, 0, bytes(8)))

    def test_program_does_not_go_on(self) -> None:
        """It is not waited for long, as others may have something; they are watched as before then."""
        data = self.more_than_fits()
        lease = self.lease(0, window=(0, 0, 1 << 20, 1 << 20, 1 << 19))
        self.assertEqual(self.wait(lease, DEADLINE), [])
        settled = lease.settle()
        stream = settled[8][0]
        took = stream[5]
        self.assertTrue(0 < took < len(data), took)
        self.peer.send(b"more")
        self.assertEqual(self.epoll.poll(DEADLINE), [(self.link.fileno(), select.EPOLLIN)])
        taken = bytearray()
        with contextlib.suppress(BlockingIOError):
            while True:
                taken += self.program.recv(1 << 20)
        self.assertEqual(taken + join(stream[7]), data[: stream[4]])
        # It would take something now, which nobody has asked for.
        self.assertEqual(self.epoll.poll(0), [(self.link.fileno(), select.EPOLLIN)])

    def answer(self, received: int) -> tuple[list[Any], int]:
        """
        Have bytes arrive, of which 4048 are worth an ACK, and something leave after that.

        @return: what the peer was told, and how many bytes it knows to have arrived.
        """

        def talk() -> None:
            self.peer.send(data_header(3, received) + content(received))
            poll = select.poll()
            poll.register(self.program, select.POLLIN)
            poll.poll(10_000)
            self.program.send(b"now")
            self.program.shutdown(socket.SHUT_WR)  # which ends the lease

        lease = self.lease(1000, window=(0, 0, 1 << 22, 1 << 22, 1 << 20), ack_bytes=4 * 1012)
        talker = threading.Thread(target=talk)
        talker.start()
        self.assertEqual(self.wait(lease, 10.0), [])
        talker.join()
        return parse(self.peer.recv(100)), lease.settle()[3]

    def test_late_ack(self) -> None:
        """What is worth no ACK is acknowledged all the same, once, while a lease lasts."""
        self.peer.send(data_header(3, 100) + content(100))
        lease = self.lease(0, window=(0, 0, 1 << 22, 1 << 22, 1 << 20))

        def talk() -> None:
            said = self.peer.recv(100)
            time.sleep(0.05)
            self.peer.send(data_header(3, 100) + content(100))
            said += self.peer.recv(100)
            heard.append(said)
            self.peer.shutdown(socket.SHUT_WR)

        heard: list[bytes] = []
        self.peer.settimeout(10.0)
        talker = threading.Thread(target=talk)
        talker.start()
        self.wait(lease, 10.0, 0.01)
        talker.join()
        self.assertEqual(parse(b"".join(heard)), [(Kind.ACK, 0, u64(112)), (Kind.ACK, 0, u64(224))])
        self.assertEqual(lease.settle()[2:4], (224, 224))

    def test_ack_leads(self) -> None:
        """An ACK for a quarter of what is worth one leaves in front of the next frame, and not by itself."""
        said = [(Kind.ACK, 0, u64(1012)), (Kind.DATA, 3, b"now")]
        self.assertEqual(self.answer(1000), (said, 1012))

    def test_no_ack_leads(self) -> None:
        """An ACK for less does not."""
        self.assertEqual(self.answer(999), ([(Kind.DATA, 3, b"now")], 0))

    def test_no_time(self) -> None:
        """Without any time, what is there is carried all the same."""
        self.program.send(b"now")
        lease = self.lease(1000)
        assert native is not None
        self.assertEqual(native.wait(self.epoll.fileno(), 0.0, 0.05, 60.0, [lease]), [])
        self.assertEqual(self.peer.recv(100), data_header(3, 3) + b"now")

    def test_acknowledged_within_a_frame(self) -> None:
        """An ACK that cannot be, of what was sent before, is Python's, and so is all that follows it."""
        lease = self.lease(1000, before=(100, 250))
        wrong = encode(Kind.ACK, 0, u64(180)) + data_header(3, 4) + b"more"
        self.peer.send(encode(Kind.ACK, 0, u64(100)) + wrong)
        self.assertEqual(self.wait(lease), [])
        settled = lease.settle()
        self.assertEqual((settled[1], self.left(settled)), (100, wrong))
        self.assertRaises(BlockingIOError, self.program.recv, 100)

    def test_peer_acknowledges_nothing(self) -> None:
        """With a full replay buffer, and what is allowed beyond that, no more CREDIT is said."""
        for held, said in ((99, [(Kind.CREDIT, 3, CREDIT.pack(2000 + 4000, 2000))]), (100, [])):
            self.peer.send(data_header(3, 2000) + content(2000))
            lease = self.lease(1000, before=(held,), most_held=100)
            self.wait(lease)
            self.assertEqual(self.program.recv(4000), content(2000))
            with contextlib.suppress(BlockingIOError):
                self.assertEqual(parse(self.peer.recv(4000)), said)
            self.assertEqual(lease.settle()[0], held + 28 * len(said))

    def test_acknowledged_once(self) -> None:
        """As many bytes as are worth it are acknowledged with one ACK."""
        window = (0, 0, 1 << 22, 1 << 22, 1 << 20)
        lease = self.lease(0, window=window, ack_bytes=5000)
        self.peer.send((data_header(3, 2000) + content(2000)) * 4)
        self.wait(lease)
        self.assertEqual(parse(self.peer.recv(4000)), [(Kind.ACK, 0, u64(4 * 2012))])
        self.assertEqual(lease.settle()[2:4], (4 * 2012, 4 * 2012))

    def test_not_for_a_lease(self) -> None:
        """What the peer must not say is Python's, who knows what to do, with all that follows."""
        good = data_header(3, 96) + content(96)
        for bad in (
            data_header(3, 4001) + content(4001),  # beyond its credit
            data_header(3, 0),
            data_header(5, 10) + content(10),
            encode(Kind.CREDIT, 3, CREDIT.pack(999, 0)),  # less than before
            encode(Kind.CREDIT, 3, CREDIT.pack(1 << 63, 0)),
            encode(Kind.CREDIT, 3, CREDIT.pack(2000, 1)),  # more than was sent
            encode(Kind.CREDIT, 5, CREDIT.pack(2000, 0)),
            encode(Kind.ACK, 3, u64(0)),
            encode(Kind.ACK, 0, u64(1)),
            encode(Kind.PING, 0, u64(1)),
            b"\x13\x01" + data_header(3, 10)[2:] + content(10),
        ):
            lease = self.lease(1000)
            self.peer.send(good + bad + good)
            self.assertEqual(self.wait(lease), [])
            settled = lease.settle()
            self.assertEqual(self.left(settled), bad + good)
            self.assertEqual((settled[2], self.program.recv(9000)), (len(good), content(96)))

    def test_blocked(self) -> None:
        """While the link takes nothing what arrives is delivered all the same, and the answer is Python's."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.link.send(bytes(65536))
        lease = self.lease(1000)
        self.assertTrue(lease.owe([b"a" * 100]))
        self.peer.send(data_header(3, 3000) + content(3000))
        self.wait(lease)
        self.assertEqual(self.program.recv(9000), content(3000))
        settled = lease.settle()
        self.assertEqual((settled[:4], settled[5]), ((0, 0, 3012, 0), [b"a" * 100]))
        self.assertEqual(settled[8][0][4:7], (3000, 3000, 4000))

    def test_what_is_owed(self) -> None:
        """What Python could not send leaves first, whole, before anything else."""
        owed = [b"a" * 100, memoryview(b"b" * 3000)]
        lease = self.lease(1000)
        self.assertTrue(lease.owe(owed))
        self.program.send(b"new")
        self.wait(lease)
        self.assertEqual(self.peer.recv(9000), b"a" * 100 + b"b" * 3000 + data_header(3, 3) + b"new")
        self.assertEqual(lease.settle()[5], [])

    def test_what_is_owed_and_not_taken(self) -> None:
        """What the link does not take is given back."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.link.send(bytes(65536))
        lease = self.lease(1000)
        self.assertTrue(lease.owe([b"a" * 100, memoryview(b"b" * 3000)]))
        self.program.send(b"new")
        self.assertEqual(self.wait(lease), [])
        self.assertEqual(b"".join(map(bytes, lease.settle()[5])), b"a" * 100 + b"b" * 3000)
        self.assertEqual(self.local.recv(100), b"new")


class EncryptedLeaseTests(LeaseTestCase):
    """The same where the link has TLS."""

    def setUp(self) -> None:
        super().setUp()
        self.keys, self.peers = Records(1, 2), Records(2, 1)

    def test_both_ways(self) -> None:
        """Encrypted towards the peer, and decrypted towards the program, wherever records are cut."""
        sent = self.peers.seal(data_header(3, 3000) + content(3000))
        for part in (sent[:3], sent[3:1000], sent[1000:]):
            self.peer.send(part)
            self.program.send(content(700))
            lease = self.lease(1000, keys=self.keys, window=(0, 0, 9000, 9000, 9000))
            self.assertEqual(self.wait(lease), [])
            settled = lease.settle()
            self.assertEqual(self.peers.open(self.peer.recv(9000)), data_header(3, 700) + content(700))
            self.assertEqual((settled[5:8], settled[11]), (([], [], 0), (False, None)))
        self.assertEqual((settled[2], self.program.recv(9000)), (3012, content(3000)))

    def test_a_frame_of_two_leases(self) -> None:
        """What has arrived of a frame when a lease is over, in whole records, is given back decrypted."""
        frame = data_header(3, 3000) + content(3000)
        self.peer.send(self.peers.seal(frame[:1000]))
        lease = self.lease(1000, keys=self.keys)
        self.wait(lease)
        left = lease.settle()[6]
        self.assertEqual(b"".join(map(bytes, left)), frame[:1000])
        self.peer.send(self.peers.seal(frame[1000:]))
        lease = self.lease(1000, keys=self.keys)
        self.assertTrue(lease.feed(left))
        self.wait(lease)
        self.assertEqual(self.program.recv(9000), content(3000))

    def test_other_records(self) -> None:
        """A record that is no data is Python's, and so is all that follows it, as it arrived."""
        good = data_header(3, 100) + content(100)
        before, odd, behind = self.peers.seal(good), self.peers.seal(b"\1\0", 21), self.peers.seal(good)
        self.peer.send(before + odd + behind)
        lease = self.lease(1000, keys=self.keys)
        self.wait(lease)
        *settled, (hole, (alert, kind, message, unread)) = lease.settle()
        self.assertFalse(hole)
        self.assertEqual((alert, kind, message, b"".join(map(bytes, unread))), (0, 21, b"\1\0", behind))
        self.assertEqual((settled[2], settled[7], self.program.recv(9000)), (len(good), 0, content(100)))

    def test_other_records_in_two_pieces(self) -> None:
        """What has arrived behind such a record is left as it is, also where it is in another buffer."""
        good = data_header(3, 100) + content(100)
        before, odd = self.peers.seal(good), self.peers.seal(b"\1\0", 21)
        behind = self.peers.seal(content(100_000))
        ciphers = BufferPool(CIPHER_BUFFER_SIZE)
        ciphers.room()
        kept = ciphers.take(CIPHER_BUFFER_SIZE - 66_000)
        self.peer.send(before + odd + behind)
        lease = self.lease(1000, keys=self.keys, ciphers=ciphers)
        self.wait(lease)
        *settled, (hole, (_, kind, _, unread)) = lease.settle()
        self.assertEqual((hole, kind, settled[2], settled[6]), (False, 21, len(good), []))
        self.assertGreater(len(unread), 1)
        self.assertEqual(b"".join(map(bytes, unread)), behind)
        self.assertEqual(len(kept), CIPHER_BUFFER_SIZE - 66_000)

    def test_cannot_answer(self) -> None:
        """CREDIT that cannot be encrypted ends the connection, too; what it is for was delivered."""
        self.keys.sealer = native.Sealer(lambda *_: 1 // 0, bytes(12))  # type: ignore[union-attr]
        self.peer.send(self.peers.seal(data_header(3, 3000) + content(3000)))
        lease = self.lease(1000, keys=self.keys)
        self.assertRaises(ZeroDivisionError, self.wait, lease)
        settled = lease.settle()
        self.assertEqual((settled[2], settled[9], settled[11]), (3012, errno.EIO, (True, None)))
        self.assertEqual(self.program.recv(9000), content(3000))

    def test_forged_records(self) -> None:
        """What comes before one counts, nothing of it is delivered, and Python knows which alert to send."""
        good = data_header(3, 100) + content(100)
        before = self.peers.seal(good)
        forged = self.peers.seal(good)
        for alert, wrong in (
            (20, forged[:-1] + bytes([forged[-1] ^ 1])),
            (20, forged[:40] + bytes([forged[40] ^ 128]) + forged[41:]),
            (10, b"\x16" + forged[1:]),
            (22, b"\x17\3\3\xff\xff" + forged[5:]),
        ):
            self.keys, self.peers = Records(1, 2), Records(2, 1)
            self.peer.send(before + wrong + forged)
            lease = self.lease(1000, keys=self.keys)
            self.wait(lease)
            *settled, (hole, odd) = lease.settle()
            self.assertFalse(hole)
            self.assertEqual((odd[:3], settled[2], settled[6]), ((alert, 0, None), len(good), []))
            self.assertEqual(self.program.recv(9000), content(100))
            self.assertRaises(BlockingIOError, self.program.recv, 9000)

    def test_cannot_encrypt(self) -> None:
        """What could not be encrypted is kept for the next connection; nothing may follow it on this one."""
        self.program.send(content(700))
        lease = self.lease(1000, keys=Records(1, 2, lambda *_: 1 // 0))
        self.assertRaises(ZeroDivisionError, self.wait, lease)
        settled = lease.settle()
        self.assertEqual((settled[0], settled[5], settled[9:]), (712, [], (errno.EIO, 700, (True, None))))
        ((end, buffers),) = settled[4]
        self.assertEqual((end, b"".join(map(bytes, buffers))), (712, data_header(3, 700) + content(700)))
        self.assertRaises(BlockingIOError, self.peer.recv, 9000)

    def test_cannot_decrypt(self) -> None:
        """What could not be decrypted is lost with the connection, whose next one brings it again."""
        self.peer.send(self.peers.seal(data_header(3, 100) + content(100)))
        lease = self.lease(1000, keys=Records(1, 2, lambda *_: 1 // 0))
        self.assertRaises(ZeroDivisionError, self.wait, lease)
        settled = lease.settle()
        self.assertEqual((settled[2], settled[7], settled[11]), (0, errno.EIO, (True, None)))
        self.assertRaises(BlockingIOError, self.program.recv, 9000)

    def test_a_cipher_that_uses_the_keys(self) -> None:
        """Nobody else makes or reads records, or fills the pools, while a lease does."""
        ciphers = BufferPool(CIPHER_BUFFER_SIZE)
        for use in (
            lambda: self.keys.seal(b"x"),
            lambda: self.keys.open(b"x"),
            lambda: ciphers.room(),
            lambda: (self.program.send(b"y"), self.wait(self.lease(1000))),
        ):
            self.keys = Records(1, 2, lambda *_, use=use: use())
            self.program.send(b"x")
            self.assertRaises(RuntimeError, self.wait, self.lease(1000, keys=self.keys, ciphers=ciphers))
            ciphers.room()

    def test_keys_in_use(self) -> None:
        """Nor does a lease take away what somebody else uses."""
        pool = BufferPool(CIPHER_BUFFER_SIZE)

        def waits(*_: object) -> int:
            self.program.send(b"x")
            for keys, ciphers in ((Records(3, 4), pool), (busy, None)):
                self.assertRaises(RuntimeError, self.wait, self.lease(1000, keys=keys, ciphers=ciphers))
            raise LookupError

        busy = Records(1, 2, waits)
        self.assertRaises(LookupError, busy.sealer.seal, pool, [b"x"], 23)
        self.wait(self.lease(1000, keys=self.keys, ciphers=pool))
        self.assertEqual(self.peers.open(self.peer.recv(9000)), data_header(3, 1) + b"x")

    def test_pools(self) -> None:
        """A pool that is too small for a frame in few pieces is refused, and so are keys given twice."""
        lease = self.lease(1000, keys=self.keys)
        keys = (self.keys.sealer, self.keys.opener)
        self.assertRaises(RuntimeError, lease.encrypt, *keys, BufferPool(CIPHER_BUFFER_SIZE), InvalidTag)
        self.assertRaises(ValueError, self.lease(1000).encrypt, *keys, BufferPool(128 * 1024), InvalidTag)


class Encrypted:
    """A TLS connection that waits for its handshake, between a socket and a link's protocol."""

    def __init__(
        self,
        reactor: Any,
        identity: TLSIdentity,
        protocol: LinkProtocol,
        sock: socket.socket,
        *,
        is_server: bool,
    ) -> None:
        self.protocol = protocol
        self.error: TransportError | None = None
        pool = pool_for(reactor, CIPHER_BUFFER_SIZE)
        self.transport = TLSTransport(reactor, identity, pool_for(reactor), pool, self, is_server=is_server)
        self.socket = transport_for(reactor, sock, self.transport.below, pool)
        self.begin = self.socket.begin

    def tls_established(self, transport: TLSTransport) -> LinkProtocol:
        return self.protocol

    def tls_connected(self, protocol: object) -> None:
        pass

    def tls_failed(self, error: TransportError) -> None:
        self.error = error


class FastPathTests(SynchronousTestCase):
    """
    Two daemons' peers in a reactor of their own, with real sockets everywhere.

    @cvar tls: whether they are joined by TLS.
    @cvar tcp: whether by TCP, and not by a UNIX socket.
    @cvar congestion: the congestion control of TCP; empty for the system's.
    """

    tls = False
    tcp = True
    congestion = b""

    def setUp(self) -> None:
        if native is None:
            raise SkipTest("needs what is compiled: make test-compiled")
        if self.tls and not tlsrecords._CAN_PROTECT:
            raise SkipTest("needs a pyca/cryptography that encrypts into given memory")
        self.seed = int(os.environ.get("RELAYMUX_SEED") or time.time_ns() % 1_000_000)
        self.random = random.Random(self.seed)
        self.reactor: Any = RelayReactor()
        self.addCleanup(self.close_reactor)
        self.directory = tempfile.mkdtemp(prefix="relaymux-")
        self.addCleanup(shutil.rmtree, self.directory)
        logged = capturedLogs()
        self.events: Any = logged.__enter__()
        self.addCleanup(logged.__exit__, None, None, None)
        if self.tls:
            self.identities = [
                Files(
                    Path(tempfile.mkdtemp(dir=self.directory)), own, AUTHORITY.certificate_pem, peer
                ).identity()
                for own, peer in ((CLIENT, "server.example"), (SERVER, "client.example"))
            ]
        self.near = self.peer("far", b"n", dialing=True)
        self.far = self.peer("near", b"f", dialing=False)
        self.links: tuple[Any, Any] = (None, None)
        self.protocols: tuple[Any, Any] = (None, None)
        self.programs: list[Program] = []
        self.addCleanup(self.close_programs)

    def peer(self, name: str, letter: bytes, *, dialing: bool) -> Peer:
        budget = Budget(512 * MIB)
        identity = Identity(f"hv-{letter.decode()}", letter * 16)
        return Peer(self.reactor, name, identity, LIMITS, dialing=dialing, budget=budget)

    def close_reactor(self) -> None:
        self.reactor.removeAll()
        for descriptor in (self.reactor.waker.i, self.reactor.waker.o):
            os.close(descriptor)
        self.reactor._poller.close()

    def close_programs(self) -> None:
        for program in self.programs:
            program.sock.close()

    # What happens

    def run_until(self, condition: Callable[[], bool], what: str) -> None:
        """Have the reactor run until C{condition} holds."""
        until = self.reactor.seconds() + DEADLINE
        while not condition() and self.reactor.seconds() < until:
            self.reactor.iterate(0.01)
        logged = [formatEvent(event) for event in self.events]
        self.assertTrue(condition(), f"seed {self.seed}: never: {what}; {logged[-5:]}")

    def told(self, text: str) -> list[str]:
        """@return: the lines of log with C{text} in them."""
        return [line for line in map(formatEvent, self.events) if text in line]

    def run_for(self, seconds: float) -> None:
        """Have the reactor run for some time."""
        until = self.reactor.seconds() + seconds
        self.run_until(lambda: self.reactor.seconds() > until, "time passed")

    def link(self, *, buffer: int = 0) -> None:
        """
        Join the peers.

        @param buffer: what the kernel may hold of each direction, or 0 for what it likes.
        """
        pair = self.tcp_pair() if self.tcp else socket.socketpair()
        if buffer:
            for sock in pair:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        ends: list[Any] = []
        self.protocols = (self.near.build_link(), self.far.build_link())
        for number, (protocol, sock) in enumerate(zip(self.protocols, pair, strict=True)):
            if self.tls:
                tls = Encrypted(self.reactor, self.identities[number], protocol, sock, is_server=number == 1)
                ends.append(tls.transport)
                self.reactor.callLater(0, tls.begin)
            else:
                ends.append(transport_for(self.reactor, sock, protocol, pool_for(self.reactor)))
                self.reactor.callLater(0, ends[-1].begin)
            if buffer:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        self.links = (ends[0], ends[1])
        self.run_until(lambda: self.near.is_up and self.far.is_up, "the link was up")

    def tcp_pair(self) -> tuple[socket.socket, socket.socket]:
        near, far = tcp_pair(self.congestion)
        for sock in (near, far):
            tune_link(sock)
        return near, far

    def cut(self) -> None:
        """The link breaks, in the middle of whatever there is: at both ends at once, or at one of them."""
        for transport in self.random.choice((self.links, self.links[:1], self.links[1:])):
            transport.abortConnection()

    def serve(self, name: str, near_says: bytes, far_says: bytes) -> tuple[Program, Program]:
        """@return: the programs at the ends of a stream that is open."""
        near_path, far_path = f"{self.directory}/near-{name}", f"{self.directory}/far-{name}"
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(far_path)
            server.listen()
            self.far.register(
                name, LocalDialer(self.reactor, self.far, LocalSocket(name, name, far_path, DEADLINE, 8))
            )
            listener = LocalListener(self.reactor, self.near, LocalSocket(name, name, near_path, DEADLINE, 8))
            bound = bind_unix(near_path)
            port = listen_on(
                self.reactor, bound.socket, listener, pool_for(self.reactor), closed=bound.remove
            )
            near = socket.socket(socket.AF_UNIX)
            near.connect(near_path)
            self.run_until(lambda: listener.totals.opened == 1, "the stream was open")
            far, _ = server.accept()
            port.stopListening()
        programs = Program(near, near_says), Program(far, far_says)
        self.programs += programs
        return programs

    def start(self, *programs: Program) -> None:
        for program in programs:
            program.start()

    def assert_received(self, program: Program, expected: bytes) -> None:
        """Compared without printing megabytes."""
        same = program.received == expected
        self.assertTrue(
            same, f"seed {self.seed}: {len(program.received)} bytes of {len(expected)}, or others"
        )

    def over(self, *programs: Program) -> None:
        """Run until all have come to their end."""
        self.run_until(lambda: not any(program.is_alive() for program in programs), "all programs were done")

    def assert_carried(self, least: int) -> None:
        """Bytes that went the fast way; each counts at both daemons, which share the reactor."""
        self.assertGreater(self.reactor.fast_path.carried, least)


class BulkTests(FastPathTests):
    """Bytes."""

    def test_one_way(self) -> None:
        """A stream arrives as it was sent, most of it the fast way."""
        self.link()
        near, far = self.serve("ram", BULK, b"")
        self.start(near, far)
        self.over(near, far)
        self.assert_received(far, BULK)
        self.assertEqual((near.ended, far.ended, near.broke), (0, 0, 0))
        self.assert_carried(4 * MIB)
        self.run_until(
            lambda: len(self.told("delivered all")) == 2, "the connection's end was told at both ends"
        )
        sent, received = (f"({len(BULK)} bytes) {what}" for what in ("sent", "received"))
        self.assertEqual([len(self.told(text)) for text in (sent, received)], [1, 1])

    def test_both_ways(self) -> None:
        """So do two directions at once."""
        self.link()
        near, far = self.serve("ram", BULK, LESS)
        self.start(near, far)
        self.over(near, far)
        self.assert_received(far, BULK)
        self.assert_received(near, LESS)
        self.assert_carried(4 * MIB)

    def test_several_streams(self) -> None:
        """So do several streams, of which some end before others."""
        self.link()
        ends = [self.serve(f"disk{i}", content(MIB * (6 + 5 * i) + i, i), LESS[: i * MIB]) for i in range(4)]
        self.start(*(program for pair in ends for program in pair))
        self.over(*(program for pair in ends for program in pair))
        for i, (near, far) in enumerate(ends):
            self.assert_received(far, content(MIB * (6 + 5 * i) + i, i))
            self.assert_received(near, LESS[: i * MIB])
        self.assert_carried(0)

    def test_little_room_in_the_kernel(self) -> None:
        """So do they over a link that takes little at a time, which blocks all the time."""
        self.link(buffer=32 * 1024)
        near, far = self.serve("ram", LESS, BULK)
        self.start(near, far)
        self.over(near, far)
        self.assert_received(far, LESS)
        self.assert_received(near, BULK)

    def test_slow_reader(self) -> None:
        """So they do to a program that takes little at a time, and sleeps in between."""
        self.link()
        near, far = self.serve("ram", LESS, LESS)
        far.pace = lambda: time.sleep(self.random.choice((0, 0, 0.001, 0.02)))
        self.start(near, far)
        self.over(near, far)
        self.assert_received(far, LESS)
        self.assert_received(near, LESS)
        self.assert_carried(0)

    def test_both_stop_reading(self) -> None:
        """So they do where both stop reading again and again, for long enough that everything is full."""
        self.link()
        near, far = self.serve("ram", BULK, BULK)
        gate = threading.Event()
        for program in (near, far):
            program.pace = lambda: gate.wait(DEADLINE)
        self.start(near, far)
        for _ in range(12):
            gate.clear()
            self.run_for(0.05)
            gate.set()
            self.run_for(self.random.uniform(0.001, 0.01))
        self.over(near, far)
        self.assert_received(far, BULK)
        self.assert_received(near, BULK)
        self.assert_carried(MIB // 2)  # it is tried less often while little comes of it

    def test_beside_a_stalled_reader(self) -> None:
        """A program that does not read at all holds up its own stream, and no other."""
        self.link()
        stalled, deaf = self.serve("deaf", BULK, b"")
        near, far = self.serve("ram", BULK, b"")
        stalled.start()
        self.start(near, far)
        self.over(near, far)
        self.assert_received(far, BULK)
        self.assert_carried(4 * MIB)
        self.start(deaf)
        self.over(stalled, deaf)
        self.assert_received(deaf, BULK)

    def test_beside_one_who_talks(self) -> None:
        """Requests and answers pass between bulk, and whoever talks is not left to the fast path."""
        self.link()
        near, far = self.serve("ram", BULK, b"")
        asks, answers = self.serve("talk", b"", b"")
        heard = []

        def ask() -> None:
            for number in range(300):
                asks.sock.sendall(b"%8d" % number)
                heard.append(asks.sock.recv(8))
                time.sleep(0.001)

        def answer() -> None:
            for _ in range(300):
                answers.sock.sendall(answers.sock.recv(8))

        talk = [threading.Thread(target=call, daemon=True) for call in (ask, answer)]
        for thread in talk:
            thread.start()
        self.run_until(lambda: len(heard) > 10, "they talked")
        self.start(near, far)
        self.run_until(lambda: len(far.received) > 2 * MIB, "bulk flowed")
        self.assertEqual(self.reactor.fast_path.carried, 0)
        self.run_until(lambda: not any(thread.is_alive() for thread in talk), "all was asked and answered")
        self.over(near, far)
        self.assertEqual(heard, [b"%8d" % number for number in range(300)])
        self.assert_received(far, BULK)


class EndTests(FastPathTests):
    """How streams and links end in the middle of bulk."""

    def test_cuts(self) -> None:
        """Links that break at any moment lose nothing, and bring nothing twice."""
        self.link()
        near, far = self.serve("ram", BULK, BULK)
        self.start(near, far)
        cuts = 0
        while near.is_alive() or far.is_alive():
            self.run_for(self.random.uniform(0.005, 0.05))
            if cuts < 12 and self.near.is_up and self.far.is_up:
                cuts += 1
                self.cut()
                self.run_until(lambda: not (self.near.is_up or self.far.is_up), "both know")
                self.link()
        self.assert_received(far, BULK)
        self.assert_received(near, BULK)
        self.assertGreater(cuts, 2)
        self.assert_carried(4 * MIB)

    def test_sender_resets(self) -> None:
        """A program that goes away without a word ends the other one's connection, as an error."""
        self.link()
        near, far = self.serve("ram", BULK, LESS)
        near.wants = 2 * MIB  # so that it leaves something unread
        self.start(near, far)
        self.run_until(lambda: len(far.received) > 4 * MIB, "bulk flowed")
        near.sock.shutdown(socket.SHUT_RDWR)
        near.sock.close()
        self.over(far)
        self.assertTrue(BULK.startswith(far.received))
        self.assertLess(len(far.received), len(BULK))
        self.assertNotEqual((far.ended, far.broke), (0, 0))
        self.assert_carried(0)

    def test_reader_leaves(self) -> None:
        """A program that takes nothing more stops the other one; the other direction goes on."""
        self.link()
        near, far = self.serve("ram", BULK, LESS)
        far.wants = 6 * MIB
        self.start(near, far)
        self.run_until(lambda: len(far.received) >= far.wants, "enough was read")
        far.sock.shutdown(socket.SHUT_RD)
        self.over(near, far)
        self.assertTrue(BULK.startswith(far.received))
        self.assert_received(near, LESS)
        self.assertIn(near.broke, (errno.EPIPE, errno.ECONNRESET))

    def test_half_close(self) -> None:
        """An end of one direction arrives behind its last byte, while the other one is full."""
        self.link()
        near, far = self.serve("ram", content(3 * MIB + 1, 9), BULK)
        self.start(near, far)
        self.over(near, far)
        self.assert_received(far, content(3 * MIB + 1, 9))
        self.assert_received(near, BULK)
        self.assertEqual((near.ended, far.ended, near.broke, far.broke), (0, 0, 0, 0))

    def test_no_memory(self) -> None:
        """Where nobody can know any more what was said, the session ends with a reason, at both ends."""
        self.link()
        near, far = self.serve("ram", BULK, b"")
        self.start(near, far)
        self.run_until(lambda: len(far.received) > 4 * MIB, "bulk flowed")
        fast_path, protocol = self.reactor.fast_path, self.protocols[0]
        ways: list[Any] = []

        def lease() -> bool:
            ways.append(fast_path._lease(protocol, self.reactor._poller.fileno()))
            return ways[-1] is not None

        self.run_until(lease, "there was something to lease")
        ways[-1].lease.settle()  # so that the next time fails, as it would without memory
        fast_path._settle(ways[-1:], self.reactor.seconds())
        self.run_until(lambda: not (self.near.open_streams or self.near.is_up), "the session was over")
        self.link()
        self.run_until(lambda: self.far.open_streams == 0, "the other end was told")
        self.over(near, far)
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)
        self.assertTrue(BULK.startswith(far.received))
        self.assertNotEqual((near.broke, far.ended), (0, 0))
        self.assertEqual(len(self.told("cannot go on behind the fast path")), 1)
        self.assertIn("out of memory", " ".join(self.told("")))

    def test_fault_of_the_peer(self) -> None:
        """A peer that breaks the protocol within bulk ends the session, for the same reason as ever."""
        self.link()
        near, far = self.serve("ram", BULK, b"")
        self.start(near, far)
        self.run_until(lambda: len(far.received) > 4 * MIB, "bulk flowed")
        protocol = self.protocols[0]
        assert isinstance(protocol, LinkProtocol)
        session = protocol.link.session
        assert session is not None
        stream_id = next(iter(session.streams))
        session.streams[stream_id].send.window.limit = 1 << 60  # and so it sends what it may not
        session.growth = None
        receiver = self.protocols[1].link.session.streams[stream_id].receive.window
        receiver.size = receiver.granted = receiver.received
        self.run_until(lambda: self.far.open_streams == 0, "the stream was over")
        told = " ".join(formatEvent(event) for event in self.events)
        self.assertIn("FLOW_CONTROL_ERROR", told)
        self.over(near, far)
        self.assertTrue(BULK.startswith(far.received))


class BulkOverTLSTests(BulkTests):
    """The same over TLS."""

    tls = True

    def test_windows(self) -> None:
        """They may be as large as where pages are passed on."""
        self.link()
        near, far = self.serve("ram", BULK, LESS)
        self.start(near, far)
        self.over(near, far)
        self.assert_carried(4 * MIB)
        for protocol in self.protocols:
            self.assertEqual(protocol.link.session.growth.turn, WIDE_TURN_SECONDS)

    def test_new_keys(self) -> None:
        """Keys that are used up within bulk are followed by new ones, and no byte is lost."""
        self.patch(tlsrecords, "KEY_RECORDS", 1000)
        self.patch(tlsrecords, "LENT_RECORDS", 100)
        self.link()
        near, far = self.serve("ram", BULK, BULK)
        self.start(near, far)
        self.over(near, far)
        self.assert_received(far, BULK)
        self.assert_received(near, BULK)
        for transport in self.links:
            used = transport._records._sealer.records
            self.assertLess(used, 2500, "of more than 3000")
        self.assert_carried(4 * MIB)

    def test_closed_in_order(self) -> None:
        """Connections that one end closes as TLS wants it, in the middle of bulk, lose nothing."""
        self.link()
        near, far = self.serve("ram", BULK, BULK)
        self.start(near, far)
        for _ in range(4):
            self.run_for(self.random.uniform(0.02, 0.05))
            if not (self.near.is_up and self.far.is_up):
                break
            self.random.choice(self.links).loseConnection()
            self.run_until(lambda: not (self.near.is_up or self.far.is_up), "both know")
            self.link()
        self.over(near, far)
        self.assert_received(far, BULK)
        self.assert_received(near, BULK)
        self.assert_carried(4 * MIB)


class EndsOverTLSTests(EndTests):
    """The same over TLS."""

    tls = True
