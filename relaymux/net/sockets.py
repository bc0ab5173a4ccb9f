"""
Connected stream sockets, TCP or UNIX, as Twisted transports that do not copy.

What differs from Twisted's own, and why:

 - Received bytes are read into pooled buffers and handed on as views; written
   buffers are queued by reference and go out through one C{sendmsg}.

 - Writing and reading fail apart.  A peer that closed its end completely makes
   our writes fail while bytes it sent before still wait in the kernel; they
   are delivered before the connection ends.  The reactor sees such a peer as a
   hang-up and would end the connection at once, so a hang-up that the reactor
   reports is only taken as a reason to try a system call, whose own answer
   counts.  (The error must not be asked for with C{SO_ERROR}: that clears it,
   and a reset would then read as a clean end.)

 - Closing lets the peer finish.  A socket that is closed with unread bytes
   sends a reset, which can destroy what the peer has not read yet.  So after
   the queue is flushed and our end shut down, input is read and dropped until
   the peer's end, for at most L{LINGER_SECONDS}.

States at rest: both directions open; input ended; output ended; closed.
C{_ending} is the reason with which the connection is closed as soon as input
has ended too.  C{disconnecting} means input is dropped.
"""

from __future__ import annotations

import errno
import select
from collections.abc import Callable
from contextlib import suppress
from socket import SHUT_RD, SHUT_WR, SO_LINGER, SOL_SOCKET, socket
from struct import pack
from typing import Any, Final

from twisted.internet.error import ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import (
    IAddress,
    IConsumer,
    IDelayedCall,
    IHalfCloseableDescriptor,
    IHalfCloseableProtocol,
    ILoggingContext,
    IProtocol,
    IPushProducer,
    IReadWriteDescriptor,
    ISystemHandle,
    ITransport,
)
from twisted.internet.main import CONNECTION_LOST
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import classImplements

from relaymux.interfaces import IBufferTransport, IHalfReadTransport
from relaymux.net.addresses import address_of, describe
from relaymux.net.buffers import BufferPool
from relaymux.net.receiving import ReceivingSocket

__all__ = ["LINGER_SECONDS", "SocketTransport"]

#: How long input is still read after our end is closed.  A peer that honours
#: an end of input answers within a round trip.
LINGER_SECONDS = 1.0

#: Seconds until another try when the kernel is short of memory.
MEMORY_PAUSE = 0.1

_log: Final = Logger("relaymux.net.sockets")

_SHORT_OF_MEMORY: Final = (errno.ENOBUFS, errno.ENOMEM)


