"""Bulk that is passed on and not copied: the same in every other way."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import importlib
import itertools
import os
import random
import select
import socket
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import SkipTest

from cryptography.exceptions import InvalidTag

from relaymux.core.frames import Kind, data_header, encode
from relaymux.core.growth import TURN_SECONDS, WIDE_TURN_SECONDS
from relaymux.net import pages
from relaymux.net.compiled import native
from relaymux.net.families import NOTSENT_LOWAT, PACED_NOTSENT_LOWAT, tune_link
from relaymux.net.fastpath import COPIED_LEASES
from relaymux.net.pages import MOST_PAGES, PageStock
from tests import test_fastpath as copied
from tests.sockets import content
from tests.wire import join, parse, u64

#: Credit, and a window for as much, that no test uses up.
PLENTY = 1 << 24
WIDE = (0, 0, PLENTY, PLENTY, PLENTY // 2)

#: socket(7); Python has no name for it.
SO_SNDBUFFORCE = 32

#: Seconds for which a lease lasts that something ends before.
LONG = 10.0


def drain(sock: socket.socket) -> bytes:
    """@return: what waits in a socket."""
    found = b""
    with contextlib.suppress(BlockingIOError):
        while piece := sock.recv(1 << 20):
            found += piece
    return found


def fill(sock: socket.socket) -> int:
    """@return: how many bytes a socket took until it takes no more."""
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            count += sock.send(bytes(4096))
    return count


def unread(sock: socket.socket) -> int:
    """@return: bytes that the peer of a UNIX socket has not read (unix(7))."""
    return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def waiting(sock: socket.socket) -> int:
    """@return: bytes that can be read of a socket."""
    return int.from_bytes(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)), sys.byteorder)


def open_files() -> set[int]:
    """@return: the descriptors of this process, without the one that was used to look."""
    return {int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}


class PagesTestCase(copied.LeaseTestCase):
    """
    Something that ends a lease, and what happens while one lasts.

    @ivar copied: the memory that a lease had used before it was settled.
    """

    def setUp(self) -> None:
        super().setUp()
        assert native is not None
        self.pages = native.Pages()
        self.copied = 0
        self.stopped, self.stop = self.sockets()
        self.epoll.register(self.stopped, select.EPOLLIN)

    def join_anew(self) -> None:
        """Other sockets for the link and the program, in which nothing is."""
        for sock in (self.link, self.local):
            self.epoll.unregister(sock)
        self.link, self.peer = self.link_sockets()
        self.local, self.program = self.sockets()
        for sock in (self.link, self.local):
            self.epoll.register(sock, select.EPOLLIN)

    def room_for(self, sock: socket.socket) -> None:
        """Have C{sock} take many small pieces, more than it usually would."""
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 1 << 22)
        except PermissionError:
            raise SkipTest("only root may have so much in a socket") from None

    def ends_by_itself(self, lease: Any) -> Any:
        """
        Wait for a lease that has a reason to end.

        @return: what it is settled with.
        """
        alarm = threading.Timer(LONG / 2, self.stop.send, (b"x",))
        alarm.start()
        happened = self.wait(lease, LONG)
        alarm.cancel()
        self.assertEqual(happened, [])
        return lease.settle()

    def carry(self, lease: Any, *calls: Callable[[], object]) -> Any:
        """
        Wait for C{lease} while C{calls} are made, each in a thread of its own, until the last one of them
        has returned.

        @return: what it is settled with.
        """
        failed: list[BaseException] = []

        def run(call: Callable[[], object], ends: bool) -> None:
            try:
                call()
            except BaseException as error:
                failed.append(error)
            if ends:
                self.stop.send(b"x")

        threads = [
            threading.Thread(target=run, args=(call, call is calls[-1]), daemon=True) for call in calls
        ]
        for thread in threads:
            thread.start()
        happened = self.wait(lease, LONG)
        for thread in threads:
            thread.join(LONG)
        self.copied = self.pool.held_bytes
        self.assertEqual(failed, [])
        self.assertEqual(happened, [(self.stopped.fileno(), select.EPOLLIN)])
        self.stopped.recv(1)
        return lease.settle()

    def blocking(self, *socks: socket.socket) -> None:
        for sock in socks:
            sock.settimeout(LONG)

    def receive(self, sock: socket.socket, count: int) -> bytes:
        """@return: C{count} bytes of a socket that blocks."""
        found = b""
        while len(found) < count:
            found += sock.recv(count - len(found))
        return found


class SameTests(copied.LeaseTests):
    """What a lease does when it copies it does when it does not."""

    def setUp(self) -> None:
        super().setUp()
        assert native is not None
        self.pages = native.Pages()


class SendTests(PagesTestCase):
    """From local sockets to the link."""

    def speak(self, data: bytes, size: int) -> Callable[[], None]:
        """@return: what has the program say C{data}, in pieces of C{size}."""

        def call() -> None:
            for start in range(0, len(data), size):
                self.program.sendall(data[start : start + size])

        return call

    def hear(self, length: int, heard: list[bytes], *, lag: int) -> Callable[[], None]:
        """
        @return: what has the peer read frames, until there are C{length} bytes in all that were C{heard}, and
            acknowledge all but the last ones.
        """

        def call() -> None:
            while sum(len(frame) - 12 for frame in heard) < length:
                header = self.receive(self.peer, 12)
                heard.append(header + self.receive(self.peer, int.from_bytes(header[8:12], "big")))
                if len(heard) > lag:
                    end = sum(map(len, heard[: len(heard) - lag]))
                    self.peer.sendall(encode(Kind.ACK, 0, u64(end)))

        return call

    def check(self, data: bytes, size: int, *, lag: int, turn: int = 1 << 19) -> list[bytes]:
        """
        Have C{data} carried, and look at what was received and at what is kept.

        @return: the frames.
        """
        self.blocking(self.program, self.peer)
        lease = self.lease(PLENTY, turn=turn)
        heard: list[bytes] = []
        settled = self.carry(lease, self.speak(data, size), self.hear(len(data), heard, lag=lag))
        self.assertEqual(b"".join(frame[12:] for frame in heard), data)
        kept = [join(buffers) for _, buffers in settled[4]]
        self.assertGreaterEqual(len(kept), min(lag, len(heard)))
        self.assertEqual(kept, heard[len(heard) - len(kept) :])
        self.assertEqual((settled[0], settled[5]), (sum(map(len, heard)), []))
        return heard

    def test_kept_until_acknowledged(self) -> None:
        """What was sent is given back as it was, but for what was acknowledged; before, nothing is copied."""
        self.check(content(9 << 20), 64 * 1024, lag=2)
        self.assertLessEqual(self.copied, 2 * self.pool.size)

    def test_nothing_acknowledged(self) -> None:
        """All of it is, if nothing was."""
        self.check(content(1 << 20), 64 * 1024, lag=64)

    def test_little_at_a_time(self) -> None:
        """A program that says few bytes at a time fills the pipes with them: what is beyond is copied."""
        for lag in (40, 20, 3):
            data = content(30 * 6_000, lag)
            heard: list[bytes] = []

            def steps(data: bytes = data, heard: list[bytes] = heard, lag: int = lag) -> None:
                for limit in range(6_000, len(data) + 1, 6_000):
                    for start in range(limit - 6_000, limit, 100):
                        self.program.sendall(data[start : start + 100])
                    self.peer.sendall(encode(Kind.CREDIT, 3, u64(limit, 0)))
                    self.hear(limit, heard, lag=lag)()

            self.blocking(self.program, self.peer)
            settled = self.carry(self.lease(0), steps)
            self.assertEqual(b"".join(frame[12:] for frame in heard), data)
            kept = [join(buffers) for _, buffers in settled[4]]
            self.assertEqual(kept, heard[-len(kept) :])
            self.assertGreaterEqual(len(kept), min(lag, len(heard)))

    def test_small_frames(self) -> None:
        """So it is with many frames in one pipe, and with one of which there was room for a part."""
        self.check(content(400_000), 30_000, lag=50, turn=20_000)

    def test_more_than_a_pipe_holds(self) -> None:
        """More pieces than a pipe has places for arrive in their order, and each header before its frame."""
        self.room_for(self.program)
        data = content(256 * 100)
        for start in range(0, len(data), 100):
            self.program.send(data[start : start + 100])
        lease = self.lease(PLENTY)
        self.wait(lease)
        settled = lease.settle()
        frames = [data_header(3, len(part)) + part for part in (data[: 255 * 100], data[255 * 100 :])]
        self.assertEqual([join(buffers) for _, buffers in settled[4]], frames)
        self.assertEqual(drain(self.peer) + join(settled[5]), b"".join(frames))

    def say_each(self, sizes: Iterable[int], heard: Callable[[], int]) -> Iterator[bytes]:
        """
        Have the program say something, and wait until it has been sent.

        @param sizes: bytes of each.
        @param heard: how many bytes the peer has of the link so far.
        @return: the frames that are to come of it, one by one.
        """
        for size in sizes:
            frame, before = data_header(3, size) + content(size, size), heard()
            self.program.sendall(frame[12:])
            until = time.monotonic() + LONG
            while heard() < before + len(frame) and time.monotonic() < until:
                time.sleep(0.0002)
            yield frame

    def test_headers_wait(self) -> None:
        """Frames that the peer leaves in its socket stay as they are, whatever is sent after them."""
        self.room_for(self.link)
        self.blocking(self.program)
        sent: list[bytes] = []
        for start in range(0, 240, 60):
            lease = self.lease(PLENTY, before=(sum(map(len, sent)),) if sent else ())
            sizes = range(1 + start, 61 + start)
            self.carry(lease, lambda: sent.extend(self.say_each(sizes, lambda: waiting(self.peer))))  # noqa: B023
        self.assertEqual(drain(self.peer), b"".join(sent))

    def test_headers_of_nothing(self) -> None:
        """Nor does what brings no bytes change them, as urgent data does not: it is not passed on."""
        self.blocking(self.program)
        frame = data_header(3, 1000) + content(1000)
        got = b""

        def steps() -> None:
            nonlocal got
            self.program.sendall(frame[12:])
            for _ in range(300):
                self.program.send(b"!", socket.MSG_OOB)
                time.sleep(0.0005)
            self.program.sendall(frame[12:])
            until = time.monotonic() + LONG
            while waiting(self.peer) < 2 * len(frame) and time.monotonic() < until:
                time.sleep(0.001)
            got = drain(self.peer)

        try:
            self.sockets()[0].send(b"!", socket.MSG_OOB)
        except OSError:
            raise SkipTest("this kernel has no urgent data on UNIX sockets") from None
        self.carry(self.lease(PLENTY), steps)
        said = parse(got)  # some of what was urgent, too, in frames of its own
        self.assertEqual({(kind, stream_id) for kind, stream_id, _ in said}, {(Kind.DATA, 3)})
        self.assertEqual((said[0][2], said[-1][2]), (frame[12:], frame[12:]))

    def test_end_of_nothing(self) -> None:
        """A program that ends and has said nothing leaves nothing in the pipes for the next lease."""
        self.program.shutdown(socket.SHUT_WR)
        settled = self.ends_by_itself(self.lease(PLENTY))
        self.assertEqual((settled[8][0][8], settled[4]), (-1, []))
        link, peer = self.link, self.peer
        self.join_anew()
        self.program.send(b"next")
        lease = self.lease(PLENTY)
        self.wait(lease)
        self.assertEqual(drain(self.peer), data_header(3, 4) + b"next")
        self.assertEqual(drain(peer), b"")
        self.assertEqual([join(buffers) for _, buffers in lease.settle()[4]], [data_header(3, 4) + b"next"])
        link.close()

    def test_headers_are_acknowledged(self) -> None:
        """So it is within a lease, with as many frames as may be that are not acknowledged."""
        self.room_for(self.link)
        self.blocking(self.program)
        sent: list[bytes] = []
        got = b""

        def heard() -> int:
            return len(got) + waiting(self.peer)

        def steps() -> None:
            nonlocal got
            for start in range(0, 180, 60):
                sizes = range(1 + start, 61 + start)
                sent.extend(self.say_each(sizes, heard))
                got += drain(self.peer)
                self.peer.send(encode(Kind.ACK, 0, u64(len(got))))

        self.carry(self.lease(PLENTY), steps)
        self.assertEqual(got, b"".join(sent))

    def test_link_takes_no_more(self) -> None:
        """What the link has not taken of a frame is given back behind what it has, wherever that ends."""
        data = content(150_000)
        for room in (0, 1, 5, 12, 13, 20_000, 100_000):
            taken = fill(self.link)
            with contextlib.suppress(BlockingIOError):
                self.receive(self.peer, min(taken, room + 8192) if room else 0)
            self.program.send(data)
            lease = self.lease(PLENTY)
            self.assertTrue(lease.owe([b"a" * 100]))
            self.wait(lease)
            settled = lease.settle()
            wire = drain(self.peer)
            wire = wire[wire.find(b"a") :] if b"a" in wire else b""
            wire += join(settled[5])
            sent = b"".join(join(buffers) for _, buffers in settled[4])
            self.assertEqual(wire, b"a" * 100 + sent)
            self.assertEqual(sent[12:] + drain(self.local), data)

    def test_slow_link(self) -> None:
        """A link that takes little at a time blocks again and again, and gets everything in its order."""
        self.link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self.check(content(700_000), 50_000, lag=3)

    def test_end(self) -> None:
        """The end of what a program says comes behind all of it."""
        self.program.send(content(3000))
        self.program.shutdown(socket.SHUT_WR)
        lease = self.lease(PLENTY)
        settled = self.ends_by_itself(lease)
        self.assertEqual(drain(self.peer), data_header(3, 3000) + content(3000))
        self.assertEqual(settled[8][0][8], -1)

    def test_link_is_gone(self) -> None:
        """A link that takes nothing any more ends the lease, with the reason; all that was sent is kept."""
        self.peer.close()
        self.program.send(content(3000))
        lease = self.lease(PLENTY)
        self.wait(lease)
        settled = lease.settle()
        self.assertIn(settled[9], (errno.EPIPE, errno.ECONNRESET, 0))
        if settled[9]:
            self.assertEqual(
                [join(buffers) for _, buffers in settled[4]], [data_header(3, 3000) + content(3000)]
            )
            self.assertEqual(join(settled[5]), data_header(3, 3000) + content(3000))


class PlacesTests(PagesTestCase):
    """Frames that fill the places of pipes, exactly and in part, over a UNIX link."""

    def say(self, data: bytes) -> None:
        """Have the program say C{data}, 100 bytes at a time, each of which takes a place."""
        for start in range(0, len(data), 100):
            self.program.sendall(data[start : start + 100])

    def check(self, sizes: Iterable[int], lags: Iterator[int]) -> None:
        """
        Have frames carried one by one.

        @param sizes: their payload.
        @param lags: after each frame, how many of them are not to be acknowledged.
        """
        self.room_for(self.program)
        self.blocking(self.program, self.peer)
        heard: list[bytes] = []
        sizes = list(sizes)
        data = content(sum(sizes), len(sizes))

        def call() -> None:
            said, acked = 0, 0
            for size in sizes:
                self.say(data[said : said + size])
                said += size
                self.peer.sendall(encode(Kind.CREDIT, 3, u64(said, 0)))
                while sum(len(frame) - 12 for frame in heard) < said:
                    header = self.receive(self.peer, 12)
                    heard.append(header + self.receive(self.peer, int.from_bytes(header[8:12], "big")))
                end = sum(map(len, heard[: max(0, len(heard) - next(lags))]))
                if end > acked:
                    acked = end
                    self.peer.sendall(encode(Kind.ACK, 0, u64(end)))

        settled = self.carry(self.lease(0), call)
        self.assertEqual(b"".join(frame[12:] for frame in heard), data)
        kept = [join(buffers) for _, buffers in settled[4]]
        self.assertEqual(kept, heard[len(heard) - len(kept) :])
        self.peer.setblocking(False)

    def test_whole_and_half_pipes(self) -> None:
        """Frames that fill a pipe, half of one, or more than half, with some of them not acknowledged."""
        for size in (25_600, 12_800, 20_000):
            for lag in (1, 2, 3, 4, 5):
                self.join_anew()
                self.check([size] * 20, itertools.repeat(lag))

    def test_any(self) -> None:
        """Frames of any size, acknowledged at any time."""
        seed = int(os.environ.get("RELAYMUX_SEED") or time.time_ns() % 1_000_000)
        print(f"seed {seed}")
        chance = random.Random(seed)
        for _ in range(20):
            self.join_anew()
            sizes = [
                chance.choice([100, 3000, 6400, 12_000, 12_800, 13_000, 20_000, 25_600]) for _ in range(25)
            ]
            most = chance.choice([1, 2, 3, 5, 9])
            self.check(sizes, (chance.randint(0, most) for _ in itertools.count()))

    def test_link_blocks(self) -> None:
        """A link that takes little at a time gets header and payload in their order, wherever they are."""
        data = content(4 * 25_600)
        self.room_for(self.program)
        self.link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self.say(data)
        self.blocking(self.peer)
        got: list[bytes] = []

        def call() -> None:
            while sum(map(len, got)) < len(data):
                got.append(self.receive(self.peer, int.from_bytes(self.receive(self.peer, 12)[8:], "big")))

        self.carry(self.lease(PLENTY), call)
        self.assertEqual(b"".join(got), data)

    def test_link_full(self) -> None:
        """What is in both pipes before a link that takes no more is given back in its order."""
        data = content(2 * 25_600)
        for room in (0, 1, 5000, 12_000, 20_000, 25_500, 25_612, 26_000):
            self.join_anew()
            self.room_for(self.program)
            taken = fill(self.link)
            if room:
                self.blocking(self.peer)
                self.receive(self.peer, room)
                self.peer.setblocking(False)
            self.say(data)
            lease = self.lease(PLENTY)
            self.wait(lease, 0.002)
            settled = lease.settle()
            sent = b"".join(join(buffers) for _, buffers in settled[4])
            self.assertEqual(drain(self.peer)[taken - room :] + join(settled[5]), sent)
            payload = b"".join(found for _, _, found in parse(sent))
            self.assertEqual(payload + drain(self.local), data)

    def test_control_byte_by_byte(self) -> None:
        """A CREDIT behind DATA whose bytes come one by one is Python's, if it is in too many pieces."""
        self.blocking(self.peer, self.program)
        credit = encode(Kind.CREDIT, 3, u64(70_000, 0))

        def call() -> None:
            self.peer.sendall(data_header(3, 5) + b"first")
            self.receive(self.program, 5)
            for place in range(len(credit)):
                self.peer.sendall(credit[place : place + 1])
                until = time.monotonic() + LONG
                while unread(self.peer) and time.monotonic() < until and thread.is_alive():
                    time.sleep(0.0005)

        lease = self.lease(0, window=WIDE)
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        settled = self.ends_by_itself(lease)
        self.assertEqual((settled[2], settled[8][0][2]), (17, 0))
        begun = join(settled[6])
        self.assertEqual(begun, credit[: len(begun)])
        self.assertGreater(len(begun), 12)
        drained = b""
        while len(begun) + len(drained) < len(credit):
            drained += drain(self.link)
            time.sleep(0.001)
        thread.join(LONG)
        self.assertEqual(begun + drained, credit)

    def test_many_pieces_before(self) -> None:
        """A frame of which much is in memory, and more than a pipe's places arrive, is left to Python."""
        self.room_for(self.peer)
        frame = data_header(3, 60_000) + content(60_000)
        pieces = [frame[:12], *(frame[start : start + 100] for start in range(12, 1112, 100))]
        lease = self.lease(0, window=WIDE)
        self.assertTrue(lease.feed(pieces))
        for start in range(1112, len(frame), 30):
            self.peer.send(frame[start : start + 30])
        settled = self.ends_by_itself(lease)
        self.assertEqual((settled[2], settled[7]), (0, 0))
        self.assertEqual(join(settled[6]) + drain(self.link), frame)
        self.assertTrue(self.pages.was_full)

    def test_copied_and_passed_on(self) -> None:
        """What was copied of a frame reaches a program that takes little before what was not."""
        for size in (1, 7, 30):
            self.join_anew()
            self.room_for(self.peer)
            self.local.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            small, length = 300 * size, 300 * size + 60_000
            frame = data_header(3, length) + content(length)
            for start in range(0, 12 + small, size):
                self.peer.send(frame[start : min(start + size, 12 + small)])
            self.peer.send(frame[12 + small :])
            lease = self.lease(0, window=WIDE)
            self.wait(lease, 0.02)
            settled = lease.settle()
            got = drain(self.program) + join(settled[8][0][7])
            self.assertEqual(got, content(length)[: settled[8][0][4]])
            rest = join(settled[6]) + drain(self.link)
            self.assertEqual(got + rest[-(length - len(got)) :] if rest else got, content(length))


