"""The pool of receive buffers: what is lent stays untouched, what is returned is used again."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import random
import socket
import struct
import sys
import time
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from twisted.trial.unittest import SynchronousTestCase

from relaymux.net.buffers import BUFFER_SIZE, END_OF_INPUT, BufferPool, PythonBufferPool, pool_for
from relaymux.net.compiled import native


def fill(pool: BufferPool, data: bytes, minimum: int = 1) -> memoryview:
    """Receive C{data}."""
    room = pool.room(minimum)
    room[: len(data)] = data
    return pool.take(len(data))


def place(pool: BufferPool, minimum: int) -> int:
    """@return: the address of the room that C{pool} offers."""
    room = pool.room(minimum)
    return ctypes.addressof((ctypes.c_char * len(room)).from_buffer(room))


if TYPE_CHECKING:
    _Base = SynchronousTestCase
else:
    _Base = object


class PoolTests(_Base):
    """What holds for a pool in Python and for a compiled one."""

    make: Callable[..., BufferPool]

    def test_readers_share_a_buffer(self) -> None:
        """Small reads follow one another in the same buffer, and none changes another."""
        pool = self.make(1024)
        views = [fill(pool, bytes([n]) * 10) for n in range(10)]
        self.assertEqual([bytes(view) for view in views], [bytes([n]) * 10 for n in range(10)])
        self.assertEqual(len({id(view.obj) for view in views}), 1)

    def test_views_are_read_only(self) -> None:
        """Who is lent bytes cannot change them for others."""
        view = fill(self.make(64), b"abc")
        self.assertTrue(view.readonly)
        with self.assertRaises(TypeError):
            view[0] = 0

    def test_whole_buffer_behind_a_view(self) -> None:
        """Who keeps views can tell how much memory they pin."""
        view = fill(self.make(64), b"abc")
        self.assertIn(memoryview(view.obj).nbytes, (64, 65))
        self.assertIs(view[1:].obj, view.obj)

    def test_room_has_the_minimum(self) -> None:
        """A buffer with less free space than wanted is left for a new one."""
        pool = self.make(100)
        kept = fill(pool, b"x" * 60)
        self.assertEqual(len(pool.room(40)), 40)
        self.assertEqual(len(pool.room(41)), 100)
        self.assertEqual(bytes(kept), b"x" * 60)

    def test_same_buffer_when_returned_at_once(self) -> None:
        """A reader that keeps nothing always fills the same memory."""
        pool = self.make(100)
        seen = set()
        for _ in range(20):
            seen.add(place(pool, 80))
            fill(pool, b"x" * 80, 80)
        self.assertEqual(len(seen), 1)

    def test_slice_keeps_the_buffer(self) -> None:
        """The last slice of a view is as good a claim as the view itself."""
        pool = self.make(100)
        part = fill(pool, b"0123456789" * 8, 80)[3:5][1:]
        for _ in range(20):
            fill(pool, b"x" * 80, 80)
        self.assertEqual(bytes(part), b"4")

    def test_views_outlive_the_pool(self) -> None:
        """What was lent is good for as long as anybody wants it."""
        pool = self.make(100)
        views = [fill(pool, bytes([n]) * 80, 80) for n in range(5)]
        del pool
        gc.collect()
        self.assertEqual([bytes(view) for view in views], [bytes([n]) * 80 for n in range(5)])

    def test_returned_buffers_are_used_again(self) -> None:
        """What was lent and given back is filled again before anything new is made."""
        pool = self.make(100)
        known, views = set(), []
        for _ in range(10):
            known.add(place(pool, 80))
            views.append(fill(pool, b"x" * 80, 80))
        views.clear()
        for _ in range(8):
            self.assertIn(place(pool, 80), known)
            views.append(fill(pool, b"y" * 80, 80))

    def test_stalled_owner_does_not_stop_reuse(self) -> None:
        """Buffers that nobody gives back do not keep others from being found."""
        pool = self.make(100)
        stalled = [fill(pool, b"s" * 80, 80) for _ in range(20)]
        made = set()
        for _ in range(200):
            made.add(place(pool, 80))
            fill(pool, b"x" * 80, 80)
        self.assertLessEqual(len(made), 8)
        self.assertEqual({bytes(view) for view in stalled}, {b"s" * 80})

    def test_shrinks_after_a_burst(self) -> None:
        """Buffers that a burst needed are given back to the system, all but a few."""
        pool = self.make(100)
        views = [fill(pool, b"x" * 80, 80) for _ in range(200)]
        self.assertGreaterEqual(pool.held_bytes, 200 * 100)
        views.clear()
        for _ in range(200):
            views = [*views[-1:], fill(pool, b"x" * 80, 80)]
        self.assertLess(pool.held_bytes, 40 * 100)

    def test_random_owners(self) -> None:
        """Whatever the order in which views are kept, cut and dropped, no content changes."""
        seed = time.time_ns()
        rng = random.Random(seed)
        pool = self.make(1000, 8)
        kept: list[tuple[memoryview, bytes]] = []
        for _ in range(3000):
            data = rng.randbytes(rng.randrange(1, 400))
            view = fill(pool, data, rng.randrange(1, 600) if len(data) < 2 else max(len(data), 300))
            if rng.random() < 0.5:
                start = rng.randrange(len(data))
                kept.append((view[start:], data[start:]))
            while len(kept) > 30 or (kept and rng.random() < 0.3):
                held, expected = kept.pop(rng.randrange(len(kept)))
                self.assertEqual(bytes(held), expected, f"seed {seed}")

    # Reading

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """@return: the end that is read, which does not block, and the other one."""
        ends = socket.socketpair()
        for end in ends:
            self.addCleanup(end.close)
        ends[0].setblocking(False)
        return ends

    def test_gather_nothing(self) -> None:
        """A socket that has nothing is no error."""
        reader, _ = self.pair()
        self.assertEqual(self.make(100).gather(reader, 1000, 50, 10), ([], 0, 0))

    def test_gather_to_the_end(self) -> None:
        """The end is told with what came before it; the next time it is all there is."""
        reader, writer = self.pair()
        writer.sendall(b"last")
        writer.close()
        pool = self.make(100)
        views, count, ended = pool.gather(reader, 1000, 50, 1)
        self.assertEqual((b"".join(views), count, ended), (b"last", 4, END_OF_INPUT))
        self.assertEqual(pool.gather(reader, 1000, 50, 1), ([], 0, END_OF_INPUT))

    def test_gather_an_error(self) -> None:
        """An error is told by its number, behind the bytes before it."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        writer = socket.create_connection(listener.getsockname())
        reader, _ = listener.accept()
        self.addCleanup(reader.close)
        reader.setblocking(False)
        writer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()
        self.assertEqual(self.make(100).gather(reader, 1000, 50, 1), ([], 0, errno.ECONNRESET))

    def test_gather_closed(self) -> None:
        """A socket that was closed meanwhile is an error as any other."""
        reader, _ = self.pair()
        reader.close()
        self.assertEqual(self.make(100).gather(reader, 1000, 50, 1), ([], 0, errno.EBADF))

    def test_gather_no_more_than_wanted(self) -> None:
        """The limit holds, and what is left is there the next time."""
        reader, writer = self.pair()
        data = bytes(range(250))
        writer.sendall(data)
        pool = self.make(100)
        views, count, ended = pool.gather(reader, 230, 50, 1)
        self.assertEqual((b"".join(views), count, ended), (data[:230], 230, 0))
        views, count, ended = pool.gather(reader, 230, 50, 1)
        self.assertEqual((b"".join(views), count, ended), (data[230:], 20, 0))

    def test_gather_few_views(self) -> None:
        """What several reads brought is one view where it fits into one buffer."""
        reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.addCleanup(reader.close)
        self.addCleanup(writer.close)
        reader.setblocking(False)
        for number in range(10):
            writer.send(bytes([number]) * 20)
        views, count, _ = self.make(100).gather(reader, 1000, 20, 20)
        self.assertEqual(count, 200)
        self.assertEqual([len(view) for view in views], [100, 100])
        self.assertEqual(b"".join(views), b"".join(bytes([number]) * 20 for number in range(10)))

    def test_gather_stops_behind_little(self) -> None:
        """A read that brought little is the last one: the next would find nothing, as a rule."""
        reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.addCleanup(reader.close)
        self.addCleanup(writer.close)
        reader.setblocking(False)
        for size in (30, 20, 10, 30):
            writer.send(bytes(size))
        self.assertEqual(self.make(100).gather(reader, 1000, 30, 20)[1], 60)

    def test_gather_any_sizes(self) -> None:
        """However much comes at once and is wanted at once, it is what was sent."""
        seed = time.time_ns()
        rng = random.Random(seed)
        reader, writer = self.pair()
        pool = self.make(4096)
        sent = received = b""
        for _ in range(300):
            data = rng.randbytes(rng.choice((1, 100, 4095, 4096, 20_000)))
            writer.sendall(data)
            sent += data
            views, count, ended = pool.gather(
                reader, rng.choice((1, 5000, 100_000)), rng.randrange(1, 4097), 64
            )
            self.assertEqual((sum(map(len, views)), ended), (count, 0), f"seed {seed}")
            received += b"".join(views)
            if len(sent) - len(received) > 50_000:
                received += b"".join(pool.gather(reader, 1_000_000, 1024, 1)[0])
        while views := pool.gather(reader, 100_000, 1024, 1)[0]:
            received += b"".join(views)
        self.assertEqual(received, sent, f"seed {seed}")


