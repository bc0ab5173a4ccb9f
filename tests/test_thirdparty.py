"""A transport from another distribution: installed, found, put through the suite, and used for a link."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.sockets import content

PROJECT = Path(__file__).parent.parent
DISTRIBUTION = Path(__file__).parent / "thirdparty"

#: Seconds for any one step on a busy machine.
DEADLINE = 120

#: More than four windows, and twice the replay buffer, as configured below.
DATA = content(9_000_000)

CONFIGURATION = """
[relay]
name = {name}
runtime-directory = {directory}/run-{name}

[link {other}]
transport = loop
{role} = {port}
window = 1M
replay-buffer = 2M

[stream s]
link = {other}
{end} = {directory}/{name}.sock
"""


class ThirdPartyTests(SynchronousTestCase):
    """C{relaymux-transport-loop}, from C{tests/thirdparty}."""

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rm"))
        self.addCleanup(shutil.rmtree, self.directory)
        # Building leaves files beside the sources.
        source, self.target = self.directory / "source", self.directory / "target"
        shutil.copytree(DISTRIBUTION, source, ignore=shutil.ignore_patterns("__pycache__"))
        pip = ["-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-index", "--no-deps"]
        self.run_python(*pip, "--no-build-isolation", "--target", str(self.target), str(source))

    @property
    def environment(self) -> dict[str, str]:
        """Where both are found: as in one Python environment, and nothing of it stays."""
        path = os.pathsep.join([str(PROJECT), str(self.target)])
        return {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}

    def run_python(self, *arguments: str) -> str:
        """@return: what C{python arguments} prints."""
        done = subprocess.run(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DEADLINE,
            cwd=self.directory,
            env=self.environment if self.target.exists() else None,
        )
        self.assertEqual(done.returncode, 0, done.stdout)
        return done.stdout

    def configure(self, name: str, other: str, role: str, end: str, port: int) -> Path:
        """@return: the configuration file of one daemon."""
        path = self.directory / f"{name}.ini"
        values = {"name": name, "other": other, "role": role, "end": end, "port": port}
        path.write_text(CONFIGURATION.format(directory=self.directory, **values))
        return path

    def test_found(self) -> None:
        """It is among the transports, with its own keys, and relaymux itself need not know of it."""
        code = (
            "from relaymux.transports.registry import find_transport, transports;"
            " print(sorted(transports()), *find_transport('loop').keys)"
        )
        self.assertEqual(self.run_python("-c", code).strip(), "['loop', 'tcp', 'tls', 'unix'] patience")

    def test_conformance(self) -> None:
        """The suite that ships with relaymux runs for it, and it passes."""
        printed = self.run_python("-m", "twisted.trial", "relaymux_loop.conformance")
        self.assertIn("LoopBufferTests", printed)
        self.assertIn("PASSED", printed)

    def test_link(self) -> None:
        """Two daemons have a link over it, and carry a stream."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        near = self.configure("near", "far", "connect", "listen", port)
        far = self.configure("far", "near", "listen", "connect", port)
        with socket.socket(socket.AF_UNIX) as program, socket.socket(socket.AF_UNIX) as qemu:
            qemu.bind(str(self.directory / "far.sock"))
            qemu.listen()
            qemu.settimeout(DEADLINE)
            program.settimeout(DEADLINE)
            for configuration in (far, near):
                self.start(configuration)
            self.connect(program, str(self.directory / "near.sock"))
            accepted, _ = qemu.accept()
            with accepted:
                accepted.settimeout(DEADLINE)
                self.assertTrue(self.carry(program, accepted) == DATA)
                self.assertTrue(self.carry(accepted, program) == DATA)

    def start(self, configuration: Path) -> None:
        """Start a daemon; it is ended with the test."""
        log = configuration.with_suffix(".log")
        with log.open("w") as output:
            daemon = subprocess.Popen(
                [sys.executable, "-m", "twisted", "relaymux", "--config", str(configuration)],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env=self.environment,
            )

        def end() -> None:
            daemon.send_signal(signal.SIGKILL)
            daemon.wait(DEADLINE)

        self.addCleanup(end)
        self.addCleanup(lambda: self.assertNotIn("Traceback", log.read_text()))

    def connect(self, program: socket.socket, path: str) -> None:
        """Connect as soon as the daemon listens."""
        end = time.monotonic() + DEADLINE
        while True:
            try:
                program.connect(path)
                return
            except OSError as error:
                if time.monotonic() > end:
                    logs = "\n".join(log.read_text() for log in self.directory.glob("*.log"))
                    self.fail(f"{path}: {error}\n{logs}")
                time.sleep(0.05)

    def carry(self, sender: socket.socket, receiver: socket.socket) -> bytearray:
        """@return: what C{receiver} gets of L{DATA}."""
        received, left = bytearray(), memoryview(DATA)
        sender.setblocking(False)
        while len(received) < len(DATA):
            if left:
                try:
                    left = left[sender.send(left[:100_000]) :]
                except BlockingIOError:
                    time.sleep(0.001)
            if not left or len(DATA) - len(left) - len(received) > 50_000:
                received += receiver.recv(1 << 20)
        sender.settimeout(DEADLINE)
        return received