class ReceiveTests(PagesTestCase):
    """From the link to local sockets."""

    def test_delivered(self) -> None:
        """Frames arrive, in whatever pieces: many small ones are copied, where no pipe has room for them."""
        self.blocking(self.peer, self.program)
        for frames, length, size in ((60, 100_000, 100_000), (3, 60_000, 30), (2, 5_000, 1), (900, 37, 997)):
            data = content(frames * length, size)
            got: list[bytes] = []

            def pass_through(
                data: bytes = data, length: int = length, size: int = size, got: list[bytes] = got
            ) -> None:
                for start in range(0, len(data), length):
                    frame = data_header(3, length) + data[start : start + length]
                    for place in range(0, len(frame), size):
                        self.peer.sendall(frame[place : place + size])
                    waiting = start + length - sum(map(len, got))
                    if waiting >= 2_000 or start + length == len(data):
                        got.append(self.receive(self.program, waiting))

            settled = self.carry(self.lease(0, window=WIDE), pass_through)
            self.assertEqual(b"".join(got), data)
            if self.link.family == socket.AF_UNIX:  # TCP joins what has arrived
                self.assertEqual(bool(self.pages.was_full), length > 256 * size)
            total = len(data)
            self.assertEqual((settled[2], settled[8][0][4:6]), (total + 12 * frames, (total, total)))
            self.assertEqual((join(settled[6]), join(settled[8][0][7])), (b"", b""))
            self.peer.setblocking(False)
            drain(self.peer)  # what was answered
            self.blocking(self.peer)

    def test_in_two_leases(self) -> None:
        """A frame whose middle is the end of a lease is delivered when it is complete, and not before."""
        frame = data_header(3, 100_000) + content(100_000)
        for cut in (1, 5, 12, 13, 50_000, 100_011):
            self.peer.send(frame[:cut])
            lease = self.lease(0, window=WIDE)
            self.wait(lease)
            settled = lease.settle()
            self.assertEqual((settled[2], join(settled[6])), (0, frame[:cut]))
            self.assertRaises(BlockingIOError, self.program.recv, 1)
            lease = self.lease(0, window=WIDE)
            self.assertTrue(lease.feed(settled[6]))
            self.peer.send(frame[cut:] + frame[:cut])
            self.wait(lease)
            self.assertEqual(drain(self.program), content(100_000))
            settled = lease.settle()
            self.assertEqual((settled[2], join(settled[6])), (len(frame), frame[:cut]))

    def test_control_in_two_leases(self) -> None:
        """So is a CREDIT whose middle is the end of a lease, and an ACK."""
        credit = encode(Kind.CREDIT, 3, u64(3500, 0))
        for frame in (credit, encode(Kind.ACK, 0, u64(0))):
            for cut in range(1, len(frame)):
                self.peer.send(frame[:cut])
                lease = self.lease(0, window=WIDE)
                self.wait(lease, 0.002)
                settled = lease.settle()
                self.assertEqual((settled[2], join(settled[6])), (0, frame[:cut]))
                lease = self.lease(0, window=WIDE)
                self.assertTrue(lease.feed(settled[6]))
                self.peer.send(frame[cut:] + data_header(3, 4) + b"next")
                self.wait(lease, 0.002)
                settled = lease.settle()
                self.assertEqual(drain(self.program), b"next")
                self.assertEqual(settled[8][0][2], 3500 if frame is credit else 0)
                self.assertEqual((join(settled[6]), settled[7]), (b"", 0))

    def test_program_takes_no_more(self) -> None:
        """What a program does not take is given back, and so is what comes behind it, or it stays."""
        self.local.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        data = content(120_000)
        sent = b"".join(data_header(3, 40_000) + data[i : i + 40_000] for i in range(0, 120_000, 40_000))
        self.assertEqual(self.peer.send(sent), len(sent))
        lease = self.lease(0, window=WIDE)
        self.wait(lease)
        settled = lease.settle()
        stream = settled[8][0]
        delivered = drain(self.program)
        self.assertEqual(len(delivered), stream[5])
        self.assertLess(len(delivered), stream[4])
        known = settled[2] // 40_012
        self.assertEqual(delivered + join(stream[7]), data[: 40_000 * known])
        self.assertEqual(join(settled[6]) + drain(self.link), sent[settled[2] :])

    def test_answers(self) -> None:
        """What was delivered is answered, and what the peer says beside it is understood."""
        payload = content(2000)
        self.peer.send(
            encode(Kind.CREDIT, 3, (2500).to_bytes(8, "big") + bytes(8))
            + data_header(3, 2000)
            + payload
            + encode(Kind.CREDIT, 3, (3500).to_bytes(8, "big") + bytes(8))
            + data_header(3, 2000)
            + payload
        )
        self.program.send(content(3000))
        lease = self.lease(1000, ack_bytes=1)
        self.wait(lease)
        self.assertEqual(drain(self.program), payload * 2)
        said = parse(drain(self.peer))
        self.assertEqual(b"".join(found for kind, _, found in said if kind == Kind.DATA), content(3000))
        self.assertIn((Kind.CREDIT, 3, u64(8000, 4000)), said)
        self.assertEqual(lease.settle()[8][0][2], 3500)

    def test_link_ends(self) -> None:
        """The end of the link comes behind what it has brought."""
        for half in (b"", b"\x13\0", data_header(3, 100), data_header(3, 100) + b"half"):
            self.epoll.unregister(self.link)
            self.link, peer = self.sockets()
            self.epoll.register(self.link, select.EPOLLIN)
            peer.send(data_header(3, 2000) + content(2000) + half)
            peer.shutdown(socket.SHUT_WR)
            lease = self.lease(0, window=WIDE)
            self.assertEqual(self.wait(lease), [])
            settled = lease.settle()
            self.assertEqual(drain(self.program), content(2000))
            self.assertEqual((join(settled[6]), settled[7]), (half, -1))


