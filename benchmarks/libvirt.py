"""
C{python -m benchmarks.libvirt}: ways for libvirt to move a machine, side by side.

Two hosts on this machine (L{relaymux.testing.libvirt}), a machine with three disks of
which two are moved, and each way in turn: libvirt alone, its own tunnel, ssh, socat and
relaymux.  Prints the medians as a table; every move is verified.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from relaymux.testing.libvirt.domain import Domain, VirtualMachine, guest_for
from relaymux.testing.libvirt.host import Host
from relaymux.testing.libvirt.install import Edition, LibvirtUnavailable, ensure_libvirt
from relaymux.testing.libvirt.moves import Move, Route
from relaymux.testing.libvirt.program import Program
from relaymux.testing.libvirt.rehearsal import Outcome, Rehearsal
from relaymux.testing.libvirt.relays import Relays
from relaymux.testing.libvirt.rig import Rig, RigUnavailable, check_machine
from relaymux.testing.qemu.observe import cpu_seconds

_NAME = "web1"
_DISKS = ("vda", "vdc")
_MEMORY, _PAGES = 192, 20

_MIB = 1 << 20

#: Where ssh and socat have their sockets, on either host.
_DIRECTORY = "/run/ways"

#: libvirt's own socket, and what QEMU makes on the destination.
_SOCKETS = {
    "ctl": "/run/libvirt/libvirt-sock",
    "mig": f"{_DIRECTORY}/mig.sock",
    "nbd": f"{_DIRECTORY}/nbd.sock",
}

_UNIX_ROUTE = Route(
    f"qemu+unix:///system?socket={_DIRECTORY}/ctl.sock",
    f"unix://{_SOCKETS['mig']}",
    f"unix://{_SOCKETS['nbd']}",
)

_SSHD = """
ListenAddress {address}:22
HostKey {directory}/host-key
AuthorizedKeysFile {directory}/key.pub
StrictModes no
PidFile none
UsePAM no
AllowStreamLocalForwarding yes
PermitRootLogin yes
"""


class Way(ABC):
    """How the bytes get to the other host."""

    name: str
    move = Move(_DISKS)

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.programs: list[Program] = []

    @abstractmethod
    async def start(self) -> Route:
        """@return: where libvirt is to go."""

    async def stop(self) -> None:
        """End what was started."""
        while self.programs:
            await self.programs.pop().end()

    def cpu(self) -> float:
        """@return: processor seconds of what carries the bytes."""
        return sum(_with_children(program.pid) for program in self.programs)

    async def spawn(self, host: Host, *command: str) -> None:
        """Start one of the programs that carry the bytes."""
        log = host.path(f"/var/log/{Path(command[0]).name}.log")
        self.programs.append(await host.spawn(*command, log=log))


class Native(Way):
    """libvirt and QEMU dial the other host themselves."""

    name = "native"

    async def start(self) -> Route:
        return Route(f"qemu+tcp://{self.rig.hosts[1].name}/system")


class Tunnelled(Native):
    """The memory goes through libvirt's connection; disks cannot."""

    name = "--tunnelled, memory alone"
    move = Move((), tunnelled=True)

    def cpu(self) -> float:
        return sum(cpu_seconds(host.libvirtd_pid) for host in self.rig.hosts)


class Relaymux(Way):
    """Two daemons, TLS."""

    name = "relaymux, TLS"

    async def start(self) -> Route:
        self.relays = Relays(self.rig, [_NAME])
        await self.relays.start()
        return self.relays.route(self.rig.hosts[1], _NAME)

    async def stop(self) -> None:
        await self.relays.close()

    def cpu(self) -> float:
        return self.relays.cpu


class Socat(Way):
    """A pair for each of the three sockets, without encryption."""

    name = "socat, no encryption"

    async def start(self) -> Route:
        source, destination = self.rig.hosts
        await _directories(self.rig)
        for number, (name, target) in enumerate(_SOCKETS.items(), start=7001):
            listen = f"TCP-LISTEN:{number},fork,reuseaddr,bind={destination.address}"
            await self.spawn(destination, "socat", listen, f"UNIX-CONNECT:{target}")
            near = f"UNIX-LISTEN:{_DIRECTORY}/{name}.sock,fork"
            await self.spawn(source, "socat", near, f"TCP:{destination.address}:{number}")
        await _until_there(source)
        return _UNIX_ROUTE


class Ssh(Way):
    """One ssh connection that forwards the three sockets."""

    name = "ssh -L"

    async def start(self) -> Route:
        source, destination = self.rig.hosts
        await _directories(self.rig)
        for name in ("host-key", "key"):
            await source.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{_DIRECTORY}/{name}")
        for name in ("host-key", "key.pub"):
            path = destination.path(f"{_DIRECTORY}/{name}")
            path.write_bytes(source.path(f"{_DIRECTORY}/{name}").read_bytes())
            path.chmod(0o600)
        configuration = _SSHD.format(address=destination.address, directory=_DIRECTORY)
        destination.path(f"{_DIRECTORY}/sshd.conf").write_text(configuration, encoding="ascii")
        destination.path("/run/sshd").mkdir(exist_ok=True)
        await self.spawn(destination, "/usr/sbin/sshd", "-D", "-e", "-f", f"{_DIRECTORY}/sshd.conf")
        await asyncio.sleep(0.5)
        forward = [
            word for name, path in _SOCKETS.items() for word in ("-L", f"{_DIRECTORY}/{name}.sock:{path}")
        ]
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "ExitOnForwardFailure=yes"]
        await self.spawn(
            source,
            *("ssh", "-N", "-F", "none", "-i", f"{_DIRECTORY}/key"),
            *(word for option in options for word in ("-o", option)),
            *forward,
            f"root@{destination.address}",
        )
        await _until_there(source)
        return _UNIX_ROUTE

    def cpu(self) -> float:
        # sshd serves each connection in a process of its own, and that has a child.
        return sum(_with_descendants(program.pid) for program in self.programs)


