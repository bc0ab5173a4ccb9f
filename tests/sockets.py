"""What tests of sockets share: a protocol that records, raw peers, waiting with a deadline."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from twisted.internet import reactor as installed_reactor
from twisted.internet.interfaces import IHalfCloseableProtocol
from twisted.internet.protocol import ClientFactory, Factory, Protocol, connectionDone
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from twisted.trial.unittest import TestCase
from zope.interface import implementer

from relaymux.interfaces import IBufferReceiver

reactor: Any = installed_reactor

#: Seconds; far above what anything here takes on a busy machine.
DEADLINE = 20.0


def content(size: int, seed: int = 0) -> bytes:
    """Bytes of which no two parts are alike, the same for the same C{seed}."""
    period = 65_521
    block = bytes((i * 31 + (i >> 8) * 17 + seed) & 0xFF for i in range(period))
    return (block * (size // period + 1))[:size]


class PlainRecorder(Protocol):
    """
    Records what it is told.

    @ivar events: names of the calls, and data as C{"data"} (once in a row).
    @ivar on_data: called after each delivery.
    """

    transport: Any

    def __init__(self) -> None:
        self.received = bytearray()
        self.events: list[str] = []
        self.reasons: list[Failure] = []
        self.deliveries = 0
        self.on_made: Callable[[], object] = lambda: None
        self.on_data: Callable[[], object] = lambda: None

    def connectionMade(self) -> None:
        self.events.append("made")
        self.on_made()

    def dataReceived(self, data: bytes) -> None:
        self._record(data)

    def _record(self, data: bytes | memoryview) -> None:
        self.received += data
        self.deliveries += 1
        if self.events[-1:] != ["data"]:
            self.events.append("data")
        self.on_data()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.events.append("lost")
        self.reasons.append(reason)

    @property
    def reason(self) -> BaseException:
        """Why the connection was lost."""
        [reason] = self.reasons
        assert reason.value is not None
        return reason.value


@implementer(IBufferReceiver)
class Recorder(PlainRecorder):
    """As its base, with buffers.  @ivar written: sum of C{buffersWritten}."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0
        self.on_written: Callable[[], object] = lambda: None

    def dataReceived(self, data: bytes) -> None:
        raise AssertionError("a buffer receiver got dataReceived")

    def buffersReceived(self, buffers: Sequence[memoryview]) -> None:
        for view in buffers:
            assert view.readonly and len(view)
        self._record(b"".join(buffers))

    def buffersWritten(self, count: int) -> None:
        self.written += count
        self.on_written()


@implementer(IHalfCloseableProtocol)
class HalfCloser(Recorder):
    """As its base, told of each direction's end."""

    def __init__(self) -> None:
        super().__init__()
        self.on_read_lost: Callable[[], object] = lambda: None
        self.on_write_lost: Callable[[], object] = lambda: None

    def readConnectionLost(self) -> None:
        self.events.append("read lost")
        self.on_read_lost()

    def writeConnectionLost(self) -> None:
        self.events.append("write lost")
        self.on_write_lost()


class RecorderFactory(Factory):
    """Makes recorders and keeps them."""

    def __init__(self, kind: type[PlainRecorder] = Recorder) -> None:
        self.kind = kind
        self.made: list[Any] = []

    def buildProtocol(self, addr: object) -> Any:
        self.made.append(self.kind())
        return self.made[-1]


class Producer:
    """A streaming producer that records."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def pauseProducing(self) -> None:
        self.calls.append("pause")

    def resumeProducing(self) -> None:
        self.calls.append("resume")

    def stopProducing(self) -> None:
        self.calls.append("stop")


def unix_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected UNIX sockets."""
    return socket.socketpair()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected TCP sockets."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = socket.create_connection(listening.getsockname(), DEADLINE)
        other, _ = listening.accept()
    for sock in (one, other):
        # Else the kernel's idea of them grows while data flows, to more than a test sends.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 256 * 1024)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 256 * 1024)
    return one, other


