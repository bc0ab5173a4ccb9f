"""What the demonstrations show: how far a migration is, and what was verified."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, TaskID, TaskProgressColumn, TextColumn
from rich.progress import Progress as ProgressDisplay
from rich.table import Table
from rich.text import Text

from relaymux.testing.qemu.plan import Progress
from relaymux.testing.qemu.rehearsal import Check

__all__ = ["Display", "print_checks"]

#: Seconds between two lines of progress where there is no terminal.
_LINE_SECONDS = 1.0

#: Notes on a terminal, the last ones.
_NOTES_SHOWN = 8


class Display:
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
        self._notes: dict[int, str] = {}
        self._tasks: dict[str, TaskID] = {}
        self._phase = ""
        self._line = ""
        self._said = 0.0
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=12)

    def __enter__(self) -> Display:
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

    def note(self, number: int, line: str, again: str = "") -> None:
        """
        Show what happens to the link.

        @param number: the line's; a later one takes its place on a terminal.
        @param again: what to print where lines cannot be replaced; by default the line.
        """
        if self._console.is_terminal:
            self._notes[number] = f"{number}. {line}"
        else:
            self._console.print(f"  {number}. {again or line}")

    def _say(self, phase: str, line: str) -> None:
        if phase == self._phase and (line == self._line or time.monotonic() - self._said < _LINE_SECONDS):
            return
        self._phase, self._line, self._said = phase, line, time.monotonic()
        self._console.print(f"  {line}")

    def _render(self) -> RenderableType:
        notes = [Text(f"  {line}", style="yellow") for line in list(self._notes.values())[-_NOTES_SHOWN:]]
        return Group(Text(f"  {self._phase}", style="bold"), self._bars, *notes)


def print_checks(console: Console, checks: Sequence[Check]) -> None:
    """Say what was verified, each with its evidence."""
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
