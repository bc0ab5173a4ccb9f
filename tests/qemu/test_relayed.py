"""Tests of whole live migrations through two relay daemons and the one link between them."""

from __future__ import annotations

from collections.abc import Sequence

from relaymux.testing.qemu.migrate import Mode
from relaymux.testing.qemu.rehearsal import SELECTED_DISKS, Check, Rehearsal
from relaymux.testing.qemu.relays import RelayPair
from tests.qemu.support import QemuTestCase, run


class RelayedMigrationTests(QemuTestCase):
    """A live guest and two of its three disks; the third stays."""

    def migrate(self, transport: str, mode: Mode, link_options: Sequence[str] = ()) -> None:
        """Migrate; every check must pass."""

        async def scenario() -> list[Check]:
            async with RelayPair(self.directory, transport, SELECTED_DISKS, link_options) as relays:
                rehearsal = Rehearsal(self.tools, self.directory, relays, mode=mode)
                try:
                    checks = await rehearsal.run()
                except Exception:
                    print(relays.logs(60))
                    raise
                await relays.close()
                return checks + relays.checks(mode, rehearsal.channels)

        wrong = [check for check in run(scenario(), 120) if not check.passed]
        self.assertEqual(wrong, [])

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
        self.migrate("tcp", Mode.PLAIN, ("window = 16K", "replay-buffer = 64K"))

    def test_multifd_unix(self) -> None:
        """Through a UNIX socket."""
        self.migrate("unix", Mode.MULTIFD)
