"""
A live migration with some of a guest's disks, step by step over QMP.

Every connection goes to a UNIX socket that the caller names: one for the
memory, one for each disk.  Whoever listens there carries the bytes to the
destination's two sockets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from relaymux.testing.qemu.machine import CommandFailed, Event, Machine, MachineEnded
from relaymux.testing.qemu.plan import MigrationFailed, MigrationPlan, Mode, Progress, Transfer

__all__ = ["Migration"]

#: Seconds between two looks at the progress.
_LOOK_SECONDS = 0.1

#: The share of the memory that is sent before postcopy begins: enough to see
#: both ways work, and most of it left to be fetched by page faults.
_PRECOPY_SHARE = 0.25


@dataclass
class Migration:
    """
    One migration; L{run} it once.

    @ivar entering: awaited with each phase's name before the phase begins.
    @ivar at_switchover: awaited while the guest is stopped and its disks are
        complete on the destination, which has not run it yet.
    @ivar report: given the progress several times a second.
    @ivar statistics: the source's C{query-migrate} at the end.
    """

    source: Machine
    destination: Machine
    plan: MigrationPlan
    report: Callable[[Progress], None] = lambda progress: None
    at_switchover: Callable[[], Awaitable[None]] | None = None
    entering: Callable[[str], Awaitable[None]] | None = None
    phase: str = "preparing"
    statistics: dict[str, Any] = field(default_factory=dict)
    _memory: Transfer | None = None
    _disks: dict[str, Transfer] = field(default_factory=dict)

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return Progress(self.phase, self._memory, dict(sorted(self._disks.items())))

    async def run(self) -> None:
        """
        Migrate; at the end the guest runs on the destination alone.

        @raise MigrationFailed: it does not; what could be undone is undone.
        """
        self.source.forget_events()
        self.destination.forget_events()
        over = asyncio.Event()
        watcher = asyncio.ensure_future(self._watch(over))
        try:
            await self._prepare()
            await self._copy_disks()
            await self._send_memory()
            await self._switch_over()
            await self._hand_over()
        except (Exception, asyncio.CancelledError) as error:
            source_runs = await self._roll_back()
            if isinstance(error, asyncio.CancelledError):
                raise
            raise MigrationFailed(self.phase, str(error), source_runs) from error
        finally:
            over.set()
            # What stopped it, a machine that ended, has stopped the steps too.
            await asyncio.gather(watcher, return_exceptions=True)

    # The steps, in their order.

    async def _enter(self, phase: str) -> None:
        self.phase = phase
        self.report(self.progress)
        if self.entering is not None:
            await self.entering(phase)

    async def _prepare(self) -> None:
        """Tell both sides how; let the destination listen."""
        plan, destination = self.plan, self.destination
        for machine in (self.source, self.destination):
            # Without return-path the source believes that it is done when
            # the last byte has left it, wherever that byte is.
            names = ["events", "return-path"]
            if machine is self.source:
                names.append("pause-before-switchover")
            if plan.mode is Mode.MULTIFD:
                names.append("multifd")
            if plan.mode is Mode.POSTCOPY:
                names += ["postcopy-ram", "postcopy-preempt"]
            capabilities = [{"capability": name, "state": True} for name in names]
            await machine.execute("migrate-set-capabilities", {"capabilities": capabilities})
            if plan.mode is Mode.MULTIFD:
                await machine.execute("migrate-set-parameters", {"multifd-channels": plan.channels})
        await self.source.execute(
            "migrate-set-parameters",
            {
                "max-bandwidth": plan.bandwidth,
                "max-postcopy-bandwidth": plan.postcopy_bandwidth,
                "downtime-limit": plan.downtime,
            },
        )
        if plan.disks:
            address = {"type": "unix", "data": {"path": str(plan.nbd_socket)}}
            await destination.execute("nbd-server-start", {"addr": address})
        for disk in plan.disks:
            await destination.execute(
                "block-export-add",
                {
                    "type": "nbd",
                    "id": f"export-{disk.name}",
                    "node-name": disk.name,
                    "name": disk.name,
                    "writable": True,
                },
            )
        await destination.execute("migrate-incoming", {"uri": f"unix:{plan.incoming_socket}"})

    async def _copy_disks(self) -> None:
        """Mirror each disk through its own socket, until source and destination agree."""
        await self._enter("copying disks")
        for disk in self.plan.disks:
            await self.source.execute(
                "blockdev-add",
                {
                    "driver": "nbd",
                    "node-name": f"target-{disk.name}",
                    "server": {"type": "unix", "path": str(disk.socket)},
                    "export": disk.name,
                    "reconnect-delay": self.plan.reconnect_delay,
                },
            )
            await self.source.execute(
                "blockdev-mirror",
                {
                    "job-id": f"mirror-{disk.name}",
                    "device": disk.name,
                    "target": f"target-{disk.name}",
                    "sync": "full",
                    "speed": self.plan.disk_bandwidth,
                },
            )
        for disk in self.plan.disks:
            await self._job_event("BLOCK_JOB_READY", f"mirror-{disk.name}")
        await self._look()

    async def _send_memory(self) -> None:
        """Send memory while the guest runs, until it can be stopped for the rest."""
        await self._enter("sending memory")
        await self.source.execute("migrate", {"uri": f"unix:{self.plan.ram_socket}"})
        if self.plan.mode is Mode.POSTCOPY:
            while not self._memory or self._memory.done < self._memory.total * _PRECOPY_SHARE:
                for event in self.source.events:
                    self._check_event(event, self.source)
                await asyncio.sleep(_LOOK_SECONDS / 2)
                await self._look()
            await self.source.execute("migrate-start-postcopy")
        await self._status(self.source, "pre-switchover")

    async def _switch_over(self) -> None:
        """The guest is stopped: finish the disks."""
        await self._enter("switching over")
        for disk in self.plan.disks:
            # Cancelling a mirror that is ready finishes it and keeps the source's own disk.
            await self.source.execute("block-job-cancel", {"device": f"mirror-{disk.name}"})
        for disk in self.plan.disks:
            await self._job_event("BLOCK_JOB_COMPLETED", f"mirror-{disk.name}")
            await self.source.execute("blockdev-del", {"node-name": f"target-{disk.name}"})
            size = self._disks[disk.name].total
            self._disks[disk.name] = Transfer(size, size)
        if self.at_switchover is not None:
            await self.at_switchover()

    async def _hand_over(self) -> None:
        """Let go, and run the guest on the destination."""
        await self._enter("fetching memory" if self.plan.mode is Mode.POSTCOPY else "handing over")
        await self.source.execute("migrate-continue", {"state": "pre-switchover"})
        if self.plan.mode is Mode.POSTCOPY:
            await self._status(self.source, "postcopy-active")
            await self._status(self.destination, "postcopy-active")
            await self._resume_destination()
        await self._status(self.source, "completed")
        await self._status(self.destination, "completed")
        if self.plan.mode is not Mode.POSTCOPY:
            await self._resume_destination()
        self.statistics = await self.source.execute("query-migrate")
        self.phase = "done"
        await self._look()

    async def _resume_destination(self) -> None:
        if self.plan.disks:
            await self.destination.execute("nbd-server-stop")
        await self.destination.execute("cont")

    async def _roll_back(self) -> bool:
        """@return: whether the guest runs on the source."""
        try:
            status = (await self.source.execute("query-migrate")).get("status")
            if status in ("completed", "postcopy-active", "postcopy-paused", "postcopy-recover"):
                return False
            if status not in (None, "none", "cancelled", "failed"):
                await self.source.execute("migrate_cancel")
                await self._ended()
            for job in await self.source.execute("query-block-jobs"):
                await self.source.execute("block-job-cancel", {"device": job["device"], "force": True})
            await self._jobs_gone()
            nodes = await self.source.execute("query-named-block-nodes", {"flat": True})
            names = {node["node-name"] for node in nodes}
            for disk in self.plan.disks:
                if f"target-{disk.name}" in names:
                    await self.source.execute("blockdev-del", {"node-name": f"target-{disk.name}"})
            if not (await self.source.execute("query-status"))["running"]:
                await self.source.execute("cont")
            return True
        except (CommandFailed, MachineEnded):
            return False

    # Waiting.

    async def _status(self, machine: Machine, wanted: str) -> None:
        """Wait until C{machine}'s migration is as C{wanted}."""

        def reached(event: Event) -> bool:
            self._check_event(event, machine)
            return event.name == "MIGRATION" and event.data["status"] == wanted

        try:
            await machine.wait_event(reached, f"migration status {wanted!r}", self.plan.phase_seconds)
        except _StatusFailed as failure:
            reason = (await machine.execute("query-migrate")).get("error-desc", "no reason given")
            raise CommandFailed(f"{machine.name}: the migration {failure}: {reason}") from None

    def _check_event(self, event: Event, machine: Machine) -> None:
        if event.name == "MIGRATION" and event.data["status"] in ("failed", "cancelled", "postcopy-paused"):
            raise _StatusFailed(event.data["status"])
        if machine is self.source and event.name == "BLOCK_JOB_COMPLETED" and "error" in event.data:
            raise CommandFailed(f"{machine.name}: {event.data['device']}: {event.data['error']}")

    async def _job_event(self, name: str, job: str) -> None:
        def arrived(event: Event) -> bool:
            self._check_event(event, self.source)
            return event.name == name and event.data["device"] == job

        await self.source.wait_event(arrived, f"{name} of {job}", self.plan.phase_seconds)

    async def _ended(self) -> None:
        for _ in range(int(self.plan.phase_seconds / _LOOK_SECONDS)):
            if (await self.source.execute("query-migrate"))["status"] in ("cancelled", "failed", "completed"):
                return
            await asyncio.sleep(_LOOK_SECONDS)
        raise CommandFailed(f"{self.source.name}: the migration does not end")

    async def _jobs_gone(self) -> None:
        for _ in range(int(self.plan.phase_seconds / _LOOK_SECONDS)):
            if not await self.source.execute("query-block-jobs"):
                return
            await asyncio.sleep(_LOOK_SECONDS)
        raise CommandFailed(f"{self.source.name}: the copying of disks does not end")

    # Progress.

    async def _watch(self, over: asyncio.Event) -> None:
        while not over.is_set():
            await self._look()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(over.wait(), _LOOK_SECONDS)

    async def _look(self) -> None:
        memory = (await self.source.execute("query-migrate")).get("ram")
        if memory and memory["total"]:
            self._memory = Transfer(memory["total"] - memory["remaining"], memory["total"])
        for job in await self.source.execute("query-block-jobs"):
            name = job["device"].removeprefix("mirror-")
            self._disks[name] = Transfer(job["offset"], job["len"])
        self.report(self.progress)


class _StatusFailed(Exception):
    """The migration took a turn that ends it."""
