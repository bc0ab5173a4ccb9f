"""
Every exception of relaymux and every error code on the wire.

The hierarchy follows who can do something about it: the operator
(L{ConfigurationError}), the calling code (L{LocalError}), the peer
(L{RemoteProtocolError}), the network (L{TransportError}), nobody any more
(L{SessionLost}, L{StreamReset}).
"""

from __future__ import annotations

from enum import IntEnum

__all__ = [
    "ConfigurationError",
    "ErrorCode",
    "LocalError",
    "RelaymuxError",
    "RemoteProtocolError",
    "SessionLost",
    "StreamReset",
    "TransportError",
    "describe_code",
]


class ErrorCode(IntEnum):
    """
    Codes in RESET, STOP_SENDING, REFUSED, CLOSED, GOAWAY, REJECT and BYE
    (protocol.md, "Error codes").  Sent as u16; a code that is not listed here
    stays a plain int on receipt.
    """

    NO_ERROR = 0

    # The peer broke the protocol; the session ends.
    PROTOCOL_ERROR = 1
    FRAME_TOO_LARGE = 2
    FLOW_CONTROL_ERROR = 3
    STREAM_STATE_ERROR = 4
    UNKNOWN_STREAM = 5
    ACK_ERROR = 6
    FLOOD = 7
    INTERNAL_ERROR = 8

    # One stream ends.
    UNKNOWN_SERVICE = 16
    CONNECT_FAILED = 17
    OPEN_TIMEOUT = 18
    TOO_MANY_STREAMS = 19
    LOCAL_RESET = 20
    LOCAL_CLOSED = 21
    ABORTED = 22
    SESSION_EXPIRED = 23
    PEER_RESTARTED = 24

    # A link is refused or ends.
    VERSION_UNSUPPORTED = 32
    NOT_AUTHORISED = 33
    BUSY = 34
    HANDSHAKE_TIMEOUT = 35
    KEEPALIVE_TIMEOUT = 36
    SHUTTING_DOWN = 37
    LINK_REPLACED = 38
    UNKNOWN_SESSION = 39
    STALE_GENERATION = 40
    OFFSET_MISMATCH = 41


def describe_code(code: int) -> str:
    """C{"UNKNOWN_SERVICE (16)"}, or C{"code 999"} for one this version does not know."""
    try:
        return f"{ErrorCode(code).name} ({code})"
    except ValueError:
        return f"code {code}"


class RelaymuxError(Exception):
    """The root of relaymux's own exceptions."""


class ConfigurationError(RelaymuxError):
    """
    The operator's mistake, found before anything listens.

    Raised with what the place that found it knows; who knows the file or the
    section adds it with L{within}.  The message names all of them.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str = "",
        section: str = "",
        key: str = "",
        found: str | None = None,
        expected: str = "",
    ) -> None:
        """
        @param problem: what is wrong, one clause without a full stop.
        @param found: the value as written; L{None} when there is none to show.
        @param expected: what would have been right, and what to do.
        """
        super().__init__(problem)
        self.problem = problem
        self.file = file
        self.section = section
        self.key = key
        self.found = found
        self.expected = expected

    def within(self, file: str = "", section: str = "", key: str = "") -> ConfigurationError:
        """@return: this error, its empty places filled in."""
        self.file = self.file or file
        self.section = self.section or section
        self.key = self.key or key
        return self

    def __str__(self) -> str:
        where = ": ".join(
            part
            for part in (
                self.file,
                f"[{self.section}]" if self.section else "",
                self.key,
            )
            if part
        )
        text = f"{where}: {self.problem}" if where else self.problem
        if self.found is not None:
            text += f"; found {self.found!r}"
        if self.expected:
            text += f"; expected {self.expected}"
        return text


class LocalError(RelaymuxError):
    """The calling code's mistake (a write after finish, an unknown stream); no state was changed."""


class RemoteProtocolError(RelaymuxError):
    """The peer broke the protocol; what the link's connection ends with."""

    def __init__(self, code: int, message: str, stream_id: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.stream_id = stream_id

    def __str__(self) -> str:
        where = f" on stream {self.stream_id}" if self.stream_id else ""
        return f"{describe_code(self.code)}{where}: {self.args[0]}"


class TransportError(RelaymuxError):
    """
    The peer could not be reached, or is not the one expected.

    @ivar retry: whether dialling again can help without anybody's doing
        (a refused connection: yes; a wrong certificate: no).
    """

    def __init__(self, message: str, *, retry: bool = True) -> None:
        super().__init__(message)
        self.retry = retry


class SessionLost(RelaymuxError):
    """The session is over and every stream of it with it."""

    def __init__(self, message: str, code: int = ErrorCode.NO_ERROR) -> None:
        super().__init__(message)
        self.code = code


class GivenUp(RelaymuxError):
    """This daemon itself ended a stream, for the reason in the message."""


class StreamReset(RelaymuxError):
    """A stream ended as an error: reset or refused by the peer, or with its session."""

    def __init__(self, code: int, message: str = "") -> None:
        super().__init__(message or describe_code(code))
        self.code = code
