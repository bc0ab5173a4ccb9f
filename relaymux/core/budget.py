"""
The memory of a daemon: one budget, from which all its sessions draw.

Drawn from it is what may have to be held: credit that peers were promised, what
is kept until they acknowledge it, and what a producer may have written and not
sent.  It is counted when it is promised, not when it is used, so that the sum
is a bound whatever peers and consumers do.

There are two ways to draw.  A I{beginning}, the least that a link or a stream
works with, is had as long as there is anything left.  I{Growth} has to leave a
part for beginnings, and takes at most half of what it finds: so the first to
grow leaves something to the second, and one link cannot starve another.
"""

from __future__ import annotations

from typing import Final

from relaymux.core.replay import HEAD_ROOM

#: The part of a budget that growth leaves alone, so that new streams can begin.
KEPT_SHARE: Final = 4

#: Of what is there to grow into, the part that one growth takes at most.
GROWTH_SHARE: Final = 2

#: A growth of less than this part of what was asked for is not worth having.
LEAST_SHARE: Final = 8

#: With less than this part of the budget left to grow into it is scarce, and windows
#: that are larger than their streams need shrink.
SCARCE_SHARE: Final = 8

#: Bytes that a producer may have written and that are not sent: what is gathered of a
#: local socket at once.  It pauses while there are any.
STREAM_WRITES: Final = 512 * 1024

#: Bytes that a link may hold beside its replay buffer: control frames beyond it, and
#: the frame that arrives in parts.
LINK_EXTRA: Final = HEAD_ROOM + 1024 * 1024


def stream_beginning(window: int) -> int:
    """@return: bytes that a stream with a window of C{window} bytes draws when it is opened."""
    return window + STREAM_WRITES


def link_beginning(replay: int) -> int:
    """@return: bytes that a link with a replay buffer of C{replay} bytes draws, with a session or without."""
    return replay + LINK_EXTRA


class Budget:
    """
    What a daemon may hold for all its links.

    @ivar total: bytes.
    @ivar drawn: bytes that are promised or held; never more than C{total}.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.drawn = 0

    @property
    def room(self) -> int:
        """Bytes that are left to grow into."""
        return max(0, self.total - self.total // KEPT_SHARE - self.drawn)

    @property
    def scarce(self) -> bool:
        """Whether others could need what is not needed."""
        return self.room < self.total // SCARCE_SHARE

    def begin(self, amount: int) -> bool:
        """@return: whether C{amount} bytes were there; if so they are drawn."""
        if amount > self.total - self.drawn:
            return False
        self.drawn += amount
        return True

    def grow(self, wanted: int) -> int:
        """@return: bytes drawn, at most C{wanted}; 0 if there are too few to be of use."""
        amount = min(wanted, self.room // GROWTH_SHARE)
        if amount < max(1, wanted // LEAST_SHARE):
            return 0
        self.drawn += amount
        return amount

    def give_back(self, amount: int) -> None:
        """Return C{amount} bytes that were drawn."""
        self.drawn -= amount


class Account:
    """
    What one session has drawn.

    @ivar drawn: bytes; all of them come back with L{close}.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._closed = False
        self.drawn = 0

    @property
    def scarce(self) -> bool:
        """See L{Budget.scarce}."""
        return self._budget.scarce

    def begin(self, amount: int) -> bool:
        """See L{Budget.begin}."""
        if self._closed or not self._budget.begin(amount):
            return False
        self.drawn += amount
        return True

    def grow(self, wanted: int) -> int:
        """See L{Budget.grow}."""
        amount = 0 if self._closed else self._budget.grow(wanted)
        self.drawn += amount
        return amount

    def give_back(self, amount: int) -> None:
        """See L{Budget.give_back}; nothing once it is closed, when everything was given back."""
        if not self._closed:
            self._budget.give_back(amount)
            self.drawn -= amount

    def close(self) -> None:
        """The session is over: give everything back."""
        self.give_back(self.drawn)
        self._closed = True
