"""Tests of NBD through the relay, with the programs that people use for it."""

from __future__ import annotations

from tests.qemu.support import CopyTestCase


class CopyTests(CopyTestCase):
    """Through a link that holds."""

    def test_nbdcopy(self) -> None:
        """C{nbdcopy}, which uses several connections at once, both ways through TLS."""
        self.copy_both_ways("tls", "nbdcopy", "nbdcopy")

    def test_qemu_img(self) -> None:
        """C{qemu-img} both ways through TCP."""
        self.copy_both_ways("tcp", "qemu-img", "qemu-img")
