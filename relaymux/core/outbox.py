"""
What one side of a session has to say, as frames: what waits, what has left, what leaves again.

It turns what was said into frames for whichever link asks C{data_to_send}.  Every frame it
makes is sequenced: counted in L{ReplayBuffer} until the peer acknowledged it.

Nothing here queues without a bound: data waits in its stream, whose producer
pauses; credit, FIN and acks are kept as state and become frames only when
they can be sent; the other control frames are at most four per open stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Final

from relaymux.core.flight import UNBOUNDED
from relaymux.core.frames import CREDIT, FIN, HEADER_BYTES, Buffer, Kind, data_header, encode
from relaymux.core.growth import Growth
from relaymux.core.handshake import Limits
from relaymux.core.replay import ReplayBuffer
from relaymux.core.schedule import SHARED_FRAME, TurnQueue
from relaymux.core.stream import ReceiveState, SendState, Stream

#: Unacknowledged bytes after which an ack is sent at once.  At 10 Gbit/s these are
#: some 2,400 acks a second.  Fewer would keep more of the sender's buffers lent, and
#: them out of the processor's cache; an ack per frame would cost a wake-up each.
ACK_BYTES: Final = 512 * 1024

#: ... but never less often than this share of the peer's replay buffer, which must
#: not run full between two acks.
ACK_SHARE: Final = 8

#: An ack rides along with other frames from this share of the above on: the CREDIT
#: that a bulk stream causes then carries nearly all of its acks.
ACK_RIDE_SHARE: Final = 4


class Outbox:
    """
    One side's frames.

    @ivar rx_next: bytes of the peer's sequenced frames accepted so far.
    @ivar rx_acknowledged: how many of them the peer was told of.
    @ivar ack_bytes: how many new ones are worth an ack of its own.
    @ivar streams: the streams that are not forgotten yet, by id.
    @ivar growth: what windows and the replay buffer may grow by; L{None} if they stay as they began.
    """

    def __init__(self, *, local: Limits, remote: Limits, growth: Growth | None) -> None:
        """
        @param local: what we told the peer: the replay buffer begins with it.
        @param remote: what the peer told us.
        """
        self.growth = growth
        self._remote = remote
        self._control: deque[bytes] = deque()
        self._control_sent = 0
        self._patient = 0  # of the last frames in _control, those that may wait for others to leave with
        self._credit_due: dict[int, None] = {}
        self._turns = TurnQueue()
        self._drained: list[int] = []
        self.ack_bytes = min(ACK_BYTES, remote.replay // ACK_SHARE)
        self._again: deque[Sequence[Buffer]] = deque()  # of the replay buffer, hence bounded by it
        self.replay = ReplayBuffer(local.replay)
        self.rx_next = 0
        self.rx_acknowledged = 0
        self.streams: dict[int, Stream] = {}

    # What waits.

    @property
    def longest_payload(self) -> int:
        """Bytes that a DATA frame may have, as the peer wants it."""
        return self._remote.max_payload

    @property
    def has_control(self) -> bool:
        """Whether a control frame or a CREDIT waits to be sent."""
        return bool(self._control or self._credit_due)

    @property
    def has_something(self) -> bool:
        """Whether a frame is to be sent now; it may have to wait for the peer's acknowledgement, too."""
        urgent = len(self._control) > self._patient
        return bool(urgent or self._credit_due or self._turns or self._again)

    @property
    def is_patient(self) -> bool:
        """Whether there is a frame that may wait for others to leave with; see L{Link.receive}."""
        return self._patient > 0

    @property
    def ack_due(self) -> bool:
        """Whether an ack should leave at once."""
        return self.rx_next - self.rx_acknowledged >= self.ack_bytes

    @property
    def ack_worthwhile(self) -> bool:
        """Whether an ack should ride along with frames that leave anyway, which wakes nobody."""
        return self.rx_next - self.rx_acknowledged >= self.ack_bytes // ACK_RIDE_SHARE

    def take_drained(self) -> list[int]:
        """@return: streams whose queue, or FIN, has left since the last call: their producers may go on."""
        drained, self._drained = self._drained, []
        return drained

    # Towards the link.

    def linked(self) -> None:
        """A new link carries the session: what was known of the way there is void."""
        if self.growth is not None:
            self.growth.restart(stream.receive.window for stream in self.streams.values())

    def park(self) -> None:
        """There is no link, and perhaps will not be for long."""
        self.replay.compact()

    def rest(self) -> None:
        """Give back what is not needed; to be called now and then."""
        if self.growth is not None:
            self.growth.narrow_replay(self.replay)

    def resume(self, offset: int) -> int:
        """
        Go on over a new link.

        @param offset: what the peer has; C{replay.can_continue_at} was asked.
        @return: bytes that will be sent again.
        """
        self.replay.acknowledge(offset)
        self._again = deque(self.replay.unacknowledged())
        # RESUME and RESUMED say what this side has, as an ACK would.
        self.rx_acknowledged = self.rx_next
        return self.replay.held_bytes

    @property
    def sent(self) -> int:
        """The offset below which everything was given to the present link, or is known to have arrived."""
        return self.replay.acknowledged if self._again else self.replay.end

    def data_to_send(self, limit: int, now: float, bulk_until: int = UNBOUNDED) -> list[Buffer]:
        """
        Make frames.

        @param limit: stop after so many bytes, or one L{SHARED_FRAME} more; control frames always go.
        @param now: seconds, of the clock that L{Link} is told.
        @param bulk_until: the offset from which on only streams that have little to send
            get a turn.  The last turn before it may exceed it by one L{SHARED_FRAME}.
        @return: buffers to be sent in this order; empty if there is nothing.
        """
        if self._again:
            return self._send_again(limit)
        out: list[Buffer] = []
        self._patient = 0
        while self._control and not self.replay.full:
            self._emit(out, self._control.popleft())
            self._control_sent += 1
        if self._control:
            return out  # only a peer that acknowledges nothing gets here: let it wait, too
        if self._credit_due:
            for stream_id in self._credit_due:
                receive = self.streams[stream_id].receive
                window = receive.window
                if self.growth is not None and receive.state is ReceiveState.OPEN:
                    self.growth.fit_window(window, now)
                self._emit(out, encode(Kind.CREDIT, stream_id, CREDIT.pack(window.grant(), window.consumed)))
            self._credit_due.clear()
        size = 0
        while size < limit and self._turns:
            ahead = bulk_until - self.replay.end
            if ahead <= 0 and not self._turns.has_little:
                break
            room = self.replay.room - HEADER_BYTES
            if room <= 0:
                if self.growth is not None and self.growth.widen_replay(self.replay):
                    continue
                break
            # Little more than the limit, as all of it is in front of the next urgent frame.
            size += self._send_turn(out, min(room, max(SHARED_FRAME, min(limit - size, ahead))))
        return out

    def carried(
        self, sent: list[tuple[int, list[Buffer]]], end: int, acknowledged: int, rx_next: int, told: int
    ) -> None:
        """
        Note what the fast path has done for this session.

        @param sent: frames that it sent and that were not acknowledged, oldest first, each with the
            offset at which it ends.
        @param end: the offset at which the last frame ends that it sent.
        @param acknowledged: what the peer said that it has.
        @param rx_next: bytes of the peer's sequenced frames accepted so far.
        @param told: how many of them the peer was told of.
        @raise RemoteProtocolError: the peer cannot have what it said.
        """
        self.rx_next, self.rx_acknowledged = rx_next, told
        self.replay.carried(sent, end, acknowledged)

    def _send_again(self, limit: int) -> list[Buffer]:
        """Repeat what the peer does not have: in order, and before anything new."""
        out: list[Buffer] = []
        size = 0
        while self._again and size < limit:
            frame = self._again.popleft()
            out += frame
            size += sum(map(len, frame))
        return out

    def _send_turn(self, out: list[Buffer], room: int) -> int:
        """Let the next stream send one frame.  @return: payload bytes sent."""
        stream_id = self._turns.take()
        send = self.streams[stream_id].send
        buffers, size = send.take(min(self._turns.frame_limit(), self._remote.max_payload, room))
        if size:
            buffers.insert(0, data_header(stream_id, size))
            self.replay.append(buffers, size + HEADER_BYTES)
            out += buffers
        if not send.queued:
            self._drained.append(stream_id)
        if send.state is SendState.FINISHING and not send.queued:
            send.state = SendState.ENDED
            self._emit(out, encode(Kind.FIN, stream_id, FIN.pack(send.window.sent)))
        elif send.ready:
            self._turns.again(stream_id)
        return size

    # Shared by the above, and by those who say something.

    def _let_answer_wait(self, stream: Stream) -> None:
        """
        Let OPENED wait for something to leave with, if it was not sent yet.

        The opener has said something already, and the answer to it is on its way soon, in most cases.
        """
        control = self._control
        if len(control) != self._patient + 1 or stream.last_control != self._control_sent + len(control):
            return
        if control[-1][0] == Kind.OPENED:
            self._patient += 1

    def _queue(self, kind: Kind, stream_id: int, payload: bytes = b"") -> None:
        self._control.append(encode(kind, stream_id, payload))
        if stream_id:
            self.streams[stream_id].last_control = self._control_sent + len(self._control)

    def _emit(self, out: list[Buffer], frame: bytes) -> None:
        self.replay.append((frame,), len(frame))
        out.append(frame)
