"""Tests of the migration itself, without a relay: that it is right, and undone when it fails."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import replace

from relaymux.testing.qemu.console import continuity
from relaymux.testing.qemu.guest import GuestSettings, boot_sector
from relaymux.testing.qemu.machine import CommandFailed, Disk, Machine, MachineEnded
from relaymux.testing.qemu.migrate import Migration
from relaymux.testing.qemu.plan import DiskRoute, MigrationFailed, MigrationPlan, Progress
from relaymux.testing.qemu.rehearsal import Direct, Rehearsal
from tests.qemu.support import MIB, QemuTestCase, run, write_random


class RehearsalTests(QemuTestCase):
    """The whole with nothing in between: what a relayed run is compared with."""

    def test_direct(self) -> None:
        """Every check of a direct migration passes."""
        rehearsal = Rehearsal(self.tools, self.directory, Direct(self.directory), memory=80)
        checks = run(rehearsal.run())
        self.assertEqual([check for check in checks if not check.passed], [])
        self.assertEqual(len(checks), 6)


class RollBackTests(QemuTestCase):
    """When a migration fails the guest goes on where it was, as if nothing had been."""

    guest = GuestSettings(memory=40, pages_per_tick=40, drives=(0x80,), blocks=64)

    def setUp(self) -> None:
        super().setUp()
        self.disks = [Disk("vda", self.directory / f"{side}.img") for side in ("a", "b")]
        write_random(self.disks[0].path, 16)
        with self.disks[0].path.open("r+b") as file:
            file.write(boot_sector(self.guest))
        with self.disks[1].path.open("wb") as file:
            file.truncate(16 * MIB)
        self.plan = MigrationPlan(
            disks=(DiskRoute("vda", self.directory / "nbd"),),
            ram_socket=self.directory / "ram",
            incoming_socket=self.directory / "ram",
            nbd_socket=self.directory / "nbd",
            reconnect_delay=1,
            phase_seconds=20,
        )

    async def failing(
        self,
        watch: Callable[[Machine, Progress], None],
        at_switchover: Callable[[], Awaitable[None]] | None = None,
    ) -> MigrationFailed:
        """
        Migrate, which must fail; then see that the guest goes on for a whole lap,
        and can still be migrated.

        @param watch: given the destination and the progress.
        """
        memory = self.guest.memory
        async with Machine(self.tools, "source", self.directory, memory, self.disks[:1]) as source:
            await source.console.wait_tick(20, 30)
            second = Machine(self.tools, "second", self.directory, memory, self.disks[1:], incoming=True)
            first = Machine(self.tools, "first", self.directory, memory, self.disks[1:], incoming=True)
            async with first:
                migration = Migration(
                    source, first, self.plan, lambda progress: watch(first, progress), at_switchover
                )
                try:
                    await migration.run()
                except MigrationFailed as error:
                    failure = error
                else:
                    raise AssertionError("the migration did not fail")
            await source.console.wait_tick(source.console.last + self.guest.lap_ticks, 30)
            async with second:
                routes = tuple(DiskRoute(disk.name, self.directory / "nbd") for disk in self.plan.disks)
                plan = replace(self.plan, disks=routes, ram_socket=self.directory / "ram")
                plan = replace(plan, bandwidth=1 << 30, disk_bandwidth=0)
                await Migration(source, second, plan).run()
                await source.close()
                await second.console.wait_tick(source.console.last + self.guest.lap_ticks, 30)
            continuity(source.console, second.console)
            return failure

    def test_no_socket_for_a_disk(self) -> None:
        """A disk whose socket is not there."""
        self.plan = replace(self.plan, disks=(DiskRoute("vda", self.directory / "nothing"),))
        failure = run(self.failing(lambda destination, progress: None))
        self.assertEqual((failure.phase, failure.source_runs), ("copying disks", True))
        self.assertIn("No such file", str(failure))

    def test_no_socket_for_the_memory(self) -> None:
        """The disks are in sync, and there is no way for the memory."""
        self.plan = replace(self.plan, ram_socket=self.directory / "nothing")
        failure = run(self.failing(lambda destination, progress: None))
        self.assertEqual((failure.phase, failure.source_runs), ("sending memory", True))

    def test_destination_dies(self) -> None:
        """The destination is gone in the middle of the memory, and with it the disk's connection."""

        def watch(destination: Machine, progress: Progress) -> None:
            if progress.phase == "sending memory" and progress.memory is not None:
                os.kill(destination.pid, signal.SIGKILL)

        # Slow enough to be in the middle for seconds.
        self.plan = replace(self.plan, bandwidth=4 * MIB)
        failure = run(self.failing(watch))
        self.assertEqual((failure.phase, failure.source_runs), ("sending memory", True))

    def test_disk_breaks(self) -> None:
        """A disk's connection is lost for good while it is copied, and QEMU's reason is told."""
        victims: list[Machine] = []

        def watch(destination: Machine, progress: Progress) -> None:
            if progress.disks and destination not in victims:
                victims.append(destination)
                os.kill(destination.pid, signal.SIGKILL)

        self.plan = replace(self.plan, disk_bandwidth=8 * MIB)
        failure = run(self.failing(watch))
        self.assertEqual((failure.phase, failure.source_runs), ("copying disks", True))
        self.assertIn("mirror-vda: ", str(failure))

    def test_stopped_at_the_switchover(self) -> None:
        """At the last moment, the guest stopped and its disks complete, it is called off."""

        async def call_off() -> None:
            raise CommandFailed("called off")

        failure = run(self.failing(lambda destination, progress: None, call_off))
        self.assertEqual((failure.phase, failure.source_runs), ("switching over", True))
        self.assertIn("called off", str(failure))

    def test_cancelled(self) -> None:
        """Whoever cancels it gets the guest back running on the source."""

        async def scenario() -> bool:
            memory = self.guest.memory
            source = Machine(self.tools, "source", self.directory, memory, self.disks[:1])
            first = Machine(self.tools, "first", self.directory, memory, self.disks[1:], incoming=True)
            async with source, first:
                await source.console.wait_tick(20, 30)
                memory_started = asyncio.Event()

                def watch(progress: Progress) -> None:
                    if progress.phase == "sending memory":
                        memory_started.set()

                migrating = asyncio.ensure_future(Migration(source, first, self.plan, watch).run())
                await asyncio.wait_for(memory_started.wait(), 30)
                migrating.cancel()
                await asyncio.wait({migrating}, timeout=30)
                self.assertTrue(migrating.cancelled())
                await source.console.wait_tick(source.console.last + self.guest.lap_ticks, 30)
                status: dict[str, bool] = await source.execute("query-status")
                return status["running"]

        self.plan = replace(self.plan, bandwidth=4 * MIB)
        self.assertTrue(run(scenario()))


