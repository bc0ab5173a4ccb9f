"""C{[vm NAME]} and C{[libvirt]}: what they come to, and what is said about wrong ones."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from pathlib import Path
from textwrap import dedent
from unittest import mock

from twisted.internet.task import Clock
from twisted.trial.unittest import SynchronousTestCase

from relaymux.service.config import (
    Configuration,
    ServiceSection,
    check_configuration,
    load_configuration,
    read_configuration,
)
from relaymux.service.config_sections import DirectoryToMake

PROJECT = Path(__file__).parent.parent

HOST_A = """
    [relay]
    name = hv-a
    [link hv-b]
    transport = tcp
    connect = 192.0.2.2:16515
    [vm web1]
    link = hv-b
    """


class VmTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rmx"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.file = self.directory / "relay.ini"

    def load(self, text: str) -> Configuration:
        self.file.write_text(dedent(text))
        return load_configuration(self.file)

    def errors(self, text: str) -> list[str]:
        self.file.write_text(dedent(text))
        _, problems = read_configuration(self.file)
        return [str(problem).removeprefix(f"{self.file}: ") for problem in problems]

    def check(self, text: str) -> list[str]:
        problems = check_configuration(self.load(text), Clock())
        return [str(problem).removeprefix(f"{self.file}: ") for problem in problems]

    def sockets(self, text: str, role: str) -> dict[tuple[str, str], str]:
        """@return: paths, by link and name on the wire."""
        services = self.load(text).services
        return {(s.link, s.name): str(s.path) for s in services if s.role == role}


class ExpansionTests(VmTestCase):
    """One section stands for all sockets of a VM."""

    def test_smallest(self) -> None:
        """Two lines: the VM may leave and arrive, and every path contains where it arrives."""
        run = "/run/libvirt/relaymux"
        self.assertEqual(
            self.sockets(HOST_A, "listen"),
            {
                ("hv-b", "web1.control"): f"{run}/hv-b/control.web1",
                ("hv-b", "web1.ram"): f"{run}/hv-b/ram.tunnelmigrate.dest.web1",
                ("hv-b", "web1.nbd"): f"{run}/hv-b/nbd.tunnelmigrate.dest.web1",
            },
        )
        self.assertEqual(
            self.sockets(HOST_A, "connect"),
            {
                ("hv-b", "web1.control"): "/run/libvirt/virtqemud-sock",
                ("hv-b", "web1.ram"): f"{run}/hv-a/ram.tunnelmigrate.dest.web1",
                ("hv-b", "web1.nbd"): f"{run}/hv-a/nbd.tunnelmigrate.dest.web1",
            },
        )

    def test_both_hosts(self) -> None:
        """What one host makes, QEMU makes at the same path on the other one: for both directions."""
        host_b = HOST_A.replace("hv-a", "x").replace("hv-b", "hv-a").replace("name = x", "name = hv-b")
        for text, other in ((HOST_A, host_b), (host_b, HOST_A)):
            made, dialled = self.sockets(text, "listen"), self.sockets(other, "connect")
            for (_, name), path in made.items():
                if not name.endswith(".control"):
                    self.assertIn(path, [p for (_, n), p in dialled.items() if n == name])
            self.assertFalse(set(made.values()) & set(self.sockets(text, "connect").values()))

    def test_libvirt_of_either_kind(self) -> None:
        """The modular daemon's socket, else libvirtd's; a key names another one."""
        (control,) = [s for s in self.load(HOST_A).services if s.role == "connect" and s.part == "control"]
        self.assertEqual(control.others, (Path("/run/libvirt/libvirt-sock"),))
        text = HOST_A + "[libvirt]\nsocket = libvirt-sock\ndirectory = run\n"
        (control,) = [s for s in self.load(text).services if s.role == "connect" and s.part == "control"]
        self.assertEqual((control.path, control.others), (self.directory / "libvirt-sock", ()))
        self.assertEqual(
            self.sockets(text, "listen")["hv-b", "web1.control"], f"{self.directory}/run/hv-b/control.web1"
        )

    def test_direction(self) -> None:
        """Who only lets VMs out dials no libvirt, and who only takes them in makes no socket."""
        for direction, listens, connects in (("out", 3, 0), ("in", 0, 3), ("both", 3, 3)):
            text = HOST_A + f"direction = {direction}\n"
            self.assertEqual(
                (len(self.sockets(text, "listen")), len(self.sockets(text, "connect"))), (listens, connects)
            )

    def test_several_links(self) -> None:
        """A VM may go to several hosts; where it arrives does not depend on where it comes from."""
        text = HOST_A.replace("link = hv-b", "link = hv-b, hv-c") + (
            "[link hv-c]\ntransport = tcp\nconnect = 192.0.2.3:16515\nmax-streams = 50\n"
        )
        self.assertEqual(len(set(self.sockets(text, "listen").values())), 6)
        self.assertEqual(len(set(self.sockets(text, "connect").values())), 3)
        limits = {(s.link, s.max_connections) for s in self.load(text).services}
        self.assertEqual(limits, {("hv-b", 128), ("hv-c", 50)})

    def test_settings(self) -> None:
        """Mode, group and limits hold for every socket of the VM; the owner not for libvirt's."""
        text = HOST_A + "mode = 0660\nowner = 12\ngroup = 34\nopen-timeout = 5\nmax-connections = 9\n"
        for service in self.load(text).services:
            owner = None if service.part == "control" else 12
            self.assertEqual(
                (service.mode, service.owner, service.group, service.open_timeout, service.max_connections),
                (0o660, owner, 34, 5.0, 9),
            )

    def test_names_in_messages(self) -> None:
        """Errors name the section that is in the file; log lines also which of its sockets."""
        names = {(s.section, s.label) for s in self.load(HOST_A).services}
        self.assertEqual(names, {("vm web1", f"vm web1 {part}") for part in ("control", "ram", "nbd")})
        disk = ServiceSection("disk", "vda", "hv-b", "listen", Path("/x"))
        self.assertEqual((disk.section, disk.label), ("disk vda", "disk vda"))

    def test_directories(self) -> None:
        """QEMU may look into those of other hosts, and makes its sockets in that of this one."""
        base = self.directory / "run"
        text = HOST_A + f"[libvirt]\ndirectory = {base}\nqemu-user = 64055\n"
        self.assertEqual(
            self.load(text).directories_to_make(),
            (
                DirectoryToMake(base, 0o755),
                DirectoryToMake(base / "hv-b", 0o755),
                DirectoryToMake(base / "hv-a", 0o700, 64055),
            ),
        )
        self.assertEqual(
            self.load(text.replace("link = hv-b", "link = hv-b\n    direction = in")).directories_to_make(),
            (DirectoryToMake(base, 0o755), DirectoryToMake(base / "hv-a", 0o700, 64055)),
        )

    def test_qemu_user(self) -> None:
        """Root gives QEMU's directory to whom the distribution runs QEMU as; nobody else can give it away."""
        for user, known, expected in (
            (0, {"libvirt-qemu": 64055, "qemu": 107}, 64055),
            (0, {"qemu": 107}, 107),
            (0, {}, None),
            (1000, {"libvirt-qemu": 64055}, None),
        ):

            def look_up(name: str, known: dict[str, int] = known) -> pwd.struct_passwd:
                return pwd.struct_passwd((name, "x", known[name], 0, "", "/", "/bin/false"))

            with mock.patch("pwd.getpwnam", look_up), mock.patch("os.geteuid", return_value=user):
                self.assertEqual(self.load(HOST_A).libvirt.qemu_user, expected)


