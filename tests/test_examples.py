"""The files in etc/ at work: two daemons of each pair, started as their comments say."""

from __future__ import annotations

import hashlib
import random
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from relaymux.certificates import make_certificates
from relaymux.service.config_sections import DEFAULT_REPLAY_BUFFER, DEFAULT_WINDOW
from tests.daemons import PATIENCE, PROJECT, Daemon, read_all

#: More than four windows and twice the replay buffer.
SIZE = max(4 * DEFAULT_WINDOW, 2 * DEFAULT_REPLAY_BUFFER) + 12345


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ExamplePairTests(SynchronousTestCase):
    """Both pairs carry data both ways, and end cleanly."""

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rmx"))
        self.addCleanup(shutil.rmtree, self.directory)
        for file in (PROJECT / "etc").glob("*.ini"):
            shutil.copy(file, self.directory)

    def start(self, name: str) -> Daemon:
        daemon = Daemon(self.directory / name)
        self.addCleanup(daemon.kill)
        return daemon

    def assert_carries(self, waiting: str, dialling: str, near: str, far: str) -> None:
        """
        What is written to C{near} arrives at C{far} and comes back.

        @param waiting: the file of the daemon that the other one dials.
        """
        daemons = [self.start(waiting), self.start(dialling)]
        for daemon in daemons:
            daemon.wait_for(": up, daemon ")
        seed = random.randrange(2**32)
        sent = random.Random(seed).randbytes(SIZE)
        with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as connection:
            listening.settimeout(PATIENCE)
            listening.bind(str(self.directory / far))
            listening.listen()
            connection.settimeout(PATIENCE)
            connection.connect(str(self.directory / near))
            self.in_thread(lambda: self.echo(listening))
            self.in_thread(lambda: self.send(connection, sent))
            received = read_all(connection)
        self.assertEqual(
            hashlib.sha256(received).hexdigest(),
            hashlib.sha256(sent).hexdigest(),
            f"seed {seed}, {len(received)} bytes of {SIZE}",
        )
        for daemon in reversed(daemons):
            self.assertEqual(daemon.stop(), 0, daemon.output())
            self.assertNotIn("Traceback", daemon.output())
        self.assertFalse((self.directory / near).exists())

    def in_thread(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        self.addCleanup(thread.join, PATIENCE)

    def echo(self, listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.settimeout(PATIENCE)
            connection.sendall(read_all(connection))

    def send(self, connection: socket.socket, data: bytes) -> None:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)

    def test_one_machine(self) -> None:
        """relay.ini and its peer, with nothing prepared."""
        self.assert_carries("relay.ini", "relay-peer.ini", "run/near.sock", "run/far.sock")
        self.assertEqual((self.directory / "run").stat().st_mode & 0o777, 0o700)

    def test_two_hosts(self) -> None:
        """source.ini and destination.ini, with certificates, and another port than other tests may use."""
        make_certificates(self.directory / "pki", ["hv-a.example", "hv-b.example"])
        port = free_port()
        for name in ("source.ini", "destination.ini"):
            file = self.directory / name
            text = file.read_text()
            self.assertIn("127.0.0.1:16515", text)
            file.write_text(text.replace("127.0.0.1:16515", f"127.0.0.1:{port}"))
        self.assert_carries(
            "destination.ini", "source.ini", "run-source/web1-vda.sock", "run-destination/web1-nbd.sock"
        )
