"""
Two daemons' peers in one process, over connections that a test cuts where it wants.

Everything but the bytes' way is the real thing: the dialler, both peers, their
sessions and streams.  Time is a C{Clock}'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random
from typing import Any

from twisted.internet.defer import Deferred, fail, succeed
from twisted.internet.error import ConnectionRefusedError
from twisted.internet.interfaces import IHalfCloseableProtocol, IProtocol, IStreamClientEndpoint
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.task import Clock
from twisted.python.failure import Failure
from zope.interface import implementer

from relaymux.core.budget import Budget
from relaymux.core.handshake import Limits
from relaymux.core.session import Session
from relaymux.errors import StreamReset
from relaymux.net.dialer import Dialer, LinkFactory
from relaymux.net.held import HeldSession
from relaymux.net.link import LinkProtocol
from relaymux.net.peer import Identity, Peer
from relaymux.net.stream import StreamTransport
from relaymux.testing.ends import MemoryTransport
from relaymux.testing.memory import MemoryConnection

#: As small as the protocol allows: a few kilobytes cross every limit several times.
SMALL = Limits(max_payload=1024, max_streams=16, window=1024, replay=4096, resume_window=60.0, silence=15.0)

#: Seconds that no test needs.
FOREVER = 10_000.0


def stamped(label: int, size: int) -> bytes:
    """Bytes that tell, every eight of them, whose they are and where they belong."""
    return b"".join((label << 48 | i).to_bytes(8, "big") for i in range((size + 7) // 8))[:size]


def difference(found: bytes, expected: bytes) -> str:
    """Say what became of L{stamped} bytes, or nothing if they are all right."""
    if found == expected:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
    if at is None:
        kind = "missing at the end" if len(found) < len(expected) else "too many"
        return f"{abs(len(found) - len(expected))} bytes {kind} of {len(expected)}"
    place = expected.find(found[at : at + 16])
    what = "of another stream, or torn" if place < 0 else f"those of offset {place}"
    return f"at offset {at} of {len(expected)}: {what}: {found[at : at + 16].hex()}"


class Wire(MemoryConnection):
    """
    A connection whose loss may be noticed by one end only.

    @ivar told: the ends that notice when C{cut_after} comes to its byte; empty: both.
    """

    told: tuple[str, ...] = ()

    def cut(self, *ends: MemoryTransport) -> None:
        """See L{MemoryConnection.cut}."""
        super().cut(*(ends or [getattr(self, name) for name in self.told]))


class Host:
    """
    One daemon: it may be restarted, which nothing but its name survives.

    @ivar protocols: of the streams to and from it, in the order in which they were begun.
    @ivar budget: its memory, if that is counted.
    """

    def __init__(
        self, clock: Clock, name: str, limits: Limits, *, dialing: bool, memory: int | None = None
    ) -> None:
        self.memory = memory
        self.clock = clock
        self.name = name
        self.limits = limits
        self.dialing = dialing
        self.starts = 0
        self.peer: Peer
        self.restart()

    def restart(self) -> Peer:
        """Be another process.  @return: its peer."""
        self.starts += 1
        instance = f"{self.name} {self.starts}".encode().ljust(16, b".")
        section = "the other"
        self.budget = Budget(self.memory) if self.memory is not None else None
        self.peer = Peer(
            self.clock,
            section,
            Identity(self.name, instance),
            self.limits,
            dialing=self.dialing,
            budget=self.budget,
        )
        return self.peer

    @property
    def held(self) -> HeldSession:
        """What the peer keeps of its session; there must be one."""
        held = self.peer._held
        assert held is not None, f"{self.name} has no session"
        return held

    @property
    def session(self) -> Session:
        """The peer's session; there must be one."""
        return self.held.streams.session

    @property
    def link(self) -> LinkProtocol:
        """The peer's link; there must be one."""
        link = self.peer._link
        assert link is not None, f"{self.name} has no link"
        return link


