"""The introductions: their literal bytes, what is ignored, what is refused and how."""

from __future__ import annotations

import struct
from dataclasses import replace

from twisted.trial.unittest import SynchronousTestCase

from relaymux.core.handshake import (
    MAX_TEXT,
    Hello,
    Limits,
    Welcome,
    decode_coded_text,
    decode_extensions,
    decode_hello,
    decode_reject,
    decode_text,
    decode_welcome,
    encode_coded_text,
    encode_extensions,
    encode_reject,
    encode_text,
)
from relaymux.errors import ErrorCode, LocalError, RemoteProtocolError
from tests.wire import INSTANCE, hello_terms, u16, unhex

TERMS = """
    0000                                 reserved
    00100000                             max_payload 1 MiB
    00000100                             max_streams 256
    0000000000400000                     window 4 MiB
    0000000002000000                     replay 32 MiB
    0000ea60                             resume_window 60 s
    00003a98                             silence 15 s
    000102030405060708090a0b0c0d0e0f     instance
    04 68762d61                          name
    0007 0002 abcd                       extension 7
    fffe 0000                            extension 65534, empty
"""

HELLO = "72656c61796d7578 0001" + "".join(line[:40] for line in TERMS.splitlines())
WELCOME = "72656c61796d7578 0001" + "11" * 16 + "22" * 32 + "".join(line[:40] for line in TERMS.splitlines())

LIMITS = Limits(
    max_payload=1 << 20, max_streams=256, window=4 << 20, replay=32 << 20, resume_window=60.0, silence=15.0
)
EXTENSIONS = {7: b"\xab\xcd", 65534: b""}
PREFIX = b"relaymux\x00\x01"


class LiteralTests(SynchronousTestCase):
    """The payloads, byte by byte."""

    def test_hello(self) -> None:
        """A HELLO is written and read as these bytes."""
        hello = Hello("hv-a", INSTANCE, LIMITS, EXTENSIONS)
        self.assertEqual(hello.encode(), unhex(HELLO))
        self.assertEqual(decode_hello(unhex(HELLO)), hello)

    def test_welcome(self) -> None:
        """A WELCOME is written and read as these bytes."""
        welcome = Welcome("hv-a", INSTANCE, LIMITS, EXTENSIONS, b"\x11" * 16, b"\x22" * 32)
        self.assertEqual(welcome.encode(), unhex(WELCOME))
        self.assertEqual(decode_welcome(unhex(WELCOME)), welcome)

    def test_reject(self) -> None:
        """A REJECT holds a code, the version of who refuses, and a text."""
        data = unhex("0022 0001 627573 79")
        self.assertEqual(encode_reject(ErrorCode.BUSY, "busy"), data)
        self.assertEqual(decode_reject(data), (34, 1, "busy"))

    def test_coded_text(self) -> None:
        """REFUSED, GOAWAY and BYE hold a code and a text."""
        data = unhex("0025 646f776e")
        self.assertEqual(encode_coded_text(ErrorCode.SHUTTING_DOWN, "down"), data)
        self.assertEqual(decode_coded_text(data, "BYE"), (37, "down"))

    def test_the_key_is_not_shown(self) -> None:
        """The secret in a WELCOME does not get into a log by way of its repr."""
        welcome = Welcome("hv-a", INSTANCE, LIMITS, {}, b"\x11" * 16, b"secret" + bytes(26))
        self.assertNotIn("secret", repr(welcome))


class IgnoredTests(SynchronousTestCase):
    """Room for later versions of the same protocol."""

    def test_unknown_extensions(self) -> None:
        """Extensions that nobody knows here are kept apart and do no harm."""
        extensions = unhex("0001 0000 8000 0003 010203")
        hello = decode_hello(PREFIX + hello_terms(extensions=extensions))
        self.assertEqual(hello.name, "far")
        self.assertEqual(hello.extensions, {1: b"", 0x8000: b"\x01\x02\x03"})

    def test_reserved_terms(self) -> None:
        """The two bytes in front of the limits are ignored on receipt."""
        terms = bytearray(hello_terms())
        terms[:2] = b"\xff\xff"
        self.assertEqual(decode_hello(PREFIX + bytes(terms)), decode_hello(PREFIX + hello_terms()))

    def test_extensions_both_ways(self) -> None:
        """What is encoded is decoded, whatever it is."""
        for extensions in ({}, {0: b""}, {1: b"a" * 500, 2: b"", 65535: bytes(3)}):
            self.assertEqual(decode_extensions(encode_extensions(extensions), "OPEN"), extensions)

    def test_too_many_extensions(self) -> None:
        """Extensions that would not fit into a frame are the caller's mistake, before anything is sent."""
        with self.assertRaises(LocalError):
            Hello("hv-a", INSTANCE, LIMITS, {1: bytes(5000)}).encode()


