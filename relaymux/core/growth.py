"""
How windows and replay buffers follow what a line can carry.

Both bound what is on its way, and so the rate: to less than the line's if they
are smaller than bandwidth x round trip.  So a window becomes larger when a whole
one of it was consumed within two round trips, for then it may have been what was
waited for.  That ends with about two to four times bandwidth x round trip, whether
the bandwidth is the line's or that of a slow consumer.  A replay buffer follows
the windows of the peer: it becomes larger when it stops what credit allows and
the link takes.

Nothing here is done per frame: a window is looked at when a CREDIT is made for
it, a replay buffer when it is found full.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from relaymux.core.budget import Account
from relaymux.core.meter import Fit
from relaymux.core.replay import ReplayBuffer
from relaymux.core.window import ReceiveWindow

#: Bytes up to which a size becomes four times what it was and not twice: on a long line
#: each step costs a round trip, and only there does any size come near to this.
HASTE = 16 * 1024 * 1024

#: A replay buffer grows when this part of it was acknowledged since it last did: with a
#: peer that acknowledges nothing more memory is of no use.
WIDEN_SHARE: Final = 4

#: Seconds added to the shortest round trip: where that is next to nothing, what is on its
#: way waits for two daemons to take their turns.  On two idle processors that takes less
#: than this, and what is more on its way only fills the processors' caches: 4 MB instead of
#: 1 MB cost a tenth of the processor time of all (docs/performance.md).
TURN_SECONDS: Final = 0.0002

#: The same where the daemons pass on pages of memory and do not touch what is on its way: then the programs'
#: turns are what is waited for, and the fewer CREDITs there are, the better.  Likewise on a fast path that
#: encrypts, as a turn takes longer there.
WIDE_TURN_SECONDS: Final = 0.001

#: The same until the windows of a session have grown by L{FIRST_BYTES}: daemons that have to
#: wait for a processor shall not be held to a few hundred kilobytes.
FIRST_TURN_SECONDS: Final = 0.002

#: What one stream's window grows by at first, from its default of 256 KiB.
FIRST_BYTES = 768 * 1024


class Growth:
    """
    The sizes of one session, within what its account gives.

    @ivar round_trip: seconds, the shortest on the present link; L{None} until the first
        is known, and nothing grows before.  The shortest: a PING may have had to wait
        behind data, and then said nothing about the line.
    @ivar turn: seconds, L{TURN_SECONDS} or L{WIDE_TURN_SECONDS}, as the link's last bulk was carried.
    @ivar grown: bytes by which the windows that are open are larger than they began.
    """

    def __init__(self, account: Account) -> None:
        self.account = account
        self.round_trip: float | None = None
        self.turn = TURN_SECONDS
        self.grown = 0

    def restart(self, windows: Iterable[ReceiveWindow]) -> None:
        """There is a new link, and the time without one says nothing about it."""
        self.round_trip = None
        self.turn = TURN_SECONDS
        for window in windows:
            window.meter.restart()

    def heard_round_trip(self, seconds: float) -> None:
        """A PING took C{seconds}."""
        if self.round_trip is None or seconds < self.round_trip:
            self.round_trip = seconds

    def fit_window(self, window: ReceiveWindow, now: float) -> None:
        """
        Look at C{window}, for which a CREDIT is about to be made.

        One that shrinks takes nothing back that was granted: no credit is due
        before as much was consumed.  What it has of the account follows the
        larger of its size and what is still promised.
        """
        if self.round_trip is None:
            return
        turn = self.turn if self.grown >= FIRST_BYTES else FIRST_TURN_SECONDS
        fit = window.meter.judge(window.consumed, window.size, now, self.round_trip + turn)
        if fit is Fit.SMALL:
            amount = self._grow(window.size)
            self._resize(window, window.size + amount)
            window.drawn += amount
        elif fit is Fit.LARGE and self.account.scarce:
            self._resize(window, max(window.least, window.size // 2))
        surplus = window.drawn - max(window.size, window.granted - window.consumed)
        if surplus > 0:
            window.drawn -= surplus
            self.account.give_back(surplus)

    def end_window(self, window: ReceiveWindow) -> None:
        """C{window}'s consumer has everything, or wants nothing more: nothing will be held for it."""
        self.account.give_back(window.drawn)
        window.drawn = 0
        self._resize(window, window.least)

    def widen_replay(self, replay: ReplayBuffer) -> bool:
        """
        Look at C{replay}, which stops DATA that the link and the peer's credit would take.

        @return: whether it is larger now: if the peer acknowledges, and there is memory.
        """
        if replay.acknowledged - replay.widened_at < replay.capacity // WIDEN_SHARE:
            return False
        amount = self._grow(replay.capacity)
        replay.capacity += amount
        replay.widened_at = replay.acknowledged
        return amount > 0

    def narrow_replay(self, replay: ReplayBuffer) -> None:
        """Give back what C{replay} has grown by, now and then, if it holds little."""
        if replay.held_bytes <= replay.least < replay.capacity:
            self.account.give_back(replay.capacity - replay.least)
            replay.capacity = replay.least

    def _resize(self, window: ReceiveWindow, size: int) -> None:
        self.grown += size - window.size
        window.size = size

    def _grow(self, size: int) -> int:
        """@return: bytes by which what has C{size} bytes may grow."""
        return self.account.grow(3 * size if size <= HASTE else size)
