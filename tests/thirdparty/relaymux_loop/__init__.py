"""
C{transport = loop}: links over TCP on the loopback interface.

The address is a port number.  Nothing of relaymux's own sockets is used: the
endpoints are Twisted's, their transports take and give C{bytes}.  A real
transport would be no different, with something better than TCP inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP4ServerEndpoint
from twisted.internet.error import CannotListenError, ConnectError
from twisted.internet.interfaces import (
    IListeningPort,
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
    IStreamServerEndpoint,
)
from zope.interface import implementer

from relaymux.errors import ConfigurationError, TransportError
from relaymux.interfaces import IRelayTransport, TransportSettings

__all__ = ["transport"]

HOST = "127.0.0.1"


@implementer(IRelayTransport)
class Loop:
    """The transport."""

    name = "loop"
    keys: Mapping[str, str] = {"patience": "with connect: seconds to wait for a connection (10)"}

    def client(self, reactor: Any, settings: TransportSettings) -> IStreamClientEndpoint:
        port = _port(settings, "connect")
        try:
            patience = float(settings.options.get("patience", "10"))
        except ValueError:
            raise ConfigurationError(
                "not a time",
                key="patience",
                found=settings.options["patience"],
                expected="a number of seconds",
            ) from None
        return _Client(TCP4ClientEndpoint(reactor, HOST, port, timeout=patience), port)

    def server(self, reactor: Any, settings: TransportSettings) -> IStreamServerEndpoint:
        port = _port(settings, "listen")
        return _Server(TCP4ServerEndpoint(reactor, port, interface=HOST), port)


def _port(settings: TransportSettings, key: str) -> int:
    text = settings.address
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise ConfigurationError("not a port", key=key, found=text, expected="a number from 0 to 65535")
    return int(text)


@implementer(IStreamClientEndpoint)
class _Client:
    """Twisted's endpoint, failing the way relaymux wants it."""

    def __init__(self, endpoint: IStreamClientEndpoint, port: int) -> None:
        self._endpoint = endpoint
        self._port = port

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        return Deferred.fromCoroutine(self._connect(protocolFactory))

    async def _connect(self, factory: IProtocolFactory) -> IProtocol:
        try:
            return await self._endpoint.connect(factory)
        except ConnectError as error:
            raise TransportError(f"cannot connect to loop port {self._port}: {error}") from error


@implementer(IStreamServerEndpoint)
class _Server:
    """Twisted's endpoint, failing the way relaymux wants it."""

    def __init__(self, endpoint: IStreamServerEndpoint, port: int) -> None:
        self._endpoint = endpoint
        self._port = port

    def listen(self, protocolFactory: IProtocolFactory) -> Deferred[IListeningPort]:
        return Deferred.fromCoroutine(self._listen(protocolFactory))

    async def _listen(self, factory: IProtocolFactory) -> IListeningPort:
        try:
            return await self._endpoint.listen(factory)
        except CannotListenError as error:
            raise TransportError(f"cannot listen on loop port {self._port}: {error}") from error


transport = Loop()
