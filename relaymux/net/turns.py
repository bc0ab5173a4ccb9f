"""
Who of the sockets of a reactor is read next, and how much of it.

What one turn costs is mostly per turn, so bulk alone is read in long ones.  But every
message of everybody else waits for the turns in front of it, on both hosts, there and
back.  So turns are short while a connection I{talks}: passes little at a time, and did
not carry bulk just before.  An NBD server's answers to a disk that is being written are
little, too, but they belong to bulk, which gains nothing by short turns.

The reactor reads sockets in the order in which they became readable, and a source of bulk
is always so: a message that arrives in one of its turns would wait for the next one, too.
So, while somebody talks, a turn of bulk begins by looking for others who have something,
of whom it is known that it will be little.
"""

from __future__ import annotations

import select
from typing import Final
from typing import Protocol as Contract
from weakref import WeakKeyDictionary

from relaymux.core.schedule import LITTLE

__all__ = [
    "LONG_TURN",
    "SHORT_TURN",
    "TALK_SECONDS",
    "LittleReader",
    "ReadTurns",
    "Talker",
    "turns_for",
]

#: Bytes gathered of one socket at most before they are handed on, while nobody talks: one
#: bulk frame, and what the memory of a daemon allows a stream to have written
#: (L{relaymux.core.budget.STREAM_WRITES}).
LONG_TURN: Final = 512 * 1024

#: The same while somebody talks.  A turn of this is some 0.15 ms of work with TLS; shorter
#: ones cost bulk more per byte, and with the processors busy nobody's answer comes earlier.
SHORT_TURN: Final = 128 * 1024

#: Seconds for which a connection counts as talking after it said something, and as bulk
#: after it carried more than L{LITTLE} at once: longer than a request over a long line
#: takes, and too short for libvirt's keepalive, every 5 s, to cost anything.
TALK_SECONDS: Final = 0.25

#: Seconds in which it is no news that a connection has said something once more.
NEWS_SECONDS: Final = 0.02

#: Sockets that are looked at before a turn of bulk: those that were read last.  Asking the
#: kernel about one costs some 0.1 microseconds.
MOST_EXPECTED: Final = 16


class LittleReader(Contract):
    """A socket that brought at most L{LITTLE} when it was read last."""

    def read_in_between(self) -> None:
        """Read once; must not raise."""


class ReadTurns:
    """
    The turns of all who read in one reactor.

    Time is an argument: seconds of a clock that does not go backwards.

    @ivar bulk: set by who has read more than L{LITTLE} at once; taken back by who wants to
        know whether it happens again.
    """

    def __init__(self) -> None:
        self.bulk = False
        self._short_until = float("-inf")
        self._poll = select.poll()
        # By descriptor, the one that was read longest ago first; at most MOST_EXPECTED.
        self._expected: dict[int, tuple[LittleReader, float]] = {}

    def somebody_talks(self, now: float) -> bool:
        """Whether somebody talks, or did less than L{TALK_SECONDS} ago."""
        return now < self._short_until

    def limit(self, now: float) -> int:
        """@return: bytes to gather of one socket before others have their turn."""
        return SHORT_TURN if now < self._short_until else LONG_TURN

    def shorten(self, now: float) -> None:
        """Somebody talks."""
        self._short_until = now + TALK_SECONDS

    def expect(self, descriptor: int, reader: LittleReader, now: float) -> None:
        """C{reader} brought little: for L{TALK_SECONDS} it goes before bulk."""
        known = self._expected.get(descriptor)
        if known is not None:
            if now < known[1] - TALK_SECONDS + NEWS_SECONDS:
                return
            del self._expected[descriptor]  # it is the last one of all now
        self._expected[descriptor] = (reader, now + TALK_SECONDS)
        if known is None:
            self._poll.register(descriptor, select.POLLIN)
            if len(self._expected) > MOST_EXPECTED:
                self.forget(next(iter(self._expected)))

    def forget(self, descriptor: int) -> None:
        """Whoever reads C{descriptor} does not go before bulk any more; called before it is closed."""
        if self._expected.pop(descriptor, None) is not None:
            self._poll.unregister(descriptor)

    def let_little_read(self, now: float) -> None:
        """To be called before a turn of bulk: whoever is L{expect}ed and has something is read first."""
        if not self.somebody_talks(now):
            return
        self._forget_overdue(now)
        for descriptor, _ in self._poll.poll(0):
            expected = self._expected.get(descriptor)
            if expected is not None:  # else what another one brought has closed it just now
                expected[0].read_in_between()

    def _forget_overdue(self, now: float) -> None:
        while self._expected:
            descriptor, (_, until) = next(iter(self._expected.items()))
            if now < until:
                return
            self.forget(descriptor)


class Talker:
    """One connection, of which we want to know whether it talks: passes at most L{LITTLE} at once."""

    def __init__(self, turns: ReadTurns) -> None:
        self._turns = turns
        self._bulk_until = float("-inf")

    def carries_bulk(self, now: float) -> bool:
        """Whether it counts as bulk, whatever it says."""
        return now < self._bulk_until

    def passed(self, count: int, now: float) -> None:
        """C{count} bytes were passed on at once, in either direction."""
        if count > LITTLE:
            self._bulk_until = now + TALK_SECONDS
        elif now >= self._bulk_until:
            self._turns.shorten(now)


_turns: WeakKeyDictionary[object, ReadTurns] = WeakKeyDictionary()


def turns_for(reactor: object) -> ReadTurns:
    """@return: what all who read in C{reactor} share."""
    turns = _turns.get(reactor)
    if turns is None:
        turns = _turns[reactor] = ReadTurns()
    return turns
