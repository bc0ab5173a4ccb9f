"""
One link: the handshake, who is alive, and the way between bytes and a session.

A link is one connection.  It begins with HELLO and WELCOME, carries a session's
frames, and ends when its connection does, when it fell silent, when the peer
broke the protocol, or with a goodbye (protocol.md 7, 8).  It never decides who
may connect: it reports L{HelloReceived} and is told.

Time is an argument: seconds of a clock that does not go backwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from struct import Struct
from typing import Final

from relaymux.core.events import (
    Event,
    HelloReceived,
    LinkEnded,
    ResumedReceived,
    ResumeReceived,
    WelcomeReceived,
)
from relaymux.core.flight import UNBOUNDED, Flight
from relaymux.core.frames import (
    FIRST_SEQUENCED,
    MAX_CONTROL_PAYLOAD,
    Buffer,
    Frame,
    FrameDecoder,
    Kind,
    encode,
)
from relaymux.core.handshake import (
    Hello,
    Limits,
    Welcome,
    decode_coded_text,
    decode_hello,
    decode_reject,
    decode_welcome,
    encode_coded_text,
    encode_reject,
)
from relaymux.core.resume import decode_resume
from relaymux.core.session import Session
from relaymux.errors import ErrorCode, LocalError, RemoteProtocolError

OFFSET: Final = Struct("!Q")

#: Seconds at which nothing is to be done any more.
NEVER: Final = float("inf")

#: Seconds until the handshake must be complete.  One round trip; the rest is for a
#: busy host.  A stranger who says nothing holds a connection no longer than this.
HANDSHAKE_SECONDS: Final = 5.0

#: PINGs per silence that a peer tolerates: two may be late before the link is given up.
PINGS_PER_SILENCE: Final = 3

#: PINGs that leave one after the other, as answers come, when a link is new.  Either daemon may have
#: something else to do just then, and the first answer be late by many times what the line takes.
FIRST_PINGS: Final = 4

#: Seconds until received bytes are acknowledged when few of them arrive: a fraction
#: of what matters to the peer's replay buffer, and long enough to gather.
ACK_SECONDS: Final = 0.025

#: The same if among them is a FIN, which CLOSED answers: until there is something to leave with it.  A
#: program that connects again and again has the next thing to say in a tenth of that.
CLOSED_SECONDS: Final = 0.005


class LinkState(Enum):
    """The life of a link."""

    HELLO = "waiting for HELLO"
    DECISION = "waiting for this side's decision"
    WELCOME = "waiting for WELCOME"
    RESUMED = "waiting for RESUMED"
    OPEN = "open"
    ENDED = "ended"


class Link:
    """
    One side of a link.

    @ivar state: see L{LinkState}.
    @ivar session: set by L{attach}; gone when the link has ended.
    """

    def __init__(
        self, *, local: Limits, now: float, hello: Hello | None = None, resume: bytes | None = None
    ) -> None:
        """
        @param local: what this side accepts.
        @param hello: what a dialling side says first, to begin a session;
        @param resume: or, to go on with one: the payload of RESUME.  Neither on
            the accepting side.
        """
        self.state = LinkState.HELLO
        self.session: Session | None = None
        # A stranger cannot make us hold more than the longest introduction.
        self._decoder = FrameDecoder(MAX_CONTROL_PAYLOAD)
        self._max_payload = local.max_payload
        self._out: list[Buffer] = []
        self._silence = local.silence
        self._ping_interval = local.silence / PINGS_PER_SILENCE
        self._handshake_until = now + HANDSHAKE_SECONDS
        self._heard_at = now
        self._ping_at = now + self._ping_interval
        self._flight = Flight()
        self._pong: bytes | None = None
        self._ack_at: float | None = None
        self._resumes = False
        # What is due is kept as state until it can leave: a transport that takes
        # nothing for long makes nothing grow here.
        self._ack_now = False
        self._ping_now = False
        self._first_pings = 0  # that have not left yet, nor are about to
        if hello is not None:
            self.state = LinkState.WELCOME
            self._out.append(encode(Kind.HELLO, 0, hello.encode()))
        elif resume is not None:
            self.state = LinkState.RESUMED
            self._out.append(encode(Kind.RESUME, 0, resume))

    @property
    def ended(self) -> bool:
        """Whether the link is over: what is queued may still be sent."""
        return self.state is LinkState.ENDED

    @property
    def round_trip(self) -> float:
        """Seconds that the last PING took; 0 before the first."""
        return self._flight.round_trip

    @property
    def missing(self) -> int:
        """Bytes that have to arrive before anything can be done with them; 0 if that is not known."""
        return self._decoder.missing

    # Calls from this side.

    def welcome(self, welcome: Welcome) -> None:
        """Accept the peer whose HELLO was reported; L{attach} its session next."""
        if self.state is not LinkState.DECISION:
            raise LocalError(f"welcome while {self.state.value}")
        self._out.append(encode(Kind.WELCOME, 0, welcome.encode()))

    def resumed(self, payload: bytes) -> None:
        """Agree to the RESUME that was reported; L{attach} its session next."""
        if self.state is not LinkState.DECISION:
            raise LocalError(f"resumed while {self.state.value}")
        self._resumes = True
        self._out.append(encode(Kind.RESUMED, 0, payload))

    def detach(self) -> None:
        """End at once and say nothing: another link carries the session now, or will."""
        self.state = LinkState.ENDED
        self.session = None
        self._out.clear()

    def attach(self, session: Session, remote: Limits, now: float) -> None:
        """Carry C{session} from now on."""
        if self.state not in (LinkState.DECISION, LinkState.WELCOME, LinkState.RESUMED):
            raise LocalError(f"attach while {self.state.value}")
        self.state = LinkState.OPEN
        self.session = session
        self._decoder.max_payload = self._max_payload
        # Whoever is the less patient of the two decides how often both speak.
        self._ping_interval = min(self._silence, remote.silence) / PINGS_PER_SILENCE
        self._ping_at = now + self._ping_interval
        session.linked()
        if session.growth is not None:
            # While nothing else is on its way yet, so that the answer tells what the way takes.
            self._ping_now = True
            self._first_pings = FIRST_PINGS - 1

    def reject(self, code: int, text: str) -> LinkEnded:
        """Refuse the peer; the connection is to be closed when this was sent."""
        self._out.append(encode(Kind.REJECT, 0, encode_reject(code, text)))
        return self._end(code, text)

    def goodbye(self, code: int, text: str) -> LinkEnded:
        """End the session with the link; the connection is to be closed when this was sent."""
        self._out.append(encode(Kind.BYE, 0, encode_coded_text(code, text)))
        return self._end(code, text, session_over=True)

    # Bytes in, bytes out.

    def receive(self, buffers: Iterable[memoryview], now: float) -> Iterator[Event]:
        """
        Take in what arrived; to be run to its end before the next call.

        Never raises for what the peer did: a fault ends the events with
        L{LinkEnded}, after those of the frames in front of it.

        @return: what happened, oldest first, each before the next frame is
            looked at: an answer given meanwhile is in time for what follows.
        """
        if self.ended:
            return
        self._heard_at = now
        try:
            for buffer in buffers:
                for frame in self._decoder.feed(buffer):
                    if frame.kind >= FIRST_SEQUENCED:
                        yield from self._open_session(frame).receive_frame(frame)
                    else:
                        yield from self._on_link_frame(frame, now)
                    if self.ended:
                        return
        except RemoteProtocolError as error:
            yield self._fault(error)
            return
        session = self.session
        if session is not None and session.rx_next > session.rx_acknowledged:
            due = now + (CLOSED_SECONDS if session.is_patient else ACK_SECONDS)
            if self._ack_at is None or due < self._ack_at:
                self._ack_at = due

    @property
    def at_rest(self) -> bool:
        """Whether it is open and nothing waits to be said: then the fast path may go on in its place."""
        session = self.session
        return session is not None and self.state is LinkState.OPEN and not self.has_something

    def suspend(self) -> list[Buffer]:
        """@return: what has arrived of a frame, to be received again; see L{FrameDecoder.suspend}."""
        return self._decoder.suspend()

    def carried(
        self,
        sent: list[tuple[int, list[Buffer]]],
        end: int,
        acknowledged: int,
        rx_next: int,
        told: int,
        now: float,
    ) -> list[Event]:
        """
        Note what the fast path has done; parameters as of L{Outbox.carried}.

        @return: L{LinkEnded} if the peer broke the protocol.
        """
        session = self.session
        assert session is not None
        if rx_next != session.rx_next or acknowledged != session.replay.acknowledged:
            self._heard_at = now
        if told != session.rx_acknowledged:
            self._ack_at = None
        try:
            session.carried(sent, end, acknowledged, rx_next, told)
        except RemoteProtocolError as error:
            return [self._fault(error)]
        self._flight.arrived(acknowledged)
        if self._ack_at is None and rx_next > told and not session.is_patient:
            self._ack_at = now + ACK_SECONDS
        return []

    def acknowledge(self) -> None:
        """Have what was received acknowledged with the next L{data_to_send}."""
        session = self.session
        self._ack_now = session is not None and session.rx_next > session.rx_acknowledged

    @property
    def max_payload(self) -> int:
        """Bytes that a DATA frame of the peer may have."""
        return self._max_payload

    @property
    def has_something(self) -> bool:
        """Whether C{data_to_send} is worth a call: there may be something to send."""
        if self._out or self._ack_now or self._ping_now or self._pong is not None:
            return True
        session = self.session
        if session is None:
            return False
        # What may wait goes with the ACK at the latest, if there is to be one.
        return session.has_something or session.ack_due or (self._ack_at is None and session.is_patient)

    def data_to_send(self, limit: int, now: float, *, beside_talk: bool = False) -> list[Buffer]:
        """
        @param limit: stop after about this many bytes of data; control frames always go.
        @param now: seconds.
        @param beside_talk: whether somebody waits for answers: then little is in front of them
            on the way, see L{relaymux.core.flight}.
        @return: buffers to be sent in this order; empty if there is nothing.
        """
        out, self._out = self._out, []
        session = self.session
        if session is not None:
            before = session.sent
            bulk_until = self._flight.bulk_until if beside_talk else UNBOUNDED
            frames = session.data_to_send(limit, now, bulk_until)
            leaves = bool(frames) or self._pong is not None
            if self._ack_now or session.ack_due or (leaves and session.ack_worthwhile):
                out.append(self._ack(session))
            if self._ping_now:
                self._ping_now = False
                out.append(encode(Kind.PING, 0, OFFSET.pack(self._flight.ping(before, now))))
            if self._pong is not None:
                out.append(encode(Kind.PONG, 0, self._pong))
                self._pong = None
            out += frames
            if beside_talk and self._flight.probe_due(session.sent):
                number = self._flight.ping(session.sent, now)
                out.append(encode(Kind.PING, 0, OFFSET.pack(number)))
        return out

    def next_timer(self) -> float:
        """@return: when L{handle_timer} wants to be called; infinity once the link has ended."""
        if self.ended:
            return NEVER
        if self.state is not LinkState.OPEN:
            return self._handshake_until
        due = min(self._heard_at + self._silence, self._ping_at)
        return due if self._ack_at is None else min(due, self._ack_at)

    def handle_timer(self, now: float) -> list[Event]:
        """
        Do what is due.  More may be there to send afterwards.

        @return: L{LinkEnded} if time is up.
        """
        session = self.session
        if self.ended:
            return []
        if session is None:
            if now < self._handshake_until:
                return []
            return [
                self.reject(
                    ErrorCode.HANDSHAKE_TIMEOUT,
                    f"{self.state.value} for {HANDSHAKE_SECONDS:g} s",
                )
            ]
        # Compared as next_timer() computes it, to the last bit.
        if now >= self._heard_at + self._silence:
            return [self._end(ErrorCode.KEEPALIVE_TIMEOUT, f"nothing heard for {self._silence:g} s")]
        if self._ack_at is not None and now >= self._ack_at:
            self._ack_at = None
            self._ack_now = session.rx_next > session.rx_acknowledged
        if now >= self._ping_at:
            self._ping_at = now + self._ping_interval
            self._ping_now = True
            session.rest()
        return []

    # Frames of the link itself.

    def _on_link_frame(self, frame: Frame, now: float) -> list[Event]:
        kind, payload = frame.kind, frame.payload
        if frame.stream_id:
            raise RemoteProtocolError(
                ErrorCode.PROTOCOL_ERROR, f"{Kind(kind).name} with a stream id", frame.stream_id
            )
        if kind == Kind.HELLO and self.state is LinkState.HELLO:
            self.state = LinkState.DECISION
            return [HelloReceived(decode_hello(payload))]
        if kind == Kind.WELCOME and self.state is LinkState.WELCOME:
            return [WelcomeReceived(decode_welcome(payload))]
        if kind == Kind.REJECT:
            code, version, text = decode_reject(payload)
            if code == ErrorCode.VERSION_UNSUPPORTED:
                text = f"{text} (the peer speaks version {version})"
            # In answer to our WELCOME, the session it was to begin ends as well.  One that
            # was only to go on here may go on elsewhere, if the peer agrees about the bytes.
            session_over = self.session is not None
            if self._resumes:
                session_over = code == ErrorCode.OFFSET_MISMATCH
            return [self._end(code, text, by_peer=True, session_over=session_over)]
        if kind == Kind.RESUME and self.state is LinkState.HELLO:
            self.state = LinkState.DECISION
            return [ResumeReceived(decode_resume(payload))]
        if kind == Kind.RESUMED and self.state is LinkState.RESUMED:
            return [ResumedReceived(decode_resume(payload))]
        session = self._open_session(frame)
        if kind == Kind.ACK:
            offset = _number(frame)
            session.acknowledge(offset)
            self._flight.arrived(offset)
        elif kind == Kind.PING:
            _number(frame)
            self._pong = payload  # only the latest is answered: a flood of them costs nothing
        elif kind == Kind.PONG:
            answered = self._flight.pong(_number(frame), now)
            if answered and session.growth is not None:
                session.growth.heard_round_trip(self._flight.round_trip)
                if self._first_pings:
                    self._first_pings -= 1
                    self._ping_now = True
        elif kind == Kind.BYE:
            code, text = decode_coded_text(payload, "BYE")
            return [self._end(code, text, by_peer=True, session_over=True)]
        else:
            raise RemoteProtocolError(
                ErrorCode.PROTOCOL_ERROR, f"{Kind(kind).name} on a link that is {self.state.value}"
            )
        return []

    def _open_session(self, frame: Frame) -> Session:
        if self.session is None:
            raise RemoteProtocolError(
                ErrorCode.PROTOCOL_ERROR,
                f"{Kind(frame.kind).name} on a link that is {self.state.value}",
                frame.stream_id,
            )
        return self.session

    def _ack(self, session: Session) -> bytes:
        session.rx_acknowledged = session.rx_next
        self._ack_at = None
        self._ack_now = False
        return encode(Kind.ACK, 0, OFFSET.pack(session.rx_next))

    def _fault(self, error: RemoteProtocolError) -> LinkEnded:
        text = f"stream {error.stream_id}: {error.args[0]}" if error.stream_id else error.args[0]
        return (self.reject if self.session is None else self.goodbye)(error.code, text)

    def _end(self, code: int, text: str, *, by_peer: bool = False, session_over: bool = False) -> LinkEnded:
        self.state = LinkState.ENDED
        self.session = None
        return LinkEnded(code, text, by_peer, session_over)


def _number(frame: Frame) -> int:
    if len(frame.payload) != OFFSET.size:
        raise RemoteProtocolError(ErrorCode.PROTOCOL_ERROR, f"malformed {Kind(frame.kind).name}")
    number: int = OFFSET.unpack(frame.payload)[0]
    return number
