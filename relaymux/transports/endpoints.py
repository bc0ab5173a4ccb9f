"""What the built-in transports return: Twisted endpoints made of one function each."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred, execute
from twisted.internet.interfaces import (
    IListeningPort,
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
    IStreamServerEndpoint,
)
from zope.interface import implementer

__all__ = ["CONNECT_SECONDS", "FLUSH_SECONDS", "ClientEndpoint", "ServerEndpoint"]

#: How long one attempt to reach the peer may take.  Three lost SYNs take 7 s.
CONNECT_SECONDS = 10.0

#: How long a link's last bytes may take to leave once it is being closed.
#: Nothing in them is needed: a session knows what its peer has.
FLUSH_SECONDS = 5.0


@implementer(IStreamClientEndpoint)
class ClientEndpoint:
    """Connects by calling a function."""

    def __init__(self, connect: Callable[[IProtocolFactory], Deferred[IProtocol]]) -> None:
        self._connect = connect

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        return self._connect(protocolFactory)


@implementer(IStreamServerEndpoint)
class ServerEndpoint:
    """Listens by calling a function, whose exception the Deferred fails with."""

    def __init__(self, listen: Callable[[IProtocolFactory], IListeningPort]) -> None:
        self._listen = listen

    def listen(self, protocolFactory: IProtocolFactory) -> Deferred[IListeningPort]:
        return execute(self._listen, protocolFactory)
