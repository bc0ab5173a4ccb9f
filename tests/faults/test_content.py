"""The stamps and their checker, which the other tests here rely on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from twisted.trial.unittest import SynchronousTestCase

from tests.faults.content import BLOCK, Checker, WrongContent, block

FLOW = 0x0102


def content(flow: int = FLOW) -> bytes:
    return b"".join(block(flow, number) for number in range(4))


class CheckerTests(SynchronousTestCase):
    """What is right passes in any pieces; what is wrong is told what it is."""

    def assert_told(self, alter: Callable[[bytes], bytes], *words: str) -> None:
        """The altered content is refused, with these words."""
        checker = Checker(FLOW)
        error = self.assertRaises(WrongContent, checker.feed, memoryview(alter(content())))
        for word in words:
            self.assertIn(word, str(error))

    def test_right_in_any_pieces(self) -> None:
        """Pieces that fit no block, and their position."""
        data = memoryview(content())
        for size in (1000, 65537, len(data)):
            checker = Checker(FLOW)
            for start in range(0, len(data), size):
                checker.feed(data[start : start + size])
            self.assertEqual(checker.position, len(data))

    def test_no_two_words_are_alike(self) -> None:
        """So none can stand for another."""
        both = content(FLOW) + content(FLOW + 1)
        words = {both[i : i + 8] for i in range(0, len(both), 8)}
        self.assertEqual(len(words), 2 * 4 * BLOCK // 8)

    def without(self, size: int, data: bytes) -> bytes:
        return data[:70001] + data[70001 + size :]

    def test_loss(self) -> None:
        """Bytes that do not come, also an odd number of them."""
        for size in (1, 8, 1001, 2 * BLOCK):
            self.assert_told(partial(self.without, size), f"{size:,} bytes are missing")

    def test_duplicate(self) -> None:
        """Bytes that come twice."""
        self.assert_told(lambda data: data[:70001] + data[60001:], "10,000 bytes before comes again")

    def test_swap(self) -> None:
        """Two pieces in the wrong order."""
        self.assert_told(
            lambda data: data[:8000] + data[16000:24000] + data[8000:16000] + data[24000:],
            "from byte 8,00",
            "8,000 bytes are missing, or come later",
        )

    def test_cross_stream(self) -> None:
        """Bytes of another flow."""
        other = content(FLOW + 1)
        self.assert_told(
            lambda data: data[:9000] + other[9000:9500] + data[9500:], "flow 0x103 (cross-stream)"
        )

    def test_damage(self) -> None:
        """One bit."""
        self.assert_told(
            lambda data: data[:70000] + bytes((data[70000] ^ 4,)) + data[70001:], "byte 70,000 on: damaged"
        )
