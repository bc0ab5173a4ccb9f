"""Frames: every kind by its literal bytes, and what cannot be one."""

from __future__ import annotations

import itertools

from twisted.trial.unittest import SynchronousTestCase

from relaymux.core.frames import (
    HEADER_BYTES,
    MAX_CONTROL_PAYLOAD,
    SMALL_PIECE,
    Frame,
    FrameDecoder,
    Kind,
    data_header,
    encode,
)
from relaymux.errors import ErrorCode, RemoteProtocolError, describe_code
from tests.wire import frame, unhex

#: Each kind with a stream id and a payload: kind, flags, reserved, stream id, length, payload.
LITERAL = {
    Kind.HELLO: "01 00 0000 00000000 00000003 616263",
    Kind.WELCOME: "02 00 0000 00000000 00000003 616263",
    Kind.RESUME: "03 00 0000 00000000 00000003 616263",
    Kind.RESUMED: "04 00 0000 00000000 00000003 616263",
    Kind.REJECT: "05 00 0000 00000000 00000003 616263",
    Kind.ACK: "06 00 0000 00000000 00000003 616263",
    Kind.PING: "07 00 0000 00000000 00000003 616263",
    Kind.PONG: "08 00 0000 00000000 00000003 616263",
    Kind.BYE: "09 00 0000 00000000 00000003 616263",
    Kind.OPEN: "10 00 0000 00000005 00000003 616263",
    Kind.OPENED: "11 00 0000 00000005 00000003 616263",
    Kind.REFUSED: "12 00 0000 00000005 00000003 616263",
    Kind.DATA: "13 00 0000 00000005 00000003 616263",
    Kind.CREDIT: "14 00 0000 00000005 00000003 616263",
    Kind.FIN: "15 00 0000 00000005 00000003 616263",
    Kind.RESET: "16 00 0000 00000005 00000003 616263",
    Kind.STOP_SENDING: "17 00 0000 00000005 00000003 616263",
    Kind.CLOSED: "18 00 0000 00000005 00000003 616263",
    Kind.GOAWAY: "19 00 0000 00000005 00000003 616263",
}


def decode(*pieces: bytes, max_payload: int = 4096) -> list[Frame]:
    """@return: the frames in C{pieces}, each of which is one read."""
    decoder = FrameDecoder(max_payload)
    return [found for piece in pieces for found in decoder.feed(memoryview(piece))]


class EncodingTests(SynchronousTestCase):
    """Bytes that another implementation would have to make and read."""

    def test_every_kind_has_a_literal(self) -> None:
        """No kind is left out below."""
        self.assertEqual(set(LITERAL), set(Kind))

    def test_encode(self) -> None:
        """Header and payload of each kind are these very bytes."""
        for kind, text in LITERAL.items():
            stream_id = 0 if kind < Kind.OPEN else 5
            self.assertEqual(encode(kind, stream_id, b"abc"), unhex(text), kind)

    def test_decode(self) -> None:
        """The same bytes are understood as what they are."""
        for kind, text in LITERAL.items():
            [found] = decode(unhex(text))
            self.assertEqual(found.kind, kind)
            self.assertEqual(found.stream_id, 0 if kind < Kind.OPEN else 5)
            self.assertEqual(found.size, 15)
            if kind is Kind.DATA:
                self.assertEqual((found.payload, found.buffers), (b"", [b"abc"]))
            else:
                self.assertEqual((found.payload, found.buffers), (b"abc", []))

    def test_data_header(self) -> None:
        """A DATA header announces a payload that is sent apart from it."""
        self.assertEqual(data_header(0x01020304, 0x00040000), unhex("13 00 0000 01020304 00040000"))

    def test_extremes(self) -> None:
        """The highest stream id and the longest control payload fit."""
        longest = bytes(MAX_CONTROL_PAYLOAD)
        [found] = decode(encode(Kind.OPEN, 2**32 - 1, longest))
        self.assertEqual((found.stream_id, found.payload), (2**32 - 1, longest))

    def test_repr(self) -> None:
        """A frame in a message says what it is, without its bytes."""
        [found] = decode(frame(Kind.DATA, 7, b"secret"))
        self.assertEqual(repr(found), "<Frame DATA stream=7 size=18>")


