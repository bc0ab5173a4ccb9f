"""
Make QEMU available: C{python -m relaymux.testing.qemu.install}.

What the machine has is used.  What is missing, or too old to migrate a busy
guest without KVM, comes from the distribution's packages and is unpacked
privately (L{relaymux.testing.qemu.packages}).
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from relaymux.testing.qemu import packages
from relaymux.testing.qemu.tools import (
    SAFE_VERSION,
    QemuTools,
    QemuUnavailable,
    cache_directory,
    load,
    locate,
    missing,
    probe,
    save,
    version_of,
)

__all__ = ["ensure_tools", "installed_tools", "main"]


def ensure_tools(cache: Path | None = None, report: Callable[[str], None] = print) -> QemuTools:
    """
    Find QEMU, and get what is missing.

    Several processes may do this at once; the others wait for the first.

    @param cache: where to unpack and remember; by default L{cache_directory}.
    @param report: told each step that takes time.
    @raise QemuUnavailable: the message says what to install.
    """
    cache = cache or cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache):
        tools = load(cache) or _find(cache, report)
        if tools is None or not tools.safe:
            tools = _fetch(cache, tools, report)
        save(tools, cache)
        return tools


def installed_tools(cache: Path | None = None) -> QemuTools:
    """
    As L{ensure_tools}, without getting anything.

    @raise QemuUnavailable: the message says how to install it.
    """
    cache = cache or cache_directory()
    tools = load(cache)
    if tools is None:
        tools = _find(cache, lambda text: None)
        if tools is None:
            raise QemuUnavailable(
                "QEMU is not installed; 'python -m relaymux.testing.qemu.install' gets it, "
                f"or install {_wanted(locate())}"
            )
        cache.mkdir(parents=True, exist_ok=True)
        save(tools, cache)
    return tools


def _find(cache: Path, report: Callable[[str], None]) -> QemuTools | None:
    """@return: the best of what is there, on the system and in C{cache}; None if nothing works."""
    tree = cache / "tree" if (cache / "tree").is_dir() else None
    best = None
    for programs in (locate(tree), locate(tree, system=False)):
        if missing(programs):
            continue
        try:
            tools = probe(programs, tree)
        except QemuUnavailable as error:
            report(str(error))
            continue
        if tools.safe:
            return tools
        best = best or tools
    return best


def _fetch(cache: Path, present: QemuTools | None, report: Callable[[str], None]) -> QemuTools:
    """@param present: a QEMU that will do if no better one can be had."""
    programs = locate()
    if "system" in programs and (present or not _is_new(programs["system"])):
        del programs["system"]
    wanted = missing(programs)
    if not packages.available():
        if present:
            report(f"using {present.description} and a calmer guest; there is no apt here to get a newer one")
            return present
        raise QemuUnavailable(f"please install {_wanted(programs)}; there is no apt here to get it with")
    report(
        f"{present.description} would lose memory of a busy guest; getting a newer one"
        if present
        else f"QEMU is not complete here; getting {', '.join(wanted)}"
    )
    try:
        packages.fetch(wanted, cache, report)
        tools = _find(cache, report)
        if tools is None:
            raise QemuUnavailable(f"the packages {', '.join(wanted)} do not have what is needed")
    except (QemuUnavailable, OSError, subprocess.SubprocessError) as error:
        if present:
            report(f"using {present.description} and a calmer guest: {error}")
            return present
        raise QemuUnavailable(f"please install {_wanted(programs)}; getting it failed: {error}") from error
    return tools


def _is_new(program: str) -> bool:
    try:
        return version_of(program) >= SAFE_VERSION
    except QemuUnavailable:
        return False


def _wanted(programs: dict[str, str]) -> str:
    return (
        f"{', '.join(missing(programs))} (QEMU for x86-64, version 9.0 or newer unless KVM works, "
        "with qemu-img, qemu-nbd and libnbd's nbdcopy)"
    )


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    with (cache / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    """@return: the exit status: 0 when there is a QEMU to use."""
    try:
        tools = ensure_tools()
    except QemuUnavailable as error:
        print(f"relaymux: {error}", file=sys.stderr)
        return 1
    print(f"{tools.description}: {tools.system}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
