"""The sending half of a socket: what the kernel does not take at once is queued by reference."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from socket import socket
from typing import Any, Final

from relaymux.interfaces import Buffer, IBufferReceiver
from relaymux.net.descriptor import Consumer

__all__ = ["SendingSocket", "total_length"]

#: Buffers gathered for one C{sendmsg}.  The kernel allows 1024; a socket
#: rarely has room for this many, and the rest was gathered in vain.
SEND_BUFFERS: Final = 64


def total_length(buffers: Sequence[Buffer]) -> int:
    """
    @return: how many bytes C{buffers} hold.
    @raise TypeError: one of them is nothing that can be queued by reference.
    """
    total = 0
    for buffer in buffers:
        kind = type(buffer)
        if kind is not bytes and kind is not memoryview:
            raise TypeError(f"data must be bytes or memoryviews, not {kind.__name__}")
        total += len(buffer)
    return total


class SendingSocket(Consumer):
    """
    A connected socket as a consumer.

    @ivar queuedBytes: bytes written that the kernel has not taken yet.
    @ivar socket: the socket; closed with the connection.
    """

    def __init__(self, reactor: Any, sock: socket, receiver: IBufferReceiver | None) -> None:
        """
        @param sock: connected; ours from now on.
        @param receiver: who is told when bytes were written.
        """
        super().__init__(reactor)
        if sock.gettimeout() != 0.0:
            sock.setblocking(False)
        self.socket = sock
        self.queuedBytes = 0
        # Bounded by the producer's obedience: it is paused while anything is here.
        self._queue: deque[Buffer] = deque()
        self._receiver = receiver
        self._output_open = True
        self._output_ending = False

    def fileno(self) -> int:
        return self.socket.fileno()

    def getHandle(self) -> socket:
        return self.socket

    def write(self, data: Buffer) -> None:
        self.writeBuffers((data,))

    def writeSequence(self, iovec: Iterable[bytes]) -> None:
        self.writeBuffers(tuple(iovec))

    def writeBuffers(self, buffers: Sequence[Buffer]) -> None:
        total = total_length(buffers)
        if not total or not self._output_open or self._output_ending:
            return
        if self._queue:
            self._queue.extend(buffers)
            self.queuedBytes += total
            return
        self._queue.extend(buffers)
        self.queuedBytes = total
        sent = self._send()
        if self._queue:
            self.startWriting()
            self._hold_producer()
        elif self.producer is not None and not self.streamingProducer and self._output_open:
            self.startWriting()
        if sent and self._receiver is not None:
            self._receiver.buffersWritten(sent)

    def doWrite(self) -> None:
        sent = self._send() if self._queue else 0
        if sent and self._receiver is not None:
            self._receiver.buffersWritten(sent)
        if self._queue:
            return
        self.stopWriting()
        if not self._output_open:
            return
        producer = self.producer
        if self._output_ending:
            self._end_output()
        elif producer is not None and (self.producerPaused or not self.streamingProducer):
            self.producerPaused = False
            producer.resumeProducing()
            if self.disconnecting and self.streamingProducer and not self._queue:
                self._end_output()
        elif self.disconnecting:
            self._end_output()

    def _send(self) -> int:
        """Give the kernel what it takes of the queue.  @return: how many bytes those are."""
        queue = self._queue
        try:
            if len(queue) == 1:
                sent = self.socket.send(queue[0])
            else:
                sent = self.socket.sendmsg(islice(queue, SEND_BUFFERS))
        except BlockingIOError:
            return 0
        except OSError as error:
            self._sending_failed(error)
            return 0
        self.queuedBytes -= sent
        if not self.queuedBytes:
            queue.clear()
            return sent
        left = sent
        while left >= len(queue[0]):
            left -= len(queue.popleft())
        if left:
            queue[0] = memoryview(queue[0])[left:]
        return sent

    @property
    def takes_more(self) -> bool:
        """Whether what is written now is in front of nothing that the kernel did not take."""
        return self.is_written and not self._queue

    @property
    def is_written(self) -> bool:
        """Whether the kernel may take more: sooner or later, if not now."""
        return self._output_open and not self._output_ending and not self.disconnecting

    def hand_over(self) -> list[Buffer]:
        """
        Have another one go on in our place, until L{take_over}.

        @return: what the kernel did not take yet.
        """
        buffers = list(self._queue)
        if buffers:
            self._drop_queue()
            self.stopWriting()
        return buffers

    def take_over(self, buffers: Sequence[Buffer], error: int) -> None:
        """
        Go on in place of one who wrote to our socket.

        @param buffers: what the kernel did not take; only where nothing is queued here.
        @param error: why it never will; 0 if it may.
        """
        if not self._output_open:
            return  # closed meanwhile, due to what others had to tell
        self._queue.extend(buffers)
        self.queuedBytes += sum(map(len, buffers))
        if error:
            self._sending_failed(OSError(error, os.strerror(error)))
        if self._queue and buffers:  # also if there is only no memory now
            if not error:
                self.startWriting()
            self._hold_producer()

    def go_on(self) -> None:
        """Behind L{take_over}: resume the producer, if it was paused for what the kernel has taken since."""
        if self.producerPaused and not self._queue and self.producer is not None and self._output_open:
            self.producerPaused = False
            self.producer.resumeProducing()

    def registerProducer(self, producer: Any, streaming: object) -> None:
        super().registerProducer(producer, streaming)
        if self._queue:
            self._hold_producer()

    def _drop_queue(self) -> None:
        self._queue.clear()
        self.queuedBytes = 0

    def _sending_failed(self, error: OSError) -> None:
        """The kernel refuses what is first in the queue.  For subclasses."""
        raise NotImplementedError

    def _end_output(self) -> None:
        """The queue is empty and nothing more will be written.  For subclasses."""
        raise NotImplementedError