class OverTCP(copied.LeaseTestCase):
    """The link is a TCP connection."""

    def link_sockets(self) -> tuple[socket.socket, socket.socket]:
        pair = copied.tcp_pair(b"reno")
        for sock in pair:
            tune_link(sock)
            sock.setblocking(False)
            self.addCleanup(sock.close)
        return pair


class SameOverTCPTests(OverTCP, SameTests):
    """The same over TCP."""


class SendOverTCPTests(OverTCP, SendTests):
    """The same over TCP."""


class ReceiveOverTCPTests(OverTCP, ReceiveTests):
    """The same over TCP."""

    def test_urgent(self) -> None:
        """Urgent data, which nobody should send and C{splice} does not pass, is Python's, who does."""
        frame = data_header(3, 40_000) + content(40_000)
        self.blocking(self.peer)
        self.peer.sendall(frame[:20_000])
        self.peer.send(b"!", socket.MSG_OOB)
        self.peer.sendall(frame[20_000:])
        settled = self.ends_by_itself(self.lease(0, window=WIDE))
        rest = b""
        while len(rest) < len(frame) - len(join(settled[6])):
            rest += self.receive(self.link, 1)
        self.assertEqual(join(settled[6]) + rest, frame)


class OwnerTests(PagesTestCase):
    """Who has the pipes."""

    def test_one_lease_at_a_time(self) -> None:
        """Another lease cannot have them until that one is settled, nor one that encrypts, or has some."""
        lease = self.lease(1000)
        other = self.lease_without()
        self.assertRaises(RuntimeError, other.pass_on, self.pages, 1, 1, True)
        lease.settle()
        other.pass_on(self.pages, 1, 1, True)
        assert native is not None
        self.assertRaises(RuntimeError, other.pass_on, native.Pages(), 1, 1, True)
        self.assertRaises(TypeError, other.pass_on, object(), 1, 1, True)
        keys = copied.Records(1, 2)
        wanted = (keys.sealer, keys.opener, keys.pool, InvalidTag)
        self.assertRaises(RuntimeError, other.encrypt, *wanted)
        self.pages = None
        encrypted = self.lease(1000, keys=keys)
        self.assertRaises(RuntimeError, encrypted.pass_on, native.Pages(), 1, 1, True)

    def test_turn(self) -> None:
        """A turn in which nothing can be read would be one after the other."""
        self.assertRaises(ValueError, self.lease_without().pass_on, self.pages, 0, 1, True)

    def test_no_memory(self) -> None:
        """What could not be settled for want of memory is not settled in part by another try."""
        try:
            testing = importlib.import_module("_testcapi")
        except ImportError:
            raise SkipTest("this Python cannot have its memory fail") from None
        assert native is not None
        failed = 0
        for count in range(1, 40):
            self.pages = native.Pages()
            self.peer.send(data_header(3, 50_000) + content(9000))
            self.program.send(content(20_000))
            lease = self.lease(PLENTY, window=WIDE)
            self.wait(lease)
            testing.set_nomemory(count, count + 1)
            try:
                lease.settle()
            except MemoryError:
                failed += 1
            finally:
                testing.remove_mem_hooks()
            self.assertRaises(RuntimeError, lease.settle)
            for sock in (self.peer, self.link):
                drain(sock)
        self.assertGreater(failed, 5)

    def lease_without(self) -> Any:
        kept, self.pages = self.pages, None
        lease = self.lease(1000)
        self.pages = kept
        return lease

    def test_closed(self) -> None:
        """Their descriptors are closed with the last one who has them, and no child gets any."""
        assert native is not None
        before = open_files()
        made = native.Pages()
        own = open_files() - before
        self.assertEqual(len(own), 13)
        self.assertFalse(any(map(os.get_inheritable, own)))
        lease = self.lease_without()
        lease.pass_on(made, 1, 1, True)
        del made
        self.assertEqual(open_files() - before, own)
        del lease
        self.assertEqual(open_files(), before)

    def test_stock(self) -> None:
        """There are so many and no more; what is given back is used again, and what is lost replaced."""
        stock = PageStock()
        taken = [stock.take() for _ in range(MOST_PAGES)]
        self.assertIsNone(stock.take())
        stock.give_back(taken[1])
        self.assertIs(stock.take(), taken[1])
        self.assertIsNone(stock.take())
        stock.lose()
        self.assertIsNotNone(stock.take())

    def test_kernel_allows_no_pipes(self) -> None:
        """Where the kernel allows none nobody asks again, and one line says so."""

        class Refusing:
            calls = 0

            @classmethod
            def Pages(cls) -> None:
                cls.calls += 1
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

        self.patch(pages, "native", Refusing)
        stock = PageStock()
        self.assertEqual([stock.take() for _ in range(3)], [None] * 3)
        self.assertEqual(Refusing.calls, 1)


