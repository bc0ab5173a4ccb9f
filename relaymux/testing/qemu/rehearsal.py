"""
A whole live migration with everything around it, and what it proves.

Three disks with different contents, two of them migrated; a guest that
dirties memory and the two disks all the while; and a list of checks with the
evidence for each.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from relaymux.testing.qemu.console import GuestFailed, continuity
from relaymux.testing.qemu.guest import GuestSettings, boot_sector
from relaymux.testing.qemu.machine import Disk, Machine
from relaymux.testing.qemu.migrate import Migration
from relaymux.testing.qemu.plan import DiskRoute, MigrationPlan, Mode, Progress
from relaymux.testing.qemu.tools import QemuTools

__all__ = ["ALL_DISKS", "SELECTED_DISKS", "Carrier", "Check", "Direct", "Rehearsal"]

ALL_DISKS = ("vda", "vdb", "vdc")

#: The middle one stays, so that neither order nor number can stand for a name.
SELECTED_DISKS = ("vda", "vdc")

_CHUNK = 1 << 20

#: Pages per tick for a QEMU that may lose track of busier ones.
_CALM = 20

#: Bytes per second before postcopy: slow enough to begin it in the middle.
_POSTCOPY_BANDWIDTH = 64 << 20


class Carrier(Protocol):
    """What carries the bytes between the sockets of source and destination."""

    @property
    def incoming_socket(self) -> Path:
        """Where the destination is to listen for memory."""

    @property
    def nbd_socket(self) -> Path:
        """Where the destination is to listen for disks."""

    def ram_socket(self) -> Path:
        """@return: where the source dials for its memory."""

    def disk_socket(self, name: str) -> Path:
        """@return: where the source dials for this disk."""


@dataclass(frozen=True)
class Direct:
    """No relay: the source dials the destination's own sockets."""

    directory: Path

    @property
    def incoming_socket(self) -> Path:
        """Where the destination takes the memory."""
        return self.directory / "ram.sock"

    @property
    def nbd_socket(self) -> Path:
        """Where the destination takes the disks."""
        return self.directory / "nbd.sock"

    def ram_socket(self) -> Path:
        """See L{Carrier}."""
        return self.incoming_socket

    def disk_socket(self, name: str) -> Path:
        """See L{Carrier}."""
        return self.nbd_socket


@dataclass(frozen=True)
class Check:
    """One thing that was verified, with the evidence; or was found wrong."""

    what: str
    passed: bool
    evidence: str


