"""C{relaymux status}, and what a daemon answers."""

from __future__ import annotations

import io
import json
import socket
import threading
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

from relaymux import status
from relaymux.cli import main
from tests.daemons import PATIENCE, read_all, read_exactly
from tests.test_core_nbd import QEMU
from tests.test_vms import NBD, VmTestCase


def run_command(*arguments: str) -> tuple[int, str, str]:
    output, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(output), redirect_stderr(errors):
        code = main(arguments)
    return code, output.getvalue(), errors.getvalue()


class StatusTests(VmTestCase):
    """Two daemons, and a disk on its way from one to the other."""

    def setUp(self) -> None:
        super().setUp()
        patcher = mock.patch.object(status, "BETWEEN_LOOKS", 0.1)
        patcher.start()
        self.addCleanup(patcher.stop)

    def configure(self, name: str, peer: str, way: str, *more: str) -> None:
        super().configure(name, peer, way, *more)
        file = self.directory / f"{name}.ini"
        file.write_text(file.read_text().replace("[relay]", f"[relay]\nstatus = {name}/status.sock"))

    def ask(self, name: str) -> dict[str, Any]:
        code, output, errors = run_command("status", "--json", str(self.directory / f"{name}.ini"))
        self.assertEqual((code, errors), (0, ""))
        document: dict[str, Any] = json.loads(output)
        return document

    def open_disk(self) -> tuple[socket.socket, socket.socket]:
        """QEMU's NBD client and server, up to the end of the handshake and 100000 bytes more."""
        listening = self.listen(self.directory / "hv-b/vms/hv-b" / NBD)
        near = socket.socket(socket.AF_UNIX)
        near.connect(str(self.directory / "hv-a/vms/hv-b" / NBD))
        far, _ = listening.accept()
        for side, data in [*QEMU, ("client", bytes(100_000))]:
            sender, receiver = (near, far) if side == "client" else (far, near)
            sender.settimeout(PATIENCE)
            receiver.settimeout(PATIENCE)
            sender.sendall(data)
            self.assertEqual(read_exactly(receiver, len(data)), data)
        for connection in (near, far):
            self.addCleanup(connection.close)
        return near, far

    def test_a_disk(self) -> None:
        """Both sides know the disk's name and size, and how many bytes went which way."""
        self.up()
        near, _far = self.open_disk()
        said = {side: sum(len(data) for who, data in QEMU if who == side) for side in ("client", "server")}
        said["client"] += 100_000
        for host, way, sent in (("hv-a", "listen", "client"), ("hv-b", "connect", "server")):
            document = self.ask(host)
            self.assertEqual((document["format"], document["daemon"]), (1, host))
            [link] = document["links"]
            self.assertEqual((link["state"], link["streams"], link["away_seconds"]), ("up", 1, None))
            self.assertEqual(len(document["sockets"]), 6)
            [served] = [one for one in document["sockets"] if one["connections"]]
            self.assertEqual((served["section"], served["part"], way in served), ("vm web1", "nbd", True))
            [connection] = served["connections"]
            self.assertEqual(connection["disk"], {"name": "drive-virtio-disk0", "bytes": 128 << 20})
            self.assertTrue(connection["joined"])
            received = "server" if sent == "client" else "client"
            self.assertEqual(
                (connection["sent_bytes"], connection["received_bytes"]), (said[sent], said[received])
            )
            self.assertEqual(served["sent_bytes"], said[sent])
        code, output, errors = run_command("status", str(self.directory / "hv-a/status.sock"))
        self.assertEqual((code, errors), (0, ""))
        self.assertRegex(output, r"(?m)^daemon hv-a, relaymux \S+, pid \d+, up \d+ s$")
        self.assertRegex(output, r"(?m)^hv-b +up +hv-b +1 +")
        self.assertRegex(
            output,
            r"(?m)^vm web1 nbd to hv-b +1 +drive-virtio-disk0, 128\.0 MiB +97\.\d KiB +\d+ bytes"
            r" +0 bytes/s +\d+ s$",
        )
        self.assertRegex(output, r"(?m)^vm web1 nbd from hv-b +none yet +0 bytes")
        near.close()

    def test_rate(self) -> None:
        """What moves between the two looks is what is shown as the rate."""
        self.up()
        near, far = self.open_disk()
        stop = threading.Event()

        def talk() -> None:
            while not stop.is_set():
                near.sendall(bytes(50_000))
                read_exactly(far, 50_000)

        talking = threading.Thread(target=talk)
        talking.start()
        try:
            lines = list(status.show(self.directory / "hv-a/status.sock"))
        finally:
            stop.set()
            talking.join(PATIENCE)
        [line] = [line for line in lines if "drive-virtio-disk0" in line]
        self.assertRegex(line, r" [\d.]+ [KMG]iB/s +\d+ s$")

    def test_link_away(self) -> None:
        """While streams wait for the next connection it is said for how long, and how long they will."""
        _, b = self.up()
        self.open_disk()
        b.kill()
        document = self.ask("hv-a")
        while document["links"][0]["state"] != "waiting":
            document = self.ask("hv-a")
        self.assertGreaterEqual(document["links"][0]["away_seconds"], 0)
        self.assertEqual(document["links"][0]["resume_window_seconds"], 60)
        _, output, _ = run_command("status", str(self.directory / "hv-a.ini"))
        self.assertRegex(output, r"(?m)^hv-b +waiting \d+ s of 60 +hv-b +1 ")

    def test_totals(self) -> None:
        """What is over is counted, and not listed."""
        self.up()
        self.move("hv-a", "hv-b")
        document = self.ask("hv-a")
        while any(one["connections"] for one in document["sockets"]):
            document = self.ask("hv-a")
        counted = {
            one["part"]: (one["opened"], one["sent_bytes"], len(one["connections"]))
            for one in document["sockets"]
            if "listen" in one
        }
        self.assertEqual(
            counted, {"control": (1, 100_000, 0), "ram": (1, 100_000, 0), "nbd": (2, 200_000, 0)}
        )
        _, output, _ = run_command("status", str(self.directory / "hv-a.ini"))
        self.assertRegex(output, r"(?m)^vm web1 nbd to hv-b +2 before +195\.3 KiB +195\.3 KiB$")

    def answers(self, path: Path) -> bool:
        """Whether somebody who says something of his own is told the same."""
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(PATIENCE)
            try:
                asking.connect(str(path))
                asking.sendall(b"GET / HTTP/1.0\r\n\r\n")
                return bool(json.loads(read_all(asking))["daemon"] == "hv-a")
            except (ConnectionError, ValueError):
                return False  # too many are asking

    def test_socket(self) -> None:
        """For the daemon's user alone, with a bound on who asks, and gone when the daemon is."""
        a, b = self.up()
        path = self.directory / "hv-a/status.sock"
        self.assertEqual(path.stat().st_mode & 0o777, 0o600)
        for _ in range(50):
            with socket.socket(socket.AF_UNIX) as asking:
                asking.connect(str(path))
        self.until(lambda: self.answers(path), "those had been told")
        self.assertEqual([b.stop(), a.stop()], [0, 0])
        self.assertFalse(path.exists())
        self.assertNotIn("Traceback", a.output())