class DecoderTests(SynchronousTestCase):
    """Frames arrive in any pieces."""

    stream = frame(Kind.PING, 0, bytes(8)) + frame(Kind.OPENED, 1) + frame(Kind.DATA, 1, b"x" * 40)

    def check(self, found: list[Frame]) -> None:
        ping, opened, data = found
        self.assertEqual((ping.kind, ping.payload, ping.size), (Kind.PING, bytes(8), 20))
        self.assertEqual((opened.kind, opened.payload, opened.size), (Kind.OPENED, b"", 12))
        self.assertEqual((data.kind, b"".join(data.buffers), data.size), (Kind.DATA, b"x" * 40, 52))

    def test_one_read(self) -> None:
        """All frames of one read come out of it."""
        self.check(decode(self.stream))

    def test_single_bytes(self) -> None:
        """The same, one byte at a time."""
        self.check(decode(*[self.stream[i : i + 1] for i in range(len(self.stream))]))

    def test_every_cut(self) -> None:
        """The same, cut in two anywhere."""
        for cut in range(1, len(self.stream)):
            self.check(decode(self.stream[:cut], self.stream[cut:]))

    def test_payload_is_not_copied(self) -> None:
        """Long pieces of DATA are views of the memory that was received into."""
        memory = bytearray(frame(Kind.DATA, 1, b"a" * 4 * SMALL_PIECE))
        view = memoryview(memory).toreadonly()
        decoder = FrameDecoder(1 << 20)
        [found] = [*decoder.feed(view[:5000]), *decoder.feed(view[5000:])]
        self.assertEqual([len(piece) for piece in found.buffers], [4988, 4 * SMALL_PIECE - 4988])
        for piece in found.buffers:
            self.assertTrue(piece.obj is memory)
            self.assertTrue(piece.readonly)

    def test_dribbled_payload_is_gathered(self) -> None:
        """A peer that sends a long payload in single bytes cannot make us keep an object for each."""
        payload = bytes(i % 251 for i in range(3 * SMALL_PIECE))
        whole = frame(Kind.DATA, 1, payload)
        [found] = decode(*[whole[i : i + 1] for i in range(len(whole))], max_payload=1 << 20)
        self.assertEqual(b"".join(found.buffers), payload)
        self.assertEqual(len(found.buffers), 1)

    def test_gathered_and_long_pieces_keep_their_order(self) -> None:
        """Small pieces between long ones stay where they belong."""
        payload = bytes(i % 251 for i in range(4 * SMALL_PIECE))
        whole = frame(Kind.DATA, 1, payload)
        cuts = [0, 12, 13, 20, 20 + SMALL_PIECE, 30 + SMALL_PIECE, 40 + 3 * SMALL_PIECE, len(whole)]
        pieces = [whole[a:b] for a, b in itertools.pairwise(cuts)]
        [found] = decode(*pieces, max_payload=1 << 20)
        self.assertEqual(b"".join(found.buffers), payload)

    def test_good_frames_before_a_bad_one(self) -> None:
        """What is right in front of what is wrong is still given out."""
        decoder = FrameDecoder(4096)
        found = []
        with self.assertRaises(RemoteProtocolError):
            for each in decoder.feed(memoryview(self.stream + b"\xff" * 12)):
                found.append(each)
        self.check(found)


class BadHeaderTests(SynchronousTestCase):
    """What no header may say; found before anything of the payload is kept."""

    def refused(self, header: bytes, code: ErrorCode, *words: str) -> None:
        with self.assertRaises(RemoteProtocolError) as caught:
            decode(header)
        self.assertEqual(caught.exception.code, code)
        for word in words:
            self.assertIn(word, str(caught.exception))

    def test_unknown_kinds(self) -> None:
        """Each number that is no kind is refused by name."""
        for number in set(range(256)) - set(Kind):
            self.refused(frame(number, 3), ErrorCode.PROTOCOL_ERROR, f"0x{number:02x}", "stream 3")

    def test_flags_and_reserved(self) -> None:
        """Bits that mean nothing yet must be 0: a later version may give them a meaning."""
        for kind in Kind:
            for bit in range(8):
                self.refused(frame(kind, flags=1 << bit), ErrorCode.PROTOCOL_ERROR, kind.name, "flags")
            for bit in range(16):
                self.refused(frame(kind, reserved=1 << bit), ErrorCode.PROTOCOL_ERROR, "reserved")

    def test_too_long(self) -> None:
        """A length beyond the limit is refused with the header, whatever follows."""
        for kind in Kind:
            limit = 8192 if kind is Kind.DATA else MAX_CONTROL_PAYLOAD
            for length in (limit + 1, 2**31, 2**32 - 1):
                header = frame(kind, length=length)
                self.assertEqual(len(header), HEADER_BYTES)
                with self.assertRaises(RemoteProtocolError) as caught:
                    decode(header, max_payload=8192)
                self.assertEqual(caught.exception.code, ErrorCode.FRAME_TOO_LARGE)
                self.assertIn(str(limit), str(caught.exception))
            self.assertEqual(decode(frame(kind, length=limit), max_payload=8192), [])


class CodeTests(SynchronousTestCase):
    """Error codes have numbers that must not change."""

    def test_numbers(self) -> None:
        """These are on the wire."""
        self.assertEqual(
            {code.name: code.value for code in ErrorCode},
            {
                "NO_ERROR": 0,
                "PROTOCOL_ERROR": 1,
                "FRAME_TOO_LARGE": 2,
                "FLOW_CONTROL_ERROR": 3,
                "STREAM_STATE_ERROR": 4,
                "UNKNOWN_STREAM": 5,
                "ACK_ERROR": 6,
                "FLOOD": 7,
                "INTERNAL_ERROR": 8,
                "UNKNOWN_SERVICE": 16,
                "CONNECT_FAILED": 17,
                "OPEN_TIMEOUT": 18,
                "TOO_MANY_STREAMS": 19,
                "LOCAL_RESET": 20,
                "LOCAL_CLOSED": 21,
                "ABORTED": 22,
                "SESSION_EXPIRED": 23,
                "PEER_RESTARTED": 24,
                "VERSION_UNSUPPORTED": 32,
                "NOT_AUTHORISED": 33,
                "BUSY": 34,
                "HANDSHAKE_TIMEOUT": 35,
                "KEEPALIVE_TIMEOUT": 36,
                "SHUTTING_DOWN": 37,
                "LINK_REPLACED": 38,
                "UNKNOWN_SESSION": 39,
                "STALE_GENERATION": 40,
                "OFFSET_MISMATCH": 41,
            },
        )

    def test_descriptions(self) -> None:
        """A code is told by name and number, one of a later version by number."""
        self.assertEqual(describe_code(16), "UNKNOWN_SERVICE (16)")
        self.assertEqual(describe_code(999), "code 999")
