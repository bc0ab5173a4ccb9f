"""The receiving half of a socket: what the kernel has is read into pooled buffers and handed on as views."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from functools import partial
from socket import MSG_PEEK, socket
from typing import Any, Final

from twisted.internet.interfaces import IProtocol

from relaymux.core.schedule import LITTLE
from relaymux.interfaces import IBufferReceiver
from relaymux.net.buffers import END_OF_INPUT, BufferPool
from relaymux.net.sending import SendingSocket
from relaymux.net.turns import Talker, turns_for

__all__ = ["PLAIN_READ", "READ_ROOM", "ReceivingSocket"]

#: Free space wanted for a read; with less left a new buffer is begun.
READ_ROOM: Final = 64 * 1024

#: A read that brought this much is followed by another one at once: bulk is
#: flowing, and meanwhile more has arrived.  Going back to the reactor for it would
#: cost a wake-up per read; measured over a TCP link, this takes the source's from
#: 4,600 to 1,600 per GB.
READ_AGAIN: Final = 16 * 1024

#: Bytes read and dropped, or given to a protocol that takes C{bytes}, before others have
#: their turn in the reactor.
READ_TURN: Final = 1024 * 1024

#: Bytes at most to a protocol that takes C{bytes}, as Twisted does it.
PLAIN_READ: Final = 64 * 1024


class ReceivingSocket(SendingSocket):
    """
    A connected socket that is read for one protocol.

    @ivar protocol: whom it is read for.
    """

    def __init__(self, reactor: Any, sock: socket, protocol: IProtocol, pool: BufferPool) -> None:
        """
        @param sock: connected; ours from now on.
        @param pool: what it is read into.
        """
        super().__init__(reactor, sock, protocol if IBufferReceiver.providedBy(protocol) else None)
        self.protocol = protocol
        self._clock = reactor
        self._pool = pool
        self._turns = turns_for(reactor)
        self._talker = Talker(self._turns)
        self._input_open = True
        self._paused = False
        self._brings_bulk = False  # the last turn of reading did

    def passed(self, count: int) -> None:
        """
        Called by a protocol for which it matters who waits: it passed C{count} bytes on at
        once, in either direction.  See L{relaymux.net.turns}.
        """
        self._talker.passed(count, self._clock.seconds())

    def pauseProducing(self) -> None:
        # The reactor goes on watching until it finds something to read: often
        # we are resumed before, and two changes of its set are saved.
        self._paused = True

    def resumeProducing(self) -> None:
        self._paused = False
        if self.connected and self._input_open:
            self.startReading()

    def resume_reading(self) -> None:
        """
        As C{resumeProducing}, and take at once what has arrived: for one who waited until
        now, and is likely to be given something.  An exception of the protocol ends the
        connection.
        """
        self._paused = False
        if self.connected and self._input_open:
            self._tell(self.doRead)
        if self.connected and self._input_open and not self._paused:
            self.startReading()

    def peek(self, most: int) -> bytes:
        """
        @return: what has arrived and nobody has read, up to C{most} bytes, which stays where it is;
            nothing also where that cannot be told: reading will tell why.
        """
        try:
            return self.socket.recv(most, MSG_PEEK)
        except OSError:
            return b""

    def skip(self, count: int) -> None:
        """Take C{count} bytes, which L{peek} has shown, as read."""
        while count:
            taken = len(self.socket.recv(count))
            if not taken:
                raise ConnectionResetError(errno.ECONNRESET, "it is not there any more")
            count -= taken

    def expectBytes(self, count: int) -> None:
        """
        Wake up, if the kernel can, when C{count} bytes have arrived and not before.

        For TLS, whose cost per wake-up is high (L{IExpectingTransport}).  A plain
        link is not told, as it loses more by reading and writing less at the same
        time than it gains.  UNIX sockets have nothing of the kind.
        """

    def stopReading(self) -> None:
        # Once we are closed the number may be another one's: then there is nothing to forget.
        self._turns.forget(self.fileno())
        super().stopReading()

    def read_in_between(self) -> None:
        """See L{LittleReader}."""
        self._tell(self.doRead)

    def doRead(self) -> None:
        if self._paused and not self.disconnecting:
            self.stopReading()
            return
        if self._receiver is None or self.disconnecting:
            self._read_bytes()
        else:
            self._read_buffers(self._receiver)

    def _read_buffers(self, receiver: IBufferReceiver) -> None:
        """Gather what is there, then hand it on at once: what a hand-over costs is per hand-over."""
        now = self._clock.seconds()
        if self._brings_bulk:
            self._turns.let_little_read(now)
            if self._paused or self.disconnecting or not self._input_open:
                return  # due to what the others brought
        buffers, count, ended = self._pool.gather(self.socket, self._turns.limit(now), READ_ROOM, READ_AGAIN)
        self._brings_bulk = count > LITTLE
        if self._brings_bulk:
            self._turns.bulk = True
            self._turns.forget(self.socket.fileno())
        elif buffers:
            self._turns.expect(self.socket.fileno(), self, now)
        if buffers:
            receiver.buffersReceived(buffers)
        if ended and self._input_open:
            self._reading_ended(ended)

    def _reading_ended(self, how: int) -> None:
        if how == END_OF_INPUT:
            self._input_ended()
        else:
            self._receiving_failed(OSError(how, os.strerror(how)))

    def take_back(self, buffers: Sequence[memoryview], ended: int) -> None:
        """
        Go on in place of one who has read our socket.  An exception of the protocol ends the connection.

        @param buffers: what was received and not passed on.
        @param ended: why there will be no more: L{END_OF_INPUT}, or an error; 0 if there may be.
        """
        receiver = self._receiver
        if buffers and receiver is not None and self.connected and not self.disconnecting:
            self._tell(partial(receiver.buffersReceived, buffers))
        if ended and self._input_open:
            self._tell(partial(self._reading_ended, ended))

    @property
    def is_read(self) -> bool:
        """Whether what arrives is delivered now."""
        return self._input_open and not self._paused and self.connected and not self.disconnecting

    @property
    def carries_bulk(self) -> bool:
        """See L{Talker.carries_bulk}."""
        return self._talker.carries_bulk(self._clock.seconds())

    def _read_bytes(self) -> None:
        """Read for a protocol that takes C{bytes}, or for nobody."""
        turn = READ_TURN
        while turn > 0 and self._input_open:
            room = self._pool.room(READ_ROOM)[:PLAIN_READ]
            try:
                count = self.socket.recv_into(room)
            except BlockingIOError:
                return
            except OSError as error:
                self._receiving_failed(error)
                return
            if not count:
                self._input_ended()
                return
            if not self.disconnecting:
                self.protocol.dataReceived(bytes(room[:count]))
                if self._paused:
                    return
            if count < len(room):
                return
            turn -= count

    def _receiving_failed(self, error: OSError) -> None:
        """The kernel has nothing more, or nothing now.  For subclasses."""
        raise NotImplementedError

    def _input_ended(self) -> None:
        """The peer sends nothing more.  For subclasses."""
        raise NotImplementedError

    def _tell(self, call: Callable[[], object]) -> None:
        """Call the protocol where the reactor would not end us for its exception.  For subclasses."""
        raise NotImplementedError
