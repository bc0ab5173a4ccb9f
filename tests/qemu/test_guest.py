"""Tests of the guest: its code, and that it notices what it is there to notice."""

from __future__ import annotations

import asyncio
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from relaymux.testing.qemu.assemble import assemble
from relaymux.testing.qemu.console import GuestFailed
from relaymux.testing.qemu.guest import PAGE_BYTES, SECTOR_BYTES, GuestSettings, boot_sector
from relaymux.testing.qemu.machine import Disk, Machine
from tests.qemu.support import MIB, QemuTestCase, run


class AssembleTests(SynchronousTestCase):
    """The listing becomes the bytes it says."""

    def test_bytes_values_and_text(self) -> None:
        """Bytes are taken as they are, values little-endian in their room, texts as ASCII."""
        code = assemble("a: 01 FF $x:2 'hi' ; a comment 99\n  $y:4", {"x": 0x1234, "y": -1}, 0)
        self.assertEqual(code, b"\x01\xff\x34\x12hi\xff\xff\xff\xff")

    def test_addresses_and_distances(self) -> None:
        """An address counts from the origin, a distance from behind itself; both ways."""
        code = assemble("a: EB >c\nb: E8 >>a\n @c @b\nc: EB >c", {}, origin=0x7C00)
        self.assertEqual(code, bytes.fromhex("eb 07 e8 fbff 097c 027c eb fe"))

    def test_too_far(self) -> None:
        """A jump that does not reach its label is refused, not cut short."""
        with self.assertRaises(ValueError) as caught:
            assemble("a: EB >b\n" + "90 " * 128 + "\nb: 90", {}, 0)
        self.assertIn("too far", str(caught.exception))

    def test_unreadable(self) -> None:
        """A word that is no byte is refused."""
        with self.assertRaises(ValueError) as caught:
            assemble("a: 90 xyz", {}, 0)
        self.assertIn("'xyz'", str(caught.exception))


