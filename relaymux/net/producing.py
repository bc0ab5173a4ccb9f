"""
The producer that is registered with a consumer.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ProducerSlot"]


class ProducerSlot:
    """
    At most one producer of either kind, told each thing once.

    A push producer is resumed only when it was paused.  A pull producer is asked
    for one piece after the other, never from within its own C{resumeProducing}:
    what it writes there may leave at once, and make room for the next piece
    before it has returned.
    """

    def __init__(self) -> None:
        self._producer: Any = None  # IPushProducer, or IPullProducer: not streaming
        self._streaming = False
        self._held = False
        self._asking = False
        self._ask_again = False

    def __bool__(self) -> bool:
        """Whether there is a producer."""
        return self._producer is not None

    def put(self, producer: Any, streaming: bool) -> None:
        """
        Take C{producer}; a pull producer is asked for its first piece.

        @raise RuntimeError: there is one already.
        """
        if self._producer is not None:
            raise RuntimeError(f"cannot register {producer!r}: {self._producer!r} was never unregistered")
        self._producer, self._streaming, self._held = producer, streaming, False
        if not streaming:
            self.go_on()

    def remove(self) -> None:
        """Forget the producer, if there is one."""
        self._producer = None

    def hold(self) -> None:
        """Pause a push producer, unless it is paused."""
        if self._producer is not None and self._streaming and not self._held:
            self._held = True
            self._producer.pauseProducing()

    def go_on(self) -> None:
        """There is room: resume a push producer that was paused, ask a pull producer for more."""
        if self._producer is None:
            return
        if self._streaming:
            if self._held:
                self._held = False
                self._producer.resumeProducing()
            return
        self._ask_again = True
        if self._asking:
            return
        self._asking = True
        try:
            while self._ask_again and self._producer is not None:
                self._ask_again = False
                self._producer.resumeProducing()
        finally:
            self._asking = False

    def stop(self) -> None:
        """Tell the producer that nothing is wanted any more, and forget it."""
        producer, self._producer = self._producer, None
        if producer is not None:
            producer.stopProducing()
