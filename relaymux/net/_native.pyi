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
        @param idle: buffers kept for the next need in any case; as many as are lent, if that is more.
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

class Pages:
    """
    Pipes by which leases pass pages of memory on instead of copying them (splice(2), tee(2)).

    One lease at a time has them; if it cannot be settled nobody can use them any more.
    """

    def __init__(self) -> None:
        """@raise OSError: the kernel allows no more of them, or cannot."""
    @property
    def was_full(self) -> int:
        """Whether the last lease had to copy, as pages came with few bytes each."""

class Lease:
    """
    A link and its streams, for the time in which C carries their bytes; see L{relaymux.net.fastpath}.

    While there is one its sockets, and all that it was told of, are not touched by anybody else.
    """

    def __init__(
        self,
        pool: BufferPool,
        link: int,
        epoll: int,
        sent: tuple[int, int, int, int, int, list[int]],
        received: tuple[int, int, int, int],
        turns: tuple[int, int],
        streams: int,
    ) -> None:
        """
        @param link: the descriptor of the link's socket.
        @param epoll: what waits for it, and for the streams' sockets.
        @param sent: sequenced bytes sent; how many were acknowledged; room in the replay buffer; bytes
            in it from which on nothing is sent; what a frame takes of the room beside its bytes; where
            the frames end that are in it, oldest first.
        @param received: sequenced bytes received; of how many the peer knows; how many new ones are
            worth an ACK; the longest DATA payload.
        @param turns: bytes to read of a local socket at once, and to send in a frame, at most; bytes to
            read of the link.
        @param streams: how many will be added at most.
        """
    def encrypt(self, sealer: Sealer, opener: Opener, pool: BufferPool, wrong_tag: type[Exception]) -> None:
        """
        The link is one with TLS.

        @param pool: for encrypted bytes; not the one for plain ones.
        @param wrong_tag: as of L{Opener.open}.
        """
    def pass_on(self, pages: Pages, turn: int, ack_bytes: int, sends: bool) -> None:
        """
        Pass pages on by C{pages}, from the link to local sockets; it is one without TLS.

        @param turn: bytes to read of the link at once, instead of what it was made with.
        @param ack_bytes: bytes that are worth an ACK, likewise.
        @param sends: whether to pass them on from local sockets to the link as well.
        """
    def add(
        self,
        stream_id: int,
        sock: int,
        reads: bool,
        writes: bool,
        queued: bool,
        sent: tuple[int, int, int],
        received: tuple[int, int, int, int, int],
    ) -> bool:
        """
        @param reads: whether the socket is read for the stream.
        @param writes: whether it is written.
        @param queued: whether somebody else waits for it to take something.
        @param sent: bytes sent; the credit for them; how many were delivered.
        @param received: bytes received; how many were consumed; the credit for them; the window, and
            what new credit waits for.
        @return: whether there was room for one more.
        """
    def owe(self, buffers: Sequence[Buffer]) -> bool:
        """
        Begin with C{buffers}, which the link has not taken yet.

        @return: whether they are few enough; if not, nothing has happened.
        """
    def feed(self, buffers: Sequence[Buffer]) -> bool:
        """
        Go on with what was received before.

        @return: whether it was understood; else there is nothing to wait for.
        """
    def settle(
        self,
    ) -> tuple[
        int,
        int,
        int,
        int,
        list[tuple[int, list[Buffer]]],
        list[Buffer],
        list[memoryview],
        int,
        list[tuple[int, int, int, int, int, int, int, list[Buffer], int, int]],
        int,
        int,
        tuple[bool, tuple[int, int, bytes | None, list[memoryview]] | None],
    ]:
        """
        Take everything back.

        @return: sequenced bytes sent; how many were acknowledged; sequenced bytes received; of how
            many the peer knows; the frames that were not acknowledged, with their ends; what the
            link has not taken; what was received and not understood; how the link's input ended;
            the streams; why the link takes no more; payload bytes carried; and what became of the keys,
            if there are any: whether something could not be encrypted, or decrypted, so that nothing may
            follow on this connection; and the record that is no application data, if one has ended the
            lease: alert, kind and content as of L{Opener.open}, and what has arrived behind it.  A stream
            is its id; bytes sent; the credit for all; how many of all were delivered; bytes received, and
            consumed; the credit for all; what its socket has not taken; how its
            input ended; why it takes no more.
        """

def wait(
    epoll: int, timeout: float, longest: float, ack_delay: float, leases: list[Lease]
) -> list[tuple[int, int]]:
    """
    Carry bytes until something happens that is not for one of C{leases}.

    @param timeout: seconds at most, or negative.
    @param longest: the same, not negative.
    @param ack_delay: seconds for which an ACK waits until it is worthwhile, or up to twice as long.
    @return: what happened: descriptors and events, as of C{epoll.poll}.
    """
