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
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from relaymux.core.handshake import Limits
from relaymux.net.peer import Identity, Peer
from relaymux.service.anyvm import MOST_ARRIVING, AnyVm
from relaymux.service.config_sections import LibvirtSection, LinkSection, ServiceSection, VmSection
from relaymux.service.sockets import LocalSockets
from tests.daemons import PATIENCE, Daemon, read_all, read_exactly
from tests.test_disks import NOBODY

RAM = "ram.tunnelmigrate.dest.web1"
NBD = "nbd.tunnelmigrate.dest.web1"
CONTROL = "control.web1"


class VmTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rmx"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.directory.chmod(0o755)
        self.seed = random.randrange(2**32)
        self.random = random.Random(self.seed)

    #: What the section of a VM is called.
    SECTION = "vm web1"

    def host(self, name: str, peer: str, way: str, *more: str) -> Daemon:
        """Start the daemon of a host, whose libvirt listens already."""
        (self.directory / name / "qemu").mkdir(parents=True, exist_ok=True)
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
                state-directory = {name}/qemu
                qemu-user = {os.geteuid()}
                [link {peer}]
                transport = unix
                {way} = link.sock
                [{self.SECTION}]
                link = {peer}
                """
            )
            + "\n".join(more)
        )

    def start(self, name: str) -> Daemon:
        daemon = Daemon(self.directory / f"{name}.ini")
        self.addCleanup(daemon.kill)
        return daemon

    def until(self, wanted: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not wanted():
            self.assertLess(time.monotonic(), deadline, f"waited in vain until {what}")
            time.sleep(0.02)

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
                self.assertEqual(read_exactly(two, len(data)), data, f"seed {self.seed}")
            other.shutdown(socket.SHUT_WR)
            self.assertEqual(read_all(connection), b"")
        return connection


class VmTests(VmTestCase):
    """A VM goes there and back over the same two daemons."""

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
        (self.directory / "hv-a/qemu").mkdir(parents=True)
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

    def test_libvirt_gives_up(self) -> None:
        """While the other host is away libvirt closes: the disks end then, and not with the session."""
        a, b = self.up()
        there, way = self.directory / "hv-b", Path("vms") / "hv-b"
        opened = []
        for name, place in ((CONTROL, "libvirt-sock"), (NBD, way / NBD), (RAM, way / RAM)):
            listening = self.listen(there / place)
            connection = socket.socket(socket.AF_UNIX)
            self.addCleanup(connection.close)
            connection.settimeout(PATIENCE)
            connection.connect(str(self.directory / "hv-a" / way / name))
            other, _ = listening.accept()
            self.addCleanup(other.close)
            other.sendall(b"x")
            self.assertEqual(read_exactly(connection, 1), b"x")
            opened.append(connection)
        control, disk, ram = opened
        b.kill()
        a.wait_for("streams wait for the next connection")
        control.close()
        self.assertEqual(read_all(disk), b"")
        a.wait_for(
            "vm web1 nbd: connection 1 ended as an error: relaymux gave up: link hv-b is away, and libvirt"
        )
        ram.setblocking(False)
        with self.assertRaises(BlockingIOError):
            ram.recv(1)

    def test_link_in_place_of_a_socket(self) -> None:
        """What QEMU's user may make where VMs arrive does not lead the daemon to libvirt's socket."""
        _, b = self.up()
        libvirt = self.listen(self.directory / "hv-b/libvirt-sock")
        for name, part in ((RAM, "ram"), (NBD, "nbd")):
            there = self.directory / "hv-b/vms/hv-b" / name
            there.symlink_to(self.directory / "hv-b/libvirt-sock")
            with socket.socket(socket.AF_UNIX) as near:
                near.settimeout(PATIENCE)
                near.connect(str(self.directory / "hv-a/vms/hv-b" / name))
                self.assertEqual(near.recv(1), b"")
            b.wait_for(f"vm web1 {part}: connection 1 failed: cannot connect to")
            there.unlink()
        self.assertEqual(b.output().count("it is a symbolic link, which is not followed"), 2)
        libvirt.setblocking(False)
        self.assertRaises(BlockingIOError, libvirt.accept)
        self.move("hv-a", "hv-b")

    def test_wrong_name(self) -> None:
        """A link that is not called as the other daemon would lead nowhere: said when they meet."""
        a = self.host("hv-a", "hv-c", "listen")
        self.host("hv-b", "hv-a", "connect")
        a.wait_for("the other daemon is called hv-b, and the sockets of [vm] sections will not meet")


class AnyVmTests(VmTestCase):
    """Whichever VM runs on a host has its sockets there, and any may arrive."""

    SECTION = "vm *"

    def runs(self, host: str, name: str) -> Path:
        """libvirt has started a VM."""
        file = self.directory / host / "qemu" / f"{name}.xml"
        file.touch()
        return file

    def names(self, host: str, destination: str) -> set[str]:
        """The sockets of C{host} for VMs that go to C{destination}."""
        directory = self.directory / host / "vms" / destination
        return {path.name for path in directory.iterdir() if not path.name.endswith(".lock")}

    def test_comes_and_goes(self) -> None:
        """A VM that is started has sockets, moves, and comes back; where it does not run it has none."""
        (self.directory / "hv-a/qemu").mkdir(parents=True)
        here = self.runs("hv-a", "web1")
        a, b = self.up()
        self.assertEqual(self.names("hv-a", "hv-b"), {CONTROL, RAM, NBD})
        self.assertEqual(self.names("hv-b", "hv-a"), set())
        for _ in range(2):
            self.move("hv-a", "hv-b")
            there = self.runs("hv-b", "web1")
            here.unlink()
            self.until(lambda: self.names("hv-b", "hv-a") == {CONTROL, RAM, NBD}, "it could go back")
            self.until(lambda: not self.names("hv-a", "hv-b"), "its sockets had gone")
            self.move("hv-b", "hv-a")
            here = self.runs("hv-a", "web1")
            there.unlink()
            self.until(lambda: self.names("hv-a", "hv-b") == {CONTROL, RAM, NBD}, "it could go again")
        for daemon in (b, a):
            self.assertEqual(daemon.stop(), 0, daemon.output())
            self.assertNotIn("Traceback", daemon.output())
        left = [path for path in self.directory.rglob("vms/*/*") if not path.is_dir()]
        self.assertEqual(left, [])

    def test_connections_outlive_the_socket(self) -> None:
        """What moves a VM goes on when it does not run here any more."""
        (self.directory / "hv-a/qemu").mkdir(parents=True)
        here = self.runs("hv-a", "web1")
        self.up()
        far = self.listen(self.directory / "hv-b/vms/hv-b" / RAM)
        with socket.socket(socket.AF_UNIX) as near:
            near.settimeout(PATIENCE)
            near.connect(str(self.directory / "hv-a/vms/hv-b" / RAM))
            other, _ = far.accept()
            with other:
                here.unlink()
                self.until(lambda: not self.names("hv-a", "hv-b"), "its sockets had gone")
                near.sendall(b"the last of it")
                near.shutdown(socket.SHUT_WR)
                self.assertEqual(read_all(other), b"the last of it")

    def test_own_section(self) -> None:
        """A VM with a section of its own has what that section says, and no more."""
        (self.directory / "hv-a/qemu").mkdir(parents=True)
        self.runs("hv-a", "web1")
        self.runs("hv-a", "db1")
        a = self.host("hv-a", "hv-b", "listen", "[vm db1]", "link = hv-b", "direction = in")
        b = self.host("hv-b", "hv-a", "connect", "[vm web1]", "link = hv-a", "direction = out")
        for daemon in (a, b):
            daemon.wait_for(": up, daemon ")
        self.assertEqual(self.names("hv-a", "hv-b"), {CONTROL, RAM, NBD})
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(PATIENCE)
            control.connect(str(self.directory / "hv-a/vms/hv-b" / CONTROL))
            self.assertEqual(control.recv(1), b"")
        b.wait_for("the peer asked for web1.control, which no section")

    def test_names_that_cannot_be(self) -> None:
        """A VM with a name that relaymux cannot take is told of, once; the others have their sockets."""
        (self.directory / "hv-a/qemu").mkdir(parents=True)
        for name in ("web 1", "w" * 57, "x" * 56, "web1"):
            self.runs("hv-a", name)
        a = self.host("hv-a", "hv-b", "listen")
        a.wait_for("vm web1: runs here, and may leave over hv-b")
        self.runs("hv-a", "web2")
        a.wait_for("vm web2: runs here")
        self.assertEqual(a.output().count("'web 1' gets no sockets"), 1)
        self.assertEqual(a.output().count("gets no sockets"), 2)

    def test_what_was_in_the_way(self) -> None:
        """A VM whose sockets cannot be made is told of once, and has them when nothing is in the way."""
        (self.directory / "hv-a/qemu").mkdir(parents=True)
        a = self.host("hv-a", "hv-b", "listen")
        a.wait_for("relaymux hv-a started")
        stranger = self.directory / "hv-a/vms/hv-b" / RAM
        stranger.touch()
        self.runs("hv-a", "web1")
        a.wait_for("vm web1: it cannot leave: cannot listen on")
        self.runs("hv-a", "web2")
        a.wait_for("vm web2: runs here")
        self.assertEqual(a.output().count("it cannot leave"), 1)
        stranger.unlink()
        a.wait_for("vm web1: runs here, and may leave over hv-b")
        self.assertLessEqual({CONTROL, RAM, NBD}, self.names("hv-a", "hv-b"))

    def test_killed(self) -> None:
        """What a killed daemon left of a VM is removed if that does not run any more, and else made anew."""
        (self.directory / "hv-a/qemu").mkdir(parents=True)
        gone = self.runs("hv-a", "db1")
        self.runs("hv-a", "web1")
        a = self.host("hv-a", "hv-b", "listen")
        a.wait_for("vm web1: runs here")
        self.assertEqual(len(self.names("hv-a", "hv-b")), 6)
        a.kill()
        gone.unlink()
        stranger = self.directory / "hv-a/vms/hv-b/control.notes"
        stranger.touch()
        a = self.start("hv-a")
        a.wait_for("relaymux hv-a started")
        self.assertEqual(self.names("hv-a", "hv-b"), {CONTROL, RAM, NBD, stranger.name})
        self.assertEqual(a.stop(), 0, a.output())
        self.assertEqual(list(stranger.parent.iterdir()), [stranger])

    def test_many_arrive(self) -> None:
        """A peer that invents names costs a bounded number of them."""
        clock = Clock()
        link = LinkSection("hv-b", "tcp", "listen", ("x",))
        peer = Peer(clock, "hv-b", Identity("hv-a", bytes(16)), Limits(), dialing=False)
        sockets = LocalSockets(clock, {"hv-b": peer})
        services = tuple(
            ServiceSection("vm", f"*.{part}", link.name, "connect", Path(f"/x/{part}.*"), vm="*", part=part)
            for part in ("control", "ram", "nbd")
        )
        vm = VmSection("*", ("hv-b",), "in", services)
        any_vm = AnyVm(clock, sockets, vm, LibvirtSection(), frozenset({"db1"}))
        first = any_vm.find("hv-b", "web0.ram")
        self.assertIsNotNone(first)
        self.assertIs(any_vm.find("hv-b", "web0.ram"), first)
        for number in range(10 * MOST_ARRIVING):
            self.assertIsNotNone(any_vm.find("hv-b", f"web{number}.ram"))
            self.assertLessEqual(len(sockets), 3 * MOST_ARRIVING)
        for name in ("db1.ram", "web1", "web1.other", ".ram"):
            self.assertIsNone(any_vm.find("hv-b", name), name)
