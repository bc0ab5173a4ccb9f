"""
How much is read of a socket before the other sockets of a reactor have their turn.

What one turn costs is mostly per turn, so bulk alone is read in long ones.  But every
message of everybody else waits for the turns in front of it, on both hosts, there and
back.  So turns are short while a connection I{talks}: passes little at a time, and did
not carry bulk just before.  An NBD server's answers to a disk that is being written are
little, too, but they belong to bulk, which gains nothing by short turns.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from relaymux.core.schedule import LITTLE

__all__ = ["LONG_TURN", "SHORT_TURN", "TALK_SECONDS", "ReadTurns", "Talker", "turns_for"]

#: Bytes gathered of one socket at most before they are handed on, while nobody talks: one
#: bulk frame, and what the memory of a daemon allows a stream to have written
#: (L{relaymux.core.budget.STREAM_WRITES}).
LONG_TURN = 512 * 1024

#: The same while somebody talks.  A turn of this is some 0.1 ms of work with TLS; with
#: half of it bulk costs nearly twice as much per byte as with long turns.
SHORT_TURN = 64 * 1024

#: Seconds for which a connection counts as talking after it said something, and as bulk
#: after it carried more than L{LITTLE} at once: longer than a request over a long line
#: takes, and too short for libvirt's keepalive, every 5 s, to cost anything.
TALK_SECONDS = 0.25


class ReadTurns:
    """
    The length of turns, for all who read in one reactor.

    Time is an argument: seconds of a clock that does not go backwards.
    """

    def __init__(self) -> None:
        self._short_until = float("-inf")

    def limit(self, now: float) -> int:
        """@return: bytes to gather of one socket before others have their turn."""
        return SHORT_TURN if now < self._short_until else LONG_TURN

    def shorten(self, now: float) -> None:
        """Somebody talks."""
        self._short_until = now + TALK_SECONDS


class Talker:
    """One connection, of which we want to know whether it talks: passes at most L{LITTLE} at once."""

    def __init__(self, turns: ReadTurns) -> None:
        self._turns = turns
        self._bulk_until = float("-inf")

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