def of_leases(test: copied.FastPathTests, number: int, look: Callable[[], object]) -> list[object]:
    """@return: what C{look} finds after leases of one end that pass pages on, copy, and pass on again."""
    fast_path, protocol = test.reactor.fast_path, test.protocols[number]
    protocol.link.session.growth.heard_round_trip(0.0)  # whatever a busy machine made of it

    def lease() -> bool:
        way = fast_path._lease(protocol, test.reactor._poller.fileno())
        fast_path._settle([way] if way is not None else [], test.reactor.seconds())
        return way is not None

    found = []
    for leases in (0, 2 * COPIED_LEASES, 0):
        fast_path._copying[protocol] = leases
        test.run_until(lease, "there was something to lease")
        found.append(look())
    return found


class BulkOverUNIXTests(copied.BulkTests):
    """Bulk over a link of a UNIX socket, whose pages are passed on to it, too."""

    tcp = False

    def assert_carried(self, least: int) -> None:
        super().assert_carried(least)
        self.assertTrue(self.reactor.fast_path._stock._idle, "it was passed on")

    def test_windows(self) -> None:
        """They may be larger where pages are passed on, and no longer when these are copied."""
        self.link()
        near, far = self.serve("ram", copied.BULK, b"")
        far.pace = lambda: time.sleep(0.001)
        self.start(near, far)
        growth = self.protocols[1].link.session.growth
        turns = of_leases(self, 1, lambda: growth.turn)
        self.assertEqual(turns, [WIDE_TURN_SECONDS, TURN_SECONDS, WIDE_TURN_SECONDS])
        self.over(near, far)
        self.assert_received(far, copied.BULK)

    def test_no_pipes(self) -> None:
        """Where the kernel allows no pipes it is copied."""
        self.reactor.fast_path._stock._more = 0
        self.link()
        near, far = self.serve("ram", copied.BULK, copied.LESS)
        self.start(near, far)
        self.over(near, far)
        self.assert_received(far, copied.BULK)
        self.assert_received(near, copied.LESS)
        super().assert_carried(4 * copied.MIB)


