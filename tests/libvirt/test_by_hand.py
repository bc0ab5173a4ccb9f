"""Tests of the hosts that a person starts to try things on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from relaymux.testing.libvirt import __main__ as by_hand
from tests.libvirt.support import LibvirtTestCase


class ByHandTests(LibvirtTestCase):
    """C{python -m relaymux.testing.libvirt}."""

    def rig(self, *arguments: str) -> tuple[int, str]:
        """@return: the exit status, and all that was said."""
        result = subprocess.run(
            [sys.executable, "-m", "relaymux.testing.libvirt", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        return result.returncode, result.stdout

    def test_up_and_down(self) -> None:
        """Hosts with a machine; its move as printed works; and nothing is left."""
        if by_hand.current_state() is not None:
            self.skipTest("somebody has hosts up here, which this test would end")
        self.addCleanup(self.rig, "down")
        status, said = self.rig("up")
        self.assertEqual(status, 0, said)
        there = next(line.strip() for line in said.splitlines() if line.strip().startswith("virsh"))
        self.assertEqual(self.rig("up"), (1, "the hosts are up; 'down' ends them\n"))
        status, said = self.rig("shell", "hv-a", "sh", "-c", there)
        self.assertEqual(status, 0, said)
        self.assertEqual(self.rig("shell", "hv-b", "virsh", "list", "--name")[1].split(), ["web1"])
        state = by_hand.current_state()
        assert state is not None
        self.assertEqual(self.rig("down"), (0, ""))
        self.assertEqual(self.rig("status"), (1, "there are no hosts\n"))
        self.assertEqual([pid for pid in state.values() if Path(f"/proc/{pid}").exists()], [])

    def test_none(self) -> None:
        """Without hosts there is nothing to enter."""
        if by_hand.current_state() is not None:
            self.skipTest("somebody has hosts up here")
        self.assertEqual(self.rig("shell", "hv-a"), (1, "there are no hosts; 'up' starts them\n"))
