"""What F{_native.c} offers."""

from collections.abc import Callable, Sequence
from socket import socket

from relaymux.interfaces import Buffer

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

class _Records:
    """The TLS 1.3 records of one direction under one key (RFC 8446, 5.2)."""

    def __init__(
        self, cipher: Callable[[Buffer, Buffer, Buffer, Buffer], int], iv: bytes, records: int = ...
    ) -> None:
        """
        @param cipher: from nonce, data and additional data into the last one; to encrypt, or to
            decrypt.  It must not keep any of them.
        @param iv: of the traffic keys, 12 bytes.
        @param records: how many there were under this key before.
        """
    @property
    def records(self) -> int:
        """How many there were under this key."""

class Sealer(_Records):
    """What encrypts them."""

    def seal(self, pool: BufferPool, buffers: Sequence[Buffer], kind: int) -> list[memoryview]:
        """
        @param pool: where encrypted bytes go.
        @param buffers: share records: all but the last one are full.
        @param kind: what they are (RFC 8446, B.1).
        @return: whole records.
        """

class Opener(_Records):
    """What decrypts them; it keeps what has arrived of a record that is not complete."""

    def open(
        self, pool: BufferPool, data: Buffer, wrong_tag: type[Exception]
    ) -> tuple[list[memoryview], int, int, int, bytes | None]:
        """
        Decrypt, up to the first record that is not application data.

        @param pool: where plain bytes go.
        @param data: what was received.
        @param wrong_tag: what C{decrypt_into} raises if a record was changed.
        @return: application data; how many bytes of C{data} have been used; the alert to send if
            a record is not as it should be, or 0; and kind and content of a record that is not
            application data, or 0 and L{None}.
        """
