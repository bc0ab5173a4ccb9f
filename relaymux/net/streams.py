"""
The streams of one session, as transports: who gets which event, who waits for an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final
from typing import Protocol as Contract

from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from relaymux.core.events import (
    DataReceived,
    Event,
    SendingStopped,
    StreamAccepted,
    StreamClosed,
    StreamCrowdedOut,
    StreamFinished,
    StreamOpened,
    StreamRefused,
    StreamReset,
)
from relaymux.core.session import Session
from relaymux.errors import ErrorCode, RelaymuxError, SessionLost
from relaymux.errors import StreamReset as StreamResetError
from relaymux.net.quietlog import QuietLog
from relaymux.net.sockets import SocketTransport
from relaymux.net.stream import StreamTransport

__all__ = ["OpenRequest", "Service", "SessionStreams"]


_log: Final = Logger("relaymux.link")


class Service(Contract):
    """What incoming streams are handed to, in the order in which the peer opened them."""

    def stream_opened(self, stream: StreamTransport) -> None:
        """Answer with C{stream.accept} or C{stream.refuse}, now or later."""


class OpenRequest:
    """
    A stream that somebody wants.

    An exception of whoever asked is logged and resets the stream; it harms no other.

    @ivar forget: called if the request is cancelled while it waits for a link.
    @ivar stream: the one that was opened for it, which the peer has not answered yet.
    """

    def __init__(
        self,
        service: str,
        opened: Callable[[StreamTransport], object],
        failed: Callable[[Failure], object],
        greeting: Callable[[], bytes] = bytes,
    ) -> None:
        """
        One of the two is called, once; neither when L{cancel} has returned.

        @param opened: the peer's end is connected.
        @param failed: it will not come: C{StreamReset}, C{SessionLost} or C{LocalError}.
        @param greeting: asked when the stream is opened: what may be sent with OPEN, see
            L{StreamTransport.greet}.
        """
        self.service = service
        self.greeting = greeting
        self.forget: Callable[[OpenRequest], None] = lambda _: None
        self.stream: StreamTransport | None = None
        self.timer: IDelayedCall | None = None
        self._opened = opened
        self._failed = failed
        self._answered = False

    def succeed(self, stream: StreamTransport) -> None:
        """The stream is usable."""
        self._stop_timer()
        if not self._answered:
            self._answered = True
            try:
                self._opened(stream)
            except Exception:
                _log.failure("exception from who asked for {service}", service=self.service)
                stream.abort(ErrorCode.INTERNAL_ERROR)

    def fail(self, error: RelaymuxError) -> None:
        """It will not come; a stream that was opened for it is aborted."""
        self._stop_timer()
        if not self._answered:
            self._answered = True
            try:
                self._failed(Failure(error))
            except Exception:
                _log.failure("exception from who asked for {service}", service=self.service)

    def cancel(self) -> None:
        """It is not wanted any more; nothing happens once it was answered."""
        if self._answered:
            return
        self._stop_timer()
        if self.stream is not None:
            self.stream.abort(ErrorCode.ABORTED)
        else:
            self.forget(self)
        self._answered = True  # nor by a session that is over, and is telling one after the other

    def _stop_timer(self) -> None:
        if self.timer is not None and self.timer.active():
            self.timer.cancel()


class SessionStreams:
    """
    @ivar session: the session; nobody else calls it.
    @ivar peer_name: for addresses and logs.
    @ivar undelivered: bytes accepted for streams that are closed, which the peer
        did not report as taken by its consumer.
    """

    def __init__(
        self,
        session: Session,
        peer_name: str,
        find_service: Callable[[str], Service | None],
        flush: Callable[[], None],
        flush_soon: Callable[[], None],
        quiet_log: QuietLog,
    ) -> None:
        """
        @param find_service: what serves streams of a name.
        @param flush: sends what was said on the current link.
        @param flush_soon: the same at the end of the reactor's turn.
        @param quiet_log: for what the peer can cause as often as it likes.
        """
        self._quiet_log = quiet_log
        self.session = session
        self.peer_name = peer_name
        self.flush = flush
        self.flush_soon = flush_soon
        self.undelivered = 0
        self._find_service = find_service
        self._streams: dict[int, StreamTransport] = {}
        self._unanswered: dict[int, OpenRequest] = {}  # bounded by the peer's max_streams

    def __len__(self) -> int:
        return len(self._streams)

    def carried(self) -> list[tuple[StreamTransport, SocketTransport]]:
        """@return: the streams whose bytes nobody has to see, with the sockets of theirs that carry bulk."""
        found = []
        for stream in self._streams.values():
            socket = stream.carrier.lend() if stream.carrier is not None else None
            if socket is not None and socket.carries_bulk:
                found.append((stream, socket))
        return found

    def open(self, request: OpenRequest) -> None:
        """Open a stream for C{request}, or fail it."""
        try:
            stream_id = self.session.open_stream(request.service)
        except RelaymuxError as error:
            request.fail(error)
            return
        stream = request.stream = StreamTransport(self, stream_id, request.service, outgoing=True)
        self._streams[stream_id] = stream
        self._unanswered[stream_id] = request
        if not self.session.untouched:
            # Else it may have to be opened again, in another session, and nothing is to be said twice.
            stream.greet(request.greeting())

    def take_back(self) -> list[OpenRequest]:
        """
        Undo L{open}; of use only when the session is to end.

        @return: the requests that were not answered, oldest first.
        """
        requests = list(self._unanswered.values())
        self._unanswered.clear()
        for request in requests:
            assert request.stream is not None
            del self._streams[request.stream.stream_id]
            request.stream = None
        return requests

    def handle(self, events: Iterable[Event]) -> None:
        """Tell the streams concerned."""
        for event in events:
            stream = self._streams.get(getattr(event, "stream_id", 0))
            if isinstance(event, StreamClosed):
                self.undelivered += event.accepted - event.delivered
            if stream is not None:
                self._tell(stream, event)
            elif isinstance(event, StreamOpened):
                self._opened(event)
            elif isinstance(event, StreamCrowdedOut):
                self._crowded_out(event)

    def drained(self) -> None:
        """Frames left: producers of streams with nothing queued may go on."""
        for stream_id in self.session.take_drained():
            stream = self._streams.get(stream_id)
            if stream is not None:
                stream.drained()

    def gone(self, stream: StreamTransport, reason: Failure) -> None:
        """C{stream} is over."""
        self._streams.pop(stream.stream_id, None)
        request = self._unanswered.pop(stream.stream_id, None)
        if request is not None:
            error = reason.value
            if not isinstance(error, RelaymuxError):
                error = StreamResetError(ErrorCode.ABORTED, "the stream ended before it was answered")
            request.fail(error)

    def fail_all(self, error: SessionLost) -> None:
        """The session is over."""
        unanswered, self._unanswered = self._unanswered, {}
        for request in unanswered.values():
            request.fail(error)
        for stream in list(self._streams.values()):
            stream.ended(Failure(error))

    def _opened(self, event: StreamOpened) -> None:
        service = self._find_service(event.service)
        if service is None:
            self._quiet_log.warn(
                event.service,
                "link {peer}: the peer asked for {service}, which no section with 'connect' serves here",
                peer=self.peer_name,
                service=event.service,
            )
            text = f"no section {event.service!r} with 'connect' for this link"
            self.handle(self.session.refuse(event.stream_id, ErrorCode.UNKNOWN_SERVICE, text))
            return
        stream = StreamTransport(self, event.stream_id, event.service, outgoing=False)
        self._streams[event.stream_id] = stream
        try:
            service.stream_opened(stream)
        except Exception:
            _log.failure(
                "link {peer}: exception from service {service}, resetting stream {stream}",
                peer=self.peer_name,
                service=event.service,
                stream=event.stream_id,
            )
            stream.abort(ErrorCode.INTERNAL_ERROR)

    def _crowded_out(self, event: StreamCrowdedOut) -> None:
        self._quiet_log.warn(
            "memory",
            "link {peer}: refused a stream to {service}: the memory of this daemon is used up;"
            " set a larger memory in [relay], or smaller windows",
            peer=self.peer_name,
            service=event.service,
        )

    def _closed(self, stream: StreamTransport, event: StreamClosed) -> None:
        missing = event.accepted - event.delivered
        stream.undelivered, stream.untaken = missing, event.received - event.consumed
        if missing:
            text = f"the other end did not take the last {missing} bytes"
            stream.closed(Failure(StreamResetError(ErrorCode.LOCAL_CLOSED, text)))
        else:
            stream.closed()

    def _tell(self, stream: StreamTransport, event: Event) -> None:
        if isinstance(event, DataReceived):
            stream.data_received(event.buffers, event.size)
        elif isinstance(event, StreamFinished):
            stream.finished()
        elif isinstance(event, StreamClosed):
            self._closed(stream, event)
        elif isinstance(event, StreamAccepted):
            request = self._unanswered.pop(event.stream_id, None)
            if request is not None:
                request.succeed(stream)
        elif isinstance(event, StreamRefused):
            error = StreamResetError(event.code, event.text)
            request = self._unanswered.pop(event.stream_id, None)
            if request is not None:
                request.fail(error)
            stream.ended(Failure(error))
        elif isinstance(event, StreamReset):
            stream.abort(event.code)
        elif isinstance(event, SendingStopped):
            stream.sending_stopped()
