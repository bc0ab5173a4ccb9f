"""
Frames: the units on the wire, and how bytes become frames (protocol.md 3).

A frame is a 12 byte header and a payload::

    0        1        2                 4                                 8
    +--------+--------+-----------------+---------------------------------+
    |  kind  | flags  |  reserved (0)   |            stream id            |
    +--------+--------+-----------------+---------------------------------+
    |         payload length            |  payload ...
    +-----------------------------------+

Payload of DATA frames is never joined: it stays the list of views in which it
was received.  Every other payload is small and becomes C{bytes}.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from struct import Struct
from typing import Final

from relaymux.errors import ErrorCode, RemoteProtocolError

#: Bytes that are passed on without being copied.  Whoever is given one may keep it,
#: slice it and hand it on, and must never change it.
Buffer = bytes | memoryview

HEADER: Final = Struct("!BBHII")
HEADER_BYTES: Final = HEADER.size

#: No control frame needs more: the longest holds a name, an error text and extensions.
MAX_CONTROL_PAYLOAD: Final = 4096

#: Pieces of a DATA payload below this are gathered, so that a peer which dribbles a
#: large frame in tiny segments cannot make us keep one object for each of them.
SMALL_PIECE: Final = 2048


# The payloads of sequenced frames that have a fixed layout (protocol.md 4, 5).
CREDIT: Final = Struct("!QQ")
FIN: Final = Struct("!Q")
RESET: Final = Struct("!HQ")
STOP: Final = Struct("!H")
CLOSED: Final = Struct("!HQ")


class Kind(IntEnum):
    """Frame kinds.  From 0x10 on they are sequenced: numbered, acknowledged, replayed."""

    HELLO = 0x01
    WELCOME = 0x02
    RESUME = 0x03
    RESUMED = 0x04
    REJECT = 0x05
    ACK = 0x06
    PING = 0x07
    PONG = 0x08
    BYE = 0x09

    OPEN = 0x10
    OPENED = 0x11
    REFUSED = 0x12
    DATA = 0x13
    CREDIT = 0x14
    FIN = 0x15
    RESET = 0x16
    STOP_SENDING = 0x17
    CLOSED = 0x18
    GOAWAY = 0x19


FIRST_SEQUENCED: Final = 0x10
_KNOWN: Final = frozenset(int(kind) for kind in Kind)
_DATA: Final = int(Kind.DATA)


class Frame:
    """
    One received frame.

    @ivar payload: C{bytes}; empty for DATA.
    @ivar buffers: the payload of a DATA frame, in pieces; empty for all others.
    @ivar size: bytes on the wire, header included.
    """

    __slots__ = ("buffers", "kind", "payload", "size", "stream_id")

    def __init__(
        self, kind: int, stream_id: int, payload: bytes, buffers: list[memoryview], size: int
    ) -> None:
        self.kind = kind
        self.stream_id = stream_id
        self.payload = payload
        self.buffers = buffers
        self.size = size

    def __repr__(self) -> str:
        return f"<Frame {Kind(self.kind).name} stream={self.stream_id} size={self.size}>"


def encode(kind: int, stream_id: int = 0, payload: bytes = b"") -> bytes:
    """@return: a whole control frame."""
    return HEADER.pack(kind, 0, 0, stream_id, len(payload)) + payload


def data_header(stream_id: int, length: int) -> bytes:
    """@return: the header of a DATA frame whose payload of C{length} bytes follows it."""
    return HEADER.pack(_DATA, 0, 0, stream_id, length)


class FrameDecoder:
    """
    Finds the frames in a byte stream that arrives in any pieces.

    A frame is given out when its last byte has arrived.  What is held back
    is bounded by one frame: C{max_payload} and a header.

    @ivar max_payload: the longest DATA payload to accept, in bytes.
    """

    def __init__(self, max_payload: int) -> None:
        """@param max_payload: the longest DATA payload to accept, in bytes."""
        self.max_payload = max_payload
        self._header = b""  # the beginning of a header that a read cut in two
        self._in_payload = False
        self._kind = 0
        self._stream_id = 0
        self._length = 0
        self._missing = 0
        self._pieces: list[memoryview] = []
        self._small: bytearray | None = None  # tail of the pieces, still growing

    @property
    def missing(self) -> int:
        """Bytes without which the frame that is arriving cannot be given out."""
        return self._missing

    def suspend(self) -> list[Buffer]:
        """
        Forget the frame that is arriving.

        @return: what has arrived of it, which is to be fed again: to this decoder, or to
            whoever goes on in its place.
        """
        if not self._in_payload:
            header, self._header = self._header, b""
            return [header] if header else []
        self._seal_small()
        pieces, self._pieces = self._pieces, []
        self._in_payload = False
        self._missing = 0
        return [HEADER.pack(self._kind, 0, 0, self._stream_id, self._length), *pieces]

    def feed(self, data: memoryview) -> Iterable[Frame]:
        """
        Yield the frames that C{data} completes, oldest first.

        A generator, so that frames in front of a bad one are handled first.

        @param data: not empty; views of it live on in DATA frames.
        @raise RemoteProtocolError: the bytes cannot be a frame.  The decoder
            must not be fed again.
        """
        position = 0
        end = len(data)
        while position < end:
            if not self._in_payload:
                position = self._read_header(data, position, end)
                if not self._in_payload:
                    return
            take = min(self._missing, end - position)
            piece = data[position : position + take]
            self._missing -= take
            position += take
            if take == self._length:  # all of it is here, as nearly always
                yield self._finish([piece] if take else [])
                continue
            if take:
                self._keep(piece, take)
            if not self._missing:
                self._seal_small()
                pieces, self._pieces = self._pieces, []
                yield self._finish(pieces)

    def _read_header(self, data: memoryview, position: int, end: int) -> int:
        """Read a header, or put aside its beginning.  @return: the new position."""
        if self._header:
            need = HEADER_BYTES - len(self._header)
            self._header += bytes(data[position : position + need])
            position = min(end, position + need)
            if len(self._header) < HEADER_BYTES:
                return position
            fields = HEADER.unpack(self._header)
            self._header = b""
        elif end - position < HEADER_BYTES:
            self._header = bytes(data[position:end])
            return end
        else:
            fields = HEADER.unpack_from(data, position)
            position += HEADER_BYTES
        kind, flags, reserved, stream_id, length = fields
        # All of it is checked before a byte of the payload is kept.
        if kind not in _KNOWN:
            raise RemoteProtocolError(ErrorCode.PROTOCOL_ERROR, f"unknown frame kind 0x{kind:02x}", stream_id)
        if flags or reserved:
            raise RemoteProtocolError(
                ErrorCode.PROTOCOL_ERROR,
                f"{Kind(kind).name} frame with flags 0x{flags:02x}, reserved 0x{reserved:04x}: must be 0",
                stream_id,
            )
        limit = self.max_payload if kind == _DATA else MAX_CONTROL_PAYLOAD
        if length > limit:
            raise RemoteProtocolError(
                ErrorCode.FRAME_TOO_LARGE,
                f"{Kind(kind).name} payload of {length} bytes, at most {limit} allowed",
                stream_id,
            )
        self._kind, self._stream_id, self._length = kind, stream_id, length
        self._missing = length
        self._in_payload = True
        return position

    def _keep(self, piece: memoryview, size: int) -> None:
        if size >= SMALL_PIECE:
            self._seal_small()
            self._pieces.append(piece)
        elif self._small is None:
            self._small = bytearray(piece)
        else:
            self._small += piece

    def _seal_small(self) -> None:
        if self._small is not None:
            self._pieces.append(memoryview(self._small).toreadonly())
            self._small = None

    def _finish(self, pieces: list[memoryview]) -> Frame:
        self._in_payload = False
        size = HEADER_BYTES + self._length
        if self._kind == _DATA:
            return Frame(_DATA, self._stream_id, b"", pieces, size)
        return Frame(self._kind, self._stream_id, b"".join(pieces), [], size)
