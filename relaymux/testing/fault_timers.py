"""What is to happen later: named timers, of which there is one each, and planned operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any, Final

from relaymux.errors import LocalError

__all__ = ["Timers"]

#: Operations waiting for their time.
MAX_PLANNED: Final = 1_000


class Timers:
    """Everything that waits for a time; all of it can be called off at once."""

    def __init__(self, clock: Any, random: Random, failed: Callable[[str], object]) -> None:
        """
        @param random: where C{every} takes its intervals from.
        @param failed: called with the words of a planned operation's L{LocalError}.
        """
        self._clock = clock
        self._random = random
        self._failed = failed
        #: At most L{MAX_PLANNED} and the few that have names.
        self._timers: dict[object, Any] = {}

    def start(self, name: object, seconds: float, call: Callable[[], object]) -> None:
        """Call C{call} so much later; replaces the timer of the same name."""

        def fire() -> None:
            del self._timers[name]
            call()

        self.stop(name)
        self._timers[name] = self._clock.callLater(seconds, fire)

    def stop(self, name: object) -> None:
        """Call it off, if it runs."""
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def stop_all(self) -> None:
        """Call off everything."""
        for name in list(self._timers):
            self.stop(name)

    def at(self, seconds: float, operation: Callable[[], object]) -> None:
        """
        Call C{operation} so much later.

        @raise LocalError: too much is planned.
        """
        self._plan(object(), seconds, operation)

    def every(self, low: float, high: float, operation: Callable[[], object]) -> None:
        """
        Call C{operation} again and again, each time C{low} to C{high} seconds later.

        @raise LocalError: too much is planned.
        """
        name = object()

        def again() -> None:
            self._plan(name, self._random.uniform(low, high), again)
            operation()

        self._plan(name, self._random.uniform(low, high), again)

    def _plan(self, name: object, seconds: float, operation: Callable[[], object]) -> None:
        if len(self._timers) >= MAX_PLANNED:
            raise LocalError(f"at most {MAX_PLANNED} operations can be planned at a time")
        self.start(name, seconds, partial(self._do, operation))

    def _do(self, operation: Callable[[], object]) -> None:
        try:
            operation()
        except LocalError as error:
            self._failed(str(error))
