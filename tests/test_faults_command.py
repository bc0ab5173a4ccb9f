"""The fault proxy in words: scripts, the control socket, the command."""

from __future__ import annotations

import io
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

from twisted.internet.task import Clock
from twisted.internet.threads import deferToThread
from twisted.trial.unittest import SynchronousTestCase

from relaymux.errors import ConfigurationError, LocalError, TransportError
from relaymux.testing import fault_control
from relaymux.testing.fault_control import ControlSocket, tell
from relaymux.testing.fault_proxy import main
from relaymux.testing.fault_script import COMMANDS, parse_script
from relaymux.testing.faults import Ending, FaultProxy
from tests.proxies import RESET, FaultProxyTestCase
from tests.sockets import DEADLINE, SocketTestCase, reactor

PROJECT = Path(__file__).parent.parent


class Listed:
    """Stands for a proxy and lists what is called."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> None:
            self.calls.append((name, *arguments, *options.values()))

        return call


class ScriptTests(SynchronousTestCase):
    """Words become the calls that they say."""

    def calls(self, script: str) -> list[tuple[Any, ...]]:
        proxy: Any = Listed()
        for operation in parse_script(script):
            operation(proxy)
        calls: list[tuple[Any, ...]] = proxy.calls
        return calls

    def test_commands(self) -> None:
        """Every command with and without what may be left out."""
        for script, expected in [
            ("cut", ("cut", Ending.RST, 0)),
            ("cut fin refuse 0.5", ("cut", Ending.FIN, 0.5)),
            ("cut after 1K up", ("cut_after", 1024, "up", Ending.RST, 0)),
            ("cut fin after 0 down refuse 2", ("cut_after", 0, "down", Ending.FIN, 2)),
            ("cut rst each 5 up", ("cut_each", 5, 5, "up", Ending.RST, 0)),
            ("cut each 5..1M down refuse 1", ("cut_each", 5, 1 << 20, "down", Ending.RST, 1)),
            ("refuse", ("refuse", None, False)),
            ("refuse 3 reset", ("refuse", 3, True)),
            ("blackhole", ("blackhole", None, "both")),
            ("blackhole 5 up", ("blackhole", 5, "up")),
            ("blackhole down", ("blackhole", None, "down")),
            ("delay 0.05", ("delay", 0.05, 0, "both")),
            ("delay .05 0.02 up", ("delay", 0.05, 0.02, "up")),
            ("rate 100K down", ("rate", 102_400, "down")),
            ("segments 1", ("segments", 1, 1, "both")),
            ("segments 1..100 up", ("segments", 1, 100, "up")),
            ("segments 0", ("segments", 0, 0, "both")),
            ("flip 7 up", ("damage", 7, "up", "flip")),
            ("insert 7 down", ("damage", 7, "down", "insert")),
            ("remove 7 down", ("damage", 7, "down", "remove")),
            ("corrupt 1e-6", ("corrupt", 1e-6, "both")),
            ("hold 1M", ("hold", 1 << 20, 1.0, "up")),
            ("hold 0 within 0.2 down", ("hold", 0, 0.2, "down")),
        ]:
            self.assertEqual(self.calls(script), [expected], script)

    def test_statements(self) -> None:
        """Several on a line, several lines, comments, nothing."""
        self.assertEqual(
            self.calls("  # a comment; cut\nrate 1 ; ;rate 2 # rate 3\n\n rate 4;"),
            [("rate", 1, "both"), ("rate", 2, "both"), ("rate", 4, "both")],
        )

    def test_when(self) -> None:
        """Plans are made with the proxy, and do the command when their time comes."""
        proxy: Any = Listed()
        for operation in parse_script("at 3 cut; every 1..2 rate 5; every 4 rate 6"):
            operation(proxy)
        self.assertEqual([call[:-1] for call in proxy.calls], [("at", 3), ("every", 1, 2), ("every", 4, 4)])
        for *_, planned in list(proxy.calls):
            planned()
        self.assertEqual(proxy.calls[3:], [("cut", Ending.RST, 0), ("rate", 5, "both"), ("rate", 6, "both")])

    def test_errors(self) -> None:
        """Each says which statement it is, what is wrong with it, and what would be right."""
        for script, part in [
            ("cat", "did you mean 'cut'"),
            ("rate 5; at 3 frobnicate", "at 3 frobnicate: there is no such command"),
            ("cut after 5", "up (to the target) or down (back)"),
            ("cut now", "expected cut [rst|fin]"),
            ("cut each 5..2 up", "lower end"),
            ("delay", "something is missing"),
            ("delay soon", "not a duration"),
            ("delay -1", "too short"),
            ("at", "something is missing"),
            ("at 3", "such as cut"),
            ("every 0 cut", "at least 0.001"),
            ("rate fast", "not a size"),
            ("segments 0..5", "at least one byte"),
            ("corrupt 2", "a number from 0 to 1"),
            ("corrupt some", "a number from 0 to 1"),
            ("hold 1G", "at most 16M"),
            ("flip 7", "up (to the target)"),
            ("release now", "expected release"),
        ]:
            error = self.assertRaises(ConfigurationError, parse_script, script)
            self.assertIn(part, str(error), script)

    def test_usage(self) -> None:
        """There is a usage line for every command and for nothing else."""
        error = self.assertRaises(ConfigurationError, parse_script, "?")
        self.assertEqual(error.expected, "one of " + ", ".join(COMMANDS))


class ControlTests(FaultProxyTestCase):
    """The socket that takes commands."""

    def setUp(self) -> None:
        super().setUp()
        self.path = f"{self.directory()}/control"
        self.control = ControlSocket(reactor, self.path, self.proxy)
        self.control.start()
        self.addCleanup(self.control.stop)

    def ask(self, line: str) -> Any:
        return deferToThread(tell, self.path, line, DEADLINE)

    async def test_commands(self) -> None:
        """What is told is done when the answer comes."""
        near, far = await self.pair()
        self.assertEqual(await self.ask("blackhole up; rate 1000 down"), "")
        self.assertTrue(self.proxy.lanes["up"].silent)
        self.assertEqual(self.proxy.lanes["down"].rate, 1000)
        self.assertEqual(await self.ask("clear"), "")
        await self.carries(near, far)
        self.assertEqual(await self.ask("cut"), "1")
        self.assertEqual(await self.ending(near), (b"", RESET))

    async def test_status(self) -> None:
        """Names and numbers that a program can take apart."""
        near, far = await self.pair()
        await self.carries(near, far, 1000)
        answer = await self.ask("status")
        status = {name: int(count) for name, _, count in (part.partition("=") for part in answer.split())}
        self.assertEqual(status, self.proxy.status())
        self.assertEqual(status["up_delivered"], 1000)

    async def test_errors(self) -> None:
        """A wrong line does nothing, not even its right part; the connection goes on."""
        for line in ("rate 5; nonsense", "hold 1G"):
            error = await self.assertFailure(self.ask(line), LocalError)
            self.assertIn(self.path, str(error))
        self.assertEqual(self.proxy.lanes["up"].rate, 0)
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(self.path)
            await self.send(raw, b"nonsense\ncut\n\xff\n")
            answers = b""
            while answers.count(b"\n") < 3:
                answers += await self.read(raw, 1)
        lines = answers.split(b"\n")
        self.assertTrue(lines[0].startswith(b"error nonsense: there is no such command"), lines)
        self.assertEqual(lines[1], b"ok 0")
        self.assertTrue(lines[2].startswith(b"error "), lines)

    async def test_long_line(self) -> None:
        """A line without end ends the connection."""
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(self.path)
            await self.send(raw, b"x" * 40_000)
            self.assertEqual((await self.ending(raw))[0], b"")

    async def test_too_many(self) -> None:
        """There is a bound to the connections."""
        self.patch(fault_control, "_MAX_CONNECTIONS", 1)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(self.path)
            error = await self.assertFailure(self.ask("cut"), LocalError)
            self.assertIn("already 1 connections", str(error))
            await self.send(first, b"cut\n")
            self.assertEqual(await self.read(first, 5), b"ok 0\n")

    def test_mode(self) -> None:
        """The socket is its owner's alone."""
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)

    def test_path_in_use(self) -> None:
        """That is said with what to do."""
        second = ControlSocket(reactor, self.path, self.proxy)
        error = self.assertRaises(TransportError, second.start)
        self.assertEqual(
            str(error),
            f"cannot listen on {self.path}: Address already in use; remove the file if nothing listens there",
        )


