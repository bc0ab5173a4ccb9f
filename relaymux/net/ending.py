"""
Who ended a bridged connection, and why: the one line that an operator is told.

QEMU and libvirt say little when a migration fails, "End of file" mostly, and the line here
is where it can be seen whether a program closed, and which, or whether relaymux gave up.
"""

from __future__ import annotations

from typing import Final

from twisted.internet.error import ConnectionDone
from twisted.python.failure import Failure

from relaymux.errors import ErrorCode, GivenUp, SessionLost, StreamReset

__all__ = ["Ending"]

HERE: Final = "the program here"
THERE: Final = "the program at the other end"

#: Of a stream: what its code says.
_STREAM_ENDED: Final = {
    int(ErrorCode.LOCAL_RESET): f"{THERE} reset it",
    int(ErrorCode.LOCAL_CLOSED): f"{THERE} closed it before it had taken everything",
    int(ErrorCode.ABORTED): "the other daemon gave it up",
}

#: Of a session, with all its streams.
_SESSION_ENDED: Final = {
    int(ErrorCode.SESSION_EXPIRED): "relaymux gave up",
    int(ErrorCode.PEER_RESTARTED): "the other daemon is another process now",
    # What a daemon that was started anew says when it is dialled.
    int(ErrorCode.UNKNOWN_SESSION): "the other daemon was restarted, or has given up",
    int(ErrorCode.SHUTTING_DOWN): "a daemon was stopped",
}


class Ending:
    """
    What becomes known of an end, in whatever order.

    Who closes first has decided: the other end only follows.  An error counts more than
    an end in order, and the first error is the cause of the others.

    @ivar reason: as for C{connectionLost}; L{None} while nothing has ended.
    """

    def __init__(self) -> None:
        self.reason: Failure | None = None
        self._closer = ""
        self._cause = ""

    def finished(self, *, here: bool) -> None:
        """One program has closed, or ended its output, in order."""
        if not self._closer:
            self._closer = HERE if here else THERE

    def lost(self, reason: Failure, *, here: bool) -> None:
        """The local connection, or the stream, is gone."""
        if isinstance(reason.value, ConnectionDone):
            self.finished(here=here)
            self.reason = self.reason or reason
        elif self.reason is None or self.is_clean:
            self.reason = reason
            self._cause = _cause_here(reason) if here else _cause_there(reason)

    @property
    def is_clean(self) -> bool:
        """Whether all was in order."""
        return self.reason is not None and isinstance(self.reason.value, ConnectionDone)

    def __str__(self) -> str:
        return f"closed by {self._closer}" if self.is_clean else f"ended as an error: {self._cause}"


def _cause_here(reason: Failure) -> str:
    return f"the connection to {HERE} broke: {reason.getErrorMessage()}"


def _cause_there(reason: Failure) -> str:
    error = reason.value
    if isinstance(error, SessionLost):
        return f"{_SESSION_ENDED.get(error.code, 'the daemons lost their session')}: {error}"
    if isinstance(error, GivenUp):
        return f"relaymux gave up: {error}"
    if isinstance(error, StreamReset):
        return f"{_STREAM_ENDED.get(error.code, 'the other daemon ended it')}: {error}"
    return f"relaymux ended it: {reason.getErrorMessage()}"