class CommandTests(VmTestCase):
    """What can be wrong when somebody asks."""

    def test_no_socket_configured(self) -> None:
        """The key is named."""
        self.configure("hv-a", "hv-b", "listen")
        code, output, errors = run_command("status", str(self.directory / "hv-a.ini"))
        self.assertEqual((code, output), (1, ""))
        self.assertIn("[relay]: status: the daemon makes no status socket; expected the path", errors)

    def test_no_daemon(self) -> None:
        """Nobody there, and somebody else."""
        self.configure("hv-a", "hv-b", "listen")
        file = self.directory / "hv-a.ini"
        file.write_text(file.read_text().replace("[relay]", "[relay]\nstatus = status.sock"))
        code, _, errors = run_command("status", str(file))
        self.assertEqual(code, 1)
        self.assertIn(
            f"error: no answer from {self.directory}/status.sock: No such file or directory", errors
        )
        for answer in (b"", b"{}", b"[1]", b"220 mail.example ESMTP\r\n"):
            listening = self.listen(self.directory / "status.sock")

            def serve(listening: socket.socket = listening, answer: bytes = answer) -> None:
                connection, _ = listening.accept()
                with connection:
                    connection.sendall(answer)

            serving = threading.Thread(target=serve)
            serving.start()
            code, _, errors = run_command("status", str(file))
            serving.join(PATIENCE)
            self.assertEqual(code, 1)
            self.assertIn(f"error: {self.directory}/status.sock: ", errors)

    def test_wrong_file(self) -> None:
        """A configuration with errors is one here, too; so is a missing one."""
        file = self.directory / "x.ini"
        code, _, errors = run_command("status", str(file))
        self.assertEqual(code, 1)
        self.assertIn("the file cannot be read", errors)
