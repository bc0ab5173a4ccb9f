"""
The contracts between relaymux's parts, and with transports written by others.

Method names follow Twisted, whose interfaces these stand beside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from twisted.internet.interfaces import IStreamClientEndpoint, IStreamServerEndpoint
from zope.interface import Attribute, Interface

from relaymux.core.frames import Buffer

__all__ = [
    "Buffer",
    "IBufferReceiver",
    "IBufferTransport",
    "IExpectingTransport",
    "IExportingTransport",
    "IHalfReadTransport",
    "IIdentifiedTransport",
    "IRelayTransport",
    "TransportSettings",
]


class IBufferTransport(Interface):
    """
    What a connected transport provides beside C{ITransport}, C{IConsumer} and
    C{IPushProducer} to carry bulk data without joining or copying.

    A protocol finds it with C{IBufferTransport.providedBy(transport)}.  The
    transport looks, at C{makeConnection}, whether its protocol provides
    L{IBufferReceiver}; if it does, received bytes go to C{buffersReceived}
    and never to C{dataReceived}.
    """

    queuedBytes = Attribute("C{int}: bytes written that the kernel has not taken yet.")

    def writeBuffers(buffers: Sequence[Buffer]) -> None:
        """
        Write all of C{buffers}, in order.

        With nothing queued the bytes go to the kernel before this returns;
        what it does not take is queued by reference.  While anything is
        queued the registered streaming producer is paused; it is resumed when
        the queue is empty.  Writing after the connection was lost, or after
        C{loseWriteConnection}, drops the bytes, as in C{ITransport.write}.
        """


class IBufferReceiver(Interface):
    """A protocol that takes received bytes as buffers and may keep them."""

    def buffersReceived(buffers: Sequence[memoryview]) -> None:
        """
        @param buffers: what was received, in order; none is empty.  Read-only
            views of pooled memory.  The memory is lent: it goes back to the
            pool by itself when the last view or slice of it is gone, so a
            receiver that keeps few bytes of a large buffer for long should
            keep a copy of them instead.
        """

    def buffersWritten(count: int) -> None:
        """
        C{count} more bytes given to C{writeBuffers} (or C{write}) were taken
        by the kernel.  May be called from within C{writeBuffers}.
        """


class IHalfReadTransport(Interface):
    """A connected transport whose two directions can be closed one by one by this side."""

    def loseReadConnection() -> None:
        """
        Take nothing more from the peer, ever.

        Bytes that wait unread are dropped, the peer's further writes fail where
        the transport can make them, and C{readConnectionLost} is not called.
        Our own direction goes on.
        """


class IIdentifiedTransport(Interface):
    """A connected transport that knows who is at the other end."""

    peerIdentity = Attribute(
        """
        C{str}: the name that was checked, e.g. C{"dns:hv-b.example"} (the
        certificate name that was matched, not the whole certificate: a
        renewal must not change it) or C{"uid:0"}.  Set before
        C{connectionMade}.
        """
    )


class IExpectingTransport(Interface):
    """A connected transport that can let received bytes gather before it wakes anybody for them."""

    def expectBytes(count: int) -> None:
        """
        A hint: of the bytes that are still to come nothing can be used before
        C{count} more have arrived.  It holds until the next call, so a protocol
        that was told of less, or waits for a time, says it anew; 0 asks for
        whatever arrives, at once.  The transport may call C{buffersReceived}
        earlier, and does so at the end of the connection.
        """


class IExportingTransport(Interface):
    """A connected transport that can tie something to this very connection."""

    def exporter(label: str, length: int) -> bytes:
        """@return: C{length} bytes that only the two ends of this connection know (RFC 8446, 7.5)."""


@dataclass(frozen=True)
class TransportSettings:
    """
    What a C{[link]} section says to its transport.

    @ivar address: the value of C{connect} or C{listen}, one address, not yet
        parsed: its form is the transport's business.
    @ivar options: the transport's own keys (L{IRelayTransport.keys}) that are
        present, as written.
    @ivar directory: what relative file names are relative to.
    """

    address: str
    options: Mapping[str, str] = field(default_factory=dict)
    directory: Path = Path()

    def path(self, key: str) -> Path:
        """@return: the file named by option C{key}; it need not exist.  C{KeyError} without it."""
        return self.directory / self.options[key]


class IRelayTransport(Interface):
    """
    A way to reach the peer, found through C{twisted.plugin} in
    C{relaymux.plugins} and chosen by C{transport = NAME}.

    It yields connected transports and knows nothing of frames.  What it
    connects must be a reliable ordered byte stream in both directions.
    """

    name = Attribute("C{str}: the word after C{transport =}; C{[a-z][a-z0-9-]*}.")
    keys = Attribute(
        """
        C{Mapping[str, str]}: the keys of a C{[link]} section that are this
        transport's own, each with one line of help for messages and
        C{relaymux check}.
        """
    )

    def client(reactor: object, settings: TransportSettings) -> IStreamClientEndpoint:
        """
        @return: an endpoint whose C{connect} fires with the protocol once the
            connection is usable: established, and for an authenticated
            transport the peer's identity checked, so that C{connectionMade}
            may send.  It fails with L{TransportError}, which says whether to
            try again.
        @raise ConfigurationError: a setting is missing or wrong; names the
            key.  All that can be known without connecting is checked here:
            C{relaymux check} calls this and starts nothing.
        """

    def server(reactor: object, settings: TransportSettings) -> IStreamServerEndpoint:
        """As L{client}; its C{listen} fires with an C{IListeningPort} or fails with L{TransportError}."""