class AnyVmTests(VmTestCase):
    """C{[vm *]}: the same for whichever VM."""

    TEXT = HOST_A.replace("[vm web1]", "[vm *]")

    def test_called(self) -> None:
        """For a name it means what a section of that name would; by itself it makes nothing."""
        configuration = self.load(self.TEXT + "mode = 0660\n")
        self.assertEqual(configuration.services, ())
        assert configuration.any_vm is not None
        named = self.load(HOST_A + "mode = 0660\n")
        self.assertEqual(configuration.any_vm.called("web1"), named.vms[0])
        self.assertIsNone(named.any_vm)
        self.assertEqual(configuration.directories_to_make(), named.directories_to_make())

    def test_beside_others(self) -> None:
        """VMs with a section of their own are that section's business."""
        configuration = self.load(self.TEXT + "[vm db1]\nlink = hv-b\ndirection = out\n")
        self.assertEqual({service.vm for service in configuration.services}, {"db1"})

    def test_errors(self) -> None:
        """Found in it as in any other."""
        (error,) = self.errors(self.TEXT + "max-connections = 300\n")
        self.assertIn("[vm *]: max-connections: the link carries fewer streams", error)
        (error,) = self.errors(HOST_A + "[disk *]\nlink = hv-b\nlisten = x\n")
        self.assertIn("[disk *]: this is not a name", error)

    def test_state_directory(self) -> None:
        """It must be readable if it is there, and need not be there before libvirt was started."""
        text = self.TEXT + "[libvirt]\ndirectory = run\nstate-directory = qemu\n"
        self.assertEqual(self.check(text), [])
        (self.directory / "qemu").touch()
        (error,) = self.check(text)
        self.assertIn(f"cannot see in {self.directory}/qemu which VMs run", error)
        self.assertEqual(self.check(text.replace("link = hv-b", "link = hv-b\n    direction = in")), [])