class PythonBufferPoolTests(PoolTests, SynchronousTestCase):
    """The pool in Python, which any installation has."""

    make = PythonBufferPool

    def test_forgets_beyond_the_bound(self) -> None:
        """The pool waits for a bounded number of buffers; what it forgot stays intact."""
        pool = PythonBufferPool(100, kept=4)
        views = [fill(pool, bytes([n]) * 80, 80) for n in range(50)]
        self.assertEqual([bytes(view) for view in views], [bytes([n]) * 80 for n in range(50)])
        self.assertEqual(pool.held_bytes, 500)

    def test_no_memory(self) -> None:
        """Once there was no memory for another buffer, none is lent to two, and room is room."""
        pool = PythonBufferPool(100)
        views = [fill(pool, b"a" * 80, 80)]
        with patch.object(pool, "_new", side_effect=MemoryError):
            for minimum in (80, 80, 1):
                self.assertRaises(MemoryError, pool.room, minimum)
        views.append(fill(pool, b"b" * 80, 80))
        views.append(fill(pool, b"c" * 80, 80))
        del views[0]
        for content in (b"d", b"e", b"f"):
            views.append(fill(pool, content * 80, 80))
        self.assertEqual(
            [bytes(view) for view in views], [content * 80 for content in (b"b", b"c", b"d", b"e", b"f")]
        )


