"""
Connections in memory: two transports without sockets, whose network does what a test wants.

Either end is a transport as Twisted's are, with a bounded buffer towards the
other end that stands for what the kernel and the network hold.  Bytes move
only in L{MemoryConnection.pump}, which one drives by hand, with
L{MemoryConnection.settle}, or with a L{twisted.internet.task.Clock}.  Given a
seed, they move in pieces of every size from one byte up, the same ones for
the same seed.

What is like a socket's, since code depends on it:

 - What was written before a clean end arrives before that end.
 - Closing with unread input makes the peer see a loss instead of an end, after
   it has read what was sent to it.
 - Writing to a peer that has closed its input fails a turn later, and not from
   within C{write}.
 - A paused end notices nothing that comes after the bytes it has not read; but
   L{MemoryConnection.cut} tells it.

The two ends share nothing else, so a test that ends with both protocols in the
right state has shown that the bytes between them were enough.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

from twisted.internet.error import ConnectionLost
from twisted.internet.interfaces import IProtocol
from twisted.internet.task import Clock
from zope.interface import alsoProvides

from relaymux.interfaces import IExportingTransport, IIdentifiedTransport
from relaymux.testing.ends import BufferMemoryTransport, MemoryTransport, Pipe
from relaymux.testing.recording import Feeder

__all__ = ["MemoryConnection"]

#: Bytes each direction holds by default: small, so that tests meet its limit.
CAPACITY = 16 * 1024

#: Turns at one time of the clock after which two ends are taken to go on for ever.
MAX_TURNS = 1_000_000


class MemoryConnection:
    """
    Two ends and what lies between them.

    @ivar client: one end, by its transport.
    @ivar server: the other; they differ in name only.
    @ivar seed: what the sizes of pieces follow from; L{None} when nothing is split.
    """

    def __init__(
        self,
        client: IProtocol,
        server: IProtocol,
        *,
        clock: Clock | None = None,
        seed: int | None = None,
        capacity: int = CAPACITY,
        buffers: bool = True,
        identities: tuple[str, str] | None = None,
        exporter: Callable[[str, int], bytes] | None = None,
    ) -> None:
        """
        Connect two protocols with one another: C{server} first, both before this returns.

        @param clock: moves bytes in C{advance}, of which C{advance(0)} moves
            all there are; without one they move in L{pump} and L{settle} only.
        @param seed: splits what is delivered; L{None} delivers what there is.
        @param capacity: bytes that each direction holds, at least 1.
        @param buffers: whether the transports provide L{IBufferTransport}.
        @param identities: what client and server are known as to one another
            (L{IIdentifiedTransport}); by default they are not identified.
        @param exporter: gives both the same key material (L{IExportingTransport}); by default
            there is none.
        """
        self.seed = seed
        self._random = None if seed is None else random.Random(seed)
        self._clock = clock
        self._awake = False
        self._turns = 0
        self._turns_at = -1.0
        kind = BufferMemoryTransport if buffers else MemoryTransport
        to_server, to_client = Pipe(capacity), Pipe(capacity)
        self.client = kind(self, "client", client, to_client, to_server)
        self.server = kind(self, "server", server, to_server, to_client)
        self._ends = (self.server, self.client)
        self._pipes = {self.client: to_client, self.server: to_server}
        # Each end is told the other's: the server the client's, and so on.
        for end, identity in zip(self._ends, identities or (), strict=False):
            end.peerIdentity = identity
            alsoProvides(end, IIdentifiedTransport)
        if exporter is not None:
            for end in self._ends:
                end.exporter = exporter
                alsoProvides(end, IExportingTransport)
        for end in self._ends:
            end.protocol.makeConnection(end)

    def __repr__(self) -> str:
        return f"<MemoryConnection seed={self.seed}>"

    # Moving bytes

    def pump(self) -> bool:
        """
        Let each end do one thing in each direction: write what finds room, take one piece.

        @return: whether anything was done.
        """
        ends = list(self._ends)
        if self._random is not None:
            self._random.shuffle(ends)
        return sum([end.turn() for end in ends]) > 0

    def settle(self) -> None:
        """Pump until nothing moves, running also what is due on the clock now."""
        clock = self._clock
        self._turns = 0
        while self._turn() or (clock is not None and _is_due(clock)):
            if clock is not None:
                clock.advance(0)

    def transfer(self, sender: MemoryTransport, data: bytes) -> Feeder:
        """
        Write C{data} to C{sender}, as a producer that obeys it, and settle.

        @return: the producer, which goes on by itself if it was held up.
        """
        feeder = Feeder(sender, data, self.portion)
        feeder.start()
        self.settle()
        return feeder

    # Faults

    def stall(self, *ends: MemoryTransport) -> None:
        """
        Let nothing arrive at C{ends} (by default at both) until L{release}.

        Bytes, ends and losses wait; writers fill what room there is and are
        then paused.  This is a network that swallows everything as well as a
        reader that has stopped: to the other end they are the same.
        """
        for end in ends or self._ends:
            self._pipes[end].stalled = True

    def release(self, *ends: MemoryTransport) -> None:
        """Undo L{stall}: what was held back arrives."""
        for end in ends or self._ends:
            self._pipes[end].stalled = False
        self.wake()

    def cut(self, *ends: MemoryTransport) -> None:
        """
        Lose the connection now, and what is under way with it.

        C{ends} (by default both) are told before this returns.  An end that is
        not named learns nothing: for it the other one has fallen silent.
        """
        for pipe in self._pipes.values():
            pipe.held.clear()
            pipe.stalled = True
        for end in ends or self._ends:
            end.lose(ConnectionLost(f"cut by the test ({self!r})"))

    def cut_after(self, count: int, end: MemoryTransport) -> None:
        """Cut as soon as C{count} bytes have arrived at C{end} since the beginning; not one more does."""
        pipe = self._pipes[end]
        if count < pipe.total:
            raise ValueError(f"{pipe.total} bytes have arrived, more than {count} already")
        pipe.cut_at = count
        if count == pipe.total:
            self.cut()

    # For the ends

    def portion(self, available: int) -> int:
        """@return: how many of so many bytes to take: all; with a seed 1 to all, each magnitude as likely."""
        if self._random is None:
            return available
        return min(available, int(2 ** self._random.uniform(0, math.log2(available + 1))))

    def wake(self) -> None:
        """There is something to do: have the clock do it."""
        if self._clock is not None and not self._awake:
            self._awake = True
            self._clock.callLater(0, self._run)

    def _run(self) -> None:
        self._awake = False
        if self._turn():
            self.wake()

    def _turn(self) -> bool:
        """L{pump}, but not for ever."""
        now = 0.0 if self._clock is None else self._clock.seconds()
        if now != self._turns_at:
            self._turns, self._turns_at = 0, now
        self._turns += 1
        if self._turns > MAX_TURNS:
            raise AssertionError(f"{self!r} does not settle: {MAX_TURNS} turns and the ends still have work")
        return self.pump()


def _is_due(clock: Clock) -> bool:
    return any(call.getTime() <= clock.seconds() for call in clock.getDelayedCalls())