SCRIPT = """
import sys
from twisted.internet import reactor
from relaymux.testing.fault_proxy import main
sys.exit(main(sys.argv[1:], reactor))
"""


class CommandTests(SocketTestCase):
    """The command, as a process of its own."""

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, *arguments],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return process

    def until_ready(self, process: subprocess.Popen[str]) -> list[str]:
        """@return: the lines to the one that says that all is ready."""
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("ready"):
                return lines
        raise AssertionError(f"it ended: {lines}")

    def test_runs(self) -> None:
        """It says where it listens, obeys script and control socket, and at the end says what it carried."""
        directory = self.directory()
        with socket.create_server(("127.0.0.1", 0)) as target:
            target.settimeout(DEADLINE)
            process = self.start(
                f"{directory}/listen",
                f"127.0.0.1:{target.getsockname()[1]}",
                "cut fin after 5 up",
                *(
                    "--control",
                    f"{directory}/control",
                    "--seed",
                    "7",
                    "--delay",
                    "0.001",
                    "--jitter",
                    "0.001",
                ),
            )
            self.assertEqual(self.until_ready(process)[-1], f"ready on {directory}/listen, seed 7\n")
            with socket.socket(socket.AF_UNIX) as near:
                near.settimeout(DEADLINE)
                near.connect(f"{directory}/listen")
                far, _ = target.accept()
                with far:
                    far.settimeout(DEADLINE)
                    near.sendall(b"0123456789")
                    received = b""
                    while piece := far.recv(10):
                        received += piece
            self.assertEqual(received, b"01234")
        self.assertIn("accepted=1", tell(f"{directory}/control", "status", DEADLINE))
        process.send_signal(signal.SIGTERM)
        output, complaint = process.communicate(timeout=DEADLINE)
        self.assertEqual((process.returncode, complaint), (0, ""))
        self.assertIn("#1 cut: FIN after 5 bytes up", output)
        self.assertIn("\nup_delivered 5\n", output)
        self.assertEqual(os.listdir(directory), [])

    def test_options_are_a_script(self) -> None:
        """Each option does what its command does; a file comes first."""
        directory = self.directory()
        Path(directory, "script").write_text("# slow\nrate 5 up\n", encoding="utf-8")
        process = self.start(
            *("127.0.0.1:0", "127.0.0.1:1", "segments 3", "--script", f"{directory}/script"),
            *("--cut-every", "2..3", "--fin", "--refuse", "0.5", "--rate", "7K", "--corrupt", "0.5"),
        )
        faults = [line.partition("fault: ")[2] for line in self.until_ready(process) if "fault: " in line]
        self.assertEqual(
            faults,
            [
                "rate up 5 bytes per second\n",
                "rate both 7168 bytes per second\n",
                "flip a bit both in a byte with probability 0.5\n",
                "segments both 3 to 3 bytes\n",
            ],
        )

    def test_wrong(self) -> None:
        """Every mistake is one line that says what to do, with the exit status of a wrong command line."""
        for arguments, part in [
            (("nowhere", "127.0.0.1:1"), "not an address with a port"),
            (("127.0.0.1:0", "127.0.0.1:1", "cat"), "cat: there is no such command"),
            (("127.0.0.1:0", "127.0.0.1:1", "--refuse", "1"), "need --cut-every"),
            (("127.0.0.1:0", "127.0.0.1:1", "--jitter", "1"), "needs --delay"),
            (
                ("127.0.0.1:0", "127.0.0.1:1", "--script", "/nonexistent"),
                "/nonexistent: cannot read the script",
            ),
            (("127.0.0.1:0", "127.0.0.1:1", "--receive-buffer", "x"), "not a size"),
        ]:
            errors = io.StringIO()
            self.patch(sys, "stderr", errors)
            status = main(arguments, Clock())
            complaint = errors.getvalue()
            self.assertEqual(status, 2, complaint)
            self.assertTrue(complaint.startswith("error: "), complaint)
            self.assertEqual(complaint.count("\n"), 1, complaint)
            self.assertIn(part, complaint)

    def test_cannot_listen(self) -> None:
        """It removes what it had made, and ends with another status."""
        directory = self.directory()
        process = self.start(
            f"{directory}/listen", "127.0.0.1:1", "--control", f"{directory}/missing/control"
        )
        _, complaint = process.communicate(timeout=DEADLINE)
        self.assertEqual(process.returncode, 1)
        self.assertIn(f"cannot listen on {directory}/missing/control: No such file or directory", complaint)
        self.assertEqual(os.listdir(directory), [])


class ProxyAddressTests(SocketTestCase):
    """Where a proxy listens."""

    def test_ipv6(self) -> None:
        """Over IPv6, too, if the machine has it."""
        proxy = FaultProxy(reactor, "[::1]:0", "[::1]:1")
        try:
            proxy.start()
        except TransportError as error:
            self.assertIn("cannot listen on [::1]:0", str(error))
            return
        self.addCleanup(proxy.stop)
        self.assertRegex(proxy.address, r"^\[::1\]:[1-9][0-9]*$")
