"""Two daemons' ends in one process, joined in memory; data that tells its place; what tests of both share."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IProtocol
from twisted.internet.protocol import Protocol
from twisted.internet.task import Clock
from twisted.logger import capturedLogs, formatEvent
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from relaymux.core.handshake import Limits
from relaymux.core.link import CLOSED_SECONDS
from relaymux.net.peer import Identity, Peer
from relaymux.net.stream import StreamTransport
from relaymux.testing.memory import MemoryConnection
from relaymux.testing.recording import HalfCloseRecorder

WINDOW = 16 * 1024
REPLAY = 64 * 1024

#: Small, so that tests move a multiple of each.
LIMITS = Limits(max_payload=8 * 1024, max_streams=8, window=WINDOW, replay=REPLAY, silence=15.0)

#: More than four windows, and than twice the replay buffer.
LARGE = 3 * REPLAY


def stamped(size: int, stream: int = 1) -> bytes:
    """C{size} bytes, of which every eight say which stream's they are and where."""
    return b"".join(struct.pack("!HIH", stream, i, 0xA55A) for i in range(size // 8 + 1))[:size]


class Acceptor:
    """
    A service that accepts every stream.

    @ivar streams: what it was given, in order.
    @ivar protocols: the protocol of each.
    """

    def __init__(self, build: Callable[[], IProtocol] = HalfCloseRecorder, **options: bool) -> None:
        """@param options: for C{StreamTransport.begin}."""
        self.streams: list[StreamTransport] = []
        self.protocols: list[Any] = []
        self._build = build
        self._options = options

    def stream_opened(self, stream: StreamTransport) -> None:
        """Accept, and connect a new protocol."""
        self.streams.append(stream)
        self.protocols.append(self._build())
        stream.accept()
        stream.begin(self.protocols[-1], **self._options)


class Undecided:
    """A service that only collects its streams."""

    def __init__(self) -> None:
        self.streams: list[StreamTransport] = []

    def stream_opened(self, stream: StreamTransport) -> None:
        """Neither accept nor refuse."""
        self.streams.append(stream)


class Ends:
    """
    Two peers: C{near} dials C{far}.

    @ivar clock: of both; nothing moves but by it.
    @ivar connection: the current one.
    """

    def __init__(
        self,
        *,
        near: Limits = LIMITS,
        far: Limits = LIMITS,
        buffers: bool = True,
        seed: int | None = None,
        capacity: int = 16 * 1024,
        connect: bool = True,
    ) -> None:
        """See L{MemoryConnection}.  @param near: the limits of that side; C{far} alike."""
        self.clock = Clock()
        self.near = Peer(self.clock, "far", Identity("hv-near", b"n" * 16), near, dialing=True)
        self.far = Peer(self.clock, "near", Identity("hv-far", b"f" * 16), far, dialing=False)
        self._options: dict[str, Any] = {"buffers": buffers, "seed": seed, "capacity": capacity}
        if connect:
            self.connect()
            self.settle()

    def connect(self) -> MemoryConnection:
        """Make a connection; the handshake is under way then."""
        near, far = self.near.build_link(), self.far.build_link()
        assert near is not None and far is not None
        self.connection = MemoryConnection(near, far, clock=self.clock, **self._options)
        return self.connection

    def settle(self) -> None:
        """Let happen what needs no time."""
        self.connection.settle()

    def advance(self, seconds: float) -> None:
        """Let time pass, in small steps, and all happen that is due."""
        until = self.clock.seconds() + seconds
        while self.clock.seconds() < until - 1e-9:
            self.clock.advance(min(0.05, until - self.clock.seconds()))
            self.connection.settle()

    def open(
        self, protocol: IProtocol, service: str = "vda", *, opener: Peer | None = None, **options: bool
    ) -> StreamTransport:
        """Open a stream (by default from near to far), which is accepted, for C{protocol}."""
        found: list[StreamTransport] = []
        (opener or self.near).open_stream(service, 10.0).addCallback(found.append)
        self.settle()
        [stream] = found
        stream.begin(protocol, **options)
        return stream


class EndsTestCase(SynchronousTestCase):
    """Assertions about data and ends."""

    def assert_bytes(self, got: bytes | bytearray, wanted: bytes) -> None:
        """The bytes are the same; a failure says where they begin not to be."""
        if got == wanted:
            return
        pairs = zip(got, wanted, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(got), len(wanted)))
        around = slice(max(0, place - 8), place + 24)
        self.fail(
            f"{len(got)} bytes instead of {len(wanted)}, other from {place} on:"
            f" {bytes(got[around]).hex(' ')} instead of {wanted[around].hex(' ')}"
        )

    def assert_lost(self, protocol: Any, kind: type[Exception]) -> Any:
        """A recorder was told, once and last, that its connection is lost, because of C{kind}."""
        self.assertIsNotNone(protocol.reason, f"not lost: {protocol.events}")
        self.assertEqual(protocol.events.count("lost"), 1)
        self.assertEqual(protocol.events[-1], "lost")
        self.assertIs(protocol.reason.type, kind, protocol.reason)
        return protocol.reason.value

    def failed(self, deferred: Deferred[Any]) -> Any:
        """@return: what C{deferred} has failed with."""
        found: list[Failure] = []
        deferred.addErrback(found.append)
        self.assertEqual(len(found), 1, f"has not failed: {deferred}")
        return found[0].value

    def assert_no_timers(self, ends: Ends) -> None:
        """Nobody wants to be called at any time any more."""
        ends.clock.advance(0)  # the connection's own turn
        self.assertEqual(ends.clock.getDelayedCalls(), [])

    def assert_idle(self, ends: Ends) -> None:
        """Nothing is left of any stream, on either side."""
        self.assertEqual((ends.near.open_streams, ends.far.open_streams), (0, 0))
        for peer in (ends.near, ends.far):
            if peer._held is not None:
                self.assertEqual(peer._held.streams.session.streams, {})
                self.assertEqual(peer._held.streams._unanswered, {})


class Echo(Protocol):
    """Sends back what it gets, and closes when the other side does."""

    def dataReceived(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)


class Producer:
    """A producer that records what it is told."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pauseProducing(self) -> None:
        self.calls.append("pause")

    def resumeProducing(self) -> None:
        self.calls.append("resume")

    def stopProducing(self) -> None:
        self.calls.append("stop")


class StreamTestCase(EndsTestCase):
    """One stream from near to far."""

    def connect(
        self,
        near_protocol: Any = None,
        far_protocol: Callable[[], Any] = HalfCloseRecorder,
        **options: Any,
    ) -> tuple[StreamTransport, Any, StreamTransport, Any]:
        """@return: transport and protocol of the near end, then of the far end."""
        self.ends = Ends(**options)
        service = Acceptor(far_protocol)
        self.ends.far.register("vda", service)
        near_protocol = near_protocol or HalfCloseRecorder()
        stream = self.ends.open(near_protocol)
        return stream, near_protocol, service.streams[0], service.protocols[0]

    def settle(self) -> None:
        """Let happen what needs no time, and what waits for others to leave with."""
        self.ends.settle()
        self.ends.advance(2 * CLOSED_SECONDS)


class PeerTestCase(EndsTestCase):
    """Runs with what was logged at hand."""

    def setUp(self) -> None:
        logged = capturedLogs()
        self.events: Any = logged.__enter__()
        self.addCleanup(logged.__exit__, None, None, None)

    def lines(self, *words: str) -> list[str]:
        """@return: the log lines with all of C{words}."""
        lines = [formatEvent(event) for event in self.events]
        return [line for line in lines if all(word in line for word in words)]