class ErrorTests(VmTestCase):
    """What is wrong in a file."""

    def test_link(self) -> None:
        """It must be there, once, and not have this daemon's name."""
        cases = {
            "": "link: the key is missing; expected the name of a [link NAME] section",
            "link = hv-x": "link: there is no section [link hv-x]; did you mean 'hv-b'?; found 'hv-x'",
            "link = hv-b, hv-b": "link: the same link comes twice; found 'hv-b'",
        }
        for line, said in cases.items():
            (error,) = self.errors(HOST_A.replace("link = hv-b", line))
            self.assertTrue(error.startswith(f"[vm web1]: {said}"), error)
        (error,) = self.errors(HOST_A.replace("name = hv-a", "name = hv-b"))
        self.assertIn("[vm web1]: link: the link is called as this daemon is", error)

    def test_direction(self) -> None:
        """The words are named; a key without effect is one too many."""
        (error,) = self.errors(HOST_A + "direction = away\n")
        self.assertEqual(
            error,
            "[vm web1]: direction: this is not a direction; found 'away'; "
            "expected out (it may leave), in (it may arrive) or both",
        )
        (error,) = self.errors(HOST_A + "direction = in\nmode = 0660\n")
        self.assertIn("[vm web1]: mode: the key says how sockets are made, and with direction = in", error)

    def test_unknown_keys(self) -> None:
        """Those of other sections are none here."""
        (error,) = self.errors(HOST_A + "listen = x.sock\n")
        self.assertIn("[vm web1]: listen: there is no such key in a [vm] section", error)
        (error,) = self.errors(HOST_A + "[libvirt]\nsokcet = x\n")
        self.assertIn("[libvirt]: sokcet: there is no such key in the [libvirt] section; did you mean", error)

    def test_names(self) -> None:
        """A VM's name has to fit on the wire, its sockets' names into an address."""
        (error,) = self.errors(HOST_A.replace("[vm web1]", f"[vm {'w' * 57}]"))
        self.assertIn("the name has 57 characters; expected a VM's name of at most 56", error)
        text = (
            HOST_A.replace("[vm web1]", f"[vm {'w' * 56}]") + "[libvirt]\ndirectory = /run/libvirt/relaymux1"
        )
        self.assertEqual(self.errors(text), [])
        errors = self.errors(text + "2")
        self.assertEqual(len(errors), 4, errors)
        self.assertIn("a socket's path would have 108 bytes, and there is room for 107; found", errors[0])
        (error,) = self.errors(HOST_A + "[libvirt x]\n")
        self.assertEqual(error, "[libvirt x]: this kind of section has no name; expected [libvirt]")

    def test_other_sections(self) -> None:
        """A hand-made section may take neither a VM's name nor its socket."""
        (error,) = self.errors(HOST_A + "[disk web1.ram]\nlink = hv-b\nconnect = /x\n")
        self.assertIn("[vm web1]: the name is taken by [disk web1.ram]", error.split("; expected")[0])
        (error,) = self.errors(
            HOST_A + "[disk vda]\nlink = hv-b\nlisten = /run/libvirt/relaymux/hv-b/control.web1\n"
        )
        self.assertIn("[vm web1]: [disk vda] makes the same socket", error)

    def test_connections(self) -> None:
        """Said once, not for each socket."""
        (error,) = self.errors(HOST_A + "max-connections = 300\n")
        self.assertIn("[vm web1]: max-connections: the link carries fewer streams", error)


