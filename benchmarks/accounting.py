"""What the kernel accounts to a process and all its descendants: processor time and memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

__all__ = ["Memory", "ProcessId", "Usage", "memory", "tree", "usage"]

_TICK = 1 / os.sysconf("SC_CLK_TCK")

#: How often a look is repeated because processes came or went meanwhile.
_ATTEMPTS = 50

_T = TypeVar("_T")


@dataclass(frozen=True)
class Usage:
    """Processor time in seconds, in steps of the kernel's clock tick (10 ms)."""

    user: float = 0.0
    system: float = 0.0

    @property
    def total(self) -> float:
        """User and system time."""
        return self.user + self.system

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.user + other.user, self.system + other.system)

    def __sub__(self, other: Usage) -> Usage:
        return Usage(self.user - other.user, self.system - other.system)


@dataclass(frozen=True)
class Memory:
    """
    @ivar resident: VmRSS in bytes: all of the processes that is in memory,
        shared libraries included, once for each process.
    @ivar anonymous: the part of it that is the processes' own data.
    @ivar proportional: in bytes, with pages that several processes share
        divided among them: what counts for programs that fork.
    """

    resident: int = 0
    anonymous: int = 0
    proportional: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(
            self.resident + other.resident,
            self.anonymous + other.anonymous,
            self.proportional + other.proportional,
        )


@dataclass(frozen=True)
class ProcessId:
    """
    A process that is not mistaken for a later one of the same number.

    @ivar started: in clock ticks since the machine's start.
    """

    pid: int
    started: int


def tree(pid: int) -> list[ProcessId]:
    """
    @return: the process and all its descendants, zombies too; empty if it is gone.
        Those whose parent ended before are descendants of nobody.
    """
    try:
        fields = _stat(pid)
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return []
    found = [ProcessId(pid, int(fields[19]))]
    for task in tasks:
        try:
            children = (task / "children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # The thread has ended; its children are another's now.
        for child in children:
            found += tree(int(child))
    return found


def usage(pid: int) -> Usage:
    """
    @return: what the process and its descendants have used so far, those
        included that have ended and been waited for.
    @raise ProcessLookupError: it is gone.
    """
    return sum(_consistently(pid, _usage_of), Usage())


def memory(pid: int) -> Memory:
    """
    @return: what the process and its descendants have in memory now.
    @raise ProcessLookupError: it is gone.
    """
    return sum(_consistently(pid, _memory_of), Memory())


def _consistently(pid: int, read: Callable[[int], _T]) -> list[_T]:
    """
    Read something of each process of a tree, again if the tree changed meanwhile.

    A child that ends between the looks at it and at its parent would otherwise
    be counted twice, or not at all.
    """
    for _ in range(_ATTEMPTS):
        before = tree(pid)
        try:
            found = [read(process.pid) for process in before]
        except (FileNotFoundError, ProcessLookupError):
            found = []
        if found and tree(pid) == before:
            return found
        if not before:
            break
    raise ProcessLookupError(f"process {pid} is gone, or its children come and go too fast to be counted")


def _stat(pid: int) -> list[str]:
    # What follows the name, which is in parentheses and may hold spaces, begins with field 3.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _usage_of(pid: int) -> Usage:
    user, system, children_user, children_system = (int(ticks) * _TICK for ticks in _stat(pid)[11:15])
    return Usage(user + children_user, system + children_system)


def _memory_of(pid: int) -> Memory:
    kib = {"VmRSS": 0, "RssAnon": 0, "Pss": 0}
    for name in ("status", "smaps_rollup"):
        for line in Path(f"/proc/{pid}/{name}").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in kib:
                kib[key] = int(value.split()[0])
    return Memory(kib["VmRSS"] * 1024, kib["RssAnon"] * 1024, kib["Pss"] * 1024)