_WAYS: tuple[type[Way], ...] = (Native, Tunnelled, Ssh, Socat, Relaymux)


@dataclass(frozen=True)
class _Run:
    outcome: Outcome
    connections: int
    cpu: float


async def _measure(way: Way, machine: VirtualMachine) -> _Run:
    source, destination = way.rig.hosts
    dialled = await way.rig.network.dialled()
    route = await way.start()
    try:
        before = way.cpu()
        outcome = await Rehearsal(machine).move(source, destination, way.move, route)
        cpu = way.cpu() - before
    finally:
        await way.stop()
    return _Run(outcome, await way.rig.network.dialled() - dialled, cpu)


async def _run(tree: Path, runs: int, disk_mib: int) -> int:
    wrong = 0
    print(f"{'way':<26} {'virsh s':>8} {'RAM MiB/s':>10} {'disk MiB/s':>11} {'downtime ms':>12}", end="")
    print(f" {'longest gap ms':>15} {'TCP':>4} {'CPU s':>6}", flush=True)
    for kind in _WAYS:
        results = []
        for _ in range(runs):
            async with Rig(libvirt=tree) as rig:
                written = kind.move.disks
                machine = VirtualMachine(
                    rig, Domain(_NAME, guest_for(_MEMORY, _PAGES, written)), disk_mib * _MIB
                )
                await machine.start(rig.hosts[0], written)
                await machine.heartbeat.wait_tick(200, 120)
                run = await _measure(kind(rig), machine)
                await machine.destroy()
                results.append(run)
                for check in run.outcome.wrong:
                    wrong += 1
                    print(f"WRONG: {kind.name}: {check.what}: {check.evidence}")
        _print(kind, results, disk_mib)
    return 1 if wrong else 0


def _print(kind: type[Way], results: Sequence[_Run], disk_mib: int) -> None:
    def median(values: Sequence[float]) -> float:
        return statistics.median(values)

    figures = [run.outcome.figures for run in results]
    seconds = median([run.outcome.seconds for run in results])
    rate = median([each["Memory bandwidth"] for each in figures])
    # What virsh took, without the time that the memory took at its rate.
    disks = [
        len(kind.move.disks)
        * disk_mib
        / (run.outcome.seconds - each["Memory processed"] / _MIB / each["Memory bandwidth"])
        for run, each in zip(results, figures, strict=True)
    ]
    disk = f"{median(disks):11.0f}" if kind.move.disks else f"{'-':>11}"
    downtime = median([each["Total downtime"] for each in figures])
    gap = median([run.outcome.gap * 1000 for run in results])
    connections = median([run.connections for run in results])
    cpu = "-" if kind is Native else f"{median([run.cpu for run in results]):.2f}"
    print(f"{kind.name:<26} {seconds:8.1f} {rate:10.0f} {disk} {downtime:12.0f}", end="")
    print(f" {gap:15.0f} {connections:4.0f} {cpu:>6}", flush=True)


async def _directories(rig: Rig) -> None:
    for host in rig.hosts:
        host.path(_DIRECTORY).mkdir()
        host.path(_DIRECTORY).chmod(0o1777)


async def _until_there(host: Host) -> None:
    for _ in range(200):
        if all(host.path(f"{_DIRECTORY}/{name}.sock").exists() for name in _SOCKETS):
            return
        await asyncio.sleep(0.05)
    raise TimeoutError("no sockets within 10 s")


def _with_children(pid: int) -> float:
    """@return: processor seconds of a process and of those of its children that have ended."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2]
    return sum(map(int, text.split()[11:15])) / os.sysconf("SC_CLK_TCK")


def _with_descendants(pid: int) -> float:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return _with_children(pid) + sum(_with_descendants(int(child)) for child in children)


def main() -> int:
    """@return: the exit status: 0 if every move was right."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.libvirt", description="Ways for libvirt to move a machine."
    )
    parser.add_argument("--runs", type=int, default=3, help="of each way (%(default)s)")
    parser.add_argument(
        "--disk-size", type=int, default=128, metavar="MIB", help="of each disk (%(default)s)"
    )
    chosen = parser.parse_args()
    try:
        check_machine()
        tree = ensure_libvirt(Edition.RELEASE)
    except (RigUnavailable, LibvirtUnavailable) as error:
        print(f"relaymux: {error}", file=sys.stderr)
        return 1
    return asyncio.run(_run(tree, chosen.runs, chosen.disk_size))


if __name__ == "__main__":
    sys.exit(main())