class MachineTests(QemuTestCase):
    """What a QEMU that does not do as it should looks like."""

    def test_does_not_start(self) -> None:
        """QEMU's own words are in the error."""

        async def scenario() -> None:
            disk = Disk("vda", self.directory / "nothing.img")
            async with Machine(self.tools, "guest", self.directory, 32, [disk]):
                pass

        error = self.assertRaises(MachineEnded, run, scenario())
        self.assertIn("nothing.img", str(error))
        self.assertIn("No such file", str(error))

    def test_killed(self) -> None:
        """A command to a QEMU that is gone fails at once."""

        async def scenario() -> None:
            async with Machine(self.tools, "guest", self.directory, 32, []) as machine:
                os.kill(machine.pid, signal.SIGKILL)
                await machine.wait_event(lambda event: False, "nothing", 20)

        error = self.assertRaises(MachineEnded, run, scenario())
        self.assertIn("status -9", str(error))

    def test_refused(self) -> None:
        """A command that QEMU refuses is told with its reason; the machine goes on."""

        async def scenario() -> str:
            async with Machine(self.tools, "guest", self.directory, 32, []) as machine:
                try:
                    await machine.execute("blockdev-del", {"node-name": "nobody"})
                except CommandFailed as error:
                    await machine.execute("query-status")
                    return str(error)
            return ""

        self.assertRegex(run(scenario()), r"guest: blockdev-del: .*nobody")
