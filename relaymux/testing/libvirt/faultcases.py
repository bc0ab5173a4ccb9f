"""
The cases of the long suite in which something is lost: the link, a relay, a libvirtd.

What the machine survives it has to survive unnoticed.  What it does not leaves the guest where it
was, both hosts clean, and the next migration works without anything being started again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from relaymux.testing.libvirt.bench import Bench, Case
from relaymux.testing.libvirt.domain import VirtualMachine
from relaymux.testing.libvirt.faults import Fault, Moment, Saboteur, Strike
from relaymux.testing.libvirt.moves import Move
from relaymux.testing.qemu.rehearsal import Check

__all__ = ["FAULT_CASES", "WINDOW_CASES"]

#: For the relay of each side, what its log has to say of whose decision the ends were.
Decisions = Mapping[int, Mapping[str, str]]

_DISKS = ("vda", "vdc")

#: MiB per second: a migration is to last a while.
_SLOW = Move(_DISKS, bandwidth=24)

#: Seconds until what starts a program again, as systemd does, has done so.
_RESTART_SECONDS = 2.0

#: What the source's log says of the disks that relaymux does not hold any longer.
_GAVE_UP = {"nbd": "relaymux gave up: link hv-b is away, and libvirt here has closed its control connection"}

#: What the log of the relay that lives on says of all that ended with the one that was killed: as
#: that one dials it, and as it dials that one.
_WAS_DIALLED = dict.fromkeys(("control", "nbd"), "the other daemon is another process now")
_HAS_DIALLED = dict.fromkeys(("control", "nbd"), "the other daemon was restarted, or has given up")

#: On the host whose libvirtd was killed, and on the other one.
_HERE = {"control": "the program here"}
_THERE = {"control": "the program at the other end"}


def _struck(*strikes: tuple[Moment, Fault, float]) -> Case:
    async def case(bench: Bench) -> list[Check]:
        """The link goes away and comes back, and nobody notices."""
        machine = await bench.machine(_DISKS)
        source, destination = bench.ends(0)
        plan = [Strike(*strike) for strike in strikes]
        saboteur = Saboteur(bench.relays, machine, source, destination, plan)
        outcome = await bench.move(machine, _SLOW, during=saboteur.run, may_redial=True)
        states = "; ".join(f"{strike.moment.value}: {strike.state}" for strike in saboteur.done)
        done = Check("the link was away in each phase", len(saboteur.done) == len(plan), states)
        return [*outcome.checks, done]

    return case


def _given_up(moment: Moment) -> Case:
    async def case(bench: Bench) -> list[Check]:
        """Away for longer than libvirt waits; then the same machine moves after all."""
        machine = await bench.machine(_DISKS)
        source, destination = bench.ends(0)
        strike = Strike(moment, Fault.BLACK_HOLE, 60.0)
        saboteur = Saboteur(bench.relays, machine, source, destination, [strike])
        checks = await bench.fails(machine, _SLOW, saboteur.run, {0: _GAVE_UP, 1: {}})
        return checks + await _moves_after_all(bench, machine)

    return case


def _killed(
    kill: Callable[[Bench], Awaitable[None]], decisions: Decisions, *, may_hang: bool = False
) -> Case:
    async def case(bench: Bench) -> list[Check]:
        """Something dies while disks are copied; then the same machine moves after all."""
        machine = await bench.machine(_DISKS)

        async def during() -> None:
            while "cur=" not in await _mirror(bench, machine.domain.name):
                await asyncio.sleep(0.05)
            await kill(bench)

        checks = await bench.fails(machine, _SLOW, during, decisions, may_hang=may_hang)
        return checks + await _moves_after_all(bench, machine)

    return case


def _relay(side: int) -> Callable[[Bench], Awaitable[None]]:
    async def kill(bench: Bench) -> None:
        await bench.relays.kill(side)
        await asyncio.sleep(_RESTART_SECONDS)
        await bench.relays.restart(side)

    return kill


def _libvirtd(side: int) -> Callable[[Bench], Awaitable[None]]:
    async def kill(bench: Bench) -> None:
        host = bench.rig.hosts[side]
        await host.stop_libvirtd(kill=True)
        await asyncio.sleep(_RESTART_SECONDS)
        await host.start_libvirtd()

    return kill


async def _mirror(bench: Bench, name: str) -> str:
    source, _ = bench.ends(0)
    command = f"virsh --quiet blockjob {name} vda --info --raw || true"
    return (await source.run("sh", "-c", command)).output


async def _moves_after_all(bench: Bench, machine: VirtualMachine) -> list[Check]:
    outcome = await bench.move(machine, Move(_DISKS), may_redial=True)
    return [Check(f"then it moves: {check.what}", check.passed, check.evidence) for check in outcome.checks]


FAULT_CASES: dict[str, Case] = {
    "reset 3 s in each phase": _struck(*((moment, Fault.RESET, 3.0) for moment in Moment)),
    **{
        f"reset 3 s, three times, {moment.value}": _struck(*((moment, Fault.RESET, 3.0),) * 3)
        for moment in Moment
        if moment is not Moment.SWITCHOVER
    },
    # Over before a second reset comes: three migrations instead.
    **{
        f"reset 3 s, switchover, {turn} of 3": _struck((Moment.SWITCHOVER, Fault.RESET, 3.0))
        for turn in (1, 2, 3)
    },
    **{f"black hole 10 s, {moment.value}": _struck((moment, Fault.BLACK_HOLE, 10.0)) for moment in Moment},
    "black hole 60 s": _given_up(Moment.DISKS),
    "black hole 60 s, memory": _given_up(Moment.MEMORY),
    "source's relay killed": _killed(_relay(0), {1: _WAS_DIALLED}),
    "destination's relay killed": _killed(_relay(1), {0: _HAS_DIALLED}),
    "source's libvirtd killed": _killed(_libvirtd(0), {0: _HERE, 1: _THERE}),
    # libvirt cancels both mirrors itself, at once: 0021 says what comes of that.
    "destination's libvirtd killed": _killed(_libvirtd(1), {0: _THERE, 1: _HERE}, may_hang=True),
}

#: With a C{resume-window} that is over before the link is back: the session ends, too.
WINDOW_CASES: dict[str, Case] = {"black hole 60 s, resume-window 30": _given_up(Moment.DISKS)}
