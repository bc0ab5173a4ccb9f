"""
Whether a window is as large as what passes in the time for which it has to last.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

#: Round trips within which a window's worth has to pass for the window to be too small.
GROW_WITHIN: Final = 2

#: A window is too large if this many times what passes in L{GROW_WITHIN} round trips
#: would still be less.
TOO_LARGE: Final = 8


#: The part of a window that is measured.  A CREDIT is made for every quarter, so the
#: last one is heard of with the next round trip only, and each growth would take two.
MEASURED: Final = 3 / 4


class Fit(Enum):
    """How a size compares with what passes in a round trip."""

    SMALL = "small"
    RIGHT = "right"
    LARGE = "large"


class Meter:
    """How fast an offset rises, measured again and again over up to L{GROW_WITHIN} round trips."""

    __slots__ = ("_offset", "_since")

    def __init__(self) -> None:
        self._offset = 0
        self._since: float | None = None

    def restart(self) -> None:
        """Forget: what was measured was another link, or none."""
        self._since = None

    def judge(self, offset: int, size: int, now: float, round_trip: float) -> Fit:
        """
        @param offset: bytes that have passed so far.
        @param size: the window that is judged, bytes.
        @param round_trip: seconds.
        """
        if self._since is None:
            self._offset, self._since = offset, now
            return Fit.RIGHT
        passed, elapsed = offset - self._offset, now - self._since
        part, period = MEASURED * size, MEASURED * GROW_WITHIN * round_trip
        if elapsed < period and passed < part:
            return Fit.RIGHT
        if passed * period >= part * elapsed:
            fit = Fit.SMALL  # also where nobody has looked for longer than that
        else:
            fit = Fit.LARGE if part * elapsed > TOO_LARGE * passed * period else Fit.RIGHT
        self._offset, self._since = offset, now
        return fit
