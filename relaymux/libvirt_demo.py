"""
C{python -m relaymux.libvirt_demo}: a virtual machine moves between two libvirt hosts.

Both hosts are on this machine, in namespaces.  The machine has three disks, two of
which go along, and the link is reset while they do.  At the end it says what was verified.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial

from rich.console import Console

from relaymux.demo_display import Display, print_checks
from relaymux.testing.libvirt.domain import Domain, VirtualMachine, guest_for
from relaymux.testing.libvirt.faults import Fault, Moment, Saboteur, Strike
from relaymux.testing.libvirt.host import CommandFailed, HostFailed
from relaymux.testing.libvirt.install import Edition, LibvirtUnavailable, ensure_libvirt
from relaymux.testing.libvirt.moves import Move
from relaymux.testing.libvirt.rehearsal import Rehearsal
from relaymux.testing.libvirt.relays import Relays
from relaymux.testing.libvirt.rig import Rig, RigUnavailable, check_machine
from relaymux.testing.libvirt.verdict import relay_checks
from relaymux.testing.qemu.console import GuestFailed
from relaymux.testing.qemu.rehearsal import Check
from relaymux.testing.qemu.relays import RelayFailed

__all__ = ["main"]

_NAME = "web1"

#: The middle one stays, so that neither order nor number can stand for a name.
_SELECTED = ("vda", "vdc")

#: MiB of memory, and pages that the guest writes in a tick: few enough for a QEMU that
#: has no KVM and loses track of busier guests, also without a relay.
_MEMORY, _PAGES = 64, 10

#: MiB per second for the memory, and for each disk, so that there is something to see.
_BANDWIDTH = 32

_FAILURES = (CommandFailed, GuestFailed, HostFailed, RelayFailed, TimeoutError)


def _show_strike(display: Display, saboteur: Saboteur, strike: Strike, mended: bool) -> None:
    number = list(saboteur.plan).index(strike) + 1
    down = f"every connection between the hosts is reset for {strike.seconds:g} s"
    if not mended:
        display.note(number, f"{down} ({strike.moment.value})")
        return
    outage = saboteur.relays.outages()[0][-1]
    back = (
        f"resumed after {outage.seconds} s, {outage.streams} streams go on, "
        f"{outage.again:,} bytes sent again, {outage.lost} lost"
    )
    display.note(number, f"{down} ({strike.moment.value}): {back}", back)


async def _migrate(rig: Rig, arguments: argparse.Namespace, console: Console) -> list[Check]:
    source, destination = rig.hosts
    domain = Domain(_NAME, guest_for(_MEMORY, _PAGES, _SELECTED))
    machine = VirtualMachine(rig, domain, arguments.disk_size << 20)
    relays = Relays(rig, [_NAME])
    try:
        await relays.start()
        console.print(f"Two relays, one TLS connection. {_NAME} boots on {source.name}.")
        await machine.start(source, _SELECTED)
        await machine.heartbeat.wait_tick(domain.guest.lap_ticks // 4, 60)
        move = Move(_SELECTED, bandwidth=_BANDWIDTH, suspend=True)
        route = relays.route(destination, _NAME)
        console.print(f"virsh {shlex.join(move.arguments(_NAME, route))}", markup=False, highlight=False)
        moments = (Moment.DISKS, Moment.MEMORY)[: arguments.resets]
        plan = [Strike(moment, Fault.RESET, 3.0) for moment in moments]
        saboteur = Saboteur(relays, machine, source, destination, plan)
        with Display(console) as display:
            saboteur.changed = partial(_show_strike, display, saboteur)
            rehearsal = Rehearsal(machine, display.show, saboteur.run if plan else None)
            outcome = await rehearsal.move(source, destination, move, route)
        console.print(f"virsh took {outcome.seconds:.1f} s; the relays {relays.cpu:.1f} s of processor time.")
        await relays.close()
        return outcome.checks + await relay_checks(relays, len(_SELECTED), saboteur.done, len(plan))
    except _FAILURES:
        for host in rig.hosts:
            console.print(f"{host.name}: libvirt said:\n{host.said()}", markup=False, highlight=False)
        console.print(relays.logs(), markup=False, highlight=False)
        raise
    finally:
        await machine.destroy()
        await relays.close()


async def _run(arguments: argparse.Namespace, console: Console) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        await asyncio.to_thread(check_machine)
        tree = await asyncio.to_thread(ensure_libvirt, Edition(arguments.edition), console.print)
    except (RigUnavailable, LibvirtUnavailable) as error:
        console.print(f"[bold red]Not here:[/] {error}")
        return 1
    started = time.monotonic()
    try:
        async with Rig(libvirt=tree) as rig:
            version = (await rig.hosts[0].virsh("version")).splitlines()
            console.print(f"Two hosts: {', '.join(line.partition(': ')[2] for line in version[1::2])}")
            checks = await _migrate(rig, arguments, console)
    except _FAILURES as error:
        console.print(f"[bold red]The migration failed:[/] {error}")
        return 1
    print_checks(console, checks)
    console.print(f"{time.monotonic() - started:.0f} seconds; nothing is left of the hosts.")
    return 0 if all(check.passed for check in checks) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """@return: the exit status: 0 if all checks passed."""
    parser = argparse.ArgumentParser(
        prog="relaymux.libvirt_demo", description="Migrate a virtual machine between two libvirt hosts here."
    )
    parser.add_argument(
        "--edition",
        choices=[edition.value for edition in Edition],
        default=Edition.RELEASE.value,
        help="which libvirt and QEMU (%(default)s)",
    )
    parser.add_argument(
        "--disk-size", type=int, default=64, metavar="MIB", help="size of each disk (%(default)s)"
    )
    parser.add_argument(
        "--resets", type=int, choices=(0, 1, 2), default=2, help="how often the link is reset (%(default)s)"
    )
    chosen = parser.parse_args(arguments)
    if chosen.disk_size < 4:
        parser.error("--disk-size: a disk has at least 4 MiB")
    console = Console(soft_wrap=True) if not sys.stdout.isatty() else Console()
    try:
        return asyncio.run(_run(chosen, console))
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("Stopped; nothing is left of the hosts.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
