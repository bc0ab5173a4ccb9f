"""What happens to the link while a machine moves, and just when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from relaymux.testing.libvirt.domain import VirtualMachine
from relaymux.testing.libvirt.host import CommandFailed, Host
from relaymux.testing.libvirt.moves import job_figures
from relaymux.testing.libvirt.relays import Relays

__all__ = ["Fault", "Moment", "Saboteur", "Strike"]

#: Seconds between two looks.
_LOOK_SECONDS = 0.01

#: Seconds without a tick after which the guest is stopped rather than late.
_STOPPED_SECONDS = 0.03

#: Seconds until a moment that does not come is given up.
_PATIENCE = 120.0


class Moment(str, Enum):
    """When."""

    CONTROL = "control"
    PREPARE = "prepare"
    DISKS = "disks"
    MEMORY = "memory"
    SWITCHOVER = "switchover"


class Fault(str, Enum):
    """What."""

    RESET = "reset"
    BLACK_HOLE = "black hole"


@dataclass
class Strike:
    """
    @ivar state: what libvirt said of the machine while the link was away.
    """

    moment: Moment
    fault: Fault
    seconds: float
    state: str = ""


@dataclass
class Saboteur:
    """
    Takes the link away at the moments that were ordered, one after the other.

    @ivar plan: in the order in which they come.
    @ivar changed: called when the link is away, and, then with True, when it is back.
    @ivar done: those that were carried out.
    """

    relays: Relays
    machine: VirtualMachine
    source: Host
    destination: Host
    plan: Sequence[Strike]
    changed: Callable[[Strike, bool], None] = lambda strike, mended: None
    done: list[Strike] = field(default_factory=list)
    _sends_memory: bool = False

    async def run(self) -> None:
        """
        Carry the plan out; to be run beside the migration.

        @raise TimeoutError: a moment did not come.
        """
        network = self.relays.rig.network
        side = self.relays.rig.hosts.index(self.source)
        since = len(self.relays.said(side))
        for strike in self.plan:
            await asyncio.wait_for(self._await(strike.moment, side, since), _PATIENCE)
            links = [len(told) for told in self.relays.outages()]
            try:
                await (network.reset() if strike.fault is Fault.RESET else network.swallow())
                self.changed(strike, False)
                until = time.monotonic() + strike.seconds
                strike.state = await self._state()
                await asyncio.sleep(max(0.0, until - time.monotonic()))
            finally:
                await network.mend()
            self.done.append(strike)
            if strike.fault is Fault.RESET:
                # A short silence may pass unnoticed.
                await self._mended(links)
            self.changed(strike, True)

    async def _await(self, moment: Moment, side: int, since: int) -> None:
        """Sleep until the migration is there."""
        while not await self._reached(moment, self.relays.said(side)[since:]):
            await asyncio.sleep(_LOOK_SECONDS)

    async def _reached(self, moment: Moment, said: str) -> bool:
        name = self.machine.domain.name
        if moment is Moment.CONTROL:
            # libvirt has dialled, and has said little as yet.
            return f"{name}.control" in said or f"{name} control" in said
        if moment is Moment.PREPARE:
            # The destination's libvirt has been asked, and starts its QEMU.
            return self.destination.path(f"/run/libvirt/qemu/{name}.pid").exists()
        if moment is Moment.DISKS:
            return await self._disk_begun()
        if not self._sends_memory:
            job = await job_figures(self.source, name)
            self._sends_memory = job.get("Memory processed", 0.0) > 0
        # Libvirt is not asked again: its answer may take as long as the guest is stopped.
        return self._sends_memory and (moment is Moment.MEMORY or self._stopped())

    async def _disk_begun(self) -> bool:
        for disk in self.machine.domain.disks:
            try:
                said = await self.source.virsh("blockjob", self.machine.domain.name, disk, "--info", "--raw")
            except CommandFailed:
                continue
            if "cur=" in said and "cur=0\n" not in said:
                return True
        return False

    def _stopped(self) -> bool:
        ticks = self.machine.heartbeat.ticks
        return bool(ticks) and time.monotonic() - ticks[-1][1] > _STOPPED_SECONDS

    async def _state(self) -> str:
        try:
            return (await self.source.virsh("domstate", self.machine.domain.name, "--reason")).strip()
        except CommandFailed:
            return "not there any more"

    async def _mended(self, before: Sequence[int]) -> None:
        """Until both daemons say that they have resumed."""
        while True:
            told = self.relays.outages()
            if all(
                len(now) > count and now[-1].seconds is not None
                for now, count in zip(told, before, strict=True)
            ):
                return
            await asyncio.sleep(_LOOK_SECONDS)