class SocketTestCase(TestCase):
    """Raw peers, temporary paths, and waiting."""

    timeout = 60

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Let the reactor run until C{condition()}, for at most L{DEADLINE}."""
        end = reactor.seconds() + DEADLINE
        while not condition():
            if reactor.seconds() > end:
                self.fail(f"waited {DEADLINE} s in vain until {what}")
            await deferLater(reactor, 0.002)

    async def arrived(self, protocol: PlainRecorder, count: int) -> None:
        """Wait until C{protocol} has received C{count} bytes."""
        await self.until(lambda: len(protocol.received) >= count, f"{count} bytes arrived")

    async def lost(self, protocol: PlainRecorder) -> BaseException:
        """@return: why the connection of C{protocol} was lost, when it was."""
        await self.until(lambda: protocol.reasons, "the connection was lost")
        return protocol.reason

    async def turns(self, count: int = 10) -> None:
        """Let the reactor look at everything a few times: what is to happen at once has happened."""
        for _ in range(count):
            await deferLater(reactor, 0.001)

    async def read(self, peer: socket.socket, count: int = -1) -> bytes:
        """
        Read C{count} bytes, or to the end of input.

        @raise OSError: the connection was reset.
        """
        peer.setblocking(False)
        data = bytearray()

        def step() -> bool:
            while len(data) != count:
                try:
                    got = peer.recv(count - len(data) if count >= 0 else 1 << 18)
                except BlockingIOError:
                    return False
                if not got:
                    return True
                data.extend(got)
            return True

        await self.until(step, f"{count} bytes or the end were read; got {len(data)}")
        return bytes(data)

    async def send(self, peer: socket.socket, data: bytes) -> None:
        """Write all of C{data}."""
        peer.setblocking(False)
        left = memoryview(data)

        def step() -> bool:
            nonlocal left
            while left:
                try:
                    left = left[peer.send(left) :]
                except BlockingIOError:
                    return False
            return True

        await self.until(step, "the transport took all bytes")

    def fill(self, peer: socket.socket) -> bytes:
        """Write until the kernel takes no more.  @return: what it took."""
        peer.setblocking(False)
        sent = bytearray()
        while True:
            piece = content(50_000, len(sent) % 251)
            try:
                sent += piece[: peer.send(piece)]
            except BlockingIOError:
                return bytes(sent)

    def directory(self) -> str:
        """A temporary directory whose paths are short enough for UNIX sockets."""
        path = tempfile.mkdtemp(prefix="rm")
        self.addCleanup(shutil.rmtree, path)
        return path

    def open_descriptors(self) -> set[str]:
        """What this process has open: sockets by their inode."""
        found = set()
        for name in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{name}")
            except FileNotFoundError:
                continue
            if target.startswith("socket:"):
                found.add(target)
        return found


def reset(peer: socket.socket) -> None:
    """Close a TCP socket with a reset."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


class Wire:
    """
    A TCP connection's way through somebody else's hands.

    @ivar port: where to connect instead of to the target.
    @ivar mangle: given what travels and whether it comes from the client;
        returns what travels on.
    """

    def __init__(self, target: int) -> None:
        self.mangle: Callable[[bytes, bool], bytes] = lambda data, from_client: data
        self._ends: list[Protocol] = []
        server: Any = Factory()
        server.buildProtocol = lambda _address: self._accepted(target)
        self._listening = reactor.listenTCP(0, server, interface="127.0.0.1")
        self.port: int = self._listening.getHost().port

    def _accepted(self, target: int) -> Protocol:
        near, far = _WireEnd(self, True), _WireEnd(self, False)
        near.other, far.other = far, near
        self._ends += [near, far]
        client: Any = ClientFactory()
        client.buildProtocol = lambda _address: far
        near.on_made = lambda: reactor.connectTCP("127.0.0.1", target, client)
        return near

    def cut(self) -> None:
        """End the connections, with a FIN to each side."""
        for end in self._ends:
            if end.transport is not None:
                end.transport.loseConnection()

    async def close(self) -> None:
        """Stop, and wait for it."""
        await self._listening.stopListening()
        self.cut()


class _WireEnd(Protocol):
    other: _WireEnd
    transport: Any = None
    on_made: Callable[[], object] = staticmethod(lambda: None)

    def __init__(self, wire: Wire, is_client_side: bool) -> None:
        self._wire = wire
        self._is_client_side = is_client_side
        self._early = b""

    def connectionMade(self) -> None:
        self.on_made()
        if not self._is_client_side:
            self.transport.write(self.other._early)

    def dataReceived(self, data: bytes) -> None:
        data = self._wire.mangle(data, self._is_client_side)
        if self.other.transport is None:
            self._early += data
        else:
            self.other.transport.write(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self.other.transport is not None:
            self.other.transport.loseConnection()
