"""
The yardsticks: relays as one usually writes them with Twisted.

L{Link} multiplexes: bytes come with C{dataReceived} and go with
C{transport.write}, each frame has a length, and whatever is full pauses what
fills it.  It is meant to be good plain Twisted: the epoll reactor, half-close,
no copy that is easily avoided.  What it lacks is what relaymux is about:
credit per stream (here one slow stream stops all), resuming, limits, names.

With C{--forward} nothing is multiplexed: Twisted's own port forwarder, one
connection for each stream.  That is the least that a byte can cost there.

C{python -m benchmarks.baseline_twisted source|destination ...}: the source
listens on a UNIX socket, the destination dials one, the link is between them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from struct import Struct
from typing import Any

from twisted.internet import epollreactor, ssl
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import (
    SSL4ServerEndpoint,
    TCP4ClientEndpoint,
    TCP4ServerEndpoint,
    UNIXClientEndpoint,
    UNIXServerEndpoint,
    connectProtocol,
    wrapClientTLS,
)
from twisted.internet.interfaces import IHalfCloseableProtocol, IPushProducer
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import globalLogBeginner, textFileLogObserver
from twisted.protocols.portforward import ProxyClient, ProxyServer
from twisted.python.failure import Failure
from zope.interface import implementer

__all__ = ["main"]

#: Kind, number of the stream, length of the payload that follows.
HEADER = Struct(">BII")
OPEN, DATA, FINISH, CLOSE = range(4)


@implementer(IPushProducer)
class Link(Protocol):
    """The connection between the two relays; produces what the streams' local sockets say."""

    transport: Any

    def __init__(self, reactor: Any, dial: str) -> None:
        """@param dial: the UNIX socket for streams that the other side opens."""
        self.reactor = reactor
        self.dial = dial
        self.streams: dict[int, Local] = {}
        self.unprocessed = b""
        #: The frame that is being received, and how much of its payload is still to come.
        self.kind = self.stream = self.missing = 0

    def connectionMade(self) -> None:
        self.transport.registerProducer(self, True)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        for local in list(self.streams.values()):
            local.transport.abortConnection()

    def send_frame(self, kind: int, stream: int, payload: bytes = b"") -> None:
        self.transport.writeSequence((HEADER.pack(kind, stream, len(payload)), payload))

    def dataReceived(self, data: bytes) -> None:
        position = 0
        if self.unprocessed:
            data = self.unprocessed + data
            self.unprocessed = b""
        while position < len(data):
            if self.missing == 0:
                if len(data) < position + HEADER.size:
                    self.unprocessed = data[position:]
                    return
                self.kind, self.stream, self.missing = HEADER.unpack_from(data, position)
                position += HEADER.size
            payload = data[position : position + self.missing]
            position += len(payload)
            self.missing -= len(payload)
            self.frame_received(self.kind, self.stream, payload)

    def frame_received(self, kind: int, stream: int, payload: bytes) -> None:
        if kind == OPEN:
            self.streams[stream] = local = Local(self, stream)
            dialled = connectProtocol(UNIXClientEndpoint(self.reactor, self.dial), local)
            dialled.addErrback(lambda reason: self.send_frame(CLOSE, stream))
        elif stream in self.streams:
            self.streams[stream].frame_received(kind, payload)

    def pauseProducing(self) -> None:
        for local in self.streams.values():
            local.pause_reading()

    def resumeProducing(self) -> None:
        for local in self.streams.values():
            local.resume_reading()

    def stopProducing(self) -> None:
        """Nothing: C{connectionLost} follows and ends the streams."""


@implementer(IHalfCloseableProtocol, IPushProducer)
class Local(Protocol):
    """A stream's local socket; produces what comes from the link."""

    transport: Any = None

    def __init__(self, link: Link, stream: int) -> None:
        self.link = link
        self.stream = stream
        self.early: list[tuple[int, bytes]] = []
        self.finished = False

    def connectionMade(self) -> None:
        self.transport.registerProducer(self, True)
        for kind, payload in self.early:
            self.frame_received(kind, payload)

    def dataReceived(self, data: bytes) -> None:
        self.link.send_frame(DATA, self.stream, data)

    def readConnectionLost(self) -> None:
        self.finished = True
        self.link.send_frame(FINISH, self.stream)

    def writeConnectionLost(self) -> None:
        """Nothing: the peer gave up reading; C{connectionLost} follows."""

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.link.streams.pop(self.stream, None)
        self.link.send_frame(CLOSE, self.stream)

    def frame_received(self, kind: int, payload: bytes) -> None:
        if self.transport is None:
            self.early.append((kind, payload))
        elif kind == DATA:
            self.transport.write(payload)
        else:
            self.transport.unregisterProducer()
            self.link.transport.resumeProducing()
            if kind == FINISH:
                self.transport.loseWriteConnection()
            else:
                self.transport.loseConnection()

    def pause_reading(self) -> None:
        if self.transport:
            self.transport.pauseProducing()

    def resume_reading(self) -> None:
        if self.transport and not self.finished:
            self.transport.resumeProducing()

    def pauseProducing(self) -> None:
        self.link.transport.pauseProducing()

    def resumeProducing(self) -> None:
        self.link.transport.resumeProducing()

    def stopProducing(self) -> None:
        """Nothing: C{connectionLost} follows and tells the other side."""


