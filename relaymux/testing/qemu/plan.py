"""What is asked of a migration, and what is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

__all__ = ["DiskRoute", "MigrationFailed", "MigrationPlan", "Mode", "Progress", "Transfer"]


class Mode(str, Enum):
    """How the memory travels."""

    PLAIN = "plain"
    MULTIFD = "multifd"
    POSTCOPY = "postcopy"


@dataclass(frozen=True)
class DiskRoute:
    """
    @ivar name: the disk's block node on both machines, and its NBD export.
    @ivar socket: where the source dials for this disk.
    """

    name: str
    socket: Path


@dataclass(frozen=True)
class MigrationPlan:
    """
    @ivar disks: those to copy; others are left alone.
    @ivar ram_socket: where the source dials for the memory.
    @ivar incoming_socket: where the destination listens for it.
    @ivar nbd_socket: where the destination listens for all disks.
    @ivar channels: how many further connections multifd makes.
    @ivar bandwidth: bytes per second for memory before postcopy.
    @ivar postcopy_bandwidth: bytes per second for it afterwards, beside the
        pages that the guest asks for; 0 for no limit.
    @ivar disk_bandwidth: bytes per second for each disk; 0 for no limit.
    @ivar downtime: milliseconds the guest may be stopped for the last memory.
    @ivar reconnect_delay: seconds QEMU retries a lost NBD connection before
        the copy of the disk fails.
    @ivar phase_seconds: how long one phase may last.
    """

    disks: tuple[DiskRoute, ...]
    ram_socket: Path
    incoming_socket: Path
    nbd_socket: Path
    mode: Mode = Mode.PLAIN
    channels: int = 4
    bandwidth: int = 1 << 30
    postcopy_bandwidth: int = 0
    disk_bandwidth: int = 0
    downtime: int = 300
    reconnect_delay: int = 30
    phase_seconds: float = 60.0


@dataclass(frozen=True)
class Transfer:
    """How far something is, in bytes; C{done} can fall when the guest writes."""

    done: int
    total: int


@dataclass(frozen=True)
class Progress:
    """
    @ivar phase: what is being done, in a word or two.
    @ivar memory: None before it starts.
    @ivar disks: by name, of those that have started.
    """

    phase: str
    memory: Transfer | None
    disks: Mapping[str, Transfer]


class MigrationFailed(Exception):
    """
    @ivar phase: where it failed.
    @ivar source_runs: whether the guest runs on the source as before; if not,
        it is or may be on the destination, and nothing was undone.
    """

    def __init__(self, phase: str, reason: str, source_runs: bool) -> None:
        where = "the guest runs on the source" if source_runs else "the guest may be on the destination"
        super().__init__(f"while {phase}: {reason} ({where})")
        self.phase = phase
        self.source_runs = source_runs