@dataclass
class Rehearsal:
    """
    @ivar directory: empty and private, with a short path; everything is made in it.
    @ivar disk_bytes: size of each disk.
    @ivar reconnect_delay: see L{MigrationPlan}.
    @ivar entering: see L{Migration}.
    @ivar checks: what was verified, when L{run} is done.
    """

    tools: QemuTools
    directory: Path
    carrier: Carrier
    mode: Mode = Mode.PLAIN
    disk_bytes: int = 64 << 20
    memory: int = 128
    pages_per_tick: int = 60
    channels: int = 4
    reconnect_delay: int = 30
    report: Callable[[Progress], None] = lambda progress: None
    entering: Callable[[str], Awaitable[None]] | None = None
    checks: list[Check] = field(default_factory=list)
    _comparing: float = 0.0

    async def run(self) -> list[Check]:
        """
        Migrate, let the guest verify itself on the destination, and check.

        @return: the checks; some may have failed.
        @raise MigrationFailed: the migration itself did.
        """
        guest = GuestSettings(
            memory=self.memory,
            pages_per_tick=self.pages_per_tick if self.tools.safe else min(self.pages_per_tick, _CALM),
            drives=tuple(0x80 + ALL_DISKS.index(name) for name in SELECTED_DISKS),
        )
        untouched = await asyncio.to_thread(self._make_images, boot_sector(guest))
        source = Machine(self.tools, "source", self.directory, self.memory, self._disks("a"))
        destination = Machine(
            self.tools, "destination", self.directory, self.memory, self._disks("b"), incoming=True
        )
        async with destination:
            async with source:
                self.report(Progress("booting the guest", None, {}))
                await source.console.wait_tick(guest.lap_ticks // 4, 60)
                migration = Migration(source, destination, self._plan(), self.report, self._compare_disks)
                migration.entering = self.entering
                await migration.run()
                self._check_events(source, destination)
            self.report(replace(migration.progress, phase="letting the guest verify itself"))
            # Until every page and every block was verified where it is now.
            start = source.console.last
            await destination.console.wait_tick(start + guest.lap_ticks + 2, 120)
        self._check_guest(source, destination, guest)
        self._check_mode(migration)
        after = await asyncio.to_thread(_digest, self._image("b", "vdb"))
        same = f"the destination's own image is as it was, sha256 {after[:16]}..."
        self._add("vdb was not sent", after == untouched, same if after == untouched else "it was written to")
        return self.checks

    def _plan(self) -> MigrationPlan:
        return MigrationPlan(
            disks=tuple(DiskRoute(name, self.carrier.disk_socket(name)) for name in SELECTED_DISKS),
            ram_socket=self.carrier.ram_socket(),
            incoming_socket=self.carrier.incoming_socket,
            nbd_socket=self.carrier.nbd_socket,
            mode=self.mode,
            channels=self.channels,
            bandwidth=_POSTCOPY_BANDWIDTH if self.mode is Mode.POSTCOPY else 1 << 30,
            postcopy_bandwidth=_POSTCOPY_BANDWIDTH // 2,
            reconnect_delay=self.reconnect_delay,
        )

    def _image(self, side: str, name: str) -> Path:
        return self.directory / f"{side}-{name}.img"

    def _disks(self, side: str) -> list[Disk]:
        return [Disk(name, self._image(side, name)) for name in ALL_DISKS]

    def _make_images(self, sector: bytes) -> str:
        """@return: the digest of the destination's vdb."""
        for name in ALL_DISKS:
            _fill(self._image("a", name), self.disk_bytes)
            if name in SELECTED_DISKS:
                with self._image("b", name).open("wb") as file:
                    file.truncate(self.disk_bytes)
        with self._image("a", "vda").open("r+b") as file:
            file.write(sector)
        _fill(self._image("b", "vdb"), self.disk_bytes)
        return _digest(self._image("b", "vdb"))

    async def _compare_disks(self) -> None:
        """Compare byte by byte while the guest runs on neither side."""
        started = time.monotonic()
        for name in SELECTED_DISKS:
            place = await asyncio.to_thread(_difference, self._image("a", name), self._image("b", name))
            if place is None:
                evidence = f"{self.disk_bytes:,} bytes are equal on both sides at the switchover"
            else:
                evidence = f"the two sides differ at byte {place:,}"
            self._add(f"{name} is identical", place is None, evidence)
        self._comparing = time.monotonic() - started

    def _check_guest(self, source: Machine, destination: Machine, guest: GuestSettings) -> None:
        what = "the guest's ticks go on without a gap"
        try:
            ticks = continuity(source.console, destination.console)
        except GuestFailed as failure:
            self._add(what, False, str(failure))
            return
        pause = (ticks.pause - self._comparing) * 1000
        self._add(
            what,
            True,
            f"1 to {ticks.last:,} on the source, on to {ticks.end:,} on the destination, to the byte; "
            f"paused for {pause:.0f} ms (and {self._comparing * 1000:.0f} ms to compare the disks)",
        )
        self._add(
            "the guest's memory is right",
            ticks.end - ticks.last > guest.lap_ticks,
            f"since then it verified all {guest.pages:,} pages, and {guest.blocks} blocks "
            f"it had written on each of {' and '.join(SELECTED_DISKS)}",
        )

    def _check_events(self, source: Machine, destination: Machine) -> None:
        """Whether QEMU met an error, even one that it got over."""
        events = source.events + destination.events
        wrong = [event.name for event in events if event.name == "BLOCK_JOB_ERROR" or "error" in event.data]
        mirrors = sum(event.name == "BLOCK_JOB_COMPLETED" for event in source.events)
        states = [event.data["status"] for event in source.events if event.name == "MIGRATION"]
        self._add(
            "QEMU met no error",
            not wrong and mirrors == len(SELECTED_DISKS) and "postcopy-paused" not in states,
            f"{mirrors} mirrors completed with {', '.join(wrong) if wrong else 'no block job error'}; "
            f"the migration was {', '.join(states)}",
        )

    def _check_mode(self, migration: Migration) -> None:
        memory = migration.statistics["ram"]
        if self.mode is Mode.POSTCOPY:
            fetched, requests = memory["postcopy-bytes"], memory["postcopy-requests"]
            self._add(
                "postcopy was entered and completed",
                fetched > 0,
                f"{fetched:,} bytes of memory came after the guest had moved, {requests:,} pages on request",
            )
        if self.mode is Mode.MULTIFD:
            carried = memory["multifd-bytes"]
            evidence = f"{carried:,} bytes in {self.channels} channels"
            self._add("multifd carried the memory", carried > 0, evidence)

    def _add(self, what: str, passed: bool, evidence: str) -> None:
        self.checks.append(Check(what, passed, evidence))


def _fill(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for _ in range(0, size, _CHUNK):
            file.write(os.urandom(_CHUNK))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _difference(one: Path, other: Path) -> int | None:
    """@return: where two files first differ; None if they do not."""
    place = 0
    with one.open("rb") as first, other.open("rb") as second:
        while True:
            a, b = first.read(_CHUNK), second.read(_CHUNK)
            if a != b:
                pairs = enumerate(zip(a, b, strict=False))
                return place + next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
            if not a:
                return None
            place += len(a)