@implementer(IStreamClientEndpoint)
class Hosts:
    """
    Host C{a} dials host C{b}.

    @ivar wires: all connections so far.
    @ivar refusing: whether connections are refused now.
    @ivar plan: what to do to the next connections, oldest first: each is called
        with its wire as soon as that exists.
    """

    def __init__(
        self,
        *,
        limits: Limits = SMALL,
        other: Limits | None = None,
        buffers: bool = True,
        seed: int | None = None,
        capacity: int = 16 * 1024,
        exporting: bool = False,
        pumped: bool = False,
        memory: int | None = None,
    ) -> None:
        """
        @param memory: bytes that each host may hold; L{None} if nobody counts.
        @param other: of host b, if they differ.
        @param pumped: bytes move in C{wire.pump} alone, not with the clock.
        @param seed: splits what is delivered, differently in each connection.
        @param exporting: whether the transports have key material of their own.
        """
        self.clock = Clock()
        self.a = Host(self.clock, "hv-a", limits, dialing=True, memory=memory)
        self.b = Host(self.clock, "hv-b", other or limits, dialing=False, memory=memory)
        self.wires: list[Wire] = []
        self.refusing = False
        self.plan: list[Callable[[Wire], object]] = []
        self.identities = ("dns:hv-a.example", "dns:hv-b.example")
        self.buffers = buffers
        self.seed = seed
        self.capacity = capacity
        self.exporting = exporting
        self.pumped = pumped
        self.dialer: Dialer | None = None

    @property
    def ends(self) -> tuple[Host, Host]:
        """Both hosts."""
        return self.a, self.b

    def dial(self) -> None:
        """Let a real dialler keep the link up from now on."""
        self.dialer = Dialer(self.clock, self.a.peer, [("memory", self)], Random(1))
        self.dialer.start()
        self.run(0.0)

    def connect(self, protocolFactory: Any = None) -> Deferred[IProtocol]:
        """See C{IStreamClientEndpoint}; for tests that dial by hand."""
        if self.refusing:
            return fail(ConnectionRefusedError())
        client = (protocolFactory or LinkFactory(self.a.peer)).buildProtocol(None)
        server = LinkFactory(self.b.peer).buildProtocol(None)
        assert client is not None and server is not None
        number = len(self.wires)
        wire = Wire(
            client,
            server,
            clock=None if self.pumped else self.clock,
            seed=None if self.seed is None else self.seed + number,
            capacity=self.capacity,
            buffers=self.buffers,
            identities=self.identities,
            exporter=_exporter(number) if self.exporting else None,
        )
        self.wires.append(wire)
        if self.plan:
            self.plan.pop(0)(wire)
        return succeed(client)

    @property
    def wire(self) -> Wire:
        """The newest connection."""
        return self.wires[-1]

    def up(self) -> Hosts:
        """Connect by hand, and come to rest.  @return: itself."""
        self.connect()
        self.run(0.0)
        return self

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Let C{seconds} pass, one timer after the other, or less if C{until} comes true."""
        clock = self.clock
        end = clock.seconds() + seconds
        steps = 0
        while not until():
            steps += 1
            assert steps < 1_000_000, "time does not pass: somebody asks to be called again at once"
            due = min((call.getTime() for call in clock.getDelayedCalls()), default=end)
            if due > end:
                break
            clock.advance(max(0.0, due - clock.seconds()))
            if due == end and not any(call.getTime() <= end for call in clock.getDelayedCalls()):
                break
        else:
            return
        clock.advance(max(0.0, end - clock.seconds()))

    def stop_dialing(self) -> None:
        """The dialler gives up."""
        if self.dialer is not None:
            self.dialer.stop()


def _exporter(number: int) -> Callable[[str, int], bytes]:
    """@return: what gives out something that only connection C{number} knows."""

    def exporter(label: str, length: int) -> bytes:
        assert label == "EXPERIMENTAL-relaymux-resume"
        return f"connection {number}".encode().ljust(length, b"x")

    return exporter


@implementer(IHalfCloseableProtocol)
class Talker(Protocol):
    """
    An end of a stream that says what it is told to, and writes down what it hears.

    @ivar received: all bytes so far.
    @ivar events: C{"made"}, C{"read lost"}, C{"write lost"}, C{"lost"}.
    @ivar reason: why it was lost.
    @ivar written: how many bytes were written.
    @ivar pauses: how often it was paused as a producer.
    @ivar faults: what it was told that it may not be told.
    """

    transport: StreamTransport

    def __init__(
        self,
        say: bytes = b"",
        *,
        portion: int = 700,
        finish: bool = True,
        after: int | None = None,
        then: Callable[[Talker], object] = lambda talker: None,
    ) -> None:
        """
        @param say: what to write, from the beginning on.
        @param portion: how much of it at once.
        @param finish: half-close after it.
        @param after: with so many bytes received ...
        @param then: ... do this, once.
        """
        self.received = bytearray()
        self.events: list[str] = []
        self.reason: Failure | None = None
        self.written = 0
        self.pauses = 0
        self.faults: list[str] = []
        self._say = memoryview(say)
        self._portion = portion
        self._finish = finish
        self._after = after
        self._then = then
        self._paused = False
        self._writing = False
        self._registered = False

    def connectionMade(self) -> None:
        self._once("made")
        self._registered = True
        self.transport.registerProducer(self, True)
        self._write()
        self._check()

    def dataReceived(self, data: bytes) -> None:
        self._expect(bool(data), "no data")
        self._expect("made" in self.events and not {"read lost", "lost"} & set(self.events), "data")
        self.received += data
        self._check()

    def readConnectionLost(self) -> None:
        """See C{IHalfCloseableProtocol}."""
        self._once("read lost")

    def writeConnectionLost(self) -> None:
        """See C{IHalfCloseableProtocol}."""
        self._once("write lost")
        self._say = memoryview(b"")

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._once("lost")
        self.reason = reason

    def say(self, data: bytes, *, finish: bool = True) -> None:
        """Write C{data} as well, as far as that is allowed now."""
        self._say = memoryview(bytes(self._say) + data)
        self._finish = finish
        if not self._registered and self.transport.writable:
            self._registered = True
            self.transport.registerProducer(self, True)
        self._write()

    @property
    def unwritten(self) -> int:
        """Bytes that nobody takes at the moment."""
        return len(self._say)

    @property
    def outcome(self) -> tuple[bytes, list[str], str]:
        """What it came to, whatever happened on the way."""
        error = self.reason.value if self.reason is not None else None
        ending = f"StreamReset {error.code}" if isinstance(error, StreamReset) else type(error).__name__
        return bytes(self.received), sorted(self.events), ending

    # IPushProducer

    def pauseProducing(self) -> None:
        """See C{IPushProducer}."""
        self._expect(not self._paused, "paused twice")
        self._paused = True
        self.pauses += 1

    def resumeProducing(self) -> None:
        """See C{IPushProducer}."""
        self._expect(self._paused, "resumed twice")
        self._paused = False
        self._write()

    def stopProducing(self) -> None:
        """See C{IPushProducer}."""
        self._registered = False
        self._say = memoryview(b"")

    def _write(self) -> None:
        if self._writing:
            return
        self._writing = True
        while self._say and not self._paused:
            piece, self._say = self._say[: self._portion], self._say[self._portion :]
            self.written += len(piece)
            self.transport.write(bytes(piece))
        self._writing = False
        if not self._say and not self._paused and self._registered:
            self._registered = False
            self.transport.unregisterProducer()
            if self._finish:
                self.transport.loseWriteConnection()

    def _check(self) -> None:
        if self._after is not None and len(self.received) >= self._after:
            self._after = None
            self._then(self)

    def _once(self, event: str) -> None:
        self._expect(event not in self.events and "lost" not in self.events, event)
        self._expect((event == "made") == (not self.events), event)
        self.events.append(event)

    def _expect(self, right: bool, what: str) -> None:
        if not right:
            self.faults.append(f"{what} after {self.events}")
            raise AssertionError(self.faults[-1])


class Server:
    """
    A service: each stream to it is accepted and given to a new protocol.

    @ivar talkers: these protocols.
    """

    def __init__(self, make: Callable[[], Talker] = Talker) -> None:
        self.make = make
        self.talkers: list[Talker] = []

    def stream_opened(self, stream: StreamTransport) -> None:
        """See L{Service.stream_opened}."""
        talker = self.make()
        self.talkers.append(talker)
        stream.accept()
        stream.begin(talker)


def begin(peer: Peer, service: str, talker: Talker, seconds: float = FOREVER) -> Deferred[StreamTransport]:
    """Open a stream for C{talker}.  @return: fires, or fails, as C{open_stream}'s."""
    return peer.open_stream(service, seconds).addCallback(_begun, talker)


def _begun(stream: StreamTransport, talker: Talker) -> StreamTransport:
    stream.begin(talker)
    return stream


def all_lost(talkers: Iterable[Talker]) -> bool:
    """Whether all of them have come to an end."""
    return all(talker.reason is not None for talker in talkers)
