"""Tests of NBD through the relay, with the programs that people use for it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from relaymux.testing.qemu.relays import RelayPair
from tests.qemu.support import QemuTestCase, digest_of, run, write_random

#: More than two replay buffers and more than four windows by default (32 and 4 MiB), in each direction.
SIZE_MIB = 256


class CopyTests(QemuTestCase):
    """Disks copied to and from an NBD server behind the relay."""

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

    async def both_ways(self, transport: str, there: str, back: str) -> tuple[str, list[int]]:
        """
        Copy an image to the server and from there to a new one, all through the relay.

        @return: the new one's digest, and the daemons' exit statuses.
        """
        far, result = self.directory / "far.img", self.directory / "back.img"
        for path in (far, result):
            with path.open("wb") as file:
                file.truncate(SIZE_MIB << 20)
        async with RelayPair(self.directory, transport, ["vda"]) as relays:
            server = await self.serve(far, relays.nbd_socket)
            url = f"nbd+unix:///disk?socket={relays.disk_socket('vda')}"
            copies = {
                "nbdcopy": [self.tools.nbdcopy, "--flush"],
                "qemu-img": [self.tools.img, "convert", "-n", "-f", "raw", "-O", "raw"],
            }
            try:
                await self.tool(*copies[there], str(self.directory / "near.img"), url)
                self.assertEqual(digest_of(far), self.digest)
                await self.tool(*copies[back], url, str(result))
            finally:
                server.terminate()
                await server.wait()
        self.assertEqual(len(relays.connections), 1)
        return digest_of(result), relays.statuses

    def setUp(self) -> None:
        super().setUp()
        self.digest = write_random(self.directory / "near.img", SIZE_MIB)

    def test_nbdcopy(self) -> None:
        """C{nbdcopy}, which uses several connections at once, both ways through TLS."""
        self.assertEqual(run(self.both_ways("tls", "nbdcopy", "nbdcopy")), (self.digest, [0, 0]))

    def test_qemu_img(self) -> None:
        """C{qemu-img} both ways through TCP."""
        self.assertEqual(run(self.both_ways("tcp", "qemu-img", "qemu-img")), (self.digest, [0, 0]))
