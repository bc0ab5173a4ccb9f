"""
Protocols that write down what happens to them, a producer that obeys, and tests run over seeds.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from twisted.internet.interfaces import IConsumer, IHalfCloseableProtocol, IPushProducer, ITransport
from twisted.internet.protocol import Protocol, connectionDone
from twisted.python.failure import Failure
from twisted.trial.unittest import SkipTest
from zope.interface import implementer

from relaymux.interfaces import IBufferReceiver

__all__ = ["BufferRecorder", "Feeder", "HalfCloseRecorder", "Recorder", "over_seeds"]

#: The environment variable that repeats a failed run.
SEED_VARIABLE = "RELAYMUX_SEED"

_Test = TypeVar("_Test", bound=Any)


class Recorder(Protocol):
    """
    A protocol that is closed as a whole.

    @ivar received: all bytes so far.
    @ivar events: what happened beside bytes, in order: C{"made"}, C{"read
        lost"}, C{"write lost"}, C{"lost"}.
    @ivar reason: why the connection was lost; L{None} before.
    """

    def __init__(self) -> None:
        self.received = bytearray()
        self.events: list[str] = []
        self.reason: Failure | None = None

    def connectionMade(self) -> None:
        self.events.append("made")

    def dataReceived(self, data: bytes) -> None:
        self._expect_none_of("read lost", "lost")
        self.received += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._expect_none_of("lost")
        self.events.append("lost")
        self.reason = reason

    def _expect_none_of(self, *ends: str) -> None:
        """What happens now may only happen after "made" and before C{ends}."""
        if "made" not in self.events or not set(ends).isdisjoint(self.events):
            raise AssertionError(f"too early or too late: after {self.events}")


@implementer(IHalfCloseableProtocol)
class HalfCloseRecorder(Recorder):
    """A protocol that wants to know of each direction's end."""

    def readConnectionLost(self) -> None:
        """See C{IHalfCloseableProtocol}."""
        self._expect_none_of("read lost", "lost")
        self.events.append("read lost")

    def writeConnectionLost(self) -> None:
        """See C{IHalfCloseableProtocol}."""
        self._expect_none_of("write lost", "lost")
        self.events.append("write lost")


@implementer(IBufferReceiver)
class BufferRecorder(HalfCloseRecorder):
    """
    A protocol that takes buffers, and keeps them.

    @ivar buffers: what was given to it.
    @ivar written: how many bytes it was told that the transport got rid of.
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[memoryview] = []
        self.written = 0

    def dataReceived(self, data: bytes) -> None:
        raise AssertionError("dataReceived was called on a protocol that takes buffers")

    def buffersReceived(self, buffers: Sequence[memoryview]) -> None:
        """See L{IBufferReceiver.buffersReceived}."""
        self._expect_none_of("read lost", "lost")
        for buffer in buffers:
            if not buffer.readonly or not len(buffer):
                raise AssertionError(f"not a read-only view of bytes: {buffer!r}")
            self.received += buffer
        self.buffers += buffers

    def buffersWritten(self, count: int) -> None:
        """See L{IBufferReceiver.buffersWritten}."""
        self.written += count


@implementer(IPushProducer)
class Feeder:
    """
    Writes bytes to a transport, only ever while it may.

    @ivar pauses: how often it was paused.
    @ivar done: whether everything was written.
    @ivar stopped: whether it was told to stop before.
    """

    def __init__(
        self, consumer: ITransport, data: bytes, portion: Callable[[int], int] = lambda size: size
    ) -> None:
        """
        @param consumer: an C{IConsumer}, too.
        @param portion: says how many of so many bytes to write next.
        """
        self.pauses = 0
        self.done = False
        self.stopped = False
        self._consumer: Any = consumer
        self._data = memoryview(data)
        self._portion = portion
        self._paused = False
        self._writing = False

    def start(self) -> None:
        """Register, and write until paused."""
        if not IConsumer.providedBy(self._consumer):
            raise TypeError(f"{self._consumer!r} takes no producer")
        self._consumer.registerProducer(self, True)
        if not self.stopped:
            self._write()

    def pauseProducing(self) -> None:
        """See C{IPushProducer}."""
        self.pauses += 1
        self._paused = True

    def resumeProducing(self) -> None:
        """See C{IPushProducer}."""
        self._paused = False
        self._write()

    def stopProducing(self) -> None:
        """See C{IPushProducer}."""
        self.stopped = True

    def _write(self) -> None:
        if self._writing:
            return
        self._writing = True
        while self._data and not self._paused and not self.stopped:
            count = self._portion(len(self._data))
            piece, self._data = self._data[:count], self._data[count:]
            self._consumer.write(bytes(piece))
        self._writing = False
        if not self._data and not self.stopped and not self.done:
            self.done = True
            self._consumer.unregisterProducer()


def over_seeds(count: int = 3) -> Callable[[Callable[[_Test, int], None]], Callable[[_Test], None]]:
    """
    Run a test method C{count} times, each time with another seed as its argument.

    A failure names its seed; setting C{RELAYMUX_SEED} to it repeats that run
    alone.  C{setUp} is called once, so the method makes what it needs itself.
    """

    def decorate(method: Callable[[_Test, int], None]) -> Callable[[_Test], None]:
        @functools.wraps(method)
        def run(test: _Test) -> None:
            given = os.environ.get(SEED_VARIABLE)
            for seed in [int(given)] if given else random.sample(range(2**32), count):
                try:
                    method(test, seed)
                except SkipTest:
                    raise
                except Exception as error:
                    raise AssertionError(f"{error} (repeat with {SEED_VARIABLE}={seed})") from error

        # Else test runners would see the signature of the method, and look for its argument.
        del run.__wrapped__
        return run

    return decorate
