"""Tests of what is read from a relay's log about the ends of connections: real lines of it."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from relaymux.testing.libvirt.endings import connection_ends, one_line_each

BEGUN = """\
[relaymux#info] vm web1 control: connection 1 open, /run/c, stream 1 of link hv-b
[relaymux#info] vm web1 nbd: connection 1 open, /run/n, stream 3 of link hv-b
[relaymux#info] vm web1 nbd: connection 1 is disk drive-virtio-disk0, 64.0 MiB (67108864 bytes)
[relaymux#info] vm web10 nbd: connection 1 open, /run/n, stream 5 of link hv-b
"""

CONTROL = (
    "[relaymux#warn] vm web1 control: connection 1 ended as an error: the connection to the program here"
    " broke: Broken pipe; 28 bytes were not taken., 3.8 KiB (3912 bytes) sent, 116 bytes received, 60.7 s,"
    " 84 bytes/s; 140 bytes are not known to have been delivered at the other end, 140 bytes were not taken"
    " by the program here; /run/c\n"
)

DISK = (
    "[relaymux#warn] vm web1 nbd: connection 1 (disk drive-virtio-disk0) ended as an error: relaymux gave up:"
    " link hv-b is away, and libvirt here has closed its control connection, 11.9 MiB (12491275 bytes) sent,"
    " 359 bytes received, 30.5 s, 400.1 KiB/s; 788864 bytes are not known to have been delivered at the other"
    " end; /run/n\n"
)

CLOSED = (
    "[relaymux#info] vm web1 nbd: connection 1 closed by the program here, 0 bytes sent, 0 bytes received,"
    " 0.1 s, 0 bytes/s; relaymux has delivered all it had; /run/n\n"
)

SHORT = (
    "[relaymux#info] vm web1 ram: connection 1 closed by the program here, 16 bytes sent, 0 bytes received,"
    " 0.0 s, 0 bytes/s; relaymux has delivered all it had; /run/r, stream 7 of link hv-b\n"
)

GAVE_UP = {"nbd": "relaymux gave up: link hv-b is away"}


class EndTests(SynchronousTestCase):
    """Lines of a log, and which of them will not do."""

    def test_read(self) -> None:
        """What ended, whose decision it was, what was not delivered."""
        begun, ends = connection_ends(BEGUN + CONTROL + DISK, "web1")
        self.assertEqual(begun, [("control", "1"), ("nbd", "1")])
        control, disk = ends
        self.assertIn("the connection to the program here broke: ", control.whose)
        self.assertIn("140 bytes were not taken by the program here", control.left)
        self.assertTrue(disk.whose.endswith("libvirt here has closed its control connection"), disk.whose)
        self.assertEqual(disk.left, "788864 bytes are not known to have been delivered at the other end")

    def test_good(self) -> None:
        """One line for each."""
        self.assertTrue(one_line_each("hv-a", BEGUN + CONTROL + DISK, "web1", GAVE_UP).passed)
        self.assertTrue(one_line_each("hv-a", BEGUN + CONTROL + CLOSED, "web1", {}).passed)
        self.assertTrue(one_line_each("hv-a", BEGUN + CONTROL + CLOSED + SHORT, "web1", {}).passed)

    def test_wrong(self) -> None:
        """None, one too few, one too many, another decision, a part that was to be there."""
        for log in (
            "",
            BEGUN,
            BEGUN + DISK,
            BEGUN + CONTROL + DISK + DISK,
            BEGUN + CONTROL + CLOSED,
            SHORT * 2,
        ):
            check = one_line_each("hv-a", log, "web1", GAVE_UP)
            self.assertFalse(check.passed, log)
        self.assertFalse(one_line_each("hv-a", BEGUN + CONTROL + DISK, "web1", {"ram": ""}).passed)
