"""
Many deadlines, one timer.

A timer for each connection that is opened is cancelled within a millisecond in nearly all cases,
and takes the reactor out of its stride: it has to look at its timers before it waits again.
Here one runs all the time, and is mostly found to have been for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from twisted.internet.interfaces import IDelayedCall, IReactorTime

__all__ = ["Deadlines"]

_NEVER: Final = float("inf")


class Deadlines:
    """
    What is waited for, each until a time of its own.

    Bounded by who is waited for: nobody is here twice.
    """

    def __init__(
        self,
        reactor: IReactorTime,
        overdue: Callable[[Any, float], None],
        more_will_come: Callable[[], bool],
    ) -> None:
        """
        @param overdue: called with who was waited for, and for how many seconds, when these are over.
        @param more_will_come: whether the timer should go on when nobody is waited for.
        """
        self._reactor = reactor
        self._overdue = overdue
        self._more_will_come = more_will_come
        # By the seconds to wait, and in each in the order in which they end.
        self._waiting: dict[float, dict[object, float]] = {}
        self._timer: IDelayedCall | None = None
        self._timer_at = _NEVER

    def add(self, who: object, seconds: float) -> None:
        """Wait for C{who}, who is not waited for yet, for so long."""
        due = self._reactor.seconds() + seconds
        self._waiting.setdefault(seconds, {})[who] = due
        if due < self._timer_at:
            self._set_timer(due)

    def discard(self, who: object) -> None:
        """Wait for C{who} no more; nothing happens if nobody does."""
        for waiting in self._waiting.values():
            waiting.pop(who, None)
        self.rest()

    def rest(self) -> None:
        """Stop the timer if nobody is waited for, nor will be soon."""
        if self._timer is not None and not any(self._waiting.values()) and not self._more_will_come():
            self._set_timer(_NEVER)

    def _set_timer(self, due: float) -> None:
        if self._timer is not None and self._timer.active():
            self._timer.cancel()
        self._timer_at = due
        self._timer = None
        if due != _NEVER:
            self._timer = self._reactor.callLater(max(0.0, due - self._reactor.seconds()), self._look)

    def _look(self) -> None:
        """Tell who is overdue, and see that the next one is told."""
        self._timer, self._timer_at = None, _NEVER
        now = self._reactor.seconds()
        over = [
            (due, seconds, who)
            for seconds, waiting in self._waiting.items()
            for who, due in waiting.items()
            if due <= now
        ]
        over.sort(key=lambda entry: entry[0])
        for _, seconds, who in over:
            if self._waiting[seconds].pop(who, None) is not None:  # else one of the others has ended it
                self._overdue(who, seconds)
        self._waiting = {seconds: waiting for seconds, waiting in self._waiting.items() if waiting}
        first = min([next(iter(waiting.values())) for waiting in self._waiting.values()], default=_NEVER)
        if first < self._timer_at:
            self._set_timer(first)