class SocketTransport(ReceivingSocket):
    """
    A connected socket carrying one protocol.

    @cvar is_local: whether it is a UNIX socket.
    """

    is_local = False

    def __init__(
        self,
        reactor: Any,
        sock: socket,
        protocol: IProtocol,
        pool: BufferPool,
        peer: IAddress | None = None,
        flush_seconds: float | None = None,
        host: IAddress | None = None,
    ) -> None:
        """
        @param sock: connected; owned by the transport from now on.
        @param peer: the other end, where asking the socket may be too late.
        @param host: this end, where that is known.
        @param flush_seconds: how long after C{loseConnection} a peer may take
            to read what is queued before the connection is aborted;
            L{None}: for ever.
        """
        super().__init__(reactor, sock, protocol, pool)
        self._flush_seconds = flush_seconds
        self._output_reset = False
        self._ending: Exception | None = None
        self._timers: list[IDelayedCall] = []
        self._half_closeable = IHalfCloseableProtocol(protocol, None)
        # Asked now, since nobody can ask a closed socket.
        self._host = host or address_of(sock.getsockname())
        self._peer = peer or address_of(sock.getpeername())

    def expectPages(self, expected: bool) -> None:
        """Pages of memory, which cost the sender little, are what is written from now on, or no longer."""

    def begin(self) -> None:
        """
        Connect the protocol and start reading; called once, by who made this
        transport.  An exception of the protocol ends the connection.
        """
        self._tell(lambda: self.protocol.makeConnection(self))
        if self.connected and not self._paused:
            self.startReading()

    # What the socket is

    def logPrefix(self) -> str:
        """What Twisted calls the protocol in its log."""
        protocol = self.protocol
        return str(protocol.logPrefix()) if ILoggingContext.providedBy(protocol) else type(protocol).__name__

    def getHost(self) -> IAddress:
        return self._host

    def getPeer(self) -> IAddress:
        return self._peer

    # When reading fails or ends

    def _receiving_failed(self, error: OSError) -> None:
        if error.errno in _SHORT_OF_MEMORY:
            self.stopReading()
            self._later(MEMORY_PAUSE, self._read_on)
        else:
            self._close(ConnectionLost(f"reading from {describe(self._peer)}: {error.strerror}"))

    def _read_on(self) -> None:
        if self._input_open:
            self.startReading()

    def _input_ended(self) -> None:
        """The peer sends nothing more."""
        self._input_open = False
        self.stopReading()
        half_closeable = self._half_closeable
        if self.disconnecting or self._output_reset:
            pass
        elif half_closeable is not None:
            half_closeable.readConnectionLost()
        elif self._ending is None:
            self._ending = ConnectionDone()
            if self._queue:
                self._ending = ConnectionLost(
                    f"{describe(self._peer)} closed the connection before"
                    f" it had taken the last {self.queuedBytes} bytes"
                )
        if self._ending is not None and self.connected:
            self._close(self._ending)

    # When sending fails

    def _sending_failed(self, error: OSError) -> None:
        self.stopWriting()
        if error.errno in _SHORT_OF_MEMORY:
            self._later(MEMORY_PAUSE, self.startWriting)
            return
        self._output_open = False
        self._output_reset = error.errno != errno.EPIPE
        self._ending = ConnectionLost(
            f"writing to {describe(self._peer)}: {error.strerror}; {self.queuedBytes} bytes were not taken"
        )
        self._drop_queue()
        # Told later, since whoever is writing does not expect to be called back.
        self._later(0, self._output_failed, self._ending)

    def _output_failed(self, reason: Exception) -> None:
        """What is written is lost; what the peer sent before is not."""
        half_closeable = self._half_closeable
        if not self._input_open:
            self._close(reason)
        elif half_closeable is None or self.disconnecting:
            self._later(LINGER_SECONDS, self._close, reason)
        else:
            self._tell(half_closeable.writeConnectionLost)

    # Ending

    def loseWriteConnection(self) -> None:
        """
        Send what is queued, then the end of our output; the input stays as it is.

        With nothing queued that is done at once: C{writeConnectionLost}, or C{connectionLost}
        if the input had ended before, may come before this returns.
        """
        if self._output_open and not self._output_ending:
            self._output_ending = True
            if self._queue:
                self.startWriting()
            else:
                self._tell(self._end_output)

    def loseReadConnection(self) -> None:
        """
        Take nothing more from the peer; the output stays as it is.

        What it had sent and we had not read is dropped.  A UNIX peer's next
        write fails with EPIPE; TCP has no way to tell.
        """
        if not self._input_open:
            return
        self._input_open = False
        self.stopReading()
        with suppress(OSError):  # the peer was faster: reset, there is no input left to shut
            self.socket.shutdown(SHUT_RD)
        if self._ending is not None:
            self._later(0, self._close, self._ending)

    @property
    def hung_up(self) -> bool:
        """
        Whether the peer of a UNIX socket has closed it, with whatever was sent before still to be read.

        The reactor does not tell while reading is paused: it does not watch the socket then.
        """
        if not self.connected:
            return True
        look = select.poll()
        look.register(self.socket, 0)
        return any(event & select.POLLHUP for _, event in look.poll(0))

    def loseConnection(self) -> None:
        """
        Send what is queued, then close.

        Nothing is delivered any more from now on.
        """
        if not self.connected or self.disconnecting:
            return
        self.disconnecting = True
        if self._input_open:
            self.startReading()
        if self._output_open:
            self.startWriting()
            if self._flush_seconds is not None:
                self._later(self._flush_seconds, self._flush_overdue)
        else:
            self._linger()

    def abortConnection(self) -> None:
        """
        Close at once: queued bytes are dropped, received ones stay unread.

        A TCP peer sees a reset; a UNIX peer does if it had sent something we
        had not read, and else an end of input.
        """
        if not self.connected:
            return
        self.connected = False
        self._input_open = self._output_open = False
        self._drop_queue()
        self.stopReading()
        self.stopWriting()
        self.socket.setsockopt(SOL_SOCKET, SO_LINGER, pack("ii", 1, 0))
        self.socket.close()
        self._later(0, self._close, ConnectionAborted())

    def connectionLost(self, reason: Failure) -> None:
        """
        Called by the reactor: an exception left the protocol, the reactor
        stops, or a hang-up was seen while reading was paused.

        In the last case bytes may wait to be read; the reactor has stopped
        watching us.
        """
        self._stop_watching()
        error = reason.value or ConnectionLost()
        hang_up = type(error) is ConnectionLost and error is not CONNECTION_LOST and not error.args
        if not hang_up:
            self._close(error)
            return
        if self._input_open and not self._paused:
            self.startReading()
        self.doWrite()
        if self._queue:
            self.startWriting()

    def readConnectionLost(self, reason: Failure) -> None:
        """Called by the reactor, which reads no more: a hang-up while reading; the system call says which."""
        self._is_reading = False
        self.startReading()
        self.doRead()

    def writeConnectionLost(self, reason: Failure) -> None:
        """For reactors that find out about writing; this one does not."""
        self.connectionLost(reason)

    def _end_output(self) -> None:
        """Everything is flushed: tell the peer that nothing more comes."""
        self._output_open = False
        self._ending = ConnectionDone()
        try:
            self.socket.shutdown(SHUT_WR)
        except OSError as error:
            self._ending = ConnectionLost(f"closing {describe(self._peer)}: {error.strerror}")
        half_closeable = self._half_closeable
        if self.disconnecting or not self._input_open:
            self._linger()
        elif half_closeable is not None:
            half_closeable.writeConnectionLost()

    def _linger(self) -> None:
        """Our end is closed: wait a little for the peer's."""
        assert self._ending is not None
        if self._input_open:
            self._later(LINGER_SECONDS, self._close, self._ending)
        else:
            self._close(self._ending)

    def _flush_overdue(self) -> None:
        if self._output_open:
            _log.warn(
                "{peer} does not read: closing without its having taken the last {count} bytes",
                peer=describe(self._peer),
                count=self.queuedBytes,
            )
            self.abortConnection()

    def _close(self, error: BaseException) -> None:
        """The one place where the connection ends."""
        if self.disconnected:
            return
        for timer in self._timers:
            if timer.active():
                timer.cancel()
        self._input_open = self._output_open = False
        self._drop_queue()
        reason = connectionDone if type(error) is ConnectionDone else Failure(error)
        self._forget()
        self.socket.close()
        self.protocol.connectionLost(reason)

    # Helpers

    def _later(self, seconds: float, call: Callable[..., object], *args: object) -> None:
        self._timers = [timer for timer in self._timers if timer.active()]
        self._timers.append(self._clock.callLater(seconds, call, *args))

    def _tell(self, call: Callable[[], object]) -> None:
        """Call the protocol where the reactor would not end us for its exception."""
        try:
            call()
        except Exception as error:
            _log.failure("exception from {protocol}", protocol=self.logPrefix())
            self._close(error)


classImplements(
    SocketTransport,
    IBufferTransport,
    IConsumer,
    IHalfCloseableDescriptor,
    IHalfReadTransport,
    ILoggingContext,
    IPushProducer,
    IReadWriteDescriptor,
    ISystemHandle,
    ITransport,
)
