"""The pool of receive buffers: what is lent stays untouched, what is returned is used again."""

from __future__ import annotations

import random
import time

from twisted.trial.unittest import SynchronousTestCase

from relaymux.net.buffers import BufferPool, pool_for


def fill(pool: BufferPool, data: bytes, minimum: int = 1) -> memoryview:
    """Receive C{data}."""
    room = pool.room(minimum)
    room[: len(data)] = data
    return pool.take(len(data))


class BufferPoolTests(SynchronousTestCase):
    def test_readers_share_a_buffer(self) -> None:
        """Small reads follow one another in the same buffer, and none changes another."""
        pool = BufferPool(1024)
        views = [fill(pool, bytes([n]) * 10) for n in range(10)]
        self.assertEqual([bytes(view) for view in views], [bytes([n]) * 10 for n in range(10)])
        self.assertEqual(len({id(view.obj) for view in views}), 1)

    def test_views_are_read_only(self) -> None:
        """Who is lent bytes cannot change them for others."""
        view = fill(BufferPool(64), b"abc")
        self.assertTrue(view.readonly)
        with self.assertRaises(TypeError):
            view[0] = 0

    def test_room_has_the_minimum(self) -> None:
        """A buffer with less free space than wanted is left for a new one."""
        pool = BufferPool(100)
        kept = fill(pool, b"x" * 60)
        self.assertEqual(len(pool.room(40)), 40)
        self.assertEqual(len(pool.room(41)), 100)
        self.assertEqual(bytes(kept), b"x" * 60)

    def test_same_buffer_when_returned_at_once(self) -> None:
        """A reader that keeps nothing always fills the same memory."""
        pool = BufferPool(100)
        seen = set()
        for _ in range(20):
            seen.add(id(fill(pool, b"x" * 80, 80).obj))
        self.assertEqual(len(seen), 1)

    def test_slice_keeps_the_buffer(self) -> None:
        """The last slice of a view is as good a claim as the view itself."""
        pool = BufferPool(100)
        part = fill(pool, b"0123456789" * 8, 80)[3:5][1:]
        for _ in range(20):
            fill(pool, b"x" * 80, 80)
        self.assertEqual(bytes(part), b"4")

    def test_returned_buffers_are_used_again(self) -> None:
        """What was lent and given back is filled again before anything new is made."""
        pool = BufferPool(100)
        views = [fill(pool, b"x" * 80, 80) for _ in range(10)]
        known = {id(view.obj) for view in views}
        views.clear()
        for _ in range(8):
            views.append(fill(pool, b"y" * 80, 80))
        self.assertLessEqual({id(view.obj) for view in views}, known)

    def test_stalled_owner_does_not_stop_reuse(self) -> None:
        """Buffers that nobody gives back do not keep others from being found."""
        pool = BufferPool(100)
        stalled = [fill(pool, b"s" * 80, 80) for _ in range(20)]
        made = set()
        for _ in range(200):
            made.add(id(fill(pool, b"x" * 80, 80).obj))
        self.assertLessEqual(len(made), 8)
        self.assertEqual({bytes(view) for view in stalled}, {b"s" * 80})

    def test_forgets_beyond_the_bound(self) -> None:
        """The pool waits for a bounded number of buffers; what it forgot stays intact."""
        pool = BufferPool(100, kept=4)
        views = [fill(pool, bytes([n]) * 80, 80) for n in range(50)]
        self.assertEqual([bytes(view) for view in views], [bytes([n]) * 80 for n in range(50)])
        self.assertEqual(pool.held_bytes, 500)

    def test_shrinks_after_a_burst(self) -> None:
        """Buffers that a burst needed are given back to the system, all but a few."""
        pool = BufferPool(100)
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
        pool = BufferPool(1000, kept=8)
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

    def test_one_pool_per_reactor(self) -> None:
        """All readers of a reactor find the same pool, and another reactor has its own."""

        class Reactor:
            pass

        one, other = Reactor(), Reactor()
        self.assertIs(pool_for(one), pool_for(one))
        self.assertIsNot(pool_for(one), pool_for(other))
