"""Tests of following a guest from one host to the other."""

from __future__ import annotations

from pathlib import Path

from relaymux.testing.libvirt.heartbeat import Heartbeat
from relaymux.testing.qemu.console import GuestFailed
from tests.qemu.support import DirectoryTestCase


def ticks(first: int, last: int) -> bytes:
    """@return: what the guest says from one tick to another."""
    return b"".join(b"tick %08d ok\r\n" % number for number in range(first, last + 1))


class HeartbeatTests(DirectoryTestCase):
    """Two files that are one."""

    def setUp(self) -> None:
        super().setUp()
        self.files: tuple[Path, Path] = (self.directory / "a", self.directory / "b")
        self.heart = Heartbeat(self.files)

    def say(self, side: int, said: bytes) -> None:
        with self.files[side].open("ab") as file:
            file.write(said)

    def test_there_and_back(self) -> None:
        """A line that breaks off on one host goes on on the other."""
        whole = ticks(1, 30)
        for side, begin, end in ((0, 0, 100), (1, 100, 333), (0, 333, len(whole))):
            self.say(side, whole[begin:end])
            self.heart.look()
        self.heart.check()
        self.assertEqual(self.heart.last, 30)
        self.assertEqual([side for _, side in self.heart.moves], [0, 1, 0])

    def test_between_looks(self) -> None:
        """What was said on either side since the last look is in its order."""
        self.say(0, ticks(1, 2))
        self.heart.look()
        self.say(1, ticks(4, 5))
        self.say(0, ticks(3, 3))
        self.heart.look()
        self.heart.check()
        self.assertEqual((self.heart.last, self.heart.side), (5, 1))

    def test_wrong(self) -> None:
        """A tick that is missing, one that comes twice, and the guest's own complaint."""
        for number, said in enumerate((ticks(3, 4), ticks(2, 2) + ticks(2, 2), b"BAD page 00000001 ")):
            heart = Heartbeat((self.directory / f"{number}a", self.directory / f"{number}b"))
            (self.directory / f"{number}a").write_bytes(ticks(1, 1) + said)
            heart.look()
            self.assertRaises(GuestFailed, heart.check)

    def test_both_run(self) -> None:
        """A guest that goes on where it has left."""
        self.say(0, ticks(1, 2))
        self.heart.look()
        self.say(1, ticks(3, 3))
        self.heart.look()
        self.say(0, ticks(3, 3))
        self.heart.look()
        self.assertRaises(GuestFailed, self.heart.check)

    def test_gap(self) -> None:
        """The longest pause is the guest's, not that between two looks without a tick."""
        self.heart.ticks = [(1, 10.0), (2, 10.5), (3, 10.6), (4, 10.9)]
        self.assertAlmostEqual(self.heart.longest_gap(0), 0.5)
        self.assertAlmostEqual(self.heart.longest_gap(10.4), 0.3)
