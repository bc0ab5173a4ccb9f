"""What the fast path needs to pass pages of memory on, and not to copy them (F{_fastpath_pipes.c})."""

from __future__ import annotations

from typing import Any, Final

from twisted.logger import Logger

from relaymux.net.compiled import native

__all__ = ["PageStock"]

_log: Final = Logger("relaymux.link")

#: Sets of pipes, one for each lease at a time; the others copy.  A set takes 13 descriptors and 1,536 of
#: the 16,384 pages of pipes that Linux allows an ordinary user; nothing is in them between two leases.
MOST_PAGES: Final = 4


class PageStock:
    """The sets of pipes of one reactor, made when they are first wanted."""

    def __init__(self) -> None:
        self._idle: list[Any] = []
        self._more = MOST_PAGES

    def take(self) -> Any:
        """@return: C{Pages} for one lease, or L{None}: it is to copy."""
        if self._idle:
            return self._idle.pop()
        if not self._more:
            return None
        assert native is not None
        try:
            pages = native.Pages()
        except OSError as error:
            self._more = 0
            _log.info(
                "bulk is copied, which costs more CPU time, as there are no pipes to pass it on by: {error}"
                " (see LimitNOFILE, and pipe-user-pages-soft in pipe(7))",
                error=error.strerror,
            )
            return None
        self._more -= 1
        return pages

    def give_back(self, pages: Any) -> None:
        """C{pages} are of no use to a lease any more, which is settled."""
        self._idle.append(pages)

    def lose(self) -> None:
        """Those of a lease that could not be settled are gone."""
        self._more += 1
