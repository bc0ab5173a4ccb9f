"""Tests of the hosts themselves: that there are two, and that nothing is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

from relaymux.testing.libvirt.install import Edition, LibvirtUnavailable, installed_libvirt
from relaymux.testing.libvirt.rig import Rig, RigUnavailable, check_machine
from tests.libvirt.support import LibvirtTestCase
from tests.qemu.support import DirectoryTestCase, run

#: Says which processes its hosts are, and waits to be killed.
WAITING = """
import asyncio
from relaymux.testing.libvirt.rig import Rig

async def main():
    async with Rig() as rig:
        print(*(host.pid for host in rig.hosts), *(host.libvirtd_pid for host in rig.hosts), flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


class RigTests(LibvirtTestCase):
    """Two hosts that do not know of each other but through their link."""

    def test_apart(self) -> None:
        """Each libvirt has its own identity and its own files, and they reach one another."""

        async def scenario() -> None:
            async with Rig() as hosts:
                one, other = hosts.hosts
                self.assertNotIn(other.uuid, await one.virsh("capabilities"))
                for place in ("/etc/libvirt/mark", "/var/lib/libvirt/mark", "/run/mark"):
                    one.path(place).touch()
                    self.assertFalse(other.path(place).exists())
                    self.assertFalse(Path(place).exists())
                self.assertEqual((await one.run("hostname")).output, "hv-a\n")
                await other.run("bash", "-c", "exec 3<>/dev/tcp/hv-a/16509")
                self.assertEqual(await hosts.network.dialled(), 1)

        run(scenario())

    def test_crash(self) -> None:
        """When the process that holds them is killed, nothing of the hosts stays."""
        holder = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, text=True)
        try:
            assert holder.stdout is not None
            pids = [int(word) for word in holder.stdout.readline().split()]
            self.assertEqual(len(pids), 4)
        finally:
            os.kill(holder.pid, signal.SIGKILL)
            holder.communicate()
        until = time.monotonic() + 20
        while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
            self.assertLess(time.monotonic(), until, f"{left} are still there")
            time.sleep(0.05)


class UnavailableTests(DirectoryTestCase):
    """Where there can be no hosts it is said why."""

    def test_not_root(self) -> None:
        """Namespaces and overlays need root."""
        with mock.patch("os.geteuid", return_value=1000):
            error = self.assertRaises(RigUnavailable, check_machine)
        self.assertIn("need root", str(error))

    def test_no_tools(self) -> None:
        """What is missing is named."""
        with (
            mock.patch("os.geteuid", return_value=0),
            mock.patch("shutil.which", return_value=None),
        ):
            error = self.assertRaises(RigUnavailable, check_machine)
        self.assertIn("no unshare, nsenter", str(error))

    def test_no_namespaces(self) -> None:
        """The kernel's own words are in the message."""
        answer = subprocess.CompletedProcess([], 1, "", "unshare: Operation not permitted\n")
        with (
            mock.patch("os.geteuid", return_value=0),
            mock.patch("subprocess.run", return_value=answer),
        ):
            error = self.assertRaises(RigUnavailable, check_machine)
        self.assertIn("unshare: Operation not permitted", str(error))

    def test_no_libvirt(self) -> None:
        """What is missing is named, and how to get it."""
        with mock.patch.dict(os.environ, {"RELAYMUX_QEMU_CACHE": str(self.directory / "qemu")}):
            error = self.assertRaises(LibvirtUnavailable, installed_libvirt, Edition.RELEASE)
        self.assertIn("there is no libvirtd, virsh", str(error))
        self.assertIn("relaymux.testing.libvirt.install release", str(error))