class RefusedTests(SynchronousTestCase):
    """What is no introduction."""

    def refused(self, payload: bytes, code: int = ErrorCode.PROTOCOL_ERROR) -> str:
        """@return: what is said of it."""
        with self.assertRaises(RemoteProtocolError) as caught:
            decode_hello(payload)
        self.assertEqual(caught.exception.code, code)
        return str(caught.exception)

    def test_other_version(self) -> None:
        """Another version is refused with both versions in the text, whatever the rest looks like."""
        for version in (0, 2, 65535):
            for rest in (hello_terms(), b"", b"\xff" * 100):
                for decode in (decode_hello, decode_welcome):
                    with self.assertRaises(RemoteProtocolError) as caught:
                        decode(b"relaymux" + u16(version) + rest)
                    self.assertEqual(caught.exception.code, ErrorCode.VERSION_UNSUPPORTED)
                    self.assertIn(f"version {version}", str(caught.exception))
                    self.assertIn("version 1", str(caught.exception))

    def test_another_protocol(self) -> None:
        """Who does not begin with our word is told that this is another protocol."""
        for payload in (b"", b"relaymux", b"relaymux\x00", b"Relaymux\x00\x01", b"SSH-2.0-OpenSSH_9"):
            self.assertIn("relaymux", self.refused(payload))

    def test_every_truncation(self) -> None:
        """An introduction that ends anywhere before its end is refused."""
        for text, decode in ((HELLO, decode_hello), (WELCOME, decode_welcome)):
            whole = unhex(text)
            # Without its extensions it is whole, too, and with the first of them.
            valid = {len(whole), len(whole) - 4, len(whole) - 10}
            for end in range(len(whole)):
                if end not in valid:
                    with self.assertRaises(RemoteProtocolError):
                        decode(whole[:end])

    def test_names(self) -> None:
        """A name is 1 to 64 of the allowed letters: it goes into logs."""
        for name in (b"", b"a b", b"a\nb", b"a/b", b"\xc3\xa4", b"\x00", b"a" * 65, b"\x1b[31m"):
            self.refused(PREFIX + hello_terms(name))
        for name in (b"a", b"a" * 64, b"A.b_c-9"):
            self.assertEqual(decode_hello(PREFIX + hello_terms(name)).name, name.decode())

    def test_name_beyond_the_end(self) -> None:
        """A length of the name that points behind the payload is refused."""
        terms = hello_terms(b"abc")
        self.refused(PREFIX + terms[:-4] + b"\x04abc")

    def test_limits_too_small_or_large(self) -> None:
        """Limits with which nothing could be sent are refused by name."""
        for key, value in (
            ("max_payload", 0),
            ("max_payload", 1023),
            ("window", 1023),
            ("window", 2**62),
            ("replay", 4095),
            ("replay", 2**64 - 1),
        ):
            self.assertIn(key, self.refused(PREFIX + hello_terms(**{key: value})))  # type: ignore[arg-type]
        self.assertIn("silence", self.refused(PREFIX + hello_terms(silence_ms=0)))

    def test_no_streams_at_all(self) -> None:
        """A peer that takes no streams may say so."""
        self.assertEqual(decode_hello(PREFIX + hello_terms(max_streams=0)).limits.max_streams, 0)

    def test_extensions(self) -> None:
        """Extensions that are cut off or there twice are refused."""
        for extensions in (b"\x00", b"\x00\x01\x00", "0001 0001", "0001 0000 0001 0000", "0001 ffff 00"):
            data = unhex(extensions) if isinstance(extensions, str) else extensions
            self.refused(PREFIX + hello_terms(extensions=data))

    def test_short_codes(self) -> None:
        """Frames that begin with a code have one."""
        for data in (b"", b"\x00", b"\x00\x01\x00"):
            with self.assertRaises(RemoteProtocolError):
                decode_reject(data)
        for data in (b"", b"\x00"):
            with self.assertRaises(RemoteProtocolError):
                decode_coded_text(data, "BYE")


class TextTests(SynchronousTestCase):
    """Texts of a peer end up in logs."""

    def test_one_printable_line(self) -> None:
        """Nothing that moves a cursor or begins a line is left."""
        evil = "a\nb\rc\x1b[31md\x00e\x85f\u2028g\u202eh"
        self.assertEqual(decode_text(evil.encode()), "a?b?c?[31md?e?f?g?h")

    def test_broken_utf8(self) -> None:
        """Bytes that are no UTF-8 are shown as unknown."""
        self.assertEqual(decode_text(b"a\xff\xfeb"), "a\ufffd\ufffdb")

    def test_length(self) -> None:
        """A long text is cut, on both sides, and never inside a character."""
        self.assertEqual(encode_text("x" * 500), b"x" * MAX_TEXT)
        self.assertEqual(decode_text(b"x" * 4000), "x" * MAX_TEXT)
        text = encode_text("ä" * 101 + "x")
        self.assertEqual(text.decode(), "ä" * 100)
        self.assertEqual(encode_text("a" + "ä" * 150).decode(), "a" + "ä" * 99)

    def test_unpaired_surrogates(self) -> None:
        """File names that are no text can be told of all the same."""
        self.assertEqual(encode_text("/run/\udcff.sock"), b"/run/?.sock")


class TermsTests(SynchronousTestCase):
    """Limits go over the wire as they are."""

    def test_defaults(self) -> None:
        """The defaults are in the range a peer accepts."""
        limits = Limits()
        self.assertEqual(decode_hello(Hello("a", INSTANCE, limits).encode()).limits, limits)

    def test_fractions(self) -> None:
        """Times are told to the millisecond."""
        limits = replace(Limits(), silence=0.75, resume_window=1.5)
        self.assertEqual(decode_hello(Hello("a", INSTANCE, limits).encode()).limits, limits)

    def test_longest_hello_fits(self) -> None:
        """The longest name and the most extensions that are allowed fit into one frame."""
        room = 4096 - 10 - 48 - struct.calcsize("!HIIQQII16s") - 65 - 4
        for kind in (Hello, Welcome):
            self.assertLessEqual(len(kind("n" * 64, INSTANCE, LIMITS, {1: bytes(room)}).encode()), 4096)
