"""Log lines that others can cause as often as they like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.logger import Logger

__all__ = ["QuietLog"]

#: Seconds in which the same is logged once.
QUIET_SECONDS = 10.0

#: Things remembered for that; with more of them, the oldest are forgotten.
REMEMBERED = 1000


class QuietLog:
    """Logs each thing once in L{QUIET_SECONDS}, and then how often it had happened in between."""

    def __init__(self, log: Logger, seconds: Callable[[], float]) -> None:
        """@param seconds: the time, as C{IReactorTime.seconds}."""
        self._log = log
        self._seconds = seconds
        # Time of the last line and the number since, oldest line first.
        self._said: dict[object, tuple[float, int]] = {}

    def warn(self, key: object, text: str, **values: Any) -> None:
        """
        @param key: what counts as the same.
        @param text: a format for C{twisted.logger}.
        """
        now = self._seconds()
        last, unsaid = self._said.get(key, (now - QUIET_SECONDS, 0))
        if 0 <= now - last < QUIET_SECONDS:
            self._said[key] = (last, unsaid + 1)
            return
        self._said.pop(key, None)
        self._said[key] = (now, 0)
        if len(self._said) > REMEMBERED:
            del self._said[next(iter(self._said))]
        if unsaid:
            text += " ({unsaid} more like this since the last such line)"
        self._log.warn(text, unsaid=unsaid, **values)
