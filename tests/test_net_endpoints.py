"""Streams as Twisted endpoints: any factory connects to a service, or is one."""

from __future__ import annotations

from typing import Any

from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IListeningPort, IStreamClientEndpoint, IStreamServerEndpoint
from twisted.internet.protocol import Factory, Protocol
from zope.interface.verify import verifyObject

from relaymux.errors import ErrorCode, LocalError
from relaymux.net.endpoints import PeerClientEndpoint, PeerServerEndpoint
from relaymux.net.stream import StreamAddress
from relaymux.testing.recording import Feeder, HalfCloseRecorder
from tests.peers import LARGE, Ends, EndsTestCase, stamped


class Echo(Protocol):
    """Sends back what it gets."""

    def dataReceived(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)


class CountingFactory(Factory):
    """Notes when it is started and stopped, and what it was asked to build for."""

    noisy = False

    def __init__(self, build: Any) -> None:
        self.build = build
        self.calls: list[str] = []
        self.addresses: list[object] = []

    def startFactory(self) -> None:
        self.calls.append("start")

    def stopFactory(self) -> None:
        self.calls.append("stop")

    def buildProtocol(self, addr: object) -> Any:
        self.addresses.append(addr)
        return self.build()


class EndpointTests(EndsTestCase):
    """From a factory near to a factory far."""

    def setUp(self) -> None:
        self.ends = Ends()
        self.server = PeerServerEndpoint(self.ends.far, "echo")
        self.client = PeerClientEndpoint(self.ends.near, "echo")

    def listen(self, build: Any = Echo) -> tuple[CountingFactory, IListeningPort]:
        factory = CountingFactory(build)
        return factory, self.successResultOf(self.server.listen(factory))

    def test_interfaces(self) -> None:
        """They provide what they say."""
        verifyObject(IStreamClientEndpoint, self.client)
        verifyObject(IStreamServerEndpoint, self.server)
        verifyObject(IListeningPort, self.listen()[1])

    def test_connect(self) -> None:
        """Two protocols, two factories, one stream: far more than its limits goes through and back."""
        server, port = self.listen()
        client = CountingFactory(HalfCloseRecorder)
        connecting = self.client.connect(client)
        self.ends.settle()
        protocol: Any = self.successResultOf(connecting)
        data = stamped(LARGE)
        Feeder(protocol.transport, data).start()
        self.ends.settle()
        self.assert_bytes(protocol.received, data)
        self.assertEqual(client.addresses, [StreamAddress("far", "echo")])
        self.assertEqual(server.addresses, [StreamAddress("near", "echo")])
        self.assertEqual(port.getHost(), StreamAddress("near", "echo"))
        protocol.transport.loseConnection()
        self.ends.settle()
        self.assert_lost(protocol, ConnectionDone)

    def test_stop_listening(self) -> None:
        """A service that has stopped is unknown; connections that are there go on."""
        factory, port = self.listen()
        connecting = self.client.connect(CountingFactory(HalfCloseRecorder))
        self.ends.settle()
        protocol: Any = self.successResultOf(connecting)
        for _ in range(2):
            stopped: Any = port.stopListening()
            self.successResultOf(stopped)
        self.assertEqual(factory.calls, ["start", "stop"])
        refused = self.client.connect(CountingFactory(HalfCloseRecorder))
        self.ends.settle()
        self.assertEqual(self.failed(refused).code, ErrorCode.UNKNOWN_SERVICE)
        protocol.transport.write(b"still there")
        self.ends.settle()
        self.assertEqual(protocol.received, b"still there")

    def test_taken(self) -> None:
        """A service that is offered already cannot be offered again."""
        self.listen()
        other = CountingFactory(Echo)
        self.assertIsInstance(self.failed(self.server.listen(other)), LocalError)
        self.assertEqual(other.calls, [])

    def test_server_declines(self) -> None:
        """A factory that builds no protocol refuses the stream."""
        self.listen(lambda: None)
        connecting = self.client.connect(CountingFactory(HalfCloseRecorder))
        self.ends.settle()
        self.assertEqual(self.failed(connecting).code, ErrorCode.CONNECT_FAILED)
        self.assert_idle(self.ends)

    def test_client_declines(self) -> None:
        """A client's factory that builds none leaves no stream behind."""
        self.listen()
        connecting = self.client.connect(CountingFactory(lambda: None))
        self.ends.settle()
        self.assertIsInstance(self.failed(connecting), LocalError)
        self.ends.settle()
        self.assert_idle(self.ends)

    def test_cancelled(self) -> None:
        """An attempt may be taken back."""
        self.listen()
        connecting = self.client.connect(CountingFactory(HalfCloseRecorder))
        connecting.cancel()
        self.failed(connecting)
        self.ends.settle()
        self.assert_idle(self.ends)
