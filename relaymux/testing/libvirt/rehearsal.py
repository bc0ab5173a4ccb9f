"""
A migration between two libvirt hosts with everything around it, and what it proves.

After each move the guest is given the time to verify every page of its memory and
every block it has written; the rest of the disks is compared here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from relaymux.testing.libvirt.domain import VirtualMachine
from relaymux.testing.libvirt.host import Host
from relaymux.testing.libvirt.moves import Move, Route, completed_job, watch_progress
from relaymux.testing.qemu.console import GuestFailed
from relaymux.testing.qemu.plan import Progress
from relaymux.testing.qemu.rehearsal import Check

__all__ = ["Outcome", "Rehearsal"]

#: Seconds that one C{virsh migrate} may take.
_MIGRATE_SECONDS = 300.0

#: Seconds for the guest to verify itself, at most.
_VERIFY_SECONDS = 60.0


@dataclass
class Outcome:
    """
    @ivar seconds: that virsh took.
    @ivar gap: the guest's longest time without a tick, seconds, around the move.
    @ivar figures: libvirt's own, see L{completed_job}.
    """

    seconds: float = 0.0
    gap: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)

    @property
    def wrong(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if not check.passed]


@dataclass
class Rehearsal:
    """
    Moves of one machine.

    @ivar machine: started.
    @ivar report: given the progress while it moves; None saves asking for it.
    @ivar during: run beside virsh; what it raises fails the move.
    """

    machine: VirtualMachine
    report: Callable[[Progress], None] | None = None
    during: Callable[[], Awaitable[None]] | None = None

    async def move(self, source: Host, destination: Host, move: Move, route: Route) -> Outcome:
        """
        Move it, let the guest verify itself, and check.

        @raise CommandFailed: virsh failed.
        @raise GuestFailed: the guest does not run.
        """
        machine, name = self.machine, self.machine.domain.name
        heart = machine.heartbeat
        heart.check()
        others = [disk for disk in machine.domain.disks if disk not in move.disks]
        untouched = await asyncio.to_thread(self._digests, destination, others)
        outcome = Outcome()
        moves, started = len(heart.moves), time.monotonic()
        await self._migrate(source, move, route)
        outcome.seconds = time.monotonic() - started
        if move.suspend:
            await self._compare(outcome, move, whole=True)
            await destination.virsh("resume", name)
        last = heart.last
        lap = machine.domain.guest.lap_ticks
        await heart.wait_tick(last + lap + 2, _VERIFY_SECONDS + lap / machine.domain.guest.ticks_per_second)
        outcome.gap = heart.longest_gap(started - 1)
        outcome.figures = dict(await completed_job(destination, name))
        if not move.suspend:
            await self._compare(outcome, move, whole=False)
        self._check_guest(outcome, moves, last, lap, destination)
        places = [host.name for host in await machine.where()]
        self._add(outcome, "it is on one host", places == [destination.name], f"on {' and '.join(places)}")
        after = await asyncio.to_thread(self._digests, destination, others)
        for disk in others:
            same = after[disk] == untouched[disk]
            self._add(
                outcome,
                f"{disk} was not sent",
                same,
                "the destination's own image is as it was" if same else "the destination's own image changed",
            )
        return outcome

    async def _migrate(self, source: Host, move: Move, route: Route) -> None:
        machine, name = self.machine, self.machine.domain.name
        virsh = source.virsh(*move.arguments(name, route), seconds=_MIGRATE_SECONDS)
        tasks: list[asyncio.Future[object]] = [asyncio.ensure_future(virsh)]
        if self.during is not None:
            tasks.append(asyncio.ensure_future(self.during()))
        watcher: asyncio.Future[None] | None = None
        if self.report is not None:
            watcher = asyncio.ensure_future(watch_progress(source, name, move.disks, self.report))
        try:
            for one in tasks:
                await one
        finally:
            if watcher is not None:
                watcher.cancel()
                await asyncio.gather(watcher, return_exceptions=True)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        machine.heartbeat.check()

    async def _compare(self, outcome: Outcome, move: Move, *, whole: bool) -> None:
        for disk in move.disks:
            place = await asyncio.to_thread(self.machine.difference, disk, whole=whole)
            size = f"{self.machine.disk_bytes:,} bytes"
            if place is not None:
                evidence = f"the two hosts' images differ at byte {place:,}"
            elif whole:
                evidence = f"{size} are equal on both hosts at the switchover"
            else:
                evidence = f"{size} are equal on both hosts, but for what the guest writes and verifies"
            self._add(outcome, f"{disk} is identical", place is None, evidence)

    def _check_guest(self, outcome: Outcome, moves: int, last: int, lap: int, destination: Host) -> None:
        machine, heart = self.machine, self.machine.heartbeat
        guest = machine.domain.guest
        what = "the guest's ticks go on without a gap"
        try:
            heart.check()
        except GuestFailed as failure:
            self._add(outcome, what, False, str(failure))
            return
        arrived = heart.side is not None and machine.rig.hosts[heart.side] is destination
        self._add(
            outcome,
            what,
            arrived and len(heart.moves) == moves + 1,
            f"1 to {heart.last:,}, the move between two of them; longest pause {outcome.gap * 1000:.0f} ms",
        )
        blocks = f", and {guest.blocks} blocks on each of {len(guest.drives)} disks" if guest.drives else ""
        self._add(
            outcome,
            "the guest's memory is right",
            heart.last - last > lap,
            f"since the move it verified all {guest.pages:,} pages{blocks}",
        )

    def _digests(self, host: Host, disks: list[str]) -> dict[str, str]:
        return {disk: self.machine.digest(host, disk) for disk in disks}

    def _add(self, outcome: Outcome, what: str, passed: bool, evidence: str) -> None:
        outcome.checks.append(Check(what, passed, evidence))
