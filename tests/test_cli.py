"""The relaymux command, as a person calls it."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from relaymux import __version__
from relaymux.cli import main

GOOD = f"""\
[relay]
name = hv-a
[link hv-b]
transport = unix
connect = one.sock, two.sock
max-streams = 64
[disk vda]
link = hv-b
listen = vda.sock
mode = 0660
owner = {os.geteuid()}
group = {os.getegid()}
[stream ram]
link = hv-b
connect = ram.sock
open-timeout = 2.5
"""


class CommandTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rmx"))
        self.addCleanup(shutil.rmtree, self.directory)

    def run_command(self, *arguments: str) -> tuple[int | str | None, str, str]:
        """@return: exit status, standard output, standard error."""
        output, errors = io.StringIO(), io.StringIO()
        with redirect_stdout(output), redirect_stderr(errors):
            try:
                status: int | str | None = main(arguments)
            except SystemExit as leaving:
                status = leaving.code
        return status, output.getvalue(), errors.getvalue()


class UsageTests(CommandTestCase):
    """The command line itself."""

    def test_version(self) -> None:
        """--version names the program and its version."""
        self.assertEqual(self.run_command("--version"), (0, f"relaymux {__version__}\n", ""))

    def test_as_a_module(self) -> None:
        """python -m relaymux is the command, also where its script is not on the path."""
        for arguments, status in ((["--version"], 0), (["check", "/nonexistent/file"], 1)):
            result = subprocess.run(
                [sys.executable, "-m", "relaymux", *arguments],
                capture_output=True,
                timeout=60,
                check=False,
                cwd=Path(__file__).parent.parent,
            )
            self.assertEqual(result.returncode, status, result.stderr)

    def test_nothing_to_do(self) -> None:
        """Without a command, or with a wrong one, the commands are named and the status is 2."""
        for arguments in ((), ("chekc",)):
            status, output, errors = self.run_command(*arguments)
            self.assertEqual((status, output), (2, ""))
            self.assertIn("relaymux", errors)
        self.assertIn("make-certificates", self.run_command("--help")[1])

    def test_help(self) -> None:
        """Each command says what it does."""
        for arguments, said in (
            ((), "everything that is wrong"),
            (("check",), "Starts, makes and changes nothing"),
            (("make-certificates",), "Overwrites nothing"),
        ):
            status, output, _ = self.run_command(*arguments, "--help")
            self.assertEqual(status, 0)
            self.assertIn(said, " ".join(output.split()))


class CheckTests(CommandTestCase):
    """relaymux check."""

    def check(self, text: str) -> tuple[int | str | None, list[str], list[str]]:
        file = self.directory / "relay.ini"
        file.write_text(text)
        status, output, errors = self.run_command("check", str(file))
        return status, output.splitlines(), errors.splitlines()

    def test_good(self) -> None:
        """One line for each section says what it means, with the defaults."""
        directory = self.directory
        self.assertEqual(
            self.check(GOOD),
            (
                0,
                [
                    "daemon hv-a: 512M of memory for all links; SIGTERM waits up to 30 s for open streams",
                    "link hv-b: unix connects to one.sock, or two.sock; at most 64 streams, each with a "
                    "window of 256K or more, replay buffer 4M or more; dead after 15 s of silence",
                    f"disk vda: makes the socket {directory}/vda.sock (mode 0660, owner "
                    f"{os.geteuid()}, group {os.getegid()}) and opens streams over link hv-b; "
                    "at most 64 at once, 10 s to open one",
                    f"stream ram: connects streams that come over link hv-b to the socket "
                    f"{directory}/ram.sock; at most 64 at once, 2.5 s to open one",
                    f"{directory}/relay.ini: no errors found",
                ],
                [],
            ),
        )
        self.assertEqual([path.name for path in directory.iterdir()], ["relay.ini"])

    def test_vm(self) -> None:
        """What virsh has to be told can be copied; for any VM with a place for its name."""
        text = GOOD.replace("[disk vda]", "[libvirt]\ndirectory = vms\n[vm web1]\nlink = hv-b\n[disk vda]")
        run = f"{self.directory}/vms"
        status, output, errors = self.check(text)
        self.assertEqual((status, errors), (0, []))
        start = output.index(
            "vm web1: over link hv-b; at most 64 connections to a socket at once, 10 s to open one"
        )
        self.assertEqual(
            output[start + 1 : -1],
            [
                f"  may arrive here: its QEMU makes {run}/hv-a/ram.tunnelmigrate.dest.web1 and "
                f"{run}/hv-a/nbd.tunnelmigrate.dest.web1;",
                "  the peer's libvirt is connected to /run/libvirt/virtqemud-sock, or to "
                "/run/libvirt/libvirt-sock",
                f"  may leave: makes {run}/hv-b/control.web1, {run}/hv-b/ram.tunnelmigrate.dest.web1, "
                f"{run}/hv-b/nbd.tunnelmigrate.dest.web1 (mode 0600); this moves it to hv-b:",
                "    virsh migrate --live --p2p --copy-storage-all --migrate-disks DISK,DISK web1 \\",
                f"      --desturi 'qemu+unix:///system?socket={run}/hv-b/control.web1' \\",
                f"      --migrateuri unix://{run}/hv-b/ram.tunnelmigrate.dest.web1 \\",
                f"      --disks-uri unix://{run}/hv-b/nbd.tunnelmigrate.dest.web1",
            ],
        )
        _, output, _ = self.check(text.replace("[vm web1]", "[vm *]"))
        self.assertIn("vm *: any that has no section, here called NAME: over link hv-b", "\n".join(output))
        self.assertIn(f"      --disks-uri unix://{run}/hv-b/nbd.tunnelmigrate.dest.NAME", output)

    def test_wrong_file(self) -> None:
        """All errors are shown, and nothing of what cannot be understood."""
        status, output, errors = self.check(GOOD.replace("= 0660", "= rw").replace("= 64", "= none"))
        self.assertEqual((status, output), (1, []))
        self.assertEqual(len(errors), 3, errors)
        for error, where in zip(errors, ("[link hv-b]: max-streams: ", "[disk vda]: mode: "), strict=False):
            self.assertTrue(error.startswith(f"error: {self.directory}/relay.ini: {where}"), error)
        self.assertEqual(errors[2], f"{self.directory}/relay.ini: 2 errors")

    def test_wrong_machine(self) -> None:
        """A file that is right in itself is shown, and then what the machine lacks."""
        status, output, errors = self.check(GOOD.replace("listen = ", "listen = missing/"))
        self.assertEqual(status, 1)
        self.assertEqual(len(output), 4)
        self.assertEqual(len(errors), 2, errors)
        self.assertIn(f"[disk vda]: listen: the directory {self.directory}/missing does not exist", errors[0])
        self.assertEqual(errors[1], f"{self.directory}/relay.ini: 1 error")

    def test_missing_file(self) -> None:
        """A file that is not there is an error like others."""
        status, output, errors = self.run_command("check", str(self.directory / "x.ini"))
        self.assertEqual((status, output), (1, ""))
        self.assertIn("x.ini: the file cannot be read: No such file or directory", errors)


class MakeCertificatesTests(CommandTestCase):
    """relaymux make-certificates."""

    def test_made(self) -> None:
        """The files are there and named; a second call does not touch them and says so."""
        pki = self.directory / "pki"
        status, output, errors = self.run_command("make-certificates", str(pki), "hv-a.example", "192.0.2.1")
        self.assertEqual((status, errors), (0, ""))
        made = ["ca.key", "ca.pem", "hv-a.example.key", "hv-a.example.pem", "192.0.2.1.key", "192.0.2.1.pem"]
        self.assertEqual(sorted(output.splitlines()), sorted(f"made {pki / name}" for name in made))
        before = {path: path.read_bytes() for path in pki.iterdir()}
        self.assertEqual(sorted(path.name for path in before), sorted(made))

        status, output, errors = self.run_command("make-certificates", str(pki), "hv-a.example")
        self.assertEqual((status, output), (1, ""))
        self.assertTrue(errors.startswith("error: "), errors)
        self.assertIn("hv-a.example", errors)
        self.assertEqual({path: path.read_bytes() for path in pki.iterdir()}, before)

    def test_wrong_name(self) -> None:
        """What is no host name is refused before anything is made."""
        status, _, errors = self.run_command("make-certificates", str(self.directory / "pki"), "host a")
        self.assertEqual(status, 1)
        self.assertIn("host a", errors)
        self.assertFalse((self.directory / "pki").exists())
