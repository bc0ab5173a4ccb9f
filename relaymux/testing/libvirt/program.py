"""A process that runs on a host."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Program", "children"]

#: Seconds for a process that was asked to end.
_END_SECONDS = 10.0


@dataclass
class Program:
    """
    A process on a host.

    @ivar pid: as this process sees it.
    """

    _entering: asyncio.subprocess.Process
    pid: int

    @property
    def status(self) -> int | None:
        """Its exit status; negative for a signal; None as long as it runs."""
        return self._entering.returncode

    def send_signal(self, number: int) -> None:
        """Does nothing if it has ended."""
        if self.status is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def wait(self) -> int:
        """@return: its exit status."""
        return await self._entering.wait()

    async def end(self, number: int = signal.SIGTERM, seconds: float = _END_SECONDS) -> int:
        """
        Ask it to end, and make it end if it does not within C{seconds}.

        @return: its exit status.
        """
        self.send_signal(number)
        try:
            return await asyncio.wait_for(self.wait(), seconds)
        except asyncio.TimeoutError:
            self.send_signal(signal.SIGKILL)
            return await self.wait()


def children(pid: int) -> list[int]:
    """@return: the processes that C{pid} has started and that have not been waited for."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(word) for word in text.split()]
