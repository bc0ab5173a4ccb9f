"""Tests of whole live migrations through two relay daemons and the one link between them."""

from __future__ import annotations

from dataclasses import replace

from relaymux.testing.qemu.guest import GuestSettings, boot_sector
from relaymux.testing.qemu.machine import Disk, Machine
from relaymux.testing.qemu.migrate import Migration
from relaymux.testing.qemu.plan import DiskRoute, MigrationFailed, MigrationPlan, Mode
from relaymux.testing.qemu.relays import RelayPair
from tests.qemu.support import MIB, QemuTestCase, RelayedTestCase, run


class RelayedMigrationTests(RelayedTestCase):
    """Through a link that holds."""

    def test_plain_tls(self) -> None:
        """One connection for the memory, through TLS."""
        self.migrate("tls", Mode.PLAIN)

    def test_multifd_tls(self) -> None:
        """Five connections for the memory; the first one has to arrive first."""
        self.migrate("tls", Mode.MULTIFD)

    def test_postcopy_tls(self) -> None:
        """The guest moves before its memory; the channel for urgent pages has no bytes at first."""
        self.migrate("tls", Mode.POSTCOPY)

    def test_plain_tcp(self) -> None:
        """Through TCP, with the smallest windows and replay buffer that a file may have."""
        self.migrate("tcp", Mode.PLAIN, small=True)


class FarSideMissingTests(QemuTestCase):
    """The relay is there, and behind it nobody listens: QEMU is told, and the guest goes on."""

    def migrate(self, **wrong: object) -> tuple[MigrationFailed, str]:
        """
        @param wrong: sockets for the destination to listen on in place of those the relay knows.
        @return: the failure and what the daemons logged.
        """
        guest = GuestSettings(memory=32, pages_per_tick=20)
        disks = [Disk("vda", self.directory / f"{side}.img") for side in ("a", "b")]
        for disk in disks:
            disk.path.write_bytes(boot_sector(guest).ljust(4 * MIB, b"\0"))

        async def scenario() -> tuple[MigrationFailed, str]:
            source = Machine(self.tools, "source", self.directory, guest.memory, disks[:1])
            destination = Machine(
                self.tools, "destination", self.directory, guest.memory, disks[1:], incoming=True
            )
            async with RelayPair(self.directory, "tls", ["vda"]) as relays, source, destination:
                plan = MigrationPlan(
                    disks=(DiskRoute("vda", relays.disk_socket("vda")),),
                    ram_socket=relays.ram_socket(),
                    incoming_socket=relays.incoming_socket,
                    nbd_socket=relays.nbd_socket,
                    phase_seconds=20,
                )
                await source.console.wait_tick(10, 30)
                try:
                    await Migration(source, destination, replace(plan, **wrong)).run()  # type: ignore[arg-type]
                except MigrationFailed as error:
                    failure = error
                else:
                    raise AssertionError("the migration did not fail")
                await source.console.wait_tick(source.console.last + guest.lap_ticks, 30)
                return failure, relays.logs(100)

        return run(scenario())

    def test_no_disk(self) -> None:
        """No NBD server: C{blockdev-add} fails, and the log names the socket."""
        failure, logs = self.migrate(nbd_socket=self.directory / "other.sock")
        self.assertEqual((failure.phase, failure.source_runs), ("copying disks", True))
        self.assertIn("b-nbd.sock", logs)

    def test_no_memory(self) -> None:
        """Nobody takes the memory: the migration fails, and the log names the socket."""
        failure, logs = self.migrate(incoming_socket=self.directory / "other.sock")
        self.assertEqual((failure.phase, failure.source_runs), ("sending memory", True))
        self.assertIn("b-ram.sock", logs)
