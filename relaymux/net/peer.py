"""
The other daemon, as this one knows it: its session, its services, who waits for it.
"""

from __future__ import annotations

from typing import Final

from twisted.internet.defer import Deferred, succeed

from relaymux.errors import ErrorCode, LocalError, StreamReset
from relaymux.net.keeper import Identity, LinkListener, SessionKeeper
from relaymux.net.stream import StreamTransport
from relaymux.net.streams import OpenRequest, Service

__all__ = ["Identity", "LinkListener", "Peer"]

#: Seconds between two looks at whether everything was delivered, while draining.
DRAIN_INTERVAL: Final = 0.05


class Peer(SessionKeeper):
    """
    A session that is kept, and what may be done with it: streams are opened by
    whoever asks, waiting for a link if there is none, and handed to the service
    that they name; in the end everything is delivered and the session closed.
    """

    # Streams

    def register(self, name: str, service: Service) -> None:
        """Hand streams that the peer opens to service C{name} to C{service}."""
        if name in self._services:
            raise LocalError(f"service {name!r} is registered already")
        self._services[name] = service

    def unregister(self, name: str) -> None:
        """Refuse streams to service C{name} from now on."""
        del self._services[name]

    def open_stream(self, service: str, seconds: float) -> Deferred[StreamTransport]:
        """
        Open a stream to the peer's C{service}; without a link, as soon as there is one.

        Streams are opened in the order of the calls.

        @param seconds: how long to wait for a link and for the peer's answer.
        @return: fires with the stream once the peer's end is connected: call its
            C{begin}.  Fails with L{StreamReset}, L{SessionLost} or L{LocalError}.
            May be cancelled.
        """
        result: Deferred[StreamTransport] = Deferred(lambda _: request.cancel())
        request: OpenRequest = OpenRequest(service, result.callback, result.errback)
        self.open(request, seconds)
        return result

    def open(self, request: OpenRequest, seconds: float) -> None:
        """As L{open_stream}, for one who needs no C{Deferred}; may be answered before this returns."""
        if self._draining:
            request.fail(LocalError("this daemon is shutting down"))
            return
        request.forget = self._waiting.remove
        request.timer = self._reactor.callLater(seconds, self._too_late, request, seconds)
        if self._held is not None and self._link is not None:
            self._held.streams.open(request)
            self.flush_soon()
        else:
            # Not opened before it can be said: the peer hears nothing of one that is given up meanwhile.
            self._waiting.add(request)

    def _too_late(self, request: OpenRequest, seconds: float) -> None:
        if request.stream is None:
            self._waiting.remove(request)
        if self._link is None:
            text = f"link {self.name} was not up within {seconds:g} s"
        else:
            text = f"no answer from daemon {self.daemon} within {seconds:g} s"
        request.fail(StreamReset(ErrorCode.OPEN_TIMEOUT, text))
        if request.stream is not None:
            request.stream.abort(ErrorCode.OPEN_TIMEOUT)

    # The end

    def drain(self, seconds: float) -> Deferred[int]:
        """
        Take no new streams, let those there are come to their end, then say goodbye.

        @param seconds: how long; streams that are open then are ended as errors.
        @return: fires with the number of bytes that were taken, from either side,
            and not delivered by this drain.
        """
        self._draining = True
        self._waiting.fail_all(LocalError("this daemon is shutting down"))
        if self._held is None:
            return succeed(0)
        streams = self._held.streams
        streams.session.goaway(ErrorCode.SHUTTING_DOWN, f"daemon {self._identity.name} is shutting down")
        self.flush()
        before = self.undelivered + streams.undelivered
        done: Deferred[int] = Deferred()
        self._drain_step(done, before, self._reactor.seconds() + seconds)
        return done

    def _drain_step(self, done: Deferred[int], before: int, until: float) -> None:
        link, held = self._link, self._held
        if held is not None:
            settled = held.streams.session.settled
            if not settled and self._reactor.seconds() < until:
                self._reactor.callLater(DRAIN_INTERVAL, self._drain_step, done, before, until)
                return
            text = "everything was delivered" if settled else f"{len(held.streams)} streams were still open"
            if link is not None:
                link.end(link.link.goodbye(ErrorCode.SHUTTING_DOWN, text))
            else:
                self._end_session(held, ErrorCode.SHUTTING_DOWN, text)
        done.callback(self.undelivered - before)
