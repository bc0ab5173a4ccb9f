"""The cases of the long suite: each moves real machines and says what it verified."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from relaymux.testing.libvirt.bench import CLEAN_SECONDS, NAMES, Bench, Case
from relaymux.testing.libvirt.faultcases import FAULT_CASES
from relaymux.testing.libvirt.host import CommandFailed, Host
from relaymux.testing.libvirt.moves import Move
from relaymux.testing.qemu.rehearsal import Check

__all__ = ["BUSY_CASES", "CASES", "POSTCOPY_CASES"]

_DISKS = ("vda", "vdc")

#: Seconds until what does not come is given up.
_PATIENCE = 120.0


def _moves(disks: Sequence[str], **options: object) -> Case:
    async def case(bench: Bench) -> list[Check]:
        machine = await bench.machine(disks)
        move = Move(disks, **options)  # type: ignore[arg-type]
        return (await bench.move(machine, move)).checks

    return case


async def _back_and_forth(bench: Bench) -> list[Check]:
    """Ten migrations over the same two daemons."""
    machine = await bench.machine(_DISKS)
    checks: list[Check] = []
    descriptors: list[int] = []
    memory: list[int] = []
    for number in range(10):
        outcome = await bench.move(machine, Move(_DISKS, suspend=number % 2 == 0), side=number % 2)
        checks += [
            Check(f"move {number + 1}: {check.what}", check.passed, check.evidence) for check in outcome.wrong
        ]
        if number == 3:
            # The first few fill what Python and OpenSSL keep.
            descriptors, memory = bench.descriptors(), bench.resident()
    now, grown = bench.descriptors(), [b - a for a, b in zip(memory, bench.resident(), strict=True)]
    return [
        *checks,
        Check("ten moves, all checks passed", not checks, f"{len(checks)} did not"),
        Check("descriptors are as before", now == descriptors, f"{descriptors} then, {now} now"),
        Check(
            "memory is as before",
            max(grown) < 8 << 20,
            f"{', '.join(f'{more / 2**20:+.1f} MiB' for more in grown)} in the last six",
        ),
    ]


async def _three_at_once(bench: Bench) -> list[Check]:
    """Two machines go one way and one the other, at the same time."""
    machines = [await bench.machine(_DISKS, name=name, side=int(name == NAMES[2])) for name in NAMES]
    outcomes = await asyncio.gather(
        *(
            bench.move(machine, Move(_DISKS), side=int(machine.domain.name == NAMES[2]))
            for machine in machines
        )
    )
    return [
        Check(f"{machine.domain.name}: {check.what}", check.passed, check.evidence)
        for machine, outcome in zip(machines, outcomes, strict=True)
        for check in outcome.checks
    ]


async def _keepalive(bench: Bench) -> list[Check]:
    """Disks fill a link of 100 Mbit/s for more than two minutes; libvirt's calls are answered at once."""
    disks = ("vda", "vdb")
    machine = await bench.machine(disks, disks=disks, disk_bytes=700 << 20)
    source, destination = bench.ends(0)
    await bench.rig.network.limit(100)
    answers: list[float] = []
    # Another machine's control socket: its connection is a stream as that of the migration is.
    control = bench.relays.route(destination, NAMES[1]).control

    async def ask() -> None:
        while destination.name not in [host.name for host in await machine.where()]:
            await asyncio.sleep(0.1)
        until = time.monotonic() + 120
        while time.monotonic() < until:
            started = time.monotonic()
            await source.virsh("--connect", control, "hostname")
            answers.append(time.monotonic() - started)
            await asyncio.sleep(1)

    # Without, a guest that is quick enough is never done with.
    move = Move(disks, extra=("--auto-converge",))
    outcome = await bench.move(machine, move, during=ask)
    # To dial, to open and to ask are ten round trips and a process.
    worst = max(answers, default=99.0)
    return [
        *outcome.checks,
        Check("it took more than two minutes", outcome.seconds > 120, f"{outcome.seconds:.0f} s"),
        Check(
            "libvirt was answered within a second",
            worst < 1.0,
            f"{len(answers)} times virsh asked, at most {worst * 1000:.0f} ms with all it does",
        ),
    ]


