"""One C{virsh migrate}: how it is asked for, and how far it is."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from relaymux.testing.libvirt.host import CommandFailed, Host
from relaymux.testing.qemu.plan import Progress, Transfer

__all__ = ["Move", "Route", "completed_job", "job_figures", "watch_progress"]

#: Seconds between two looks at how far it is.
_LOOK_SECONDS = 0.4

_FIGURE = re.compile(r"^([A-Z][\w ]+):[ \t]+([\d.]+)[ \t]*(\S*)", re.MULTILINE)

_UNITS = {"": 1.0, "B": 1.0, "KiB": 1024.0, "MiB": 1024.0**2, "GiB": 1024.0**3, "ms": 1.0, "s": 1000.0}

_BLOCK_JOB = re.compile(r"cur=(\d+)\s+end=(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Route:
    """
    Where the source is to go.

    @ivar control: the URI of the other libvirt.
    @ivar memory: the URI for the memory; None lets libvirt choose.
    @ivar disks: the URI for the disks, likewise.
    """

    control: str
    memory: str | None = None
    disks: str | None = None


@dataclass(frozen=True)
class Move:
    """
    @ivar disks: those to copy; none for memory alone.
    @ivar p2p: whether libvirtd dials the other one, or virsh does.
    @ivar channels: multifd's; 0 for an ordinary migration.
    @ivar postcopy: whether the guest moves after the first pass over its memory.
    @ivar resume: whether to go on with a postcopy that was lost.
    @ivar suspend: whether the guest stays stopped when it has moved.
    @ivar bandwidth: MiB per second for the memory, and for each disk; 0 for no limit.
    @ivar extra: further options.
    """

    disks: Sequence[str]
    p2p: bool = True
    channels: int = 0
    postcopy: bool = False
    resume: bool = False
    tunnelled: bool = False
    suspend: bool = False
    bandwidth: int = 0
    extra: Sequence[str] = ()

    def arguments(self, name: str, route: Route) -> list[str]:
        """@return: virsh's."""
        # Where not all disks are copied, libvirt believes the others to be shared and
        # wants their caches off.  The guest does not use them.
        words = ["migrate", "--live", "--unsafe"]
        words += ["--p2p"] if self.p2p else []
        words += ["--tunnelled"] if self.tunnelled else []
        words += ["--copy-storage-all", "--migrate-disks", ",".join(self.disks)] if self.disks else []
        words += ["--parallel", "--parallel-connections", str(self.channels)] if self.channels else []
        words += ["--postcopy"] if self.postcopy else []
        words += ["--postcopy-resume" if self.resume else "--postcopy-after-precopy"] if self.postcopy else []
        words += ["--suspend"] if self.suspend else []
        words += ["--bandwidth", str(self.bandwidth)] if self.bandwidth else []
        words += ["--domain", name, "--desturi", route.control]
        if not self.tunnelled:
            words += ["--migrateuri", route.memory] if route.memory else []
            words += ["--disks-uri", route.disks] if route.disks and self.disks else []
        return [*words, *self.extra]


async def watch_progress(
    source: Host, name: str, disks: Sequence[str], report: Callable[[Progress], None]
) -> None:
    """
    Tell C{report} how far it is, until cancelled.

    Asks libvirt, which knows of each disk's mirror and of the memory.
    """
    done: dict[str, Transfer] = {}
    memory: Transfer | None = None
    while True:
        for disk in disks:
            said = await _ask(source, "blockjob", name, disk, "--info", "--raw")
            if match := _BLOCK_JOB.search(said):
                done[disk] = Transfer(int(match[1]), int(match[2]))
            elif disk in done:
                # Its mirror is over.
                done[disk] = Transfer(done[disk].total, done[disk].total)
        job = await job_figures(source, name)
        if total := int(job.get("Memory total", 0)):
            memory = Transfer(total - int(job.get("Memory remaining", 0)), total)
        phase = "sending memory" if memory is not None else "copying disks" if done else "preparing"
        report(Progress(phase, memory, dict(done)))
        await asyncio.sleep(_LOOK_SECONDS)


async def job_figures(host: Host, name: str) -> Mapping[str, float]:
    """@return: libvirt's figures, as L{completed_job}, of what goes on; none if nothing does."""
    return _figures(await _ask(host, "domjobinfo", name))


async def completed_job(host: Host, name: str) -> Mapping[str, float]:
    """
    @return: what libvirt tells of the migration that has brought C{name} to C{host}:
        bytes, milliseconds and counts, by libvirt's names.
    """
    return _figures(await host.virsh("domjobinfo", name, "--completed"))


async def _ask(host: Host, *arguments: str) -> str:
    try:
        return await host.virsh(*arguments)
    except CommandFailed:
        # There is no such job yet, or no more.
        return ""


def _figures(text: str) -> dict[str, float]:
    return {name: float(number) * _UNITS.get(unit, 1.0) for name, number, unit in _FIGURE.findall(text)}
