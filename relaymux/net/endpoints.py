"""
Streams as Twisted endpoints: any protocol of Twisted's may talk through a link.
"""

from __future__ import annotations

from typing import Any

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import (
    IAddress,
    IListeningPort,
    IProtocol,
    IProtocolFactory,
    IStreamClientEndpoint,
    IStreamServerEndpoint,
)
from zope.interface import implementer

from relaymux.errors import ErrorCode, LocalError
from relaymux.net.peer import Peer
from relaymux.net.stream import StreamAddress, StreamTransport

__all__ = ["PeerClientEndpoint", "PeerServerEndpoint"]

#: Seconds; the default of a section's C{open-timeout}, for the same reason.
OPEN_TIMEOUT = 10.0


@implementer(IStreamClientEndpoint)
class PeerClientEndpoint:
    """Connects to a service of a peer."""

    def __init__(self, peer: Peer, service: str, seconds: float = OPEN_TIMEOUT) -> None:
        """@param seconds: how long to wait for a link and for the peer's answer."""
        self._peer = peer
        self._service = service
        self._seconds = seconds

    def connect(self, protocolFactory: IProtocolFactory) -> Deferred[IProtocol]:
        """
        @return: fires with the connected protocol; fails with C{StreamReset},
            C{SessionLost} or C{LocalError}.
        """

        def begin(stream: StreamTransport) -> IProtocol:
            protocol = protocolFactory.buildProtocol(stream.getPeer())
            if protocol is None:
                stream.abortConnection()
                raise LocalError(f"the connection to {stream.getPeer()} is not wanted any more")
            stream.begin(protocol)
            return protocol

        return self._peer.open_stream(self._service, self._seconds).addCallback(begin)


@implementer(IStreamServerEndpoint)
class PeerServerEndpoint:
    """Serves a service to a peer."""

    def __init__(self, peer: Peer, service: str) -> None:
        self._peer = peer
        self._service = service

    def listen(self, protocolFactory: IProtocolFactory) -> Deferred[IListeningPort]:
        """@return: has fired; fails with C{LocalError} if the service is taken."""
        port = _ServicePort(self._peer, self._service, protocolFactory)
        try:
            self._peer.register(self._service, port)
        except LocalError as error:
            failed: Deferred[IListeningPort] = Deferred()
            failed.errback(error)
            return failed
        protocolFactory.doStart()
        return succeed(port)


@implementer(IListeningPort)
class _ServicePort:
    """A service that accepts every stream at once."""

    def __init__(self, peer: Peer, service: str, factory: Any) -> None:
        self._peer = peer
        self._service = service
        self._factory = factory
        self._listening = True

    def stream_opened(self, stream: StreamTransport) -> None:
        """See L{Service.stream_opened}."""
        protocol = self._factory.buildProtocol(stream.getPeer())
        if protocol is None:
            stream.refuse(ErrorCode.CONNECT_FAILED, f"{self._service} takes no connections now")
            return
        stream.accept()
        stream.begin(protocol)

    def startListening(self) -> None:
        """It listens from the beginning."""

    def stopListening(self) -> Deferred[None]:
        """Refuse streams from now on; those there are go on."""
        if self._listening:
            self._listening = False
            self._peer.unregister(self._service)
            self._factory.doStop()
        return succeed(None)

    def getHost(self) -> IAddress:
        """The service."""
        return StreamAddress(self._peer.name, self._service)