class LocalFactory(Factory):
    """Opens a stream for each connection accepted on the source's UNIX socket."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.opened = 0

    def buildProtocol(self, addr: object) -> Local:
        self.opened += 1
        self.link.streams[self.opened] = local = Local(self.link, self.opened)
        self.link.send_frame(OPEN, self.opened)
        return local


class ForwardServer(ProxyServer):
    """Twisted's port forwarder, with an endpoint to connect to."""

    transport: Any

    def __init__(self, onward: Any) -> None:
        self.onward = onward

    def connectionMade(self) -> None:
        self.transport.pauseProducing()
        client = ProxyClient()
        client.setPeer(self)
        connected = connectProtocol(self.onward, client)
        connected.addErrback(lambda reason: self.transport.loseConnection())


class Certificates:
    """Twisted's own TLS 1.3, both sides' certificates checked, from the files of C{make_certificates}."""

    def __init__(self, directory: Path, name: str) -> None:
        authority = ssl.Certificate.loadPEM((directory / "ca.pem").read_bytes())
        pair = (directory / f"{name}.key").read_bytes() + (directory / f"{name}.pem").read_bytes()
        self.own = ssl.PrivateCertificate.loadPEM(pair)
        self.trust = ssl.trustRootFromCertificates([authority])

    def for_client(self, peer: str) -> Any:
        extra = {"insecurelyLowerMinimumTo": ssl.TLSVersion.TLSv1_3}
        return ssl.optionsForClientTLS(peer, self.trust, self.own, extraCertificateOptions=extra)

    def for_server(self) -> ssl.CertificateOptions:
        return ssl.CertificateOptions(
            privateKey=self.own.privateKey.original,
            certificate=self.own.original,
            trustRoot=self.trust,
            raiseMinimumTo=ssl.TLSVersion.TLSv1_3,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the two relays until it is killed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.baseline_twisted", description=__doc__)
    parser.add_argument("role", choices=["source", "destination"])
    parser.add_argument("path", help="the UNIX socket: listened on by the source, dialled by the destination")
    parser.add_argument("port", type=int, help="of the link, on 127.0.0.1")
    parser.add_argument("--forward", action="store_true", help="a connection for each stream, no frames")
    parser.add_argument("--certificates", type=Path, help="directory of ca.pem, ROLE.pem, ROLE.key; use TLS")
    given = parser.parse_args(arguments)
    epollreactor.install()
    from twisted.internet import reactor

    globalLogBeginner.beginLoggingTo([textFileLogObserver(sys.stderr)])
    started = (start_source if given.role == "source" else start_destination)(reactor, given)

    def failed(reason: Failure) -> None:
        reason.printTraceback()
        reactor.stop()

    started.addErrback(failed)
    reactor.run()


def start_source(reactor: Any, given: argparse.Namespace) -> Deferred[Any]:
    """Connect the link, then listen on the UNIX socket; when forwarding, only the latter."""
    peer: Any = TCP4ClientEndpoint(reactor, "127.0.0.1", given.port)
    if given.certificates:
        peer = wrapClientTLS(Certificates(given.certificates, "source").for_client("destination"), peer)
    local = UNIXServerEndpoint(reactor, given.path)
    if given.forward:
        return local.listen(Factory.forProtocol(lambda: ForwardServer(peer)))  # type: ignore[no-any-return]
    linked = connectProtocol(peer, Link(reactor, given.path))
    return linked.addCallback(lambda link: local.listen(LocalFactory(link)))  # type: ignore[no-any-return]


def start_destination(reactor: Any, given: argparse.Namespace) -> Deferred[Any]:
    """Listen for the link; when forwarding, for a connection per stream."""
    port: Any = TCP4ServerEndpoint(reactor, given.port, interface="127.0.0.1")
    if given.certificates:
        context = Certificates(given.certificates, "destination").for_server()
        port = SSL4ServerEndpoint(reactor, given.port, context, interface="127.0.0.1")
    onward = UNIXClientEndpoint(reactor, given.path)

    def incoming() -> Protocol:
        return ForwardServer(onward) if given.forward else Link(reactor, given.path)

    started: Deferred[Any] = port.listen(Factory.forProtocol(incoming))
    return started


if __name__ == "__main__":
    main()
