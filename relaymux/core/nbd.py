"""
Reads the beginning of an NBD connection that passes by: which disk it is, and how large.

libvirt lets all disks of a VM arrive on one socket; only the export's name, which the
client says in the handshake, tells them apart.  So the handshake is read along, from
copies of the headers: the bytes go their way unchanged and undelayed, whatever they are.

The protocol is the fixed newstyle negotiation of the NBD project's C{doc/proto.md}::

    server: NBDMAGIC IHAVEOPT u16 flags
    client: u32 flags
    client: IHAVEOPT u32 option u32 length, data                  again and again
    server: u64 magic u32 option u32 type u32 length, data        one or more to each

until the client sends GO (answered by INFO with the size, and in the end by ACK), or
EXPORT_NAME (answered by u64 size u16 flags, without a header).  Anything else, be it TLS,
the oldstyle negotiation, more than one would say in a handshake, or no NBD at all, is "not
NBD": then nothing is known of the connection, and it works as ever.

Bounded: what is kept are the bytes of one header or of one option or reply, at most
L{LONGEST}, and the options that the server has not answered, at most L{MOST_PENDING}.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from enum import Enum
from struct import Struct
from typing import Final

from relaymux.core.frames import Buffer

__all__ = ["Export", "Handshake", "State"]

#: The longest data of an option or a reply.  A name has 4096 bytes at most; QEMU asks for
#: one or two meta contexts besides.
LONGEST: Final = 64 * 1024

#: Options that may wait for their answers.  Clients wait for each.
MOST_PENDING: Final = 16

#: Options of one handshake.  QEMU needs 3 or 4.
MOST_OPTIONS: Final = 256

_GREETING: Final = b"NBDMAGICIHAVEOPT"
_OPTION_MAGIC: Final = int.from_bytes(b"IHAVEOPT", "big")
_REPLY_MAGIC: Final = 0x3E889045565A9

_FIXED_NEWSTYLE: Final = 1
_KNOWN_CLIENT_FLAGS: Final = 3  # with "no zeroes", which changes nothing of what is read here

_EXPORT_NAME, _ABORT, _STARTTLS, _INFO, _GO = 1, 2, 5, 6, 7
_ACK, _REPLY_INFO = 1, 3
_ERROR: Final = 1 << 31
_INFO_EXPORT: Final = 0

_U16: Final = Struct("!H")
_U32: Final = Struct("!I")
_OPTION: Final = Struct("!QII")
_REPLY: Final = Struct("!QIII")
_SIZE: Final = Struct("!QH")
_INFO_SIZE: Final = Struct("!HQH")

#: Asks for so many bytes at a time, and is sent them.
_Reading = Generator[int, bytes, None]


class State(Enum):
    """What is known."""

    UNDECIDED = "undecided"
    NBD = "NBD"
    OTHER = "not NBD"


@dataclass(frozen=True)
class Export:
    """
    A disk, as the NBD server has it.

    @ivar name: what the client asked for; may be empty.  Not to be trusted: made
        printable, but chosen by the client.
    @ivar size: bytes.
    """

    name: str
    size: int


class _Surprise(Exception):
    """This is not NBD, or no NBD that is understood here."""


class _Direction:
    """The bytes of one direction, cut as its reader wants them."""

    def __init__(self, reading: _Reading) -> None:
        self._reading = reading
        self._wanted = next(reading)
        self._held = bytearray()

    def feed(self, buffers: Sequence[Buffer]) -> None:
        """@raise StopIteration: the reader has seen enough.  @raise _Surprise: it did not expect that."""
        for buffer in buffers:
            position, size = 0, len(buffer)
            while position < size:
                taken = min(self._wanted - len(self._held), size - position)
                self._held += buffer[position : position + taken]
                position += taken
                if len(self._held) == self._wanted:
                    data = bytes(self._held)
                    self._held.clear()
                    self._wanted = self._reading.send(data)


class Handshake:
    """
    One connection's handshake.  Feed both directions as they pass, until C{state} is decided.

    @ivar state: C{UNDECIDED} takes bytes; in any other nothing is read any more.
    @ivar export: the disk, once C{state} is C{NBD}.
    """

    def __init__(self) -> None:
        self.state = State.UNDECIDED
        self.export: Export | None = None
        self._pending: deque[tuple[int, str]] = deque()  # options and names, not answered yet
        self._client: _Direction | None = _Direction(self._read_client())
        self._server: _Direction | None = _Direction(self._read_server())

    def from_client(self, buffers: Sequence[Buffer]) -> None:
        """What the client sends passes by."""
        self._feed(self._client, buffers)

    def from_server(self, buffers: Sequence[Buffer]) -> None:
        """What the server sends passes by."""
        self._feed(self._server, buffers)

    def _feed(self, direction: _Direction | None, buffers: Sequence[Buffer]) -> None:
        if direction is None:
            return
        try:
            direction.feed(buffers)
        except (StopIteration, _Surprise) as end:
            known = isinstance(end, StopIteration) and self.export is not None
            self.state = State.NBD if known else State.OTHER
            self._client = self._server = None
            self._pending.clear()

    def _read_client(self) -> _Reading:
        (flags,) = _U32.unpack((yield 4))
        if not flags & _FIXED_NEWSTYLE or flags & ~_KNOWN_CLIENT_FLAGS:
            raise _Surprise
        for _ in range(MOST_OPTIONS):
            magic, option, length = _OPTION.unpack((yield _OPTION.size))
            if magic != _OPTION_MAGIC or length > LONGEST or len(self._pending) >= MOST_PENDING:
                raise _Surprise
            data = (yield length) if length else b""
            if option in (_ABORT, _STARTTLS):
                raise _Surprise
            if option == _EXPORT_NAME:
                name = data
            elif option in (_GO, _INFO):
                name = _name_of(data)
            else:
                name = b""
            self._pending.append((option, _printable(name)))
            if option == _EXPORT_NAME:
                break  # what follows are requests, before or after the server's answer
        else:
            raise _Surprise
        while True:
            yield LONGEST

    def _read_server(self) -> _Reading:
        greeting = yield len(_GREETING) + _U16.size
        (flags,) = _U16.unpack(greeting[len(_GREETING) :])
        if not greeting.startswith(_GREETING) or not flags & _FIXED_NEWSTYLE:
            raise _Surprise
        size = None
        while True:
            start = yield 8
            if not self._pending:
                raise _Surprise
            option, name = self._pending[0]
            if option == _EXPORT_NAME:
                rest = yield _SIZE.size - len(start)
                size, _ = _SIZE.unpack(start + rest)
                self.export = Export(name, size)
                return
            rest = yield _REPLY.size - len(start)
            magic, answered, kind, length = _REPLY.unpack(start + rest)
            if magic != _REPLY_MAGIC or answered != option or length > LONGEST:
                raise _Surprise
            data = (yield length) if length else b""
            if kind == _REPLY_INFO and option == _GO:
                size = _size_of(data, size)
            elif kind == _ACK or kind & _ERROR:
                self._pending.popleft()
                if kind == _ACK and option == _GO:
                    if size is None:
                        raise _Surprise
                    self.export = Export(name, size)
                    return
                size = None


def _name_of(data: bytes) -> bytes:
    """C{u32 length, name, u16 count, count * u16} of GO and INFO."""
    if len(data) < _U32.size + _U16.size:
        raise _Surprise
    (length,) = _U32.unpack_from(data)
    end = _U32.size + length
    if end + _U16.size > len(data):
        raise _Surprise
    return data[_U32.size : end]


def _size_of(data: bytes, known: int | None) -> int | None:
    """@return: what C{u16 type, u64 size, u16 flags} says; C{known} if it is of another type."""
    if len(data) < _U16.size:
        raise _Surprise
    (kind,) = _U16.unpack_from(data)
    if kind != _INFO_EXPORT:
        return known
    if len(data) != _INFO_SIZE.size:
        raise _Surprise
    return int(_INFO_SIZE.unpack(data)[1])


def _printable(name: bytes) -> str:
    """@return: C{name} for a log line: at most 80 characters, none of which does anything to a terminal."""
    text = name[:320].decode("utf-8", "replace")
    shown = "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )
    return shown if len(shown) <= 80 else f"{shown[:79]}\N{HORIZONTAL ELLIPSIS}"
