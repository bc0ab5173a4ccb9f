"""
What a reactor watches, alone and with a producer that it may hold.

The same as Twisted's C{FileDescriptor}, as far as our sockets need it, and without inheriting
from it: what inherits from interpreted classes cannot be compiled (docs/decisions/0024), and
these are called for every turn of every socket.
"""

from __future__ import annotations

from typing import Any

__all__ = ["Consumer", "Descriptor"]


class Descriptor:
    """
    @ivar connected: whether there is something to watch.
    @ivar disconnected: whether that is over, and everybody was told.
    """

    def __init__(self, reactor: Any) -> None:
        self.reactor = reactor
        self.connected = True
        self.disconnected = False
        # What we have asked of the reactor, which is not asked twice.
        self._is_reading = False
        self._is_writing = False

    def doRead(self) -> None:
        """There is something to read, or nothing more will be.  For subclasses."""
        raise NotImplementedError

    def logPrefix(self) -> str:
        """Who this is, for the log."""
        return type(self).__name__

    def startReading(self) -> None:
        if not self._is_reading:
            self._is_reading = True
            self.reactor.addReader(self)

    def stopReading(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self.reactor.removeReader(self)

    def startWriting(self) -> None:
        if not self._is_writing:
            self._is_writing = True
            self.reactor.addWriter(self)

    def stopWriting(self) -> None:
        if self._is_writing:
            self._is_writing = False
            self.reactor.removeWriter(self)

    def _stop_watching(self) -> None:
        """Nothing is watched any more, which the reactor may have decided by itself."""
        self._is_reading = self._is_writing = False
        self.reactor.removeReader(self)
        self.reactor.removeWriter(self)

    def _forget(self) -> None:
        """It is over: nothing is watched any more."""
        self.connected, self.disconnected = False, True
        self.stopReading()
        self.stopWriting()


class Consumer(Descriptor):
    """
    One that can be written to.

    @ivar disconnecting: whether it is to be closed when what is queued was sent.
    @ivar producer: of either kind; L{None} if there is none.
    @ivar streamingProducer: whether it is a push producer.
    @ivar producerPaused: whether it was told to wait.
    """

    def __init__(self, reactor: Any) -> None:
        super().__init__(reactor)
        self.disconnecting = False
        self.producer: Any = None
        self.streamingProducer = False
        self.producerPaused = False

    def registerProducer(self, producer: Any, streaming: object) -> None:
        """
        See C{IConsumer.registerProducer}.

        @param streaming: true for a push producer; some of Twisted's own callers say 1 or 0.
        @raise RuntimeError: there is one already.
        """
        if self.producer is not None:
            raise RuntimeError(f"cannot register {producer!r}: {self.producer!r} was never unregistered")
        if self.disconnected:
            producer.stopProducing()
            return
        self.producer, self.streamingProducer, self.producerPaused = producer, bool(streaming), False
        if not streaming:
            producer.resumeProducing()

    def unregisterProducer(self) -> None:
        """See C{IConsumer.unregisterProducer}."""
        self.producer = None
        if self.connected and self.disconnecting:
            self.startWriting()

    def stopProducing(self) -> None:
        """See C{IProducer.stopProducing}."""
        self.loseConnection()

    def loseConnection(self) -> None:
        """See C{ITransport.loseConnection}.  For subclasses."""
        raise NotImplementedError

    def _hold_producer(self) -> None:
        """Pause a push producer, unless it is paused."""
        if self.producer is not None and self.streamingProducer and not self.producerPaused:
            self.producerPaused = True
            self.producer.pauseProducing()

    def _forget(self) -> None:
        self.connected, self.disconnected = False, True
        producer, self.producer = self.producer, None
        if producer is not None:
            producer.stopProducing()
        super()._forget()