class EndsOverUNIXTests(copied.EndTests):
    """How streams and links end there."""

    tcp = False


class BulkOverTCPTests(BulkOverUNIXTests):
    """Bulk over TCP that goes without timers."""

    tcp = True
    congestion = b"reno"

    def link(self, *, buffer: int = 0) -> None:
        super().link(buffer=buffer)
        self.assertFalse(self.links[0].is_paced)

    def test_unsent(self) -> None:
        """What the kernel may hold is no matter of pages there."""
        self.link()
        near, far = self.serve("ram", copied.BULK, copied.LESS)
        self.start(near, far)
        self.over(near, far)
        self.assert_carried(4 * copied.MIB)
        for link in self.links:
            most = link.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
            self.assertEqual(most, NOTSENT_LOWAT)

    def test_little_at_a_time(self) -> None:
        """A link that brings few bytes with each page has them copied for a while, as that costs less."""
        self.link()
        near, far = self.serve("ram", copied.BULK, b"")
        self.start(near, far)
        self.run_until(lambda: len(far.received) > 4 * copied.MIB, "bulk flowed")
        fast_path, protocol = self.reactor.fast_path, self.protocols[1]
        ways: list[Any] = []

        def lease() -> bool:
            way = fast_path._lease(protocol, self.reactor._poller.fileno())
            if way is not None and way.pages is None:
                fast_path._settle([way], self.reactor.seconds())
                return False
            ways.append(way)
            return way is not None

        class Full:
            was_full = 1

        self.run_until(lease, "there was something to lease")
        real, ways[-1].pages = ways[-1].pages, Full()
        fast_path._settle(ways[-1:], self.reactor.seconds())
        fast_path._stock._idle.pop()
        fast_path._stock.give_back(real)
        taken = [fast_path._pages_for(protocol) for _ in range(COPIED_LEASES + 1)]
        self.assertEqual(taken, [None] * COPIED_LEASES + [real])
        fast_path._stock.give_back(real)
        self.over(near, far)
        self.assert_received(far, copied.BULK)


