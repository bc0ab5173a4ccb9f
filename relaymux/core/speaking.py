"""
What one side of a session says: calls in, and what they mean for its streams.

A session outlives links.  L{Outbox} makes the frames, for whichever link there is.
"""

from __future__ import annotations

from typing import Final

from relaymux.core.budget import STREAM_WRITES, Account, stream_beginning
from relaymux.core.events import Event, StreamClosed
from relaymux.core.frames import CLOSED, RESET, STOP, Buffer, Kind
from relaymux.core.growth import Growth
from relaymux.core.handshake import NAME, Limits, encode_coded_text
from relaymux.core.outbox import Outbox
from relaymux.core.stream import ReceiveState, SendState, Stream
from relaymux.errors import ErrorCode, LocalError

LAST_STREAM_ID: Final = 2**32 - 1

#: Why a stream cannot be, for logs and for the peer.
NO_MEMORY: Final = "there is no memory left for another stream"


class Speaker(Outbox):
    """One side of a session: what may be said, and when."""

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
        super().__init__(local=local, remote=remote, growth=Growth(account) if account is not None else None)
        self._local = local
        self._next_id = 1 if dialing else 2
        self._next_peer_id = 2 if dialing else 1
        self._goaway_sent = False
        self._goaway_received = False
        self._opened_here = 0
        self._opened_by_peer = 0
        # Of the peer's streams that are forgotten, those whose last frame is in _control.
        self._unsaid: list[int] = []

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

    def _end_receive(self, stream: Stream, code: int, *, clean: bool = False) -> list[Event]:
        """
        Say CLOSED if the receiving half has just ended.

        It may wait for something to leave with if that was C{clean} and nobody waits for it: the stream
        goes on here; or it was opened here, so that the next OPEN, if it is for a place, comes behind it.
        """
        receive = stream.receive
        if receive.state is not ReceiveState.ENDED:
            return []
        receive.state = ReceiveState.CLOSED
        self._end_window(stream)
        self._credit_due.pop(stream.stream_id, None)
        nobody_waits = stream.outgoing or stream.send.state in (SendState.OPEN, SendState.FINISHING)
        patient = clean and nobody_waits and len(self._control) == self._patient
        self._queue(Kind.CLOSED, stream.stream_id, CLOSED.pack(code, receive.window.consumed))
        self._patient += patient
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

    @property
    def undelivered_bytes(self) -> int:
        """Bytes accepted for the open streams that the peer's consumers are not known to have taken."""
        return sum(stream.send.accepted - stream.send.delivered for stream in self.streams.values())

    @property
    def unconsumed_bytes(self) -> int:
        """Bytes received for the open streams that our consumers have not taken."""
        windows = [stream.receive.window for stream in self.streams.values()]
        return sum(window.received - window.consumed for window in windows)
