"""
Receive buffers that are lent out as views and come back by themselves.

A fresh C{bytes} of a few hundred KiB per read costs more than the read: the
allocator maps the memory, the kernel clears every page of it, and both are
undone a moment later.  So all readers of a reactor fill the same few
C{bytearray}s again and again.

Nobody tells the pool that a view is no longer needed: views are sliced, queued
and kept for resending in places that know nothing of pools, and one forgotten
release would be a leak, one too many would be corrupted data.  Instead the
pool asks the buffer.  A C{bytearray} refuses to change its size while any view
of it exists, so C{pop} fails exactly as long as the buffer is lent.  (The compiled
pool need not ask: its buffers come back when the last view of them goes.)
"""

from __future__ import annotations

import errno
from collections import deque
from socket import socket
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from relaymux.net.compiled import native

__all__ = ["BUFFER_SIZE", "END_OF_INPUT", "BufferPool", "PythonBufferPool", "pool_for"]

#: Bytes per buffer.  One read of a UNIX socket returns at most what its sender
#: was allowed to queue, 208 KiB by Linux's default; more is gained by larger
#: reads only up to about this size, and it still fits the second-level cache.
BUFFER_SIZE = 256 * 1024

#: Buffers whose return is waited for.  64 MiB covers twice the default replay
#: buffer; what is lent beyond that is left to the garbage collector.
KEPT_BUFFERS = 256

#: Lent buffers looked at when one is needed.  Sessions give back in the order
#: in which they were lent, so a free one is found among the oldest or, with a
#: stalled session holding those, after a few turns.
LOOKED_AT = 4

#: Returned buffers kept for the next need; with more, the longest idle ones go
#: back to the system.
IDLE_BUFFERS = 32

#: Instead of an errno, where reading found that nothing more will come.
END_OF_INPUT = -1

_NOTHING = memoryview(b"")


class PythonBufferPool:
    """
    Memory to receive into, shared by everything that reads in one reactor.

    Reading is three steps with nothing in between, so one half-filled buffer
    serves all readers in turn::

        room = pool.room(minimum)
        count = sock.recv_into(room)
        view = pool.take(count)

    A buffer is filled from front to back, and small reads share it: what they
    pin is one buffer and not one each.

    @ivar size: bytes per buffer.
    """

    def __init__(self, size: int = BUFFER_SIZE, kept: int = KEPT_BUFFERS) -> None:
        """
        @param size: bytes per buffer.
        @param kept: buffers whose return is waited for at most.
        """
        self.size = size
        # Two queues: a bounded one of those lent, oldest first, and a bounded
        # one of those returned.  The latter is used from its warm end, so that
        # after a burst the working set shrinks to what is in flight again.
        self._lent: deque[bytearray] = deque(maxlen=kept)
        self._returned: deque[bytearray] = deque(maxlen=IDLE_BUFFERS)
        self._filled = 0
        self._current: bytearray | None = None
        self._use(self._new())

    @property
    def held_bytes(self) -> int:
        """Memory of the buffers that the pool knows of, lent or not."""
        return (1 + len(self._lent) + len(self._returned)) * self.size

    def room(self, minimum: int = 1) -> memoryview:
        """
        Free space to write into, valid until the next call of this pool.

        @param minimum: bytes needed at least; at most L{size}.  With less
            than that left of the current buffer the next one is begun.
        """
        if self.size - self._filled < minimum:
            # Without our own views the one just filled may already be free.
            self._writable = self._readable = _NOTHING
            if self._current is not None:
                self._lent.append(self._current)
                # Until there is another one, should there be no memory for it.
                self._current, self._filled = None, self.size
            self._use(self._find())
        elif not self._filled:
            return self._writable
        return self._writable[self._filled :]

    def take(self, count: int) -> memoryview:
        """
        @param count: bytes written to what L{room} returned just before.
        @return: a read-only view of them, for as long as anybody wants it.
        """
        start = self._filled
        self._filled = end = start + count
        return self._readable[start:end]

    def gather(self, sock: socket, limit: int, minimum: int, again: int) -> tuple[list[memoryview], int, int]:
        """
        Read what the kernel has of C{sock}, which does not block.

        @param limit: bytes at most.
        @param minimum: as of L{room}.
        @param again: a read that brought at least so much is followed by another one.
        @return: views of what was read, oldest first; their bytes; and 0, L{END_OF_INPUT}
            or the errno with which reading failed.
        """
        views: list[memoryview] = []
        room, filled, left, ended = _NOTHING, 0, limit, 0
        while left > 0:
            if len(room) - filled < minimum:
                # What several reads brought is one view as long as it is in one piece.
                if filled:
                    views.append(self.take(filled))
                room, filled = self.room(minimum), 0
            space = room[filled : filled + left]
            try:
                count = sock.recv_into(space)
            except BlockingIOError:
                break
            except OSError as error:
                ended = error.errno or errno.EIO
                break
            if not count:
                ended = END_OF_INPUT
                break
            filled += count
            left -= count
            if count < again and count < len(space):
                break
        if filled:
            views.append(self.take(filled))
        return views, limit - left, ended

    def _use(self, buffer: bytearray) -> None:
        """Make C{buffer} the one that is filled next."""
        self._current = buffer
        # One byte is kept back: taking it away and putting it back is how a
        # buffer is asked whether it is lent, and that must never reallocate.
        self._writable = memoryview(buffer)[: self.size]
        self._readable = self._writable.toreadonly()
        self._filled = 0

    def _find(self) -> bytearray:
        """A buffer nobody has a view of: the one just filled, one returned, or a new one."""
        lent = self._lent
        if _is_returned(lent[-1]):
            return lent.pop()
        returned = self._returned
        for _ in range(min(LOOKED_AT, len(lent))):
            if _is_returned(lent[0]):
                returned.append(lent.popleft())
            elif returned:
                break  # those behind it were lent later
            else:
                lent.rotate(-1)  # it may be held for long: others have their turn
        return returned.pop() if returned else self._new()

    def _new(self) -> bytearray:
        return bytearray(self.size + 1)


def _is_returned(buffer: bytearray) -> bool:
    """Whether no view of C{buffer} is left."""
    try:
        buffer.append(buffer.pop())
    except BufferError:
        return False
    return True


if TYPE_CHECKING or native is None:  # noqa: SIM108 (type checkers do not take the other form)
    BufferPool = PythonBufferPool
else:
    BufferPool = native.BufferPool


_pools: WeakKeyDictionary[object, dict[int, BufferPool]] = WeakKeyDictionary()


def pool_for(reactor: object, size: int = BUFFER_SIZE) -> BufferPool:
    """@return: the pool with buffers of C{size} bytes that all readers of C{reactor} share."""
    pools = _pools.setdefault(reactor, {})
    pool = pools.get(size)
    if pool is None:
        pool = pools[size] = BufferPool(size)
    return pool
