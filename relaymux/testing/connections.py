"""What the conformance suite is made of: protocols that record, and pairs of them over a transport."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IListeningPort
from twisted.internet.protocol import Factory
from twisted.internet.task import deferLater
from zope.interface import implementer

from relaymux.interfaces import (
    IBufferReceiver,
    IBufferTransport,
    IIdentifiedTransport,
    IRelayTransport,
    TransportSettings,
)
from relaymux.testing.recording import Recorder

if TYPE_CHECKING:
    from twisted.trial.unittest import TestCase as _Base
else:
    _Base = object

__all__ = ["LARGE", "ConformanceBufferProtocol", "ConformanceProtocol", "Connections", "abort", "content"]

#: More than the kernel holds between two sockets, and than any window.
LARGE = 24 * 1024 * 1024


def content(size: int, seed: int = 0) -> bytes:
    """Bytes of which no two parts are alike, the same for the same C{seed}."""
    block = bytes((i * 31 + (i >> 8) * 17 + seed) & 0xFF for i in range(65_521))
    return (block * (size // len(block) + 1))[:size]


class ConformanceProtocol(Recorder):
    """
    Records, and may do something when bytes arrive.

    @ivar on_made: called in C{connectionMade}.
    @ivar on_data: called after each delivery.
    @ivar identity: the peer's, as of C{connectionMade}.
    """

    transport: Any

    def __init__(self) -> None:
        super().__init__()
        self.on_made: Callable[[], object] = lambda: None
        self.on_data: Callable[[], object] = lambda: None
        self.identity = ""

    def connectionMade(self) -> None:
        super().connectionMade()
        if IIdentifiedTransport.providedBy(self.transport):
            self.identity = self.transport.peerIdentity
        self.on_made()

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)
        self.on_data()


@implementer(IBufferReceiver)
class ConformanceBufferProtocol(ConformanceProtocol):
    """
    The same with buffers, which it keeps, and through C{dataReceived} where the transport has none.

    @ivar written: how many bytes it was told that the kernel took.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written = 0
        self._kept: list[memoryview] = []

    def dataReceived(self, data: bytes) -> None:
        if IBufferTransport.providedBy(self.transport):
            raise AssertionError("a transport with buffers called dataReceived of a protocol that takes them")
        super().dataReceived(data)

    def buffersReceived(self, buffers: Sequence[memoryview]) -> None:
        """See L{IBufferReceiver.buffersReceived}."""
        for view in buffers:
            if not view.readonly or not len(view):
                raise AssertionError(f"not a read-only view of bytes: {view!r}")
            self._kept.append(view)
            ConformanceProtocol.dataReceived(self, bytes(view))

    def buffersWritten(self, count: int) -> None:
        """See L{IBufferReceiver.buffersWritten}."""
        self.written += count

    def unchanged(self) -> bool:
        """Whether all buffers still hold what they held when they were received."""
        return b"".join(self._kept) == self.received or not self._kept


