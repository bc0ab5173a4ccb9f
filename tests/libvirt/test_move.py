"""A quick share of C{make test-libvirt}: one machine that libvirt moves through the relays."""

from __future__ import annotations

from relaymux.testing.libvirt.domain import Domain, VirtualMachine, guest_for
from relaymux.testing.libvirt.faults import Fault, Moment, Saboteur, Strike
from relaymux.testing.libvirt.moves import Move
from relaymux.testing.libvirt.rehearsal import Rehearsal
from relaymux.testing.libvirt.relays import Relays
from relaymux.testing.libvirt.rig import Rig
from relaymux.testing.libvirt.verdict import relay_checks
from relaymux.testing.qemu.rehearsal import Check
from tests.libvirt.support import LibvirtTestCase
from tests.qemu.support import run

DISKS = ("vda", "vdc")


class MoveTests(LibvirtTestCase):
    """C{virsh migrate} with two of three disks."""

    def test_reset(self) -> None:
        """The link is reset while the disks are copied: libvirt and the guest notice nothing."""

        async def scenario() -> list[Check]:
            async with Rig() as rig:
                source, destination = rig.hosts
                machine = VirtualMachine(rig, Domain("web1", guest_for(64, 20, DISKS)), 48 << 20)
                relays = Relays(rig, ["web1"])
                try:
                    await relays.start()
                    await machine.start(source, DISKS)
                    await machine.heartbeat.wait_tick(100, 60)
                    plan = [Strike(Moment.DISKS, Fault.RESET, 1.0)]
                    saboteur = Saboteur(relays, machine, source, destination, plan)
                    rehearsal = Rehearsal(machine, during=saboteur.run)
                    move = Move(DISKS, bandwidth=16, suspend=True)
                    outcome = await rehearsal.move(
                        source, destination, move, relays.route(destination, "web1")
                    )
                except BaseException:
                    print(relays.logs(60), *(host.said() for host in rig.hosts), sep="\n")
                    raise
                finally:
                    await machine.destroy()
                    await relays.close()
                return outcome.checks + await relay_checks(relays, len(DISKS), saboteur.done, len(plan))

        checks = run(scenario(), 150)
        self.assertEqual([check for check in checks if not check.passed], [])
        self.assertEqual(len(checks), 10)