#: MiB per second before the guest moves and after: most of its memory is left by then.
_POSTCOPY = Move(_DISKS, postcopy=True, bandwidth=8, extra=("--postcopy-bandwidth", "4"))


async def _state(host: Host, name: str) -> str:
    command = f"virsh --quiet domstate {name} --reason || true"
    return (await host.run("sh", "-c", command)).output.strip()


async def _entered(bench: Bench, name: str) -> str:
    """@return: what the destination says when the guest has moved and its memory has not."""
    while "post-copy" not in (said := await _state(bench.ends(0)[1], name)):
        await asyncio.sleep(0.02)
    return said


async def _postcopy(bench: Bench) -> list[Check]:
    """The guest moves before its memory."""
    machine = await bench.machine(_DISKS)
    said: list[str] = []

    async def watch() -> None:
        said.append(await asyncio.wait_for(_entered(bench, machine.domain.name), _PATIENCE))

    outcome = await bench.move(machine, _POSTCOPY, during=watch)
    return [*outcome.checks, Check("postcopy was entered", bool(said), f"the destination: {said[0]}")]


async def _recovered(bench: Bench) -> list[Check]:
    """A relay dies when the guest has moved and its memory has not; C{--postcopy-resume} goes on."""
    machine = await bench.machine(_DISKS)
    name = machine.domain.name
    source, destination = bench.ends(0)
    route = bench.relays.route(destination, name)
    moving = asyncio.ensure_future(source.virsh(*_POSTCOPY.arguments(name, route), seconds=_PATIENCE))
    try:
        await asyncio.wait_for(_entered(bench, name), _PATIENCE)
        await bench.relays.kill(0)
        error = (await asyncio.gather(moving, return_exceptions=True))[0]
    finally:
        moving.cancel()
    await bench.relays.restart(0)
    lost: list[str] = []
    until = time.monotonic() + CLEAN_SECONDS
    while not lost or (time.monotonic() < until and not all("post-copy failed" in state for state in lost)):
        lost = [await _state(host, name) for host in (source, destination)]
        await asyncio.sleep(0.2)
    again = replace(_POSTCOPY, resume=True, bandwidth=0, extra=())
    await source.virsh(*again.arguments(name, route), seconds=_PATIENCE)
    last, guest = machine.heartbeat.last, machine.domain.guest
    await machine.heartbeat.wait_tick(last + guest.lap_ticks + 2, _PATIENCE)
    places = [host.name for host in await machine.where()]
    return [
        Check(
            "libvirt lost it in postcopy",
            isinstance(error, CommandFailed) and all("post-copy failed" in state for state in lost),
            f"source {lost[0]}, destination {lost[1]}",
        ),
        Check("--postcopy-resume went on", places == [destination.name], f"on {' and '.join(places)}"),
        Check(
            "the guest lost nothing",
            machine.heartbeat.side == 1,
            f"ticks 1 to {machine.heartbeat.last:,}; since then it verified all {guest.pages:,} pages",
        ),
    ]


#: With what the distribution's release has, QEMU as its own user.
CASES: dict[str, Case] = {
    "one disk": _moves(("vda",), suspend=True),
    "two disks": _moves(_DISKS, suspend=True),
    "three disks": _moves(("vda", "vdb", "vdc"), suspend=True),
    "memory alone": _moves(()),
    "--parallel, 4 connections": _moves(_DISKS, channels=4),
    "without --p2p": _moves(_DISKS, p2p=False),
    "--tunnelled": _moves((), tunnelled=True),
    "three machines, both ways": _three_at_once,
    "ten times back and forth": _back_and_forth,
    **FAULT_CASES,
    "100 Mbit/s, two minutes": _keepalive,
}

#: QEMU may have to be root: others may not handle page faults unless the machine's administrator says so.
POSTCOPY_CASES: dict[str, Case] = {"--postcopy": _postcopy, "--postcopy-resume": _recovered}

#: With a QEMU that keeps track of a busy guest without KVM.
BUSY_CASES: dict[str, Case] = {"a busy guest": _moves(_DISKS, suspend=True)}
