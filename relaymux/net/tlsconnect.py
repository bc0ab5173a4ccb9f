"""Connecting and accepting TLS connections."""

from __future__ import annotations

from collections import Counter
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress, IListeningPort, IProtocol, IProtocolFactory
from twisted.internet.protocol import Factory
from twisted.logger import Logger
from twisted.python.failure import Failure

from relaymux.errors import TransportError
from relaymux.net.addresses import describe
from relaymux.net.buffers import pool_for
from relaymux.net.connect import connect_tcp
from relaymux.net.families import tune_link
from relaymux.net.listen import bind_tcp, listen_on
from relaymux.net.quietlog import QuietLog
from relaymux.net.tlscontext import TLSIdentity
from relaymux.net.tlsengine import CIPHER_BUFFER_SIZE
from relaymux.net.tlssockets import TLSTransport

__all__ = ["HANDSHAKES", "HANDSHAKES_PER_SOURCE", "connect_tls", "listen_tls"]

#: Connections that may be in their handshake at a time, per listener and of
#: these per source address.  An honest peer needs one, for a few round trips.
HANDSHAKES = 32
HANDSHAKES_PER_SOURCE = 8


class _Client:
    """One attempt to connect."""

    def __init__(self, reactor: Any, factory: IProtocolFactory, identity: TLSIdentity) -> None:
        self._reactor = reactor
        self._factory = factory
        self._pool = pool_for(reactor, CIPHER_BUFFER_SIZE)
        self._tls = TLSTransport(reactor, identity, pool_for(reactor), self._pool, self, is_server=False)
        self._result: Deferred[IProtocol] = Deferred(self._cancel)

    def start(self, host: str, port: int, seconds: float, flush_seconds: float | None) -> Deferred[IProtocol]:
        below = self._tls.below
        self._connecting: Deferred[IProtocol] | None = connect_tcp(
            self._reactor, host, port, below, seconds, self._pool, tune_link, flush_seconds
        )
        self._connecting.addCallbacks(self._connected, self._result.errback)
        return self._result

    def _connected(self, _below: IProtocol) -> None:
        self._connecting = None

    def _cancel(self, _result: Deferred[IProtocol]) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
        else:
            self._tls.give_up(TransportError("given up"))

    def tls_established(self, transport: TLSTransport) -> IProtocol | None:
        return self._factory.buildProtocol(transport.getPeer())

    def tls_connected(self, protocol: IProtocol) -> None:
        self._result.callback(protocol)

    def tls_failed(self, error: TransportError) -> None:
        if not self._result.called:  # else it was cancelled
            self._result.errback(Failure(error))


def connect_tls(
    reactor: Any,
    host: str,
    port: int,
    factory: IProtocolFactory,
    identity: TLSIdentity,
    seconds: float,
    flush_seconds: float | None = None,
) -> Deferred[IProtocol]:
    """
    Connect to a TLS server and make sure that it is the right one.

    @param seconds: for the TCP connection; the handshake has its own deadline.
    @param flush_seconds: see L{SocketTransport<relaymux.net.sockets.SocketTransport>}.
    @return: fires with the connected protocol, fails with L{TransportError};
        cancelling gives up.
    """
    return _Client(reactor, factory, identity).start(host, port, seconds, flush_seconds)


class _Server(Factory):
    """Gives each accepted socket a handshake, and the protocol to those who pass it."""

    _log = Logger()

    def __init__(self, reactor: Any, factory: IProtocolFactory, identity: TLSIdentity) -> None:
        self._reactor = reactor
        self._factory = factory
        self._identity = identity
        self._pool = pool_for(reactor, CIPHER_BUFFER_SIZE)
        self._quiet = QuietLog(self._log, reactor.seconds)
        self._sources: Counter[str] = Counter()

    def doStart(self) -> None:
        self._factory.doStart()

    def doStop(self) -> None:
        self._factory.doStop()

    def buildProtocol(self, addr: IAddress) -> IProtocol | None:  # type: ignore[override]
        source = str(getattr(addr, "host", addr))
        if self._sources.total() >= HANDSHAKES:
            self._quiet.warn(
                "all",
                "closing connections: {limit} are in their TLS handshake already; the last is from {source}",
                limit=HANDSHAKES,
                source=source,
            )
            return None
        if self._sources[source] >= HANDSHAKES_PER_SOURCE:
            self._quiet.warn(
                source,
                "closing connections from {source}: {limit} of them are in their TLS handshake already",
                limit=HANDSHAKES_PER_SOURCE,
                source=source,
            )
            return None
        self._sources[source] += 1
        accepted = _Accepted(self, addr, source)
        tls = TLSTransport(
            self._reactor, self._identity, pool_for(self._reactor), self._pool, accepted, is_server=True
        )
        return tls.below

    def established(self, accepted: _Accepted) -> IProtocol | None:
        """C{accepted} has passed."""
        self._forget(accepted)
        return self._factory.buildProtocol(accepted.address)

    def failed(self, accepted: _Accepted, error: TransportError) -> None:
        """C{accepted} has not passed and is gone."""
        self._forget(accepted)
        self._quiet.warn(
            (accepted.source, str(error).replace(describe(accepted.address), "")),
            "refused a connection from {source}: {error}",
            source=accepted.source,
            error=error,
        )

    def _forget(self, accepted: _Accepted) -> None:
        if not accepted.counted:
            return
        accepted.counted = False
        self._sources[accepted.source] -= 1
        if not self._sources[accepted.source]:
            del self._sources[accepted.source]


class _Accepted:
    """One accepted connection, while its handshake runs."""

    def __init__(self, server: _Server, address: IAddress, source: str) -> None:
        self.address = address
        self.source = source
        self.counted = True
        self._server = server

    def tls_established(self, transport: TLSTransport) -> IProtocol | None:
        return self._server.established(self)

    def tls_connected(self, protocol: IProtocol) -> None:
        """The factory knows its protocol."""

    def tls_failed(self, error: TransportError) -> None:
        self._server.failed(self, error)


def listen_tls(
    reactor: Any,
    host: str,
    port: int,
    identity: TLSIdentity,
    flush_seconds: float | None,
    factory: IProtocolFactory,
) -> IListeningPort:
    """
    Accept TLS connections from the one peer that C{identity} names.

    C{factory} is asked for a protocol when a connection's peer has proved its
    name.

    @param host: an IP address; empty for all.
    @param flush_seconds: as of L{connect_tls}.
    @raise TransportError: the address cannot be listened on.
    """
    sock = bind_tcp(host, port)
    server = _Server(reactor, factory, identity)
    return listen_on(reactor, sock, server, pool_for(reactor, CIPHER_BUFFER_SIZE), tune_link, flush_seconds)
