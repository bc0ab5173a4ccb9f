"""What F{_native.c} offers; each has a twin in Python."""

from collections.abc import Callable, Sequence
from socket import socket

class BufferPool:
    """
    As L{relaymux.net.buffers.PythonBufferPool}.  What runs within a call that has it, such as a
    finaliser, cannot use it: C{RuntimeError}.
    """

    def __init__(self, size: int = ..., idle: int = ...) -> None:
        """
        @param size: bytes per buffer.
        @param idle: buffers kept for the next need at most.
        """
    @property
    def size(self) -> int: ...
    @property
    def held_bytes(self) -> int: ...
    def room(self, minimum: int = ...) -> memoryview: ...
    def take(self, count: int) -> memoryview: ...
    def gather(
        self, sock: socket, limit: int, minimum: int, again: int
    ) -> tuple[list[memoryview], int, int]: ...

class Records:
    """One connection's TLS records, by the functions of an OpenSSL whose addresses are given."""

    def __init__(
        self,
        ssl: int,
        outgoing: int,
        ssl_read: int,
        ssl_write: int,
        ssl_get_error: int,
        bio_read: int,
        want_read: int,
        small_limit: int,
    ) -> None:
        """
        @param ssl: the connection; it must live for as long as this.
        @param outgoing: the memory BIO that it writes to.
        @param want_read: C{SSL_ERROR_WANT_READ}.
        @param small_limit: bytes up to which a piece shares a record with what follows it.
        """
    def read(self, pool: BufferPool, has_read: Callable[[], bool]) -> tuple[list[memoryview], int]:
        """
        Decrypt.

        @param pool: where plain bytes go.
        @param has_read: called when OpenSSL wants more.  @return: whether it was given some.
        @return: plain bytes, and 1 or what C{SSL_read} said when it failed or the peer had closed.
        """
    def write(self, pool: BufferPool, buffers: Sequence[bytes | memoryview]) -> tuple[list[memoryview], int]:
        """
        Encrypt.

        @param pool: where encrypted bytes go.
        @return: what is to be sent, and 1 or what C{SSL_write} said when it failed.
        """
