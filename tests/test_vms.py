"""
Two daemons with a C{[vm]} section each, as libvirt and QEMU would use them.

On one machine the same path cannot be two sockets, so each daemon has a directory of
its own here; below it the paths are those of two hosts.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import stat
import tempfile
from pathlib import Path
from textwrap import dedent

from twisted.trial.unittest import SynchronousTestCase

from tests.daemons import PATIENCE, Daemon, read_all
from tests.test_disks import NOBODY

RAM = "ram.tunnelmigrate.dest.web1"
NBD = "nbd.tunnelmigrate.dest.web1"
CONTROL = "control.web1"


class VmTests(SynchronousTestCase):
    """A VM goes there and back over the same two daemons."""

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rmx"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.directory.chmod(0o755)
        self.seed = random.randrange(2**32)
        self.random = random.Random(self.seed)

    def host(self, name: str, peer: str, way: str, *more: str) -> Daemon:
        """Start the daemon of a host, whose libvirt listens already."""
        (self.directory / name).mkdir(exist_ok=True)
        self.configure(name, peer, way, *more)
        return self.start(name)

    def configure(self, name: str, peer: str, way: str, *more: str) -> None:
        (self.directory / f"{name}.ini").write_text(
            dedent(
                f"""
                [relay]
                name = {name}
                [libvirt]
                directory = {name}/vms
                socket = {name}/libvirt-sock
                qemu-user = {os.geteuid()}
                [link {peer}]
                transport = unix
                {way} = link.sock
                [vm web1]
                link = {peer}
                """
            )
            + "\n".join(more)
        )

    def start(self, name: str) -> Daemon:
        daemon = Daemon(self.directory / f"{name}.ini")
        self.addCleanup(daemon.kill)
        return daemon

    def up(self) -> tuple[Daemon, Daemon]:
        a, b = self.host("hv-a", "hv-b", "listen"), self.host("hv-b", "hv-a", "connect")
        for daemon in (a, b):
            daemon.wait_for(": up, daemon ")
        return a, b

    def listen(self, path: Path) -> socket.socket:
        listening = socket.socket(socket.AF_UNIX)
        self.addCleanup(listening.close)
        listening.settimeout(PATIENCE)
        path.unlink(missing_ok=True)  # as QEMU does
        listening.bind(str(path))
        listening.listen()
        return listening

    def move(self, source: str, destination: str) -> None:
        """What libvirt and the two QEMUs do: control, a connection per disk, the migration."""
        here, there = self.directory / source, self.directory / destination
        # The same path on both hosts, but for what stands for the root of each.
        way = Path("vms") / destination
        libvirt = self.listen(there / "libvirt-sock")
        with self.across(here / way / CONTROL, libvirt):
            nbd, ram = (self.listen(there / way / name) for name in (NBD, RAM))
            for listening, name in ((nbd, NBD), (nbd, NBD), (ram, RAM)):
                with self.across(here / way / name, listening):
                    pass
            for listening, name in ((nbd, NBD), (ram, RAM)):
                listening.close()
                (there / way / name).unlink()

    def across(self, near: Path, far: socket.socket) -> socket.socket:
        """@return: a connection that was used in both directions."""
        connection = socket.socket(socket.AF_UNIX)
        self.addCleanup(connection.close)
        connection.settimeout(PATIENCE)
        connection.connect(str(near))
        other, _ = far.accept()
        with other:
            for one, two in ((connection, other), (other, connection)):
                data = self.random.randbytes(100_000)
                one.sendall(data)
                self.assertEqual(two.recv(len(data), socket.MSG_WAITALL), data, f"seed {self.seed}")
            other.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(connection), b"")
        return connection

    def test_there_and_back(self) -> None:
        """Three times, without a restart; sockets are where virsh is told, before it is called."""
        a, b = self.up()
        for source, destination in (("hv-a", "hv-b"), ("hv-b", "hv-a")):
            made = self.directory / source / "vms" / destination
            names = {path.name for path in made.iterdir() if not path.name.endswith(".lock")}
            self.assertEqual(names, {CONTROL, RAM, NBD})
            self.assertEqual(stat.S_IMODE(made.stat().st_mode), 0o755)
            arrivals = self.directory / destination / "vms" / destination
            self.assertEqual(stat.S_IMODE(arrivals.stat().st_mode), 0o700)
        for _ in range(3):
            self.move("hv-a", "hv-b")
            self.move("hv-b", "hv-a")
        for daemon in (b, a):
            self.assertEqual(daemon.stop(), 0, daemon.output())
            self.assertNotIn("Traceback", daemon.output())
        for name in ("hv-a", "hv-b"):
            left = [path for path in (self.directory / name / "vms").rglob("*") if not path.is_dir()]
            self.assertEqual(left, [])

    def test_given_away(self) -> None:
        """libvirt gives the sockets to QEMU's user; after a stop and after a kill they are made anew."""
        if os.geteuid() != 0:
            self.skipTest("only root can give files away, as libvirt does")
        a, b = self.up()
        for end in (Daemon.stop, Daemon.kill):
            for name in (RAM, NBD):
                os.chown(self.directory / "hv-a/vms/hv-b" / name, NOBODY, NOBODY)
            self.move("hv-a", "hv-b")
            end(a)
            a = self.start("hv-a")
            a.wait_for(": up, daemon ")
        self.move("hv-a", "hv-b")
        self.assertEqual([a.stop(), b.stop()], [0, 0], a.output())

    def test_one_way(self) -> None:
        """With direction = out the peer reaches nothing here: neither a VM's sockets nor libvirt."""
        (self.directory / "hv-a").mkdir()
        libvirt = self.listen(self.directory / "hv-a/libvirt-sock")
        a = self.host("hv-a", "hv-b", "listen", "direction = out")
        b = self.host("hv-b", "hv-a", "connect")
        for daemon in (a, b):
            daemon.wait_for(": up, daemon ")
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(PATIENCE)
            control.connect(str(self.directory / "hv-b/vms/hv-a" / CONTROL))
            self.assertEqual(control.recv(1), b"")
        a.wait_for("the peer asked for web1.control, which no section")
        libvirt.setblocking(False)
        self.assertRaises(BlockingIOError, libvirt.accept)
        self.move("hv-a", "hv-b")

    def test_wrong_name(self) -> None:
        """A link that is not called as the other daemon would lead nowhere: said when they meet."""
        a = self.host("hv-a", "hv-c", "listen")
        self.host("hv-b", "hv-a", "connect")
        a.wait_for("the other daemon is called hv-b, and the sockets of [vm] sections will not meet")
