"""Daemons as processes, and their programs."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROJECT = Path(__file__).parent.parent

#: Seconds that anything here may take; it takes two.
PATIENCE = 60


def read_all(connection: socket.socket) -> bytes:
    """@return: everything up to the end of what the other side sends."""
    parts = []
    while part := connection.recv(1 << 18):
        parts.append(part)
    return b"".join(parts)


def read_exactly(connection: socket.socket, count: int) -> bytes:
    """
    @return: C{count} bytes, or what came before an earlier end.  C{MSG_WAITALL} would not do:
        a socket with a timeout does not block, and the kernel then returns what is there.
    """
    parts = []
    while count and (part := connection.recv(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


class Daemon:
    """One C{twistd relaymux}, in the foreground, its output in a file."""

    def __init__(self, config: Path, *options: str) -> None:
        """@param options: of twistd."""
        self._log = config.with_suffix(".log")
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-c", "from twisted.scripts.twistd import run; run()"),
                    *("--nodaemon", "--pidfile=", *options, "relaymux", "--config", str(config)),
                ],
                # Relative paths in the file do not depend on it.
                cwd="/",
                env={"PYTHONPATH": str(PROJECT)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while text not in self.output():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"no {text!r} in:\n{self.output()}")
            time.sleep(0.02)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
