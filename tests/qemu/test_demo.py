"""Tests of the demonstration, as a person runs it."""

from __future__ import annotations

import subprocess
import sys

from tests.qemu.support import QemuTestCase

#: Seconds for one run; it takes ten.
LIMIT = 120

#: The demo with daemons that do not start.
WITHOUT_DAEMONS = """
import sys
from relaymux import demo

async def start(self):
    raise demo.RelayFailed("no daemon today")

demo.RelayPair.start = start
sys.exit(demo.main(sys.argv[1:]))
"""


class DemoTests(QemuTestCase):
    """What it says and how it ends."""

    def demo(self, *arguments: str) -> tuple[int, list[str]]:
        """@return: exit status and lines."""
        result = subprocess.run(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        return result.returncode, [line.strip() for line in result.stdout.splitlines()]

    def test_success(self) -> None:
        """All checks are named, each with its evidence, in plain lines where there is no terminal."""
        status, lines = self.demo(
            "-m", "relaymux.demo", "--transport=unix", "--mode=multifd", "--disk-size=32", "--cuts=2"
        )
        self.assertEqual(status, 0, "\n".join(lines))
        checks = lines[lines.index("Verified:") + 1 : -1]
        self.assertEqual(len(checks), 11, "\n".join(lines))
        for check in checks:
            self.assertRegex(check, r"^ok: [^:]+: .+")
        self.assertNotIn("\x1b", "".join(lines))
        self.assertTrue(any(line.startswith("copying disks: vda ") for line in lines))
        for number, phase in enumerate(("copying disks", "sending memory"), 1):
            cut = lines.index(next(line for line in lines if line.startswith(f"{number}. link cut")))
            self.assertIn(f"while {phase}: ", lines[cut])
            self.assertRegex("\n".join(lines[cut:]), rf"(?m)^{number}\. resumed after .* 0 lost$")

    def test_failure(self) -> None:
        """A relay that does not work ends it with status 1, after the same without the relay."""
        status, lines = self.demo("-c", WITHOUT_DAEMONS, "--disk-size=4")
        self.assertEqual(status, 1, "\n".join(lines))
        self.assertIn("The migration failed: no daemon today", lines)
        self.assertEqual(lines[-1], "Without the relay it works: the fault is in the relay.")
