"""
What one side of a session says: calls in, frames out.

A session outlives links.  It turns calls into frames for whichever link asks
C{data_to_send}.  Every frame it makes is sequenced: counted in L{ReplayBuffer}
until the peer acknowledged it.

Nothing here queues without a bound: data waits in its stream, whose producer
pauses; credit, FIN and acks are kept as state and become frames only when
they can be sent; the other control frames are at most four per open stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from relaymux.core.budget import STREAM_WRITES, Account, stream_beginning
from relaymux.core.events import Event, StreamClosed
from relaymux.core.flight import UNBOUNDED
from relaymux.core.frames import (
    CLOSED,
    CREDIT,
    FIN,
    HEADER_BYTES,
    RESET,
    STOP,
    Buffer,
    Kind,
    data_header,
    encode,
)
from relaymux.core.growth import Growth
from relaymux.core.handshake import NAME, Limits, encode_coded_text
from relaymux.core.replay import ReplayBuffer
from relaymux.core.schedule import SHARED_FRAME, TurnQueue
from relaymux.core.stream import ReceiveState, SendState, Stream
from relaymux.errors import ErrorCode, LocalError

#: Unacknowledged bytes after which an ack is sent at once.  At 10 Gbit/s these are
#: some 2,400 acks a second.  Fewer would keep more of the sender's buffers lent, and
#: them out of the processor's cache; an ack per frame would cost a wake-up each.
ACK_BYTES = 512 * 1024

#: ... but never less often than this share of the peer's replay buffer, which must
#: not run full between two acks.
ACK_SHARE = 8

#: An ack rides along with other frames from this share of the above on: the CREDIT
#: that a bulk stream causes then carries nearly all of its acks.
ACK_RIDE_SHARE = 4

LAST_STREAM_ID = 2**32 - 1

#: Why a stream cannot be, for logs and for the peer.
NO_MEMORY = "there is no memory left for another stream"


class Speaker:
    """
    One side of a session.

    @ivar rx_next: bytes of the peer's sequenced frames accepted so far.
    @ivar streams: the streams that are not forgotten yet, by id.
    @ivar growth: what windows and the replay buffer may grow by; L{None} if they stay as they began.
    """

    def __init__(
        self, *, dialing: bool, local: Limits, remote: Limits, account: Account | None = None
    ) -> None:
        """
        @param dialing: whether this side dialled: it uses odd stream ids.
        @param local: what we told the peer; windows and the replay buffer begin with it.
        @param remote: what the peer told us.
        @param account: what streams and growth draw from, closed with the session;
            L{None} if nobody counts.
        """
        self.growth = Growth(account) if account is not None else None
        self._local = local
        self._remote = remote
        self._next_id = 1 if dialing else 2
        self._next_peer_id = 2 if dialing else 1
        self._control: deque[bytes] = deque()
        self._credit_due: dict[int, None] = {}
        self._turns = TurnQueue()
        self._drained: list[int] = []
        self._ack_bytes = min(ACK_BYTES, remote.replay // ACK_SHARE)
        self._goaway_sent = False
        self._goaway_received = False
        self._opened_here = 0
        self._opened_by_peer = 0
        self._control_sent = 0
        # Of the peer's streams that are forgotten, those whose last frame is in _control.
        self._unsaid: list[int] = []
        self._again: deque[Sequence[Buffer]] = deque()  # of the replay buffer, hence bounded by it
        self.replay = ReplayBuffer(local.replay)
        self.rx_next = 0
        self.rx_acknowledged = 0
        self.streams: dict[int, Stream] = {}

    # Calls from this side.

    def open_stream(self, service: str) -> int:
        """
        Open a stream to the peer's C{service}.

        @return: its id.  Data may be written at once.
        @raise LocalError: the peer accepts no (more) streams.
        """
        if not NAME.fullmatch(service):
            raise LocalError(f"{service!r} is no service name")
        if self._goaway_received or self._goaway_sent:
            raise LocalError("no new streams: the session is ending")
        if self._opened_here >= self._remote.max_streams:
            raise LocalError(f"the peer allows {self._remote.max_streams} streams at once")
        stream_id = self._next_id
        if stream_id > LAST_STREAM_ID:
            raise LocalError("the session has used all its stream ids")
        if not self._may_begin():
            raise LocalError(f"{NO_MEMORY}: set a larger memory in [relay], or smaller windows")
        self._next_id += 2
        self._add_stream(stream_id, service, outgoing=True)
        name = service.encode("ascii")
        self._queue(Kind.OPEN, stream_id, bytes([len(name)]) + name)
        return stream_id

    def accept(self, stream_id: int) -> None:
        """Tell the opener that the service is connected; nothing if it has given up meanwhile."""
        stream = self._answer(stream_id)
        # Both of our ends may be with it already, and the stream forgotten there.
        ended = stream.send.state in (SendState.ENDED, SendState.CLOSED)
        if not (ended and stream.receive.state is ReceiveState.CLOSED):
            self._queue(Kind.OPENED, stream_id)

    def refuse(self, stream_id: int, code: int, text: str) -> list[Event]:
        """
        Tell the opener that there is no service behind the stream, and why: one line.

        @raise LocalError: it was answered before, or written to.
        """
        if self._stream(stream_id).send.accepted:
            raise LocalError(f"stream {stream_id} was written to: it cannot be refused any more")
        stream = self._answer(stream_id)
        if stream.send.state is not SendState.OPEN:
            return self.abort(stream_id, code)  # the opener has given up meanwhile
        stream.send.reset()
        if stream.receive.state in (ReceiveState.OPEN, ReceiveState.FINISHED):
            stream.receive.stop()
            self._end_window(stream)
        self._queue(Kind.REFUSED, stream_id, encode_coded_text(code, text))
        return self._end_receive(stream, code)

    def write(self, stream_id: int, *buffers: Buffer) -> None:
        """
        Send C{buffers}, which are kept by reference and must not change.

        @raise LocalError: the direction was ended, or there is no such stream.
        """
        send = self._stream(stream_id).send
        send.write(*buffers)
        if send.ready:
            self._turns.add(stream_id, send.queued)

    def finish(self, stream_id: int) -> None:
        """Half-close: no more data from this side."""
        stream = self._stream(stream_id)
        stream.send.finish()
        if stream.send.ready:
            self._turns.add(stream_id, stream.send.queued)

    def reset(self, stream_id: int, code: int) -> None:
        """End our direction as an error; what was not sent is dropped."""
        stream = self._stream(stream_id)
        stream.send.reset()
        self._turns.discard(stream_id)
        self._queue(Kind.RESET, stream_id, RESET.pack(code, stream.send.window.sent))

    def stop(self, stream_id: int, code: int) -> list[Event]:
        """
        Take no more from the peer; what it sends from now on is dropped.

        @return: L{StreamClosed} if everything else had ended before.
        """
        stream = self._stream(stream_id)
        if stream.receive.stop():
            self._queue(Kind.STOP_SENDING, stream_id, STOP.pack(code))
        self._end_window(stream)
        return self._end_receive(stream, code)

    def abort(self, stream_id: int, code: int) -> list[Event]:
        """
        End, as an error, whichever direction has not ended yet.

        @return: L{StreamClosed} if everything else had ended before.
        """
        stream = self._stream(stream_id)
        if stream.send.state in (SendState.OPEN, SendState.FINISHING):
            self.reset(stream_id, code)
        if stream.receive.state in (ReceiveState.OPEN, ReceiveState.FINISHED):
            return self.stop(stream_id, code)
        return []

    def consumed(self, stream_id: int, count: int) -> list[Event]:
        """
        The consumer took C{count} bytes that L{DataReceived} gave out.

        Ignored for a direction that has ended: what happens to its last bytes
        then is nobody's business any more.

        @return: L{StreamClosed} if these were the last bytes of all.
        """
        stream = self.streams.get(stream_id)
        if stream is None or stream.receive.state not in (ReceiveState.OPEN, ReceiveState.FINISHED):
            return []
        if stream.receive.consume(count) or self._goaway_received:
            self._credit_due[stream_id] = None
        return self._end_receive(stream, ErrorCode.NO_ERROR)

    def close(self) -> None:
        """The session is over: give back what it has drawn."""
        if self.growth is not None:
            self.growth.account.close()

    def goaway(self, code: int, text: str) -> None:
        """Accept and open no new streams; said once."""
        if not self._goaway_sent:
            self._goaway_sent = True
            self._queue(Kind.GOAWAY, 0, encode_coded_text(code, text))

    # What the calling side may ask.

    def queued(self, stream_id: int) -> int:
        """@return: bytes written to a stream that no frame holds yet; 0 once it is closed."""
        stream = self.streams.get(stream_id)
        return stream.send.queued if stream else 0

    @property
    def can_open(self) -> bool:
        """Whether C{open_stream} would be allowed now."""
        ending = self._goaway_received or self._goaway_sent
        return not ending and self._opened_here < self._remote.max_streams

    @property
    def settled(self) -> bool:
        """Whether no stream is open and the peer has everything that was said."""
        return not self.streams and not self._control and not self.replay.held_bytes

    @property
    def untouched(self) -> bool:
        """Whether nothing that was said was acknowledged, and nothing was heard."""
        return not self.rx_next and not self.replay.acknowledged

    @property
    def has_control(self) -> bool:
        """Whether a control frame or a CREDIT waits to be sent."""
        return bool(self._control or self._credit_due)

    @property
    def has_something(self) -> bool:
        """Whether a frame waits to be sent; it may have to wait for the peer's acknowledgement, too."""
        return bool(self._control or self._credit_due or self._turns or self._again)

    @property
    def ack_due(self) -> bool:
        """Whether an ack should leave at once."""
        return self.rx_next - self.rx_acknowledged >= self._ack_bytes

    @property
    def ack_worthwhile(self) -> bool:
        """Whether an ack should ride along with frames that leave anyway, which wakes nobody."""
        return self.rx_next - self.rx_acknowledged >= self._ack_bytes // ACK_RIDE_SHARE

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

    # Shared by the above.

    def _may_begin(self) -> bool:
        """Whether there was memory for one more stream; it is drawn, for L{_add_stream} to note."""
        return self.growth is None or self.growth.account.begin(stream_beginning(self._local.window))

    def _add_stream(self, stream_id: int, service: str, *, outgoing: bool, paid: bool = True) -> None:
        """@param paid: whether L{_may_begin}; a stream for which it is not is to be refused."""
        stream = Stream(
            stream_id, service, outgoing=outgoing, credit=self._remote.window, window=self._local.window
        )
        self.streams[stream_id] = stream
        if paid and self.growth is not None:
            stream.drawn = STREAM_WRITES
            stream.receive.window.drawn = self._local.window
        if outgoing:
            self._opened_here += 1
        else:
            self._opened_by_peer += 1

    def _stream(self, stream_id: int) -> Stream:
        try:
            return self.streams[stream_id]
        except KeyError:
            raise LocalError(f"no stream {stream_id}") from None

    def _answer(self, stream_id: int) -> Stream:
        stream = self._stream(stream_id)
        if stream.outgoing or stream.answered:
            raise LocalError(f"stream {stream_id} has no question to answer")
        stream.answered = True
        return stream

    def _end_receive(self, stream: Stream, code: int) -> list[Event]:
        """Say CLOSED if the receiving half has just ended."""
        receive = stream.receive
        if receive.state is not ReceiveState.ENDED:
            return []
        receive.state = ReceiveState.CLOSED
        self._end_window(stream)
        self._credit_due.pop(stream.stream_id, None)
        self._queue(Kind.CLOSED, stream.stream_id, CLOSED.pack(code, receive.window.consumed))
        return self._forget_if_closed(stream)

    def _end_window(self, stream: Stream) -> None:
        """What still arrives in the peer's direction is not kept."""
        if self.growth is not None:
            self.growth.end_window(stream.receive.window)

    def _forget_if_closed(self, stream: Stream) -> list[Event]:
        if not stream.closed:
            return []
        del self.streams[stream.stream_id]
        if self.growth is not None:
            self.growth.account.give_back(stream.drawn)
        if stream.outgoing:
            self._opened_here -= 1
        else:
            self._opened_by_peer -= 1
            if stream.last_control > self._control_sent:
                self._unsaid.append(stream.last_control)
        send, window = stream.send, stream.receive.window
        return [
            StreamClosed(stream.stream_id, send.accepted, send.delivered, window.received, window.consumed)
        ]

    def _queue(self, kind: Kind, stream_id: int, payload: bytes = b"") -> None:
        self._control.append(encode(kind, stream_id, payload))
        if stream_id:
            self.streams[stream_id].last_control = self._control_sent + len(self._control)

    def _emit(self, out: list[Buffer], frame: bytes) -> None:
        self.replay.append((frame,), len(frame))
        out.append(frame)

    @property
    def undelivered_bytes(self) -> int:
        """Bytes accepted for the open streams that the peer's consumers are not known to have taken."""
        return sum(stream.send.accepted - stream.send.delivered for stream in self.streams.values())

    @property
    def unconsumed_bytes(self) -> int:
        """Bytes received for the open streams that our consumers have not taken."""
        windows = [stream.receive.window for stream in self.streams.values()]
        return sum(window.received - window.consumed for window in windows)