class CheckTests(VmTestCase):
    """A machine that is not ready."""

    def test_fine(self) -> None:
        """Nothing is made, and nothing said."""
        text = HOST_A + "[libvirt]\ndirectory = run\n"
        self.assertEqual(self.check(text), [])
        self.assertEqual([path.name for path in self.directory.iterdir()], ["relay.ini"])

    def test_no_libvirt(self) -> None:
        """Where there is no /run/libvirt nobody has started libvirt."""
        (error,) = self.check(HOST_A + "[libvirt]\ndirectory = none/relaymux\n")
        self.assertIn(f"[libvirt]: directory: the directory {self.directory}/none does not exist", error)

    def test_directory_of_arrivals(self) -> None:
        """QEMU must be able to make its sockets there."""
        arrivals = self.directory / "run/hv-a"
        arrivals.mkdir(parents=True, mode=0o755)
        other = os.geteuid() + 1
        text = HOST_A + f"[libvirt]\ndirectory = run\nqemu-user = {other}\n"
        (error,) = self.check(text)
        self.assertIn(
            f"the user with id {other}, which QEMU runs as, may not make sockets in {arrivals}; found", error
        )
        self.assertIn(f"chown {other} {arrivals}", error)
        arrivals.chmod(0o1777)
        self.assertEqual(self.check(text), [])
        arrivals.chmod(0o700)
        self.assertEqual(self.check(text.replace(str(other), str(os.geteuid()))), [])
        self.assertEqual(self.check(text.replace("link = hv-b", "link = hv-b\n    direction = out")), [])


class ExampleTests(VmTestCase):
    """etc/libvirt-a.ini and etc/libvirt-b.ini."""

    def test_fit(self) -> None:
        """Each is right, and both mean the same sockets for each direction."""
        loaded = []
        for name in ("libvirt-a.ini", "libvirt-b.ini"):
            text = (PROJECT / "etc" / name).read_text()
            loaded.append((text, self.load(text)))
        (text_a, a), (text_b, b) = loaded
        self.assertEqual([link.name for link in a.links], [b.name])
        self.assertEqual([link.name for link in b.links], [a.name])
        self.assertEqual(a.links[0].options["peer"], "hv-b.example")
        self.assertEqual({a.links[0].role, b.links[0].role}, {"connect", "listen"})
        self.assertEqual([vm.name for vm in a.vms], [vm.name for vm in b.vms])
        for there, back in ((text_a, text_b), (text_b, text_a)):
            made = {name: path for (_, name), path in self.sockets(there, "listen").items()}
            dialled = {name: path for (_, name), path in self.sockets(back, "connect").items()}
            self.assertEqual(made.keys(), dialled.keys())
            for name in made:
                if not name.endswith(".control"):
                    self.assertEqual(made[name], dialled[name])
