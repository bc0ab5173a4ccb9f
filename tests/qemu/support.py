"""What the tests with a real QEMU have in common."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from relaymux.testing.qemu.cuts import Cutter
from relaymux.testing.qemu.install import installed_tools
from relaymux.testing.qemu.plan import Mode
from relaymux.testing.qemu.rehearsal import SELECTED_DISKS, Check, Rehearsal
from relaymux.testing.qemu.relays import RelayPair
from relaymux.testing.qemu.tools import QemuTools, QemuUnavailable
from relaymux.testing.qemu.verdict import link_checks, relay_checks

T = TypeVar("T")

MIB = 1 << 20

#: Whether tests that take minutes run too.
THOROUGH = os.environ.get("RELAYMUX_THOROUGH", "0") not in ("", "0")


def run(action: Coroutine[Any, Any, T], seconds: float = 90.0) -> T:
    """Run C{action} to its end, in an event loop of its own, for at most C{seconds}."""

    async def limited() -> T:
        return await asyncio.wait_for(action, seconds)

    return asyncio.run(limited())


def write_random(path: Path, mebibytes: int) -> str:
    """@return: the digest of what was written."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(mebibytes):
            chunk = os.urandom(MIB)
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    """@return: the digest of a whole file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(MIB):
            digest.update(chunk)
    return digest.hexdigest()


class DirectoryTestCase(SynchronousTestCase):
    """@ivar directory: empty, private, and with a path short enough for sockets."""

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rmx-"))
        self.addCleanup(shutil.rmtree, self.directory)


class QemuTestCase(DirectoryTestCase):
    """@ivar tools: QEMU; without it the tests skip and say what is missing."""

    tools: QemuTools

    def setUp(self) -> None:
        super().setUp()
        try:
            self.tools = installed_tools()
        except QemuUnavailable as error:
            raise SkipTest(str(error)) from None


class CopyTestCase(QemuTestCase):
    """
    Disks copied to and from an NBD server behind the relay.

    @cvar size_mib: of the image; by default more than two replay buffers and
        four windows by default (32 and 4 MiB), in each direction.
    """

    size_mib = 256

    async def tool(self, *command: str) -> None:
        """Run a program, which must succeed."""
        process = await asyncio.create_subprocess_exec(
            *command,
            env=self.tools.environment(),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            _, errors = await process.communicate()
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        if process.returncode:
            raise AssertionError(f"{' '.join(command)}: status {process.returncode}: {errors.decode()}")

    async def serve(self, image: Path, socket: Path) -> asyncio.subprocess.Process:
        """Start qemu-nbd and wait for its socket."""
        process = await asyncio.create_subprocess_exec(
            *(self.tools.nbd, "--persistent", "--format=raw", "--shared=8", "--export-name=disk"),
            *(f"--socket={socket}", str(image)),
            env=self.tools.environment(),
        )
        while not socket.is_socket() and process.returncode is None:
            await asyncio.sleep(0.02)
        return process

    def copy_both_ways(self, transport: str, there: str, back: str, cuts: int = 0) -> None:
        """
        Copy an image to the server and from there to a new one, all through the relay.

        @param there: C{nbdcopy}, or C{qemu-img}.
        @param cuts: how often to cut the link each time.
        """
        digest = write_random(self.directory / "near.img", self.size_mib)
        result = run(self._both_ways(transport, there, back, cuts, digest), 150)
        self.assertEqual(result, (digest, [0, 0]))

    async def _both_ways(
        self, transport: str, there: str, back: str, cuts: int, digest: str
    ) -> tuple[str, list[int]]:
        """@return: the new one's digest, and the daemons' exit statuses."""
        far, result = self.directory / "far.img", self.directory / "back.img"
        for path in (far, result):
            with path.open("wb") as file:
                file.truncate(self.size_mib << 20)
        async with RelayPair(self.directory, transport, ["vda"], proxied=cuts > 0) as relays:
            server = await self.serve(far, relays.nbd_socket)
            url = f"nbd+unix:///disk?socket={relays.disk_socket('vda')}"
            copies = {
                "nbdcopy": [self.tools.nbdcopy, "--flush"],
                "qemu-img": [self.tools.img, "convert", "-n", "-f", "raw", "-O", "raw"],
            }
            try:
                copy = self.tool(*copies[there], str(self.directory / "near.img"), url)
                await asyncio.gather(copy, self.cut_often(relays, cuts, "up"))
                self.assertEqual(digest_of(far), digest)
                copy = self.tool(*copies[back], url, str(result))
                await asyncio.gather(copy, self.cut_often(relays, cuts, "down"))
            finally:
                server.terminate()
                await server.wait()
        wrong = [check for check in link_checks(relays, 2 * cuts) if not check.passed]
        self.assertEqual(wrong, [])
        # Whatever the client is, and on both sides, at least one connection each way.
        named = f"is disk disk, {self.size_mib}.0 MiB ({self.size_mib * MIB} bytes)"
        self.assertGreaterEqual(relays.logs(1000).count(named), 4)
        return digest_of(result), relays.statuses

    async def cut_often(self, relays: RelayPair, cuts: int, side: str) -> None:
        """Cut the link so often while the image goes to C{side}."""
        # More go on until the next cut is ordered: slowly, so that they are few.
        gap = self.size_mib * MIB // (2 * cuts + 2)
        for _ in range(cuts):
            assert relays.proxy is not None
            known = len(relays.outages()[0])
            await relays.proxy.do(f"rate {64 * MIB}; cut after {gap} {side}")
            while not all(len(told) > known and told[-1].seconds is not None for told in relays.outages()):
                await asyncio.sleep(0.02)


class RelayedTestCase(QemuTestCase):
    """A live guest that goes through two daemons, with two of its three disks."""

    def migrate(
        self,
        transport: str,
        mode: Mode,
        *,
        cuts: int = 0,
        disk_mib: int = 64,
        small: bool = False,
    ) -> None:
        """
        Migrate; every check must pass.

        @param cuts: how often to cut the link meanwhile.
        @param small: with the smallest windows and replay buffer that a file may have,
            and little memory for them to grow into.
        """
        link_options = ("window = 16K", "replay-buffer = 64K") if small else ()
        relay_options = ("memory = 4M",) if small else ()
        if mode is Mode.POSTCOPY and self.tools.version < (7, 1):
            raise SkipTest(f"{self.tools.description} has no postcopy-preempt; 7.1 has")

        async def scenario() -> list[Check]:
            relays = RelayPair(
                self.directory,
                transport,
                SELECTED_DISKS,
                link_options,
                relay_options=relay_options,
                proxied=cuts > 0,
            )
            async with relays:
                rehearsal = Rehearsal(
                    self.tools, self.directory, relays, mode=mode, memory=80, disk_bytes=disk_mib << 20
                )
                cutter = None
                if relays.proxy is not None:
                    cutter = Cutter(relays.proxy, relays.outages, mode, cuts)
                    cutter.join(rehearsal)
                try:
                    checks = await rehearsal.run()
                except Exception:
                    print(relays.logs(60))
                    raise
                finally:
                    if cutter is not None:
                        await cutter.finish()
                await relays.close()
                made = cutter.cuts if cutter is not None else ()
                return checks + relay_checks(relays, mode, rehearsal.channels, made, cuts)

        wrong = [check for check in run(scenario(), 150) if not check.passed]
        self.assertEqual(wrong, [])
