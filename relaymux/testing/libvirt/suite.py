"""
C{python -m relaymux.testing.libvirt.suite}: machines moved by real libvirt, in all ways.

Prints a line for each case, and every check that did not pass.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from relaymux.testing.libvirt.bench import NAMES, Bench, Case
from relaymux.testing.libvirt.cases import BUSY_CASES, CASES, POSTCOPY_CASES
from relaymux.testing.libvirt.faultcases import WINDOW_CASES
from relaymux.testing.libvirt.install import Edition, LibvirtUnavailable, ensure_libvirt
from relaymux.testing.libvirt.relays import Relays
from relaymux.testing.libvirt.rig import Rig, RigUnavailable, check_machine
from relaymux.testing.qemu.rehearsal import Check

__all__ = ["main"]

#: Seconds that one case may take.
_CASE_SECONDS = 500.0


@dataclass(frozen=True)
class _Group:
    """
    Cases that share two hosts and two relays.

    @ivar link_options: lines of the relays' C{[link]} sections.
    """

    cases: Mapping[str, Case]
    edition: Edition = Edition.RELEASE
    qemu_user: str = "libvirt-qemu"
    memory: int = 64
    pages_per_tick: int = 10
    link_options: Sequence[str] = ()


def _postcopy_user() -> str:
    """@return: whom QEMU runs as where it is to handle page faults: root, unless all may."""
    try:
        allowed = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text(encoding="ascii").strip() == "1"
    except FileNotFoundError:
        allowed = False
    return "libvirt-qemu" if allowed else "root"


_GROUPS = (
    _Group(CASES),
    _Group(WINDOW_CASES, link_options=("resume-window = 30",)),
    _Group(POSTCOPY_CASES, qemu_user=_postcopy_user()),
    _Group(BUSY_CASES, Edition.BACKPORTS, memory=128, pages_per_tick=60),
)


async def _run_case(bench: Bench, case: Case, name: str, verbose: bool) -> bool:
    """@return: whether all its checks passed."""
    started = time.monotonic()
    failure = ""
    checks: list[Check] = []
    try:
        checks = await asyncio.wait_for(case(bench), _CASE_SECONDS)
    except Exception:
        failure = traceback.format_exc(limit=4)
    finally:
        if failure:
            failure += "\n".join([bench.relays.logs(30), *(host.said() for host in bench.rig.hosts)])
        await bench.clear()
    wrong = [check for check in checks if not check.passed]
    good = not failure and bool(checks) and not wrong
    seconds = f"{time.monotonic() - started:5.0f} s"
    print(f"{'ok   ' if good else 'WRONG'}  {name:<30}  {seconds}  {len(checks):3} checks", flush=True)
    for check in checks if verbose else wrong:
        print(f"         {'ok' if check.passed else 'WRONG'}: {check.what}: {check.evidence}", flush=True)
    if failure:
        print(failure, flush=True)
    return good


def _is_chosen(name: str, only: Sequence[str]) -> bool:
    """@return: whether to run the case C{name}: C{only} has names, and parts of names; if empty, all."""
    names = {case for group in _GROUPS for case in group.cases}
    return not only or any(one == name if one in names else one in name for one in only)


async def _run_group(group: _Group, only: Sequence[str], verbose: bool) -> list[bool]:
    cases = {name: case for name, case in group.cases.items() if _is_chosen(name, only)}
    if not cases:
        return []
    tree = await asyncio.to_thread(ensure_libvirt, group.edition)
    async with Rig(qemu_user=group.qemu_user, libvirt=tree) as rig:
        lines = (await rig.hosts[0].virsh("version")).splitlines()
        versions = ", ".join(line.partition(": ")[2] for line in lines[1::2])
        print(f"{versions}, QEMU as {group.qemu_user}:", flush=True)
        async with Relays(rig, NAMES, group.link_options) as relays:
            bench = Bench(rig, relays, group.memory, group.pages_per_tick)
            return [await _run_case(bench, case, name, verbose) for name, case in cases.items()]


async def _run(only: Sequence[str], verbose: bool) -> int:
    try:
        await asyncio.to_thread(check_machine)
        results: list[bool] = []
        for group in _GROUPS:
            results += await _run_group(group, only, verbose)
    except (RigUnavailable, LibvirtUnavailable) as error:
        print(f"relaymux: {error}", file=sys.stderr)
        return 1
    print(f"{sum(results)} of {len(results)} cases passed.")
    return 0 if results and all(results) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """@return: the exit status: 0 if all cases passed."""
    parser = argparse.ArgumentParser(
        prog="relaymux.testing.libvirt.suite", description="Move machines by libvirt, in all ways."
    )
    parser.add_argument("only", nargs="*", help="run the cases of these names, or with these in their names")
    parser.add_argument("--verbose", action="store_true", help="print the checks that passed, too")
    chosen = parser.parse_args(arguments)
    return asyncio.run(_run(chosen.only, chosen.verbose))


if __name__ == "__main__":
    sys.exit(main())
