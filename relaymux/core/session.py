"""
A session: the streams, the numbering of what is said, and what the peer has of it.

L{Speaker} makes the frames; here are those that arrive.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

from relaymux.core.budget import Account
from relaymux.core.events import (
    DataReceived,
    Event,
    GoawayReceived,
    SendingStopped,
    StreamAccepted,
    StreamCrowdedOut,
    StreamFinished,
    StreamOpened,
    StreamRefused,
    StreamReset,
)
from relaymux.core.frames import CLOSED, CREDIT, FIN, HEADER_BYTES, RESET, STOP, Frame, Kind
from relaymux.core.handshake import (
    NAME,
    Limits,
    decode_coded_text,
    decode_extensions,
)
from relaymux.core.schedule import GREETING
from relaymux.core.speaking import NO_MEMORY, Speaker
from relaymux.core.stream import ReceiveState, SendState, Stream
from relaymux.errors import ErrorCode, RemoteProtocolError


class Session(Speaker):
    """
    One side of a session: what it says, and what it makes of what it hears.

    A frame is heard wholly or not at all: C{rx_next} counts those that were
    accepted, and a new link goes on behind them.
    """

    def __init__(
        self, *, dialing: bool, local: Limits, remote: Limits, account: Account | None = None
    ) -> None:
        """See L{Speaker}."""
        super().__init__(dialing=dialing, local=local, remote=remote, account=account)
        self._handlers: dict[int, Callable[[Frame], list[Event]]] = {
            Kind.OPEN: self._on_open,
            Kind.OPENED: self._on_opened,
            Kind.REFUSED: self._on_refused,
            Kind.DATA: self._on_data,
            Kind.CREDIT: self._on_credit,
            Kind.FIN: self._on_fin,
            Kind.RESET: self._on_reset,
            Kind.STOP_SENDING: self._on_stop_sending,
            Kind.CLOSED: self._on_closed,
            Kind.GOAWAY: self._on_goaway,
        }

    def acknowledge(self, offset: int) -> None:
        """The peer has everything below C{offset}.  @raise RemoteProtocolError: it cannot have."""
        self.replay.acknowledge(offset)

    def carried_stream(
        self,
        stream_id: int,
        sent: int,
        limit: int,
        delivered: int,
        received: int,
        consumed: int,
        granted: int,
        now: float,
    ) -> None:
        """
        Note what the fast path has done for a stream.

        @param sent: bytes that it took from the producer and sent.
        @param limit: the peer's credit for these.
        @param delivered: bytes in all that the peer said its consumer took.
        @param received: bytes that arrived.
        @param consumed: as many of them as the consumer took.
        @param granted: the credit that the peer was given for more of them.
        @param now: seconds.
        """
        stream = self.streams[stream_id]
        send, window = stream.send, stream.receive.window
        send.accepted += sent
        send.delivered = delivered
        send.window.sent += sent
        send.window.limit = limit
        window.received += received
        renewed = granted != window.granted
        window.granted = granted
        if consumed and (stream.receive.consume(consumed) or self._goaway_received):
            self._credit_due[stream_id] = None
        if renewed and self.growth is not None:
            self.growth.fit_window(window, now)
            if stream.receive.consume(0):
                # A larger window is of use from now on, not from the next CREDIT on.
                self._credit_due[stream_id] = None

    def receive_frame(self, frame: Frame) -> list[Event]:
        """
        Accept one sequenced frame.

        @return: what it meant, oldest first.
        @raise RemoteProtocolError: the frame was not allowed; the session must end.
        """
        events = self._handlers[frame.kind](frame)
        self.rx_next += frame.size
        return events

    # Frames that arrived.  Each handler shows its payload.

    def _on_open(self, frame: Frame) -> list[Event]:
        """C{u8 length, name, extensions}"""
        stream_id, payload = frame.stream_id, frame.payload
        name_end = 1 + payload[0] if payload else 0
        name = payload[1:name_end].decode("ascii", "replace")
        if not 1 < name_end <= len(payload) or not NAME.fullmatch(name):
            raise _malformed(frame)
        decode_extensions(payload[name_end:], "OPEN")
        if stream_id != self._next_peer_id:
            raise RemoteProtocolError(
                ErrorCode.PROTOCOL_ERROR,
                f"OPEN with id {stream_id}, expected {self._next_peer_id}",
                stream_id,
            )
        # A stream counts until the peer can know that it is over.  So this is also what
        # bounds _control, whatever a peer opens and resets without reading our answers.
        self._unsaid = [number for number in self._unsaid if number > self._control_sent]
        if self._opened_by_peer + len(self._unsaid) >= self._local.max_streams:
            raise RemoteProtocolError(
                ErrorCode.FLOOD, f"more than the allowed {self._local.max_streams} streams", stream_id
            )
        self._next_peer_id += 2
        paid = self._may_begin()
        self._add_stream(stream_id, name, outgoing=False, paid=paid)
        if self._goaway_sent:
            return self.refuse(stream_id, ErrorCode.SHUTTING_DOWN, "shutting down")
        if not paid:
            # What came with OPEN, up to a window, is dropped as it arrives.
            refused = self.refuse(stream_id, ErrorCode.TOO_MANY_STREAMS, NO_MEMORY)
            return [StreamCrowdedOut(stream_id, name), *refused]
        return [StreamOpened(stream_id, name)]

    def _on_opened(self, frame: Frame) -> list[Event]:
        """Empty."""
        self._answered_by_peer(frame)
        if frame.payload:
            raise _malformed(frame)
        return [StreamAccepted(frame.stream_id)]

    def _on_refused(self, frame: Frame) -> list[Event]:
        """C{u16 code, text}: as RESET at offset 0 and STOP_SENDING in one, with the reason."""
        stream = self._answered_by_peer(frame)
        code, text = decode_coded_text(frame.payload, "REFUSED")
        stream.receive.receive_end(0, clean=False)
        if stream.send.state in (SendState.OPEN, SendState.FINISHING):
            self.reset(frame.stream_id, code)
        refused: list[Event] = [StreamRefused(frame.stream_id, code, text)]
        return refused + self._end_receive(stream, code)

    def _on_data(self, frame: Frame) -> list[Event]:
        """Bytes, at least one."""
        stream = self._stream_of(frame)
        size = frame.size - HEADER_BYTES
        if not size:
            raise _malformed(frame)
        if stream.receive.receive_data(size):
            if size <= GREETING:
                self._let_answer_wait(stream)
            return [DataReceived(frame.stream_id, frame.buffers, size)]
        return []

    def _on_credit(self, frame: Frame) -> list[Event]:
        """C{u64 limit, u64 delivered}"""
        stream = self._stream_of(frame)
        limit, delivered = _unpack(CREDIT, frame)
        stream.send.receive_credit(limit, delivered)
        if stream.send.ready:
            self._turns.add(frame.stream_id, stream.send.queued)
        return []

    def _on_fin(self, frame: Frame) -> list[Event]:
        """C{u64 final offset}"""
        stream = self._stream_of(frame)
        (final_offset,) = _unpack(FIN, frame)
        wanted = stream.receive.receive_end(final_offset, clean=True)
        finished: list[Event] = [StreamFinished(frame.stream_id)] if wanted else []
        return finished + self._end_receive(stream, ErrorCode.NO_ERROR, clean=True)

    def _on_reset(self, frame: Frame) -> list[Event]:
        """C{u16 code, u64 final offset}"""
        stream = self._stream_of(frame)
        code, final_offset = _unpack(RESET, frame)
        wanted = stream.receive.receive_end(final_offset, clean=False)
        reset: list[Event] = [StreamReset(frame.stream_id, code)] if wanted else []
        return reset + self._end_receive(stream, code)

    def _on_stop_sending(self, frame: Frame) -> list[Event]:
        """C{u16 code}"""
        stream = self._stream_of(frame)
        (code,) = _unpack(STOP, frame)
        send = stream.send
        if send.state is SendState.CLOSED:
            raise RemoteProtocolError(
                ErrorCode.STREAM_STATE_ERROR, "STOP_SENDING after CLOSED", frame.stream_id
            )
        if send.state is SendState.ENDED:
            return []  # our FIN or RESET crossed it
        self.reset(frame.stream_id, code)
        return [SendingStopped(frame.stream_id, code, send.accepted - send.delivered)]

    def _on_closed(self, frame: Frame) -> list[Event]:
        """C{u16 code, u64 delivered}"""
        stream = self._stream_of(frame)
        _, delivered = _unpack(CLOSED, frame)
        stream.send.receive_closed(delivered)
        return self._forget_if_closed(stream)

    def _on_goaway(self, frame: Frame) -> list[Event]:
        """C{u16 code, text}"""
        if frame.stream_id:
            raise _malformed(frame)
        code, text = decode_coded_text(frame.payload, "GOAWAY")
        if self._goaway_received:
            return []
        self._goaway_received = True
        # A peer that is about to end wants to know what was delivered, to the last byte.
        for stream in self.streams.values():
            if stream.receive.state in (ReceiveState.OPEN, ReceiveState.FINISHED):
                self._credit_due[stream.stream_id] = None
        return [GoawayReceived(code, text)]

    def _stream_of(self, frame: Frame) -> Stream:
        stream = self.streams.get(frame.stream_id)
        if stream is None:
            raise RemoteProtocolError(
                ErrorCode.UNKNOWN_STREAM, f"{Kind(frame.kind).name} for no open stream", frame.stream_id
            )
        return stream

    def _answered_by_peer(self, frame: Frame) -> Stream:
        stream = self._stream_of(frame)
        if not stream.outgoing or stream.answered:
            raise RemoteProtocolError(
                ErrorCode.STREAM_STATE_ERROR, f"unexpected {Kind(frame.kind).name}", frame.stream_id
            )
        stream.answered = True
        return stream


def _unpack(layout: Struct, frame: Frame) -> tuple[int, ...]:
    if len(frame.payload) != layout.size:
        raise _malformed(frame)
    return layout.unpack(frame.payload)


def _malformed(frame: Frame) -> RemoteProtocolError:
    return RemoteProtocolError(
        ErrorCode.PROTOCOL_ERROR, f"malformed {Kind(frame.kind).name}", frame.stream_id
    )
