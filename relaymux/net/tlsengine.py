"""
TLS between memory and memory: the only module that knows how OpenSSL is fed.

pyOpenSSL's public calls allocate a block for every read, copy what they read
out of it once more, and write one record per call.  L{FastEngine} calls the
same OpenSSL functions through pyOpenSSL's bindings, on buffers that are used
again and again: about two thirds of the CPU time per byte.  Those bindings are
not a public interface, so L{make_engine} uses them only if all that it needs is
there, and else the L{Engine} that does without.  Where an installation has compiled
loops, L{relaymux.net.tlsrecords} takes over after the handshake.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from OpenSSL import SSL

from relaymux.interfaces import Buffer
from relaymux.net.buffers import BufferPool

__all__ = ["BATCH", "CIPHER_BUFFER_SIZE", "RECORD", "Engine", "FastEngine", "make_engine"]

#: Plain bytes encrypted before they are sent: what a link hands over at once
#: (L{relaymux.net.link.FLUSH_BYTES} and a frame more, with their headers), so that no
#: frame's last bytes leave alone and wake the peer for nothing.
BATCH: Final = 640 * 1024

#: A batch encrypted: each record of 16 KiB grows by 22 bytes.  A pool with
#: buffers of this size holds a batch in one.
CIPHER_BUFFER_SIZE: Final = BATCH + 16 * 1024

#: Free space wanted to read into.
_ROOM: Final = 64 * 1024

#: The most that one TLS record holds.
RECORD: Final = 16 * 1024

#: Buffers up to this size are put together with what follows: a record of
#: their own would cost more than the copy.
_SMALL: Final = 2048

_BINDINGS: tuple[str, ...] = (
    "BIO_get_mem_data",
    "BIO_new_mem_buf",
    "BIO_read",
    "BIO_set_mem_eof_return",
    "SSL_ERROR_WANT_READ",
    "SSL_clear_mode",
    "SSL_get_error",
    "SSL_MODE_ENABLE_PARTIAL_WRITE",
    "SSL_read",
    "SSL_set_bio",
    "SSL_write",
)
_ATTRIBUTES: Final = ("_ssl", "_into_ssl", "_from_ssl", "_raise_ssl_error")


class Engine:
    """
    One side of a TLS connection, through pyOpenSSL's public interface.

    @ivar connection: for what has no cost per byte: handshake, peer
        certificate, key export.
    @ivar pool: for encrypted bytes on their way out.
    @ivar error: why nothing more can be read; L{None} if that is not so.
    """

    def __init__(self, connection: SSL.Connection, pool: BufferPool) -> None:
        """
        @param connection: made without a socket; client or server is set.
        @param pool: see the attribute.
        """
        self.connection = connection
        self.pool = pool
        self.error: SSL.Error | None = None

    @property
    def failed(self) -> bool:
        """Whether TLS is broken, so that OpenSSL encrypts nothing more.  An orderly end is no failure."""
        return self.error is not None and not isinstance(self.error, SSL.ZeroReturnError)

    def shake_hands(self) -> None:
        """
        Go on with the handshake.

        @raise SSL.WantReadError: more must be fed.
        @raise SSL.Error: it has failed.
        """
        self.connection.do_handshake()

    def feed(self, data: memoryview) -> None:
        """Encrypted bytes have arrived; they may be kept by reference until they are decrypted."""
        self.connection.bio_write(data)

    def close(self) -> None:
        """Have the peer told that nothing follows; L{take} has the words."""
        self.connection.shutdown()

    def read_into(self, room: memoryview) -> int:
        """
        Decrypt what was fed.

        @return: how many bytes were put into C{room}; 0 when more must be fed.
        @raise SSL.ZeroReturnError: the peer has closed, in order.
        @raise SSL.Error: the peer broke TLS, or refused us with an alert.
        """
        if self.error is not None:
            raise self.error
        count = 0
        try:
            while count < len(room):
                # One record at a time is all OpenSSL gives, and the room is allocated anew.
                count += self.connection.recv_into(room[count : count + RECORD])
        except SSL.WantReadError:
            return count
        except SSL.Error as error:
            # Bytes before what is wrong count.
            self.error = error
            if not count:
                raise
        return count

    def read(self, pool: BufferPool) -> list[memoryview]:
        """
        Decrypt all that was fed.

        @param pool: where plain bytes go.
        @return: views of them, oldest first.  If C{error} is set then, nothing comes behind them.
        @raise SSL.Error: as L{read_into}, if there are none.
        """
        views: list[memoryview] = []
        while True:
            room = pool.room(_ROOM)
            try:
                count = self.read_into(room)
            except SSL.Error:
                if not views:
                    raise
                return views
            if count:
                views.append(pool.take(count))
            if count < len(room) and self.error is None:
                return views

    def encrypt(self, buffers: Sequence[Buffer]) -> list[memoryview]:
        """
        Encrypt C{buffers}.

        @return: all that is to be sent, encrypted.
        """
        for data in _join_small(buffers):
            self._encrypt(data)
        return self.take()

    def _encrypt(self, data: Buffer) -> None:
        left = memoryview(data)
        while left:
            left = left[self.connection.send(left) :]

    def take(self) -> list[memoryview]:
        """@return: all that OpenSSL has to send."""
        taken: list[memoryview] = []
        while True:
            room = self.pool.room(_ROOM)
            count = self._read_encrypted(room)
            if not count:
                return taken
            taken.append(self.pool.take(count))

    def _read_encrypted(self, room: memoryview) -> int:
        try:
            data = self.connection.bio_read(len(room))
        except SSL.WantReadError:
            return 0
        room[: len(data)] = data
        return len(data)


class FastEngine(Engine):
    """
    The same without copies in between.

    What was received is not written into OpenSSL's own input BIO: each received
    buffer is given to OpenSSL as a read-only BIO in its place.  OpenSSL says
    SSL_ERROR_WANT_READ only when it has taken all of it (a record that is not
    complete it keeps itself), and then the next one's turn has come.

    What C{from_buffer} returns is always released by C{with}: CPython crashes when
    its garbage collector meets a memoryview that such an object still refers to,
    as in the frames of an exception's traceback.
    """

    def __init__(self, connection: SSL.Connection, pool: BufferPool) -> None:
        super().__init__(connection, pool)
        raw: Any = connection
        self._ssl = raw._ssl
        self._outgoing = raw._from_ssl
        self._raise = raw._raise_ssl_error
        # OpenSSL frees its input BIO when the first buffer takes its place: pyOpenSSL
        # must not use it any more, and refuses to without it.
        raw._into_ssl = None
        # Bounded by what the socket transport hands on at once, as all of it is read
        # before more is fed.
        self._fed: deque[memoryview] = deque()
        self._reading: memoryview | None = None  # keeps alive what OpenSSL reads from
        self._incoming: Any = None  # the BIO that it reads it through
        # One call then writes all records of a batch.
        _lib.SSL_clear_mode(self._ssl, _lib.SSL_MODE_ENABLE_PARTIAL_WRITE)

    def shake_hands(self) -> None:
        while True:
            try:
                self.connection.do_handshake()
            except SSL.WantReadError:
                if not self._has_read():
                    raise
            else:
                return

    def feed(self, data: memoryview) -> None:
        self._fed.append(data)
        if self._reading is None:
            self._read_next()

    def _has_read(self) -> bool:
        """OpenSSL has read all it was given.  @return: whether there is another buffer for it."""
        if self._fed:
            self._read_next()
            return True
        self._reading = None
        return False

    def _read_next(self) -> None:
        """Let OpenSSL read from the next buffer."""
        data = self._reading = self._fed.popleft()
        with _from_buffer(data) as start:  # valid for as long as the view lives
            self._read_at(start, len(data))

    def _read_at(self, start: Any, size: int) -> None:
        bio = self._incoming = _lib.BIO_new_mem_buf(start, size)
        if bio == _ffi.NULL:
            raise MemoryError("OpenSSL has no memory for a BIO")
        _lib.BIO_set_mem_eof_return(bio, -1)  # at its end: try again later
        _lib.SSL_set_bio(self._ssl, bio, self._outgoing)

    def hand_over(self) -> tuple[list[memoryview], list[memoryview]]:
        """
        Stop here: the handshake is through, and somebody else goes on with the connection's records.

        @return: what is still to be sent, and what was fed and not read.  OpenSSL reads one
            record at a time, so the latter begins with a whole one.
        """
        unread = list(self._fed)
        self._fed.clear()
        if self._reading is not None:
            left: int = _lib.BIO_get_mem_data(self._incoming, _NOWHERE)
            if left:
                unread.insert(0, self._reading[-left:])
            self._reading = None
        self._read_at(_NOTHING, 0)
        return self.take(), unread

    def read_into(self, room: memoryview) -> int:
        if self.error is not None:
            raise self.error
        ssl, read, size = self._ssl, _lib.SSL_read, len(room)
        count: int = 0
        with _from_buffer(room) as start:
            while True:
                got = read(ssl, start + count, size - count)
                if got > 0:
                    count += got
                    if count == size:
                        return size
                elif _lib.SSL_get_error(ssl, got) != _lib.SSL_ERROR_WANT_READ:
                    break
                elif not self._has_read():
                    return count
        self._input_over(got, told=not count)
        return count

    def _input_over(self, result: int, *, told: bool) -> None:
        """
        Reading found the end, or an error.  To be asked at once: OpenSSL's errors wait in a
        queue that all connections share.

        @param told: whether to raise it now, since no bytes come before it.
        """
        try:
            self._raise(self._ssl, result)
        except SSL.Error as error:
            self.error = error
            if told:
                raise

    def _encrypt(self, data: Buffer) -> None:
        if not data:
            return
        with _from_buffer(data) as start:
            written = _lib.SSL_write(self._ssl, start, len(data))
        if written <= 0:
            self._raise(self._ssl, written)

    def take(self) -> list[memoryview]:
        taken: list[memoryview] = []
        missing = _lib.BIO_get_mem_data(self._outgoing, _NOWHERE)
        while missing > 0:
            room = self.pool.room(min(missing, self.pool.size))
            with _from_buffer(room) as start:
                count: int = _lib.BIO_read(self._outgoing, start, len(room))
            taken.append(self.pool.take(count))
            missing -= count
        return taken


def _join_small(buffers: Sequence[Buffer]) -> list[Buffer]:
    """@return: the same bytes as pieces worth a record each: what is small shares one with what follows."""
    pieces: list[Buffer] = []
    small: list[Buffer] = []
    for data in buffers:
        if len(data) <= _SMALL:
            small.append(data)
        elif small:
            first = RECORD - sum(map(len, small)) % RECORD
            small.append(memoryview(data)[:first])
            pieces += [b"".join(small), memoryview(data)[first:]]
            small = []
        else:
            pieces.append(data)
    if small:
        pieces.append(b"".join(small))
    return pieces


_lib: Any = getattr(SSL, "_lib", None)
_ffi: Any = getattr(SSL, "_ffi", None)
_from_buffer: Any = getattr(_ffi, "from_buffer", None)

#: Where OpenSSL puts a pointer that nobody asks for, and what it may read when there is nothing any more.
_NOWHERE: Any = None if _ffi is None else _ffi.new("char **")
_NOTHING: Any = None if _ffi is None else _ffi.new("char[1]")


def make_engine(connection: SSL.Connection, pool: BufferPool) -> Engine:
    """@return: the fastest engine that this version of pyOpenSSL allows; parameters as of L{Engine}."""
    has_bindings = _from_buffer is not None and all(hasattr(_lib, name) for name in _BINDINGS)
    if not has_bindings or not all(hasattr(connection, name) for name in _ATTRIBUTES):
        return Engine(connection, pool)
    return FastEngine(connection, pool)