@unittest.skipIf(native is None, "not compiled here: make test-compiled")
class NativeBufferPoolTests(PoolTests, SynchronousTestCase):
    """The compiled pool."""

    make = BufferPool

    def test_kept_beside_what_is_lent(self: Any) -> None:
        """As many buffers as are lent are kept for the next need, and few when nothing is lent."""
        pool = self.make(1000, 4)
        views = [fill(pool, b"x" * 1000, 1000) for _ in range(100)]
        del views[30:]
        # 30 kept, and perhaps the one that is being filled.
        self.assertIn(pool.held_bytes // 1000, range(60, 63))
        views.clear()
        self.assertLessEqual(pool.held_bytes // 1000, 5)

    def test_memory_that_nobody_sees(self: Any) -> None:
        """As long as nobody has a view of it a buffer is used from its beginning, not from behind that."""
        pool = self.make(1000)
        for _ in range(3):
            self.assertEqual(len(pool.room(100)), 1000)
            kept = pool.take(300)
            self.assertEqual(len(pool.room(100)), 700)
            pool.take(50)
            self.assertEqual(len(pool.room(100)), 650)
            del kept

    def test_gives_back_to_the_system(self: Any) -> None:
        """After a burst the process is as small as before, apart from what the pool keeps."""
        if "libasan" in os.environ.get("LD_PRELOAD", ""):
            raise unittest.SkipTest("AddressSanitizer keeps what was freed")

        def resident() -> int:
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        pool = BufferPool()
        before = resident()
        views = [fill(pool, bytes(pool.size), pool.size) for _ in range(256)]
        self.assertGreater(resident() - before, 60 * 2**20)
        views.clear()
        self.assertLess(resident() - before, 12 * 2**20)

    def test_nothing_is_left(self: Any) -> None:
        """Reading again and again leaves no objects behind, nor do calls that fail."""
        pool = self.make(4096)
        reader, writer = self.pair()

        def use() -> None:
            for _ in range(200):
                writer.sendall(bytes(10_000))
                pool.gather(reader, 100_000, 1024, 1)
                self.assertRaises(ValueError, pool.gather, reader, 1, 5000, 1)
                self.assertRaises(ValueError, pool.take, 5000)
                fill(pool, b"x" * 3000, 3000)

        use()
        gc.collect()
        before = sys.getallocatedblocks()
        use()
        gc.collect()
        self.assertLess(sys.getallocatedblocks() - before, 100)

    def test_garbage_collected_within(self: Any) -> None:
        """A finaliser that garbage collection runs within a call does not get what is being filled."""
        pool = self.make(100)
        reader, writer = self.pair()

        class Reading:
            def __init__(self) -> None:
                self.itself = self

            def __del__(self) -> None:
                with contextlib.suppress(RuntimeError):
                    pool.room(100)

        self.addCleanup(gc.set_threshold, *gc.get_threshold())
        self.addCleanup(gc.enable)
        for threshold in range(1, 8):
            for _ in range(20):
                gc.disable()
                gc.collect()
                Reading()
                writer.sendall(b"x" * 10)
                gc.set_threshold(threshold)
                gc.enable()
                views = pool.gather(reader, 100, 10, 1)[0]
                self.assertEqual(list(map(bytes, views)), [b"x" * 10])
                del views

    def test_nonsense(self: Any) -> None:
        """Wrong calls are refused, and harm nothing."""
        pool = self.make(100)
        self.assertRaises(ValueError, pool.take, 1)
        fill(pool, b"x" * 80)
        reader, _ = self.pair()
        for call in (
            lambda: pool.take(21),
            lambda: pool.take(-1),
            lambda: pool.room(101),
            lambda: pool.room(0),
            lambda: pool.gather(reader, 10, 101, 1),
            lambda: self.make(0),
            lambda: self.make(2**40),
            lambda: self.make(100, -1),
        ):
            self.assertRaises(ValueError, call)
        for call in (lambda: pool.gather(reader), lambda: pool.gather(None, 1, 1, 1), lambda: pool.take("1")):
            self.assertRaises(TypeError, call)
        self.assertEqual(bytes(pool.take(20))[:0], b"")
        self.assertEqual(len(pool.room()), 100)


class PoolForTests(SynchronousTestCase):
    """The pool of a reactor."""

    def test_one_pool_per_reactor(self) -> None:
        """All readers of a reactor find the same pool, and another reactor has its own."""

        class Reactor:
            pass

        one, other = Reactor(), Reactor()
        self.assertIs(pool_for(one), pool_for(one))
        self.assertIsNot(pool_for(one), pool_for(other))
        self.assertIs(pool_for(one, 1000), pool_for(one, 1000))
        self.assertEqual((pool_for(one, 1000).size, pool_for(one).size), (1000, BUFFER_SIZE))