class Connections(_Base):
    """
    What the suite connects, waits with, and cleans up: the part that a subclass fills in.

    @cvar transport: the transport to test.
    @cvar late_bytes: how many bytes may still be delivered after
        C{pauseProducing}; links have room for 64 KiB, as Twisted's TLS needs.
    @cvar gentle_close: whether a peer that is sending while we close still
        reads all that was sent to it.  It does not over Twisted's own
        transports, which leave its bytes unread and so reset it; links can
        live with that, since they know what their peer has.
    @cvar deadline: seconds for any one wait.
    """

    transport: IRelayTransport
    late_bytes = 64 * 1024
    gentle_close = False
    deadline = 30.0
    protocol: Callable[[], ConformanceProtocol] = ConformanceProtocol

    # What a subclass says

    def server_settings(self) -> TransportSettings:
        """@return: settings to listen with, on an address that is free."""
        raise NotImplementedError

    def client_settings(self, port: IListeningPort) -> TransportSettings:
        """@return: settings to reach C{port}, which listens with L{server_settings}."""
        raise NotImplementedError

    def unreachable_settings(self) -> TransportSettings:
        """@return: settings to reach an address on which nobody listens."""
        raise NotImplementedError

    # What the tests use

    def setUp(self) -> None:
        from twisted.internet import reactor

        self.reactor: Any = reactor
        self._open = _sockets()
        self._made: list[ConformanceProtocol] = []
        self.accepted: list[ConformanceProtocol] = []
        self.on_accept: Callable[[ConformanceProtocol], object] = lambda protocol: None
        # In reverse: first all ends, then nothing may be left of them.
        self.addCleanup(self._nothing_is_left)
        self.addCleanup(self._end_all)

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait until C{condition()}."""
        end = self.reactor.seconds() + self.deadline
        while not condition():
            if self.reactor.seconds() > end:
                self.fail(f"waited {self.deadline} s in vain until {what}")
            await deferLater(self.reactor, 0.002)

    async def quiet(self, value: Callable[[], object]) -> None:
        """Wait until C{value()} has not changed for some turns of the reactor."""
        for _ in range(1000):
            before = value()
            await deferLater(self.reactor, 0.05)
            if value() == before:
                return
        self.fail(f"it does not come to rest: {value()!r}")

    def make(self) -> ConformanceProtocol:
        """A protocol that is closed when the test ends."""
        self._made.append(type(self).protocol())
        return self._made[-1]

    async def listen(self) -> IListeningPort:
        """Listen; what is accepted is in C{accepted}, and closed when the test ends."""

        def build(_address: object) -> ConformanceProtocol:
            protocol = self.make()
            self.accepted.append(protocol)
            self.on_accept(protocol)
            return protocol

        factory: Any = Factory()
        factory.buildProtocol = build
        endpoint = self.transport.server(self.reactor, self.server_settings())
        port: IListeningPort = await endpoint.listen(factory)
        self.addCleanup(port.stopListening)
        return port

    def connect(
        self, port: IListeningPort, protocol: ConformanceProtocol | None = None
    ) -> Deferred[ConformanceProtocol]:
        """Connect C{protocol} to C{port}."""
        return self._dial(self.client_settings(port), protocol or self.make())

    def _dial(self, settings: TransportSettings, protocol: ConformanceProtocol) -> Deferred[Any]:
        factory: Any = Factory()
        factory.buildProtocol = lambda _address: protocol
        return self.transport.client(self.reactor, settings).connect(factory)

    async def pair(
        self, port: IListeningPort | None = None
    ) -> tuple[ConformanceProtocol, ConformanceProtocol]:
        """@return: two connected protocols, of client and server."""
        count = len(self.accepted)
        client = await self.connect(port or await self.listen())
        await self.until(
            lambda: len(self.accepted) > count and "made" in self.accepted[-1].events, "it was accepted"
        )
        return client, self.accepted[-1]

    async def arrived(self, protocol: ConformanceProtocol, count: int) -> None:
        """Wait for C{count} bytes."""
        await self.until(lambda: len(protocol.received) >= count, f"{count} bytes arrived")

    async def lost(self, protocol: ConformanceProtocol) -> BaseException:
        """@return: why the connection of C{protocol} was lost."""
        await self.until(lambda: protocol.reason is not None, "the connection was lost")
        assert protocol.reason is not None and protocol.reason.value is not None
        return protocol.reason.value

    def same(self, received: bytes | bytearray, expected: bytes) -> None:
        """Compare without printing megabytes."""
        if received != expected:
            pairs = zip(received, expected, strict=False)
            first = next((i for i, (a, b) in enumerate(pairs) if a != b), "none")
            self.fail(f"{len(received)} bytes instead of {len(expected)}, first difference at {first}")

    async def _end_all(self) -> None:
        for protocol in self._made:
            if "made" in protocol.events and protocol.reason is None:
                abort(protocol.transport)
                await self.lost(protocol)

    async def _nothing_is_left(self) -> None:
        await self.until(lambda: _sockets() <= self._open, "all sockets were closed")


def abort(transport: Any) -> None:
    """As links do it: C{abortConnection} is not part of C{ITransport}."""
    getattr(transport, "abortConnection", transport.loseConnection)()


def _sockets() -> set[str]:
    """The sockets this process has open; nothing where that cannot be seen."""
    found: set[str] = set()
    try:
        names = os.listdir("/proc/self/fd")
    except OSError:
        return found
    for name in names:
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        if target.startswith("socket:"):
            found.add(target)
    return found
