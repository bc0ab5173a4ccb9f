"""
What happened, as told by L{Session} and L{Link}: in the past tense, oldest first.
"""

from __future__ import annotations

from dataclasses import dataclass

from relaymux.core.handshake import Hello, Welcome
from relaymux.core.resume import Resume


@dataclass(frozen=True)
class StreamOpened:
    """The peer opened a stream to C{service}; answer with C{accept} or C{refuse}."""

    stream_id: int
    service: str


@dataclass(frozen=True)
class StreamCrowdedOut:
    """The peer opened a stream to C{service} and was refused: there is no memory for it."""

    stream_id: int
    service: str


@dataclass(frozen=True)
class StreamAccepted:
    """The peer's end of a stream that we opened is connected."""

    stream_id: int


@dataclass(frozen=True)
class StreamRefused:
    """The peer refused a stream that we opened.  L{StreamClosed} follows."""

    stream_id: int
    code: int
    text: str


@dataclass
class DataReceived:
    """
    Bytes for the consumer of a stream.

    They count against the stream's credit until C{Session.consumed}.  Nothing
    more is expected for a stream after L{StreamFinished} or L{StreamReset}.
    """

    __slots__ = ("buffers", "size", "stream_id")
    stream_id: int
    buffers: list[memoryview]
    size: int


@dataclass(frozen=True)
class StreamFinished:
    """The peer half-closed: no data follows what was received so far."""

    stream_id: int


@dataclass(frozen=True)
class StreamReset:
    """The peer's direction of a stream ended as an error; what was not consumed yet is void."""

    stream_id: int
    code: int


@dataclass(frozen=True)
class SendingStopped:
    """
    The peer takes no more bytes of our direction.

    Our direction was reset in answer; what was not delivered is lost, which
    C{undelivered} counts (bytes accepted from our producer that the peer did
    not report as consumed so far).
    """

    stream_id: int
    code: int
    undelivered: int


@dataclass(frozen=True)
class StreamClosed:
    """
    Both directions ended and the stream is forgotten.  The last event of a stream.

    @ivar accepted: bytes taken from our producer.
    @ivar delivered: of these, bytes that the peer's consumer took.
    @ivar received: bytes received.
    @ivar consumed: of these, bytes that our consumer took.
    """

    stream_id: int
    accepted: int
    delivered: int
    received: int
    consumed: int


@dataclass(frozen=True)
class GoawayReceived:
    """The peer accepts no new streams; the streams there are go on."""

    code: int
    text: str


@dataclass(frozen=True)
class HelloReceived:
    """A dialling peer introduced itself; answer with C{Link.welcome} or C{Link.reject}."""

    hello: Hello


@dataclass(frozen=True)
class WelcomeReceived:
    """The accepting peer took us: make the session and C{Link.attach} it."""

    welcome: Welcome


@dataclass(frozen=True)
class ResumeReceived:
    """A dialling peer wants to go on with a session; answer with C{Link.resumed} or C{Link.reject}."""

    resume: Resume


@dataclass(frozen=True)
class ResumedReceived:
    """The accepting peer agrees: C{Link.attach} the session, or C{Link.reject}."""

    resume: Resume


@dataclass(frozen=True)
class LinkEnded:
    """
    The link is over: close its connection when what is queued has been sent.

    @ivar code: why, as on the wire.
    @ivar text: why, for people.
    @ivar by_peer: whether the peer said so.
    @ivar session_over: whether the session ends with the link (a protocol
        error, a goodbye), as opposed to the link alone (silence, a rejection).
    """

    code: int
    text: str
    by_peer: bool
    session_over: bool


Event = (
    StreamOpened
    | StreamCrowdedOut
    | StreamAccepted
    | StreamRefused
    | DataReceived
    | StreamFinished
    | StreamReset
    | SendingStopped
    | StreamClosed
    | GoawayReceived
    | HelloReceived
    | WelcomeReceived
    | ResumeReceived
    | ResumedReceived
    | LinkEnded
)
