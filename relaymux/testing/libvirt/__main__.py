"""
Two libvirt hosts to try things on by hand: C{python -m relaymux.testing.libvirt}.

C{up} starts them in the background, with a relay on each and a machine on the first;
C{shell a} opens a shell on one; C{status} tells how they are; C{down} ends them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from relaymux.testing.libvirt.domain import Domain, VirtualMachine, guest_for
from relaymux.testing.libvirt.host import CommandFailed, Host, HostFailed
from relaymux.testing.libvirt.install import Edition, LibvirtUnavailable, ensure_libvirt
from relaymux.testing.libvirt.moves import Move
from relaymux.testing.libvirt.relays import Relays
from relaymux.testing.libvirt.rig import Rig, RigUnavailable, check_machine
from relaymux.testing.qemu.relays import RelayFailed

#: Says where the hosts are; stale if its process is not there any more.
_STATE = Path("/run/relaymux-libvirt-rig.json")

_NAME = "web1"
_DISKS = ("vda", "vdc")

#: Seconds for the hosts to be there, or gone.
_SECONDS = 60.0


def current_state() -> dict[str, int] | None:
    """@return: the holder's pid and each host's; None if there are none."""
    try:
        state: dict[str, int] = json.loads(_STATE.read_text(encoding="ascii"))
        command = Path(f"/proc/{state['holder']}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError, ValueError, KeyError):
        return None
    return state if __package__.encode() in command else None


async def _hold(edition: Edition) -> None:
    """Have the hosts until SIGTERM."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    tree = await asyncio.to_thread(ensure_libvirt, edition)
    async with Rig(libvirt=tree) as rig, Relays(rig, [_NAME]) as relays:
        machine = VirtualMachine(rig, Domain(_NAME, guest_for(64, 10, _DISKS)))
        await machine.start(rig.hosts[0], _DISKS)
        await machine.heartbeat.stop()
        pids = {host.name: host.pid for host in rig.hosts}
        try:
            _STATE.write_text(json.dumps({"holder": os.getpid(), **pids}), encoding="ascii")
            there, back = (
                shlex.join(Move(_DISKS).arguments(_NAME, relays.route(host, _NAME)))
                for host in rig.hosts[::-1]
            )
            print(f"{_NAME} runs on {rig.hosts[0].name}; to move it, on {rig.hosts[0].name}:\n")
            print(f"  virsh {there}\n\nand back, on {rig.hosts[1].name}:\n\n  virsh {back}\n", flush=True)
            _detach()
            await ended.wait()
        finally:
            _STATE.unlink(missing_ok=True)


def _detach() -> None:
    """Whoever waits for the output need not wait any longer."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def _up(edition: Edition) -> int:
    if current_state() is not None:
        print("the hosts are up; 'down' ends them", file=sys.stderr)
        return 1
    try:
        check_machine()
        ensure_libvirt(edition)
    except (RigUnavailable, LibvirtUnavailable) as error:
        print(f"relaymux: {error}", file=sys.stderr)
        return 1
    holder = subprocess.Popen(
        [sys.executable, "-m", __package__, "hold", "--edition", edition.value],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert holder.stdout is not None
    sys.stdout.write(holder.stdout.read())
    if holder.poll() is not None or current_state() is None:
        return 1
    print("'shell hv-a' and 'shell hv-b' open a shell on them, 'down' ends them.")
    return 0


def _down() -> int:
    state = current_state()
    if state is None:
        _STATE.unlink(missing_ok=True)
        print("there are no hosts")
        return 0
    os.kill(state["holder"], signal.SIGTERM)
    until = time.monotonic() + _SECONDS
    while Path(f"/proc/{state['holder']}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    if Path(f"/proc/{state['holder']}").exists():
        print(f"process {state['holder']} does not end; its hosts end with it", file=sys.stderr)
        return 1
    return 0


def _enter(name: str, command: Sequence[str]) -> int:
    state = current_state()
    if state is None or name not in state:
        print("there are no hosts; 'up' starts them", file=sys.stderr)
        return 1
    host = Host(name, "", Path(), pid=state[name])
    return subprocess.run(host.enter(list(command)), check=False).returncode


def _status() -> int:
    state = current_state()
    if state is None:
        print("there are no hosts")
        return 1
    for name in state:
        if name != "holder":
            print(f"{name}, process {state[name]}:", flush=True)
            _enter(name, ["virsh", "list", "--all"])
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """@return: the exit status."""
    parser = argparse.ArgumentParser(prog=__package__, description="Two libvirt hosts to try things on.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    editions = [edition.value for edition in Edition]
    for verb, text in (("up", "start the hosts"), ("hold", "what 'up' starts")):
        one = verbs.add_parser(verb, help=text)
        one.add_argument("--edition", choices=editions, default=Edition.RELEASE.value)
    shell = verbs.add_parser("shell", help="run a command on one of them, by default a shell")
    shell.add_argument("host", choices=("hv-a", "hv-b"))
    shell.add_argument("command", nargs=argparse.REMAINDER)
    verbs.add_parser("status", help="which machines run where")
    verbs.add_parser("down", help="end them, and with them all that is on them")
    chosen = parser.parse_args(arguments)
    if chosen.verb == "up":
        return _up(Edition(chosen.edition))
    if chosen.verb == "hold":
        try:
            asyncio.run(_hold(Edition(chosen.edition)))
        except (CommandFailed, HostFailed, RelayFailed, RigUnavailable, LibvirtUnavailable) as error:
            print(f"relaymux: {error}", flush=True)
            return 1
        return 0
    if chosen.verb == "shell":
        return _enter(chosen.host, chosen.command or [os.environ.get("SHELL", "sh")])
    return _down() if chosen.verb == "down" else _status()


if __name__ == "__main__":
    sys.exit(main())