class BulkOverPacedTCPTests(copied.FastPathTests):
    """Bulk over TCP that sends by timers."""

    congestion = b"bbr"

    def setUp(self) -> None:
        super().setUp()
        available = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_bytes().split()
        if self.congestion not in available:
            raise SkipTest("this kernel has no bbr")

    def link(self, *, buffer: int = 0) -> None:
        try:
            super().link(buffer=buffer)
        except PermissionError:
            raise SkipTest("this kernel has bbr for root alone") from None
        self.assertTrue(self.links[0].is_paced)

    def test_both_ways(self) -> None:
        """It arrives as it was sent."""
        self.link()
        near, far = self.serve("ram", copied.BULK, copied.LESS)
        self.start(near, far)
        self.over(near, far)
        self.assert_received(far, copied.BULK)
        self.assert_received(near, copied.LESS)
        self.assert_carried(4 * copied.MIB)

    def test_little_is_unsent(self) -> None:
        """Pages are passed on when all is sent, what is copied before; as the last lease was."""
        self.link()
        near, far = self.serve("ram", copied.BULK, b"")
        far.pace = lambda: time.sleep(0.001)
        self.start(near, far)
        sock = self.links[0].socket
        unsent = of_leases(self, 0, lambda: sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT))
        self.assertEqual(unsent, [PACED_NOTSENT_LOWAT, NOTSENT_LOWAT, PACED_NOTSENT_LOWAT])
        self.over(near, far)
        self.assert_received(far, copied.BULK)


class EndsOverTCPTests(copied.EndTests):
    """How streams and links end there."""

    congestion = b"reno"
