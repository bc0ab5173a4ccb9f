"""What tests of TLS share: certificates good and bad, a server, and clients."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import LogLevel, formatEvent, globalLogPublisher

from relaymux.certificates import Authority, Credentials
from relaymux.interfaces import TransportSettings
from relaymux.net import tlscontext, tlsengine, tlsrecords, tlssockets
from relaymux.net.compiled import native
from relaymux.net.tlsconnect import connect_tls, listen_tls
from relaymux.net.tlscontext import TLSIdentity
from relaymux.net.tlsengine import Engine, FastEngine
from relaymux.net.tlsrecords import RecordEngine
from relaymux.transports.tls import transport as tls
from tests.sockets import DEADLINE, RecorderFactory, SocketTestCase, Wire, reactor

AUTHORITY = Authority.create("the authority")
STRANGER = Authority.create("another authority")
NAMESAKE = Authority.create("the authority")

SERVER = AUTHORITY.issue("server.example", ["server.example", "127.0.0.1"])
CLIENT = AUTHORITY.issue("client.example")

#: What the faster engines need of pyOpenSSL.
BINDINGS = tlsengine._BINDINGS

#: How an installation may encrypt and decrypt; `make test-compiled` has them all.
ENGINES: tuple[type[Engine], ...] = (
    (Engine, FastEngine) if native is None else (Engine, FastEngine, RecordEngine)
)


def days(count: float) -> datetime:
    """The time C{count} days from now."""
    return datetime.now(timezone.utc) + timedelta(days=count)


class Files:
    """A directory with what a C{[link]} section names."""

    def __init__(self, directory: Path, credentials: Credentials, authority: bytes, peer: str) -> None:
        self.directory = directory
        self.options = {
            "certificate": "host.pem",
            "private-key": "host.key",
            "ca": "ca.pem",
            "peer": peer,
        }
        self.write("host.pem", credentials.certificate_pem)
        self.write("host.key", credentials.key_pem)
        self.write("ca.pem", authority)

    def write(self, name: str, data: bytes) -> None:
        """Replace a file, as one that renews certificates does."""
        temporary = self.directory / "new"
        temporary.write_bytes(data)
        temporary.chmod(0o600)
        temporary.rename(self.directory / name)

    def settings(self, address: str = "127.0.0.1:1") -> TransportSettings:
        return TransportSettings(address, self.options, self.directory)

    def identity(self) -> TLSIdentity:
        return tls._identity(self.settings())


class TLSTestCase(SocketTestCase):
    """A server, and clients."""

    def setUp(self) -> None:
        self.patch(tlssockets, "CLOSE_SECONDS", 0.3)
        self.server = RecorderFactory()
        self.client = RecorderFactory()
        self.log: list[str] = []
        observer: Any = self._logged
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)
        self.addCleanup(self.all_closed)

    def _logged(self, event: Any) -> None:
        if event.get("log_level", LogLevel.debug) >= LogLevel.warn:
            self.log.append(formatEvent(event))

    async def all_closed(self) -> None:
        """Whatever a test leaves open is closed, and told so exactly once."""
        for protocol in self.server.made + self.client.made:
            if protocol.transport is not None:
                protocol.transport.abortConnection()
                protocol.transport.abortConnection()
                await self.lost(protocol)
        await self.turns(3)
        for protocol in self.server.made + self.client.made:
            self.assertLessEqual(protocol.events.count("lost"), 1)

    def use(self, engine: type[Engine]) -> None:
        """Have connections from now on encrypt and decrypt by C{engine}."""
        # Not by replacing functions: what is compiled calls them directly.
        self.patch(tlsrecords, "_CAN_PROTECT", engine is RecordEngine)
        self.patch(tlsengine, "_BINDINGS", ("none of the future",) if engine is Engine else BINDINGS)

    def files(
        self, credentials: Credentials, peer: str, authority: Authority = AUTHORITY, believed: bool = True
    ) -> Files:
        """@param believed: whether C{credentials} are good enough for our own check of them."""
        if not believed:
            self.patch(tlscontext, "_check_validity", lambda certificate, path: None)
        return Files(Path(self.directory()), credentials, authority.certificate_pem, peer)

    def listen(self, credentials: Credentials = SERVER, peer: str = "client.example", **options: Any) -> int:
        """@return: the port of a TLS server."""
        identity = self.files(credentials, peer, **options).identity()
        return self.serve(identity)

    def serve(self, identity: TLSIdentity) -> int:
        """As L{listen}."""
        port: Any = listen_tls(reactor, "127.0.0.1", 0, identity, 5.0, self.server)
        self.addCleanup(port.stopListening)
        number: int = port.getHost().port
        return number

    def connect(
        self, port: int, credentials: Credentials = CLIENT, peer: str = "server.example", **options: Any
    ) -> Deferred[Any]:
        """Connect a TLS client."""
        identity = self.files(credentials, peer, **options).identity()
        return connect_tls(reactor, "127.0.0.1", port, self.client, identity, DEADLINE, 5.0)

    async def pair(self, wire: bool = False) -> tuple[Any, Any]:
        """@return: the protocols of a client and of the server it is connected to."""
        port = self.listen()
        if wire:
            self.wire = Wire(port)
            self.addCleanup(self.wire.close)
            port = self.wire.port
        client = await self.connect(port)
        await self.until(lambda: self.server.made and self.server.made[0].events, "the server knew its peer")
        return client, self.server.made[0]
