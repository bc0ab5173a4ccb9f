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
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, TaskID, TaskProgressColumn, TextColumn
from rich.progress import Progress as ProgressDisplay
from rich.table import Table
from rich.text import Text

from relaymux.testing.qemu.console import GuestFailed
from relaymux.testing.qemu.cuts import Cut, Cutter, ProxyFailed
from relaymux.testing.qemu.install import ensure_tools
from relaymux.testing.qemu.machine import CommandFailed, MachineEnded
from relaymux.testing.qemu.plan import MigrationFailed, Mode, Progress
from relaymux.testing.qemu.rehearsal import SELECTED_DISKS, Carrier, Check, Direct, Rehearsal
from relaymux.testing.qemu.relays import TRANSPORTS, RelayFailed, RelayPair
from relaymux.testing.qemu.tools import QemuTools, QemuUnavailable
from relaymux.testing.qemu.verdict import relay_checks

__all__ = ["main"]

#: Connections beside the main one in a multifd migration.
_CHANNELS = 4

#: Seconds between two lines of progress where there is no terminal.
_LINE_SECONDS = 1.0

#: Each takes half a second of the migration.
_MOST_CUTS = 100

#: Cuts on a terminal, the last ones.
_CUTS_SHOWN = 8

#: What goes wrong with a migration rather than with this program.
_FAILURES = (CommandFailed, GuestFailed, MachineEnded, MigrationFailed, ProxyFailed, RelayFailed)


class _Display:
    """Progress of the memory and of each disk: bars on a terminal, lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = ProgressDisplay(
            TextColumn("  {task.description:<7}"),
            BarColumn(bar_width=40),
            TaskProgressColumn(),
            DownloadColumn(binary_units=True),
            auto_refresh=False,
        )
        self._cuts: dict[int, str] = {}
        self._tasks: dict[str, TaskID] = {}
        self._phase = ""
        self._line = ""
        self._said = 0.0
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=12)

    def __enter__(self) -> _Display:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def show(self, progress: Progress) -> None:
        """Show the newest state."""
        transfers = dict(progress.disks)
        if progress.memory is not None:
            transfers["memory"] = progress.memory
        if self._console.is_terminal:
            self._phase = progress.phase
            for name, transfer in transfers.items():
                if name not in self._tasks:
                    self._tasks[name] = self._bars.add_task(name)
                self._bars.update(self._tasks[name], completed=transfer.done, total=transfer.total)
        else:
            parts = [f"{name} {100 * item.done // item.total} %" for name, item in transfers.items()]
            self._say(progress.phase, f"{progress.phase}: {', '.join(parts)}" if parts else progress.phase)

    def show_cut(self, cut: Cut, mended: bool) -> None:
        """Show that the link is down, or up again."""
        outage = cut.outage
        assert outage is not None
        down = (
            f"link cut while {cut.phase}: {outage.streams} streams wait, {outage.held:,} bytes on their way"
        )
        back = f"resumed after {outage.seconds} s, {outage.again:,} bytes sent again, {outage.lost} lost"
        if self._console.is_terminal:
            self._cuts[cut.number] = f"{cut.number}. {down}; {back}" if mended else f"{cut.number}. {down}"
        else:
            self._console.print(f"  {cut.number}. {back if mended else down}")

    def _say(self, phase: str, line: str) -> None:
        if phase == self._phase and (line == self._line or time.monotonic() - self._said < _LINE_SECONDS):
            return
        self._phase, self._line, self._said = phase, line, time.monotonic()
        self._console.print(f"  {line}")

    def _render(self) -> RenderableType:
        cuts = [Text(f"  {line}", style="yellow") for line in list(self._cuts.values())[-_CUTS_SHOWN:]]
        return Group(Text(f"  {self._phase}", style="bold"), self._bars, *cuts)


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
        with _Display(console) as display:
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
                cutter.changed = display.show_cut
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


def _print_checks(console: Console, checks: Sequence[Check]) -> None:
    table = Table(box=None, padding=(0, 1), show_header=False)
    for check in checks:
        mark = "[green]ok[/]" if check.passed else "[bold red]WRONG[/]"
        table.add_row(mark, check.what, check.evidence)
    if console.is_terminal:
        console.print("\nVerified:", table, sep="\n")
    else:
        console.print("Verified:")
        for check in checks:
            console.print(f"  {'ok' if check.passed else 'WRONG'}: {check.what}: {check.evidence}")


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
    _print_checks(console, checks)
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
