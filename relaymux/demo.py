"""
C{python -m relaymux.demo}: a real live migration through the relay, on this machine.

Two QEMUs, two daemons, one link between them; a guest with three disks, two of
which go along.  At the end it says what was verified.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from rich.console import Console

from relaymux.demo_display import Display, print_checks
from relaymux.testing.qemu.console import GuestFailed
from relaymux.testing.qemu.cuts import Cut, Cutter, ProxyFailed
from relaymux.testing.qemu.install import ensure_tools
from relaymux.testing.qemu.machine import CommandFailed, MachineEnded
from relaymux.testing.qemu.plan import MigrationFailed, Mode
from relaymux.testing.qemu.rehearsal import SELECTED_DISKS, Carrier, Check, Direct, Rehearsal
from relaymux.testing.qemu.relays import TRANSPORTS, RelayFailed, RelayPair
from relaymux.testing.qemu.tools import QemuTools, QemuUnavailable
from relaymux.testing.qemu.verdict import relay_checks

__all__ = ["main"]

#: Connections beside the main one in a multifd migration.
_CHANNELS = 4

#: Each takes half a second of the migration.
_MOST_CUTS = 100

#: What goes wrong with a migration rather than with this program.
_FAILURES = (CommandFailed, GuestFailed, MachineEnded, MigrationFailed, ProxyFailed, RelayFailed)


def _show_cut(display: Display, cut: Cut, mended: bool) -> None:
    outage = cut.outage
    assert outage is not None
    down = f"link cut while {cut.phase}: {outage.streams} streams wait, {outage.held:,} bytes on their way"
    back = f"resumed after {outage.seconds} s, {outage.again:,} bytes sent again, {outage.lost} lost"
    display.note(cut.number, f"{down}; {back}" if mended else down, back if mended else "")


async def _migrate(
    tools: QemuTools, directory: Path, console: Console, transport: str | None, arguments: argparse.Namespace
) -> list[Check]:
    """@param transport: None for a migration without a relay."""
    async with AsyncExitStack() as stack:
        carrier: Carrier = Direct(directory)
        relays: RelayPair | None = None
        if transport is not None:
            carrier = relays = RelayPair(directory, transport, SELECTED_DISKS, proxied=arguments.cuts > 0)
            await stack.enter_async_context(relays)
            console.print(f"Two daemons, {transport} between them. Migrating, {arguments.mode}:")
        else:
            console.print(f"Without a relay. Migrating, {arguments.mode}:")
        with Display(console) as display:
            rehearsal = Rehearsal(
                tools,
                directory,
                carrier,
                mode=Mode(arguments.mode),
                disk_bytes=arguments.disk_size << 20,
                channels=_CHANNELS,
                report=display.show,
            )
            cutter = None
            if relays is not None and relays.proxy is not None:
                cutter = Cutter(relays.proxy, relays.outages, rehearsal.mode, arguments.cuts)
                cutter.changed = partial(_show_cut, display)
                cutter.join(rehearsal)
            try:
                checks = await rehearsal.run()
            except _FAILURES:
                if relays is not None:
                    console.print(relays.logs(), markup=False, highlight=False)
                raise
            finally:
                if cutter is not None:
                    await cutter.finish()
        if relays is not None:
            await relays.close()
            cuts = cutter.cuts if cutter is not None else ()
            checks += relay_checks(relays, rehearsal.mode, rehearsal.channels, cuts, arguments.cuts)
            console.print(
                f"The daemons took {relays.cpu:.1f} s of processor time and at most "
                f"{relays.peak / 2**20:.0f} MiB of memory each."
            )
        return checks


async def _attempt(
    tools: QemuTools, console: Console, transport: str | None, arguments: argparse.Namespace
) -> bool:
    """@return: whether everything was as it should be."""
    directory = Path(tempfile.mkdtemp(prefix="relaymux-"))
    try:
        checks = await _migrate(tools, directory, console, transport, arguments)
    except _FAILURES as error:
        console.print(f"[bold red]The migration failed:[/] {error}")
        return False
    finally:
        if arguments.keep:
            console.print(f"Files and logs are in {directory}")
        else:
            shutil.rmtree(directory)
    print_checks(console, checks)
    return all(check.passed for check in checks)


async def _run(arguments: argparse.Namespace, console: Console) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        tools = await asyncio.to_thread(ensure_tools, None, console.print)
    except QemuUnavailable as error:
        console.print(f"[bold red]No QEMU:[/] {error}")
        return 1
    console.print(
        f"{tools.description}: a guest with three disks of {arguments.disk_size} MiB; "
        f"{' and '.join(SELECTED_DISKS)} go along, vdb stays."
    )
    started = time.monotonic()
    transport = None if arguments.direct else arguments.transport
    good = await _attempt(tools, console, transport, arguments)
    console.print(f"{time.monotonic() - started:.0f} seconds.")
    if not good and transport is not None:
        console.print("\nFor comparison, the same without the relay:")
        direct = await _attempt(tools, console, None, arguments)
        console.print(
            "[bold]Without the relay it works: the fault is in the relay.[/]"
            if direct
            else "[bold]It fails without the relay as well: QEMU or this machine is to blame.[/]"
        )
    return 0 if good else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """@return: the exit status: 0 if all checks passed."""
    parser = argparse.ArgumentParser(
        prog="relaymux.demo", description="Migrate a virtual machine on this host."
    )
    parser.add_argument("--transport", choices=TRANSPORTS, default="tls", help="what joins the two daemons")
    parser.add_argument(
        "--mode", choices=[mode.value for mode in Mode], default="plain", help="how memory goes"
    )
    parser.add_argument(
        "--disk-size", type=int, default=64, metavar="MIB", help="size of each disk (%(default)s)"
    )
    parser.add_argument(
        "--cuts", type=int, default=0, metavar="N", help="cut the link N times, in all phases (%(default)s)"
    )
    parser.add_argument("--direct", action="store_true", help="without a relay, for comparison")
    parser.add_argument("--keep", action="store_true", help="keep the files, configurations and logs")
    chosen = parser.parse_args(arguments)
    if chosen.disk_size < 4:
        parser.error("--disk-size: a disk has at least 4 MiB")
    if not 0 <= chosen.cuts <= _MOST_CUTS:
        parser.error(f"--cuts: there can be 0 to {_MOST_CUTS}")
    console = Console(soft_wrap=True) if not sys.stdout.isatty() else Console()
    try:
        return asyncio.run(_run(chosen, console))
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print("Stopped.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