class BootSectorTests(SynchronousTestCase):
    """The sector that a BIOS boots."""

    def test_form(self) -> None:
        """It is one sector, begins with C{cli} and has the boot signature."""
        sector = boot_sector(GuestSettings(drives=(0x80, 0x82)))
        self.assertEqual(len(sector), SECTOR_BYTES)
        self.assertEqual(sector[:1], b"\xfa")
        self.assertEqual(sector[-2:], b"\x55\xaa")
        self.assertIn(b"tick 00000000 ok\r\n\0", sector)
        self.assertIn(b"\x80\x82\x00\x00\x00", sector)

    def test_region(self) -> None:
        """The region leaves the firmware's memory alone, and a lap covers it and the blocks."""
        guest = GuestSettings(memory=32, pages_per_tick=10)
        self.assertEqual(guest.pages, 8 * MIB // PAGE_BYTES)
        self.assertEqual(guest.lap_ticks, 205)
        with_disk = GuestSettings(memory=32, pages_per_tick=100, drives=(0x80,), blocks=300)
        self.assertEqual(with_disk.lap_ticks, 300)

    def test_out_of_range(self) -> None:
        """What the hardware or the sector cannot hold is refused."""
        for wrong in (
            GuestSettings(ticks_per_second=18),
            GuestSettings(sectors_per_block=128),
            GuestSettings(drives=(0x80, 0x81, 0x82, 0x83, 0x84)),
            GuestSettings(memory=24),
            GuestSettings(pages_per_tick=0),
        ):
            with self.assertRaises(ValueError):
                boot_sector(wrong)


class GuestTests(QemuTestCase):
    """The guest in a machine."""

    guest = GuestSettings(memory=32, pages_per_tick=20, drives=(0x80, 0x81), blocks=37, sectors_per_block=5)

    def disks(self) -> list[Disk]:
        """Two disks to write to, the first one to boot from."""
        disks = [Disk(name, self.directory / f"{name}.img") for name in ("vda", "vdb")]
        for disk in disks:
            disk.path.write_bytes(bytes(2 * MIB))
        with disks[0].path.open("r+b") as file:
            file.write(boot_sector(self.guest))
        return disks

    def test_laps(self) -> None:
        """Undisturbed it goes on for laps, every page and block being what it expects."""

        async def scenario() -> list[int]:
            async with Machine(self.tools, "guest", self.directory, 32, self.disks()) as machine:
                await machine.console.wait_tick(3 * self.guest.lap_ticks, 60)
            return [number for number, _ in machine.console.ticks]

        numbers = run(scenario())
        self.assertEqual(numbers, list(range(1, len(numbers) + 1)))

    def test_writes_each_disk(self) -> None:
        """Each disk gets patterns of its own, inside the area and nowhere else."""

        async def scenario() -> None:
            async with Machine(self.tools, "guest", self.directory, 32, disks) as machine:
                await machine.console.wait_tick(self.guest.blocks + 1, 60)

        disks = self.disks()
        run(scenario())
        start = self.guest.first_sector * SECTOR_BYTES
        end = start + self.guest.blocks * self.guest.sectors_per_block * SECTOR_BYTES
        areas = [disk.path.read_bytes() for disk in disks]
        for area in areas:
            self.assertNotIn(bytes(64), area[start:end])
            self.assertEqual(area[SECTOR_BYTES:start].strip(b"\0"), b"")
            self.assertEqual(area[end:].strip(b"\0"), b"")
        first = [area[start : start + SECTOR_BYTES] for area in areas]
        self.assertNotEqual(*first)

    def test_notices_a_wrong_block(self) -> None:
        """One changed byte on a disk is found within a lap."""

        async def scenario() -> None:
            disks = self.disks()
            async with Machine(self.tools, "guest", self.directory, 32, disks) as machine:
                await machine.console.wait_tick(self.guest.blocks + 1, 60)
                await machine.execute("stop")
                _change_byte(disks[1].path, (self.guest.first_sector + 100) * SECTOR_BYTES)
                await machine.execute("cont")
                await machine.console.wait_tick(10 * self.guest.lap_ticks, 60)

        error = self.assertRaises(GuestFailed, run, scenario())
        self.assertRegex(str(error), r"^BAD disk 000\w{5} \w{8} \w{8}")

    def test_notices_a_wrong_page(self) -> None:
        """One changed byte of memory is found within a lap."""

        async def scenario() -> None:
            async with Machine(self.tools, "guest", self.directory, 32, self.disks()) as machine:
                await machine.console.wait_tick(10, 60)
                await _poke(machine, self.directory / "gdb", self.guest.region_start + 5 * MIB + 0x123)
                await machine.console.wait_tick(10 * self.guest.lap_ticks, 60)

        error = self.assertRaises(GuestFailed, run, scenario())
        # The address behind the word, then the two words.
        self.assertRegex(str(error), r"^BAD page 01500124 \w{8} \w{8}")


def _change_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)
        file.seek(offset)
        file.write(bytes([old[0] ^ 1]))


async def _poke(machine: Machine, path: Path, address: int) -> None:
    """Change a byte of the guest's memory, through QEMU's debugger port."""

    async def ask(text: str) -> str:
        writer.write(b"+$%s#%02x" % (text.encode(), sum(text.encode()) & 255))
        answer = await asyncio.wait_for(reader.readuntil(b"#"), 10)
        await reader.readexactly(2)
        return answer.partition(b"$")[2][:-1].decode()

    command = f"gdbserver unix:{path},server=on,wait=off"
    await machine.execute("human-monitor-command", {"command-line": command})
    reader, writer = await asyncio.open_unix_connection(str(path))
    old = int(await ask(f"m{address:x},1"), 16)
    assert await ask(f"M{address:x},1:{old ^ 1:02x}") == "OK"
    assert await ask("D") == "OK"
    writer.close()
    await machine.execute("cont")
