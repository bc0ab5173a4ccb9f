"""
Links over plain TCP.

Nothing is encrypted and nobody is checked: for a network that only the two
hosts are on, for a link inside a tunnel that does both, and for measuring.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from twisted.internet.interfaces import (
    IListeningPort,
    IProtocolFactory,
    IStreamClientEndpoint,
    IStreamServerEndpoint,
)
from zope.interface import implementer

from relaymux.errors import ConfigurationError
from relaymux.interfaces import IRelayTransport, TransportSettings
from relaymux.net.addresses import parse_host_port
from relaymux.net.buffers import pool_for
from relaymux.net.connect import connect_tcp
from relaymux.net.families import tune_link
from relaymux.net.listen import bind_tcp, listen_on
from relaymux.transports.endpoints import CONNECT_SECONDS, FLUSH_SECONDS, ClientEndpoint, ServerEndpoint

__all__ = ["host_and_port", "transport"]


def host_and_port(settings: TransportSettings, *, listening: bool) -> tuple[str, int]:
    """
    The address of a link over TCP, whatever is on top of it.

    @raise ConfigurationError: names the key.
    """
    try:
        return parse_host_port(settings.address, listening=listening)
    except ConfigurationError as error:
        raise error.within(key="listen" if listening else "connect") from None


@implementer(IRelayTransport)
class TCP:
    """C{transport = tcp}"""

    name = "tcp"
    keys: Mapping[str, str] = {}

    def client(self, reactor: Any, settings: TransportSettings) -> IStreamClientEndpoint:
        host, port = host_and_port(settings, listening=False)
        return ClientEndpoint(
            lambda factory: connect_tcp(
                reactor, host, port, factory, CONNECT_SECONDS, pool_for(reactor), tune_link, FLUSH_SECONDS
            )
        )

    def server(self, reactor: Any, settings: TransportSettings) -> IStreamServerEndpoint:
        host, port = host_and_port(settings, listening=True)
        return ServerEndpoint(partial(self._listen, reactor, host, port))

    def _listen(self, reactor: Any, host: str, port: int, factory: IProtocolFactory) -> IListeningPort:
        sock = bind_tcp(host, port)
        return listen_on(reactor, sock, factory, pool_for(reactor), tune_link, FLUSH_SECONDS)


transport = TCP()
