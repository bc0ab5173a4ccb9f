"""
Bytes that know where they belong.

Every 8 bytes are one big-endian number: 16 bits that name the flow (one
direction of one connection), 32 bits for the block of 64 KiB, 16 bits for the
place in it.  So what arrived in the wrong place says where it comes from.
"""

from __future__ import annotations

from struct import Struct

__all__ = ["BLOCK", "Checker", "WrongContent", "block"]

BLOCK = 65536
_WORD = 8
_KEY = Struct("!HI")
_NUMBER = Struct("!HIH")
_TEMPLATE = b"".join(_NUMBER.pack(0, 0, place) for place in range(BLOCK // _WORD))
#: Bytes that are searched for a number whose place is known.
_SEARCH = 64


class WrongContent(AssertionError):
    """What arrived is not what was sent."""


def block(flow: int, number: int) -> bytearray:
    """@return: the C{number}-th 64 KiB of C{flow}."""
    made = bytearray(_TEMPLATE)
    for place, value in enumerate(_KEY.pack(flow, number)):
        if value:
            made[place::_WORD] = bytes((value,)) * (BLOCK // _WORD)
    return made


class Checker:
    """
    Compares what arrives with what belongs there.

    @ivar position: bytes that arrived, all of them right.
    """

    def __init__(self, flow: int) -> None:
        self.position = 0
        self._flow = flow
        self._number = -1
        self._block = bytearray()

    def feed(self, data: memoryview) -> None:
        """@raise WrongContent: something else belongs there; says what it is."""
        done = 0
        while done < len(data):
            number, offset = divmod(self.position, BLOCK)
            if number != self._number:
                self._number, self._block = number, block(self._flow, number)
            piece = data[done : done + BLOCK - offset]
            # A comparison of memory, without a copy.
            if not self._block.startswith(piece, offset):
                raise WrongContent(self._explain(bytes(data[done:]), offset))
            done += len(piece)
            self.position += len(piece)

    def _explain(self, data: bytes, offset: int) -> str:
        expected = bytes(self._block[offset:])
        same = next(i for i, (got, wanted) in enumerate(zip(data, expected, strict=False)) if got != wanted)
        at = self.position + same
        where = f"flow {self._flow:#x}, from byte {at:,} on"
        found = self._locate(data, max(0, same - _WORD + 1), at - same)
        if found is None:
            return f"{where}: bytes of no known place, {data[same : same + 32].hex(' ')}"
        flow, shift = found
        if flow != self._flow:
            return f"{where}: bytes of flow {flow:#x} (cross-stream)"
        if shift > 0:
            return f"{where}: {shift:,} bytes are missing, or come later (loss or swap)"
        if shift < 0:
            return f"{where}: what was {-shift:,} bytes before comes again (duplicate or swap)"
        return f"{where}: damaged, {data[same : same + 32].hex(' ')}"

    def _locate(self, data: bytes, start: int, base: int) -> tuple[int, int] | None:
        """
        Find a number in C{data} that is followed by its successor.

        @param base: where C{data} was to begin in the flow.
        @return: its flow, and how far ahead of where it is it belongs.
        """
        for at in range(start, min(start + _SEARCH, len(data) - 2 * _WORD + 1)):
            flow, number, place = _NUMBER.unpack_from(data, at)
            following = _NUMBER.unpack_from(data, at + _WORD)
            if following == (flow, number, place + 1) and place < BLOCK // _WORD:
                return flow, number * BLOCK + place * _WORD - (base + at)
        return None
