"""
Ends that must not coincide.

libvirt overlooks the end of a disk's mirror that comes while it handles that of another
one, and then waits for ever (docs/decisions/0021).  Left to itself relaymux ends all disks of a
VM in the same moment, as they go through one session.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime

__all__ = ["APART_SECONDS", "Apart"]

#: Seconds between two ends.  libvirt handles one in a few calls to QEMU's monitor, which
#: takes milliseconds; this leaves room for a busy host.
APART_SECONDS = 0.5


class Apart:
    """Ends one thing after the other, in the order in which that was wanted."""

    def __init__(self, reactor: IReactorTime) -> None:
        self._reactor = reactor
        self._waiting: deque[Callable[[], None]] = deque()  # at most two for each connection
        self._timer: IDelayedCall | None = None
        self._free_at = 0.0
        self._hurries = False

    def add(self, end: Callable[[], None]) -> None:
        """Have C{end} called: now, or when those before it have had their time.  It must not raise."""
        self._waiting.append(end)
        self._go_on()

    def hurry(self) -> None:
        """Call all that wait, and from now on each at once: the daemon stops."""
        self._hurries = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._go_on()

    def _go_on(self) -> None:
        while self._waiting and self._timer is None:
            wait = 0.0 if self._hurries else self._free_at - self._reactor.seconds()
            if wait > 0:
                self._timer = self._reactor.callLater(wait, self._free)
            else:
                self._free_at = self._reactor.seconds() + APART_SECONDS
                self._waiting.popleft()()

    def _free(self) -> None:
        self._timer = None
        self._free_at = self._reactor.seconds()
        self._go_on()
