"""
Cutting the link between two daemons while a migration goes on.

A L{LinkProxy} stands between them; a L{Cutter} decides when it cuts: some times in
every phase of the migration, with a link slow enough to be full of bytes.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from relaymux.testing.qemu.outages import Outage
from relaymux.testing.qemu.plan import Mode, Progress
from relaymux.testing.qemu.rehearsal import SELECTED_DISKS, Rehearsal

__all__ = ["Cut", "Cutter", "LinkProxy", "ProxyFailed", "phases_to_cut"]

#: Bytes per second through the link as long as there are cuts to come.  The guest
#: dirties memory faster, so its memory is on its way until then.
_RATE = 32 << 20

#: Seconds for the proxy to start, and to answer.
_PROXY_SECONDS = 15.0

#: Seconds for the daemons to find one another again.
_RESUME_SECONDS = 20.0

#: Seconds between two looks.
_LOOK_SECONDS = 0.02

#: In the first turn, and in each further one.
_ORDER = {
    Mode.POSTCOPY: (
        ("fetching memory", "fetching memory", "copying disks", "switching over", "sending memory"),
        ("fetching memory", "copying disks", "sending memory"),
    )
}
_USUAL_ORDER = (
    ("sending memory", "copying disks", "handing over", "switching over", "sending memory"),
    ("copying disks", "sending memory"),
)

#: Of the memory that go in a phase, where it is not all.
_POSTCOPY_SHARES = {"sending memory": (0.0, 0.25), "fetching memory": (0.3, 1.0)}

#: Too short for a look at how far they are: what to tell the proxy as they begin.
#: The one begins with finishing the disks, which then has to wait; in the other the
#: last memory and the devices go, more than this.
_MOMENTS = {"switching over": "cut", "handing over": "cut after 16K up"}


class ProxyFailed(Exception):
    """The proxy or the link through it does not do as it should."""


class LinkProxy:
    """A process that stands between two daemons."""

    def __init__(self, directory: Path, listen: str, target: str) -> None:
        """@param listen: C{host:port}, or the path of a UNIX socket, as is C{target}."""
        self._control = directory / "proxy.ctl"
        self._log = directory / "proxy.log"
        self._arguments = [sys.executable, "-m", "relaymux", "fault-proxy", listen, target]
        self._arguments += ["--control", str(self._control)]
        self._process: asyncio.subprocess.Process | None = None
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def start(self) -> None:
        """@raise ProxyFailed: it did not start."""
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._arguments, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            self._streams = await asyncio.wait_for(self._connect(), _PROXY_SECONDS)
        except asyncio.TimeoutError:
            raise ProxyFailed(f"the proxy does not start: {self._said()}") from None

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        assert self._process is not None
        while self._process.returncode is None:
            try:
                return await asyncio.open_unix_connection(self._control)
            except OSError:
                await asyncio.sleep(_LOOK_SECONDS)
        raise ProxyFailed(f"the proxy ended with status {self._process.returncode}: {self._said()}")

    async def do(self, command: str) -> str:
        """
        @return: the proxy's answer.
        @raise ProxyFailed: it did not do it.
        """
        assert self._streams is not None, "not started"
        reader, writer = self._streams
        writer.write(f"{command}\n".encode())
        try:
            answer = (await asyncio.wait_for(reader.readline(), _PROXY_SECONDS)).decode().strip()
        except asyncio.TimeoutError:
            answer = "nothing"
        if not answer.startswith("ok"):
            raise ProxyFailed(f"the proxy says {answer!r} to {command!r}: {self._said()}")
        return answer.removeprefix("ok").strip()

    async def close(self) -> None:
        """End it."""
        if self._streams is not None:
            self._streams[1].close()
        if self._process is not None:
            if self._process.returncode is None:
                self._process.terminate()
            await self._process.wait()

    def _said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace").strip()[-2000:]


@dataclass
class Cut:
    """
    @ivar phase: in which the migration was.
    @ivar outage: what the dialling daemon says of it; None until it does.
    """

    number: int
    phase: str
    outage: Outage | None = None


def phases_to_cut(mode: Mode, count: int) -> Counter[str]:
    """@return: how many cuts there are to be in each phase."""
    first, further = _ORDER.get(mode, _USUAL_ORDER)
    return Counter([*first, *(further * count)][:count])


@dataclass
class Cutter:
    """
    Cuts the link C{count} times, spread over the phases of one migration.

    @ivar outages: tells what the dialling daemon and the other say so far.
    @ivar changed: called when a cut was noticed, and, then with True, when it was mended.
    @ivar cuts: those made.
    """

    proxy: LinkProxy
    outages: Callable[[], tuple[list[Outage], list[Outage]]]
    mode: Mode
    count: int
    changed: Callable[[Cut, bool], None] = lambda cut, mended: None
    cuts: list[Cut] = field(default_factory=list)
    _disk_bytes: int = 1
    _share: float = 0.0
    _hurry: bool = False
    _cutting: asyncio.Task[None] | None = None
    _following: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self._plan = phases_to_cut(self.mode, self.count)

    def join(self, rehearsal: Rehearsal) -> None:
        """Let C{rehearsal} be cut, and QEMU not dial again by itself."""
        show = rehearsal.report
        self._disk_bytes = rehearsal.disk_bytes * len(SELECTED_DISKS)

        def report(progress: Progress) -> None:
            self.report(progress)
            show(progress)

        rehearsal.report = report
        rehearsal.entering = self.entering
        rehearsal.reconnect_delay = 0

    def report(self, progress: Progress) -> None:
        """Take note of how far the migration is."""
        if progress.phase == "copying disks":
            self._share = sum(item.done for item in progress.disks.values()) / self._disk_bytes
        elif progress.memory is not None:
            self._share = progress.memory.done / progress.memory.total

    async def entering(self, phase: str) -> None:
        """
        The migration begins C{phase}, and waits for this.

        Makes the cuts that are left of the phase before.

        @raise ProxyFailed: the link does not come back.
        """
        self._hurry = True
        if self._cutting is not None:
            await self._cutting
        self._share, self._hurry = 0.0, False
        if phase == "copying disks":
            await self.proxy.do(f"rate {_RATE}")
        if phase in _MOMENTS:
            if self._plan[phase]:
                await self._cut(phase, _MOMENTS[phase])
        else:
            self._cutting = asyncio.ensure_future(self._cut_within(phase))

    async def finish(self) -> None:
        """The migration is over: make no more cuts, and wait until the last is mended."""
        if self._cutting is not None:
            self._cutting.cancel()
        # What went wrong with the last one shows in its outage.
        tasks = [task for task in (self._cutting, self._following) if task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _cut_within(self, phase: str) -> None:
        low, high = _POSTCOPY_SHARES.get(phase, (0.0, 1.0)) if self.mode is Mode.POSTCOPY else (0.0, 1.0)
        cuts = self._plan[phase]
        for number in range(1, cuts + 1):
            while self._share < low + (high - low) * number / (cuts + 1) and not self._hurry:
                await asyncio.sleep(_LOOK_SECONDS)
            await self._cut(phase)
        if phase == "sending memory":
            await self._mended()
            await self.proxy.do("rate 0")

    async def _cut(self, phase: str, command: str = "cut") -> None:
        await self._mended()
        await self.proxy.do(command)
        self.cuts.append(Cut(len(self.cuts) + 1, phase))
        self._following = asyncio.ensure_future(self._follow(self.cuts[-1]))

    async def _mended(self) -> None:
        if self._following is not None:
            # So that it goes on if this is cancelled.
            await asyncio.wait({self._following})
            self._following.result()

    async def _follow(self, cut: Cut) -> None:
        """Until the link is back."""
        for _ in range(int(_RESUME_SECONDS / _LOOK_SECONDS)):
            known, _ = self.outages()
            if len(known) >= cut.number:
                noticed, cut.outage = cut.outage is not None, known[cut.number - 1]
                if not noticed:
                    self.changed(cut, False)
                if cut.outage.seconds is not None:
                    self.changed(cut, True)
                    return
            await asyncio.sleep(_LOOK_SECONDS)
        raise ProxyFailed(f"cut {cut.number}, while {cut.phase}: no link within {_RESUME_SECONDS:g} s")
