"""Tests of cutting the link while QEMU uses it: nobody but the daemons is to notice."""

from __future__ import annotations

from unittest import skipUnless

from twisted.trial.unittest import SynchronousTestCase

from relaymux.testing.qemu.cuts import phases_to_cut
from relaymux.testing.qemu.outages import Outage, outages
from relaymux.testing.qemu.plan import Mode
from tests.qemu.support import THOROUGH, CopyTestCase, RelayedTestCase

thorough = skipUnless(THOROUGH, "takes minutes; RELAYMUX_THOROUGH=1 runs it")


class CutCopyTests(CopyTestCase):
    """A short copy through cuts."""

    size_mib = 96

    def test_nbdcopy(self) -> None:
        """Three cuts each way through TLS."""
        self.copy_both_ways("tls", "nbdcopy", "nbdcopy", cuts=3)


@thorough
class ThoroughCutCopyTests(CopyTestCase):
    """Ten cuts each way."""

    def test_nbdcopy_tls(self) -> None:
        """C{nbdcopy} with several connections at once, through TLS."""
        self.copy_both_ways("tls", "nbdcopy", "nbdcopy", cuts=10)

    def test_qemu_img_tcp(self) -> None:
        """C{qemu-img} through TCP."""
        self.copy_both_ways("tcp", "qemu-img", "qemu-img", cuts=10)

    def test_nbdcopy_unix(self) -> None:
        """C{nbdcopy} through a UNIX socket, which ends in its own way."""
        self.copy_both_ways("unix", "nbdcopy", "nbdcopy", cuts=10)


class CutMigrationTests(RelayedTestCase):
    """A short migration through cuts."""

    def test_plain_tls(self) -> None:
        """One cut while the disks are copied, one while the memory goes, one in the switchover."""
        self.migrate("tls", Mode.PLAIN, cuts=3, disk_mib=32)


@thorough
class ThoroughCutMigrationTests(RelayedTestCase):
    """
    Cuts in all phases of a migration with a guest that writes all the while.

    QEMU does not dial again by itself, and its first block job error, a pause of
    postcopy, a byte of a disk, a page or a tick that is wrong: each fails the test.
    """

    def test_plain_tls(self) -> None:
        """Five cuts."""
        self.migrate("tls", Mode.PLAIN, cuts=5)

    def test_multifd_tls(self) -> None:
        """Five cuts, with five connections for the memory."""
        self.migrate("tls", Mode.MULTIFD, cuts=5)

    def test_plain_tcp(self) -> None:
        """Twelve cuts through TCP, with the smallest windows and replay buffer that a file may have."""
        self.migrate("tcp", Mode.PLAIN, cuts=12, small=True)

    def test_postcopy_tls(self) -> None:
        """Two cuts when the guest has moved and half of its memory has not."""
        self.migrate("tls", Mode.POSTCOPY, cuts=2)

    def test_postcopy_unix(self) -> None:
        """Seven cuts through a UNIX socket, before the guest moves and after."""
        self.migrate("unix", Mode.POSTCOPY, cuts=7)


class PhasesTests(SynchronousTestCase):
    """Where cuts are made."""

    def test_each_phase(self) -> None:
        """Five cuts reach every phase, in every mode."""
        for mode in Mode:
            self.assertEqual(len(phases_to_cut(mode, 5)), 4)

    def test_number(self) -> None:
        """There are as many as are wanted, and no two in a phase that is a moment."""
        for count in range(30):
            phases = phases_to_cut(Mode.PLAIN, count)
            self.assertEqual(phases.total(), count)
            self.assertLessEqual(phases["switching over"], 1)
            self.assertLessEqual(phases["handing over"], 1)

    def test_postcopy(self) -> None:
        """The first two are made when the guest has moved."""
        self.assertEqual(phases_to_cut(Mode.POSTCOPY, 2), {"fetching memory": 2})


class OutagesTests(SynchronousTestCase):
    """What is read from a log."""

    down = (
        "link hv-b: down: connection lost: Connection was closed; 3 streams wait for the next connection,"
        " up to 60 s, 1234 bytes from here not acknowledged\n"
    )
    back = (
        "link hv-b: resumed after 0.3 s, connection 2, generation 1;"
        " 3 streams go on, 99 bytes sent again, 0 lost\n"
    )

    def test_over(self) -> None:
        """An outage that is over."""
        self.assertEqual(outages(self.down + self.back), [Outage(3, 1234, 0.3, 99, 0)])

    def test_lasting(self) -> None:
        """One that is over, and one that is not."""
        self.assertEqual(
            outages(self.down + self.back + self.down), [Outage(3, 1234, 0.3, 99, 0), Outage(3, 1234)]
        )

    def test_unnoticed(self) -> None:
        """The peer was back before this daemon had noticed."""
        self.assertEqual(outages(self.back), [Outage(0, 0, 0.3, 99, 0)])
