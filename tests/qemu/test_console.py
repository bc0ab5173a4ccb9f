"""Tests of how a guest's console is read, and of what two of them together prove."""

from __future__ import annotations

import asyncio

from twisted.trial.unittest import SynchronousTestCase

from relaymux.testing.qemu.console import Console, GuestFailed, continuity
from tests.qemu.support import run


def lines(first: int, last: int) -> bytes:
    """What the guest prints."""
    return b"".join(b"tick %08d ok\r\n" % number for number in range(first, last + 1))


def console(data: bytes, now: float = 0.0) -> Console:
    """A console with C{data}."""
    made = Console()
    made.feed(data, now)
    return made


class ContinuityTests(SynchronousTestCase):
    """What the destination says must follow what the source said, to the byte."""

    def test_every_place_to_break(self) -> None:
        """Wherever in a line the source stops, the destination may go on, and only there."""
        whole = lines(1, 4)
        for place in range(18, 54):
            found = continuity(console(whole[:place], 1.0), console(whole[place:], 1.5))
            self.assertEqual((found.last, found.end, found.pause), (-(-place // 18), 4, 0.5))

    def wrong(self, source: bytes, destination: bytes) -> str:
        """@return: what is said about these two."""
        return str(self.assertRaises(GuestFailed, continuity, console(source), console(destination)))

    def test_gap(self) -> None:
        """A missing tick is found."""
        self.assertIn("00000004 ok", self.wrong(lines(1, 2), lines(4, 5)))

    def test_overlap(self) -> None:
        """A repeated tick is found."""
        self.assertIn("destination says", self.wrong(lines(1, 3), lines(3, 5)))

    def test_lost_byte(self) -> None:
        """A single missing byte is found."""
        self.assertIn("destination says", self.wrong(lines(1, 3)[:-5], lines(1, 6)[18 * 3 - 4 :]))

    def test_bad(self) -> None:
        """What the guest complains about comes first."""
        self.assertEqual(self.wrong(lines(1, 3), b"BAD page 01 02 03 "), "BAD page 01 02 03")

    def test_silence(self) -> None:
        """A destination on which nothing ticks is no success."""
        self.assertIn("destination's console has no tick", self.wrong(lines(1, 3), b""))


class WaitTests(SynchronousTestCase):
    """Waiting for a tick."""

    def wait(self, chunks: list[bytes], number: int) -> str:
        """@return: what is said while waiting for C{number} on a console that ends; empty for nothing."""

        async def scenario() -> None:
            stream = asyncio.StreamReader()
            made = Console()
            reading = asyncio.ensure_future(made.read_from(stream))
            waiting = asyncio.ensure_future(made.wait_tick(number, 5))
            for chunk in chunks:
                stream.feed_data(chunk)
                await asyncio.sleep(0)
            stream.feed_eof()
            await reading
            await waiting

        try:
            run(scenario(), 10)
        except GuestFailed as error:
            return str(error)
        return ""

    def test_split(self) -> None:
        """A tick counts once its line is whole, however it arrives."""
        self.assertEqual(self.wait([b"tick 0000", b"0001 ok\r", b"\n"], 1), "")
        self.assertIn("ended at tick 0", self.wait([b"tick 0000", b"0001 ok\r"], 1))

    def test_bad(self) -> None:
        """A complaint ends the waiting, once it is complete, or when there is no more of it."""
        numbers = "00000001 00000002 00000003"
        chunks = [lines(1, 2), b"BAD disk 00000", b"001 00000002 0000", b"0003 "]
        self.assertEqual(self.wait(chunks, 9), f"BAD disk {numbers}")
        self.assertEqual(self.wait([lines(1, 2), b"BAD disk 00"], 9), "BAD disk 00")
