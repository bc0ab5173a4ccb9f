"""What the cases of the long suite have in common: hosts, relays, and machines to move."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from relaymux.testing.libvirt.domain import DISK_NAMES, Domain, VirtualMachine, guest_for
from relaymux.testing.libvirt.endings import one_line_each
from relaymux.testing.libvirt.host import CommandFailed, Host
from relaymux.testing.libvirt.moves import Move
from relaymux.testing.libvirt.rehearsal import Outcome, Rehearsal
from relaymux.testing.libvirt.relays import Relays
from relaymux.testing.libvirt.rig import Rig
from relaymux.testing.qemu.rehearsal import Check

__all__ = ["CLEAN_SECONDS", "NAMES", "Bench", "Case"]

#: The machines that the relays know.
NAMES = ("web1", "web2", "web3")

#: Seconds until a failed migration must have left nothing behind.
CLEAN_SECONDS = 60.0

#: Seconds until libvirt must have given up what cannot succeed: by its keepalive it does after 30 s.
_GIVE_UP_SECONDS = 45.0

_LOOK_SECONDS = 0.2

#: Seconds until a migration has ended of which libvirt was told that it is to.
_RESCUE_SECONDS = 10.0


@dataclass
class Bench:
    """
    Two hosts and two relays that serve several cases, one after the other.

    @ivar pages_per_tick: how busy the guests are.
    """

    rig: Rig
    relays: Relays
    memory: int = 64
    pages_per_tick: int = 10
    _machines: list[VirtualMachine] = field(default_factory=list)

    async def machine(
        self,
        written: Sequence[str],
        *,
        name: str = NAMES[0],
        side: int = 0,
        disks: Sequence[str] = DISK_NAMES,
        disk_bytes: int = 64 << 20,
    ) -> VirtualMachine:
        """@return: a machine that runs on the host of C{side}, its guest in its second lap."""
        guest = guest_for(self.memory, self.pages_per_tick, written, disks)
        machine = VirtualMachine(self.rig, Domain(name, guest, disks), disk_bytes)
        self._machines.append(machine)
        await machine.start(self.rig.hosts[side], written)
        await machine.heartbeat.wait_tick(guest.lap_ticks // 4, 90)
        return machine

    async def clear(self) -> None:
        """End the machines of a case, and mend the link."""
        await self.rig.network.mend()
        await self.rig.network.limit(0)
        while self._machines:
            await self._machines.pop().destroy()
        for host in self.rig.hosts:
            for name in NAMES:
                host.path(f"/var/log/libvirt/qemu/{name}.console").unlink(missing_ok=True)

    async def move(
        self,
        machine: VirtualMachine,
        move: Move,
        *,
        side: int = 0,
        during: Callable[[], Awaitable[None]] | None = None,
        may_redial: bool = False,
    ) -> Outcome:
        """
        Move from the host of C{side} to the other.

        @param may_redial: whether the link is to be lost meanwhile.
        """
        source, destination = self.ends(side)
        before = await self.rig.network.dialled()
        self.relays.most = 0  # of this migration, not of those before in which the link was lost
        rehearsal = Rehearsal(machine, during=during)
        route = self.relays.route(destination, machine.domain.name)
        outcome = await rehearsal.move(source, destination, move, route)
        dialled = await self.rig.network.dialled() - before
        if not may_redial:
            evidence = f"{dialled} more were dialled, and never more than {self.relays.most} were there"
            good = dialled == 0 and self.relays.most == 1
            outcome.checks.append(Check("all went through the one connection", good, evidence))
        return outcome

    async def fails(
        self,
        machine: VirtualMachine,
        move: Move,
        during: Callable[[], Awaitable[None]],
        decisions: Mapping[int, Mapping[str, str]],
        *,
        may_hang: bool = False,
    ) -> list[Check]:
        """
        Try to move, with something beside it that ends it.

        @param decisions: for each side whose relay lives on, what its log has to say of whose
            decision the ends were (L{one_line_each}).
        @param may_hang: whether libvirt may miss that its own mirrors have ended, which is no fault
            of the relays: then QEMU must say that they have, and C{virsh domjobabort} must help.
        @return: what was verified of the guest at the source, of both hosts, and of the logs.
        """
        source, destination = self.ends(0)
        name = machine.domain.name
        before = self.descriptors()
        told = [len(self.relays.said(side)) for side in (0, 1)]
        beside = asyncio.ensure_future(during())
        started, said, status = time.monotonic(), "", 0
        words = move.arguments(name, self.relays.route(destination, name))
        try:
            await source.virsh(*words, seconds=_GIVE_UP_SECONDS)
        except CommandFailed as error:
            said, status = error.said, error.status
        took = time.monotonic() - started
        await beside
        gave_up, evidence = status > 0, f"after {took:.1f} s: {said.partition(chr(10))[0]}"
        if may_hang and not gave_up:
            gave_up, evidence = await _rescue(source, name)
        ended = time.monotonic()
        last = machine.heartbeat.last
        await machine.heartbeat.wait_tick(last + machine.domain.guest.lap_ticks + 2, 120)
        while time.monotonic() < ended + CLEAN_SECONDS and await self._remains(destination, name, before):
            await asyncio.sleep(_LOOK_SECONDS)
        left = await self._remains(destination, name, before)
        cleaned = time.monotonic() - ended
        places = [host.name for host in await machine.where()]
        gap = machine.heartbeat.longest_gap(started)
        return [
            Check("libvirt gave it up", gave_up, evidence),
            Check(
                "the guest runs on at the source, and verifies itself",
                places == [source.name] and machine.heartbeat.side == 0,
                f"on {' and '.join(places)}, longest pause {gap * 1000:.0f} ms",
            ),
            Check(
                "libvirt and the relays are clean",
                not left,
                f"{cleaned:.0f} s later: {', '.join(left) if left else 'no domain, no QEMU, no connection'}",
            ),
            *(
                one_line_each(self.rig.hosts[side].name, self.relays.said(side)[told[side] :], name, wanted)
                for side, wanted in decisions.items()
            ),
        ]

    def ends(self, side: int) -> tuple[Host, Host]:
        """@return: where from and where to."""
        one, other = self.rig.hosts
        return (one, other) if side == 0 else (other, one)

    def descriptors(self) -> list[int]:
        """@return: how many each relay has open."""
        return [len(os.listdir(f"/proc/{pid}/fd")) for pid in self.relays.pids()]

    def resident(self) -> list[int]:
        """@return: bytes of memory that each relay has resident."""
        return [_resident(pid) for pid in self.relays.pids()]

    async def _remains(self, host: Host, name: str, before: Sequence[int]) -> list[str]:
        """Files of sockets may stay: a QEMU that was ended leaves them, and the next one takes them over."""
        left = [f"domain {name}"] if name in (await host.virsh("list", "--all", "--name")).split() else []
        left += [f"QEMU {path.name}" for path in host.path("/run/libvirt/qemu").glob(f"{name}.pid")]
        now = self.descriptors()
        if any(count > least for count, least in zip(now, before, strict=True)):
            left.append(f"descriptors of the relays, {now} after {list(before)}")
        return left


async def _rescue(host: Host, name: str) -> tuple[bool, str]:
    """
    End a migration in which libvirt waits for mirrors that have ended.

    @return: whether it was that and it helped; what was seen.
    """
    jobs = await host.virsh("qemu-monitor-command", name, '{"execute": "query-jobs"}')
    states = sorted(set(re.findall(r'"status": *"([a-z]+)"', jobs)))
    await host.virsh("domjobabort", name)
    end = time.monotonic() + _RESCUE_SECONDS
    job = ""
    while time.monotonic() < end:
        job = await host.virsh("domjobinfo", name)
        if re.search(r"Job type:\s+None", job):
            missed = states in ([], ["concluded"])
            what = "libvirt missed the end of its mirrors" if missed else f"it hung, QEMU's jobs {states}"
            return missed, f"{what}; domjobabort ended it"
        await asyncio.sleep(_LOOK_SECONDS)
    return False, f"it hangs, with QEMU's jobs {states}, domjobabort or not: {' '.join(job.split())}"


def _resident(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


#: One case: what it verified.
Case = Callable[[Bench], Awaitable[list[Check]]]
