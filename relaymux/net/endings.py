"""
The lines that say how connections ended in order: one for each, unless there are very many.

A program that connects again and again in a loop would fill the log with lines of which nobody
reads one, and most of what such a connection costs would be its line.  An end that is not in
order is none of this: it is always said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from twisted.internet.interfaces import IDelayedCall, IReactorTime

from relaymux.net.amounts import exact_amount

__all__ = ["MOST_LINES", "Endings"]

#: Lines of one section in L{INTERVAL} seconds; those beyond are counted, and one line says so.
MOST_LINES: Final = 20
INTERVAL: Final = 1.0


class Endings:
    """Those of one section."""

    def __init__(self, reactor: IReactorTime, section: str, say: Callable[[str], object]) -> None:
        """@param say: writes a line."""
        self._reactor = reactor
        self._section = section
        self._say = say
        self._until = float("-inf")
        self._left = 0
        self._rests = False
        self._unsaid = 0
        self._sent = 0
        self._received = 0
        self._timer: IDelayedCall | None = None

    def add(self, line: Callable[[], str], sent: int, received: int) -> None:
        """
        A connection has ended.

        @param line: gives what is to be said of it.
        @param sent: bytes that it took from the local program.
        @param received: bytes that it gave to it.
        """
        now = self._reactor.seconds()
        if self._timer is None and not self._until - INTERVAL <= now < self._until:
            self._until = now + INTERVAL
            self._left = MOST_LINES
        if self._left or self._rests:
            self._left = max(0, self._left - 1)
            self._say(line())
            return
        self._unsaid += 1
        self._sent += sent
        self._received += received
        if self._timer is None:
            self._timer = self._reactor.callLater(self._until - now, self.sum_up)

    def rest(self) -> None:
        """Say what was not said yet, and from now on each by itself: nobody may be there to sum up."""
        self._rests = True
        self.sum_up()

    def sum_up(self) -> None:
        """Say what was not said yet."""
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer = None
        if not self._unsaid:
            return
        self._say(
            f"{self._section}: {self._unsaid} more connections ended in order within a second,"
            f" {exact_amount(self._sent)} sent, {exact_amount(self._received)} received"
        )
        self._unsaid = self._sent = self._received = 0
