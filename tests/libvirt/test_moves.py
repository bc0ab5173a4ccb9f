"""Tests of what virsh is asked, and of what it answers."""

from __future__ import annotations

import asyncio

from twisted.trial.unittest import SynchronousTestCase

from relaymux.testing.libvirt.moves import Move, Route, completed_job

ROUTE = Route("qemu+unix:///system?socket=/c", "unix:///m", "unix:///n")

COMPLETED = """\
Job type:         Completed
Operation:        Incoming migration
Time elapsed:     2375         ms
Data processed:   41.211 MiB
Memory total:     64.508 MiB
Memory bandwidth: 231.564 MiB/s
Iteration:        3
Total downtime:   76           ms
"""


class FakeHost:
    """Answers as virsh does."""

    async def virsh(self, *arguments: str) -> str:
        return COMPLETED


class MoveTests(SynchronousTestCase):
    """The command line."""

    def test_disks(self) -> None:
        """Two disks, with sockets for all three connections."""
        words = Move(("vda", "vdc")).arguments("web1", ROUTE)
        self.assertEqual(
            " ".join(words),
            "migrate --live --unsafe --p2p --copy-storage-all --migrate-disks vda,vdc --domain web1 "
            "--desturi qemu+unix:///system?socket=/c --migrateuri unix:///m --disks-uri unix:///n",
        )

    def test_memory_alone(self) -> None:
        """Without disks there is no socket for them."""
        words = Move((), p2p=False, channels=4).arguments("web1", ROUTE)
        self.assertNotIn("--disks-uri", words)
        self.assertNotIn("--p2p", words)
        self.assertEqual(words[words.index("--parallel-connections") + 1], "4")

    def test_tunnelled(self) -> None:
        """libvirt refuses URIs for what goes through its own connection."""
        words = Move((), tunnelled=True).arguments("web1", ROUTE)
        self.assertIn("--tunnelled", words)
        self.assertNotIn("--migrateuri", words)

    def test_postcopy(self) -> None:
        """Begun, and gone on with."""
        self.assertIn("--postcopy-after-precopy", Move((), postcopy=True).arguments("web1", ROUTE))
        self.assertIn("--postcopy-resume", Move((), postcopy=True, resume=True).arguments("web1", ROUTE))


class FigureTests(SynchronousTestCase):
    """What libvirt tells of a job."""

    def test_units(self) -> None:
        """Bytes and milliseconds, whatever libvirt has chosen; rates stay as they are."""
        figures = asyncio.run(completed_job(FakeHost(), "web1"))  # type: ignore[arg-type]
        self.assertEqual(figures["Time elapsed"], 2375)
        self.assertEqual(figures["Data processed"], 41.211 * 2**20)
        self.assertEqual(figures["Memory bandwidth"], 231.564)
        self.assertEqual(figures["Total downtime"], 76)
        self.assertNotIn("Operation", figures)
