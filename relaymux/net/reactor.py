"""
Twisted's epoll reactor, with a short way to our own sockets.

For each event Twisted sets up a context for logging, and before each wait it looks twice at
its timers: some 30 calls of functions, as many as relaymux needs for all else once that is
compiled.  Here a socket of ours that has something to read is read at once, and what else
the reactor does is only done when there is a reason.  Everything else is as it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from select import EPOLLIN, EPOLLOUT
from typing import Any

from twisted.internet.epollreactor import EPollReactor
from twisted.internet.main import installReactor
from twisted.logger import Logger
from twisted.python.log import callWithLogger

from relaymux.net.descriptor import Descriptor
from relaymux.net.fastpath import FastPath

__all__ = ["RelayReactor", "install"]

_log = Logger("relaymux.reactor")

#: What is used here of Twisted's reactor and is none of its public interface.
_USED = (
    "_cancellations",
    "_disconnectSelectable",
    "_doReadOrWrite",
    "_insertNewDelayedCalls",
    "_justStopped",
    "_newTimedCalls",
    "_pendingTimedCalls",
    "_poller",
    "_selectables",
    "running",
    "threadCallQueue",
)


_IN_OR_OUT = EPOLLIN | EPOLLOUT

#: Timers that were cancelled and are kept; with more of them Twisted looks whether to throw them away.
MOST_CANCELLED = 50

#: Seconds to wait at most: epoll_wait(2) takes milliseconds as an int.
LONGEST_WAIT = 2_000_000.0


class RelayReactor(EPollReactor):
    """The reactor of C{twistd relaymux}."""

    _once = False

    def __init__(self) -> None:
        # Of links that have something to say; each is here at most once.
        self._turn_ends: list[Callable[[], None]] = []
        super().__init__()
        #: Asked before each wait; what it carries, nobody here sees.
        self.fast_path = FastPath(self)

    def callAtTurnsEnd(self, call: Callable[[], None]) -> None:
        """
        Call C{call} when all sockets that have something now were read, and before waiting for more.

        What C{callLater} with 0 does, at a fifth of the cost, for one who never changes his mind.
        C{call} may ask for another one: that has its turn behind whatever has happened meanwhile.
        """
        self._turn_ends.append(call)

    def iterate(self, delay: float = 0.0) -> None:
        """See C{IReactorCore.iterate}."""
        self._once = True
        try:
            super().iterate(delay)
        finally:
            self._once = False

    def doPoll(self, timeout: float | None) -> None:
        """
        Wait for events and have them handled, until a timer or another thread wants its turn.

        @param timeout: seconds at most until something happens; L{None} to wait for ever.
        """
        this: Any = self
        selectables = this._selectables
        while True:
            wait = -1.0 if timeout is None else timeout
            events = None
            if self.fast_path.turns.bulk and not self._turn_ends:
                events = self.fast_path.wait(this._poller.fileno(), wait)
            if events is None:
                events = this._poller.poll(0 if self._turn_ends else wait, len(selectables))
            for descriptor, event in events:
                selectable = selectables.get(descriptor)
                # With EPOLLHUP too, reading finds the end, or what came before it.
                if event & _IN_OR_OUT == EPOLLIN and isinstance(selectable, Descriptor):
                    self._read(selectable)
                elif selectable is not None:
                    callWithLogger(selectable, this._doReadOrWrite, selectable, descriptor, event)
            if self._turn_ends:
                self._end_turn()
            if not events or this.threadCallQueue or this._justStopped:
                return
            if self._once or not this.running or this._cancellations > MOST_CANCELLED:
                return
            if this._newTimedCalls:
                this._insertNewDelayedCalls()
            timers = this._pendingTimedCalls
            timeout = min(timers[0].time - this.seconds(), LONGEST_WAIT) if timers else None
            if timeout is not None and timeout <= 0:
                return

    doIteration = doPoll

    def _end_turn(self) -> None:
        calls, self._turn_ends = self._turn_ends, []
        for call in calls:
            try:
                call()
            except Exception:
                _log.failure("exception from {call}", call=call)

    def _read(self, socket: Descriptor) -> None:
        """Have C{socket} read; an exception ends its connection, as in any reactor of Twisted's."""
        this: Any = self
        try:
            socket.doRead()
        except BaseException:
            _log.failure("exception from {socket}", socket=socket.logPrefix())
            # In a context, as there an exception of whoever is told is logged and no more.
            callWithLogger(socket, this._disconnectSelectable, socket, sys.exc_info()[1], False)


def install() -> None:
    """
    Make this the process' reactor, unless it has one already: whoever chose one, as with
    C{twistd --reactor}, has their reasons.  Nor where Twisted is not as we know it.
    """
    if "twisted.internet.reactor" in sys.modules:
        return
    reactor = RelayReactor()
    if all(hasattr(reactor, name) for name in _USED):
        installReactor(reactor)
