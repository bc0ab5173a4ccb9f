"""Both hosts with the link between them, as one thing to start and stop."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

from relaymux.testing.libvirt.host import Host
from relaymux.testing.libvirt.install import Edition, installed_libvirt
from relaymux.testing.libvirt.network import Network

__all__ = ["HOST_NAMES", "Rig", "RigUnavailable", "check_machine"]

HOST_NAMES = ("hv-a", "hv-b")

#: Nobody else sees these, so they cannot clash.
_ADDRESSES = ("10.77.0.1", "10.77.0.2")

_TOOLS = ("unshare", "nsenter", "mount", "umount", "env")


class RigUnavailable(Exception):
    """This machine cannot have the hosts; the message says why."""


def check_machine() -> None:
    """@raise RigUnavailable: there can be no hosts here."""
    if os.geteuid() != 0:
        raise RigUnavailable("two libvirt hosts on one machine need root")
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise RigUnavailable(f"no {', '.join(missing)} here; util-linux and coreutils have them")
    # A mount of each kind that a host needs, in namespaces that end at once.
    trial = "mount -t tmpfs tmpfs /run && mkdir /run/u /run/w && "
    trial += "mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/u,workdir=/run/w /etc"
    command = ["unshare", "--mount", "--net", "--uts", "--ipc", "--pid", "--fork", "sh", "-c", trial]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RigUnavailable(f"no namespaces or no overlay file system here: {result.stderr.strip()}")


class Rig:
    """
    Two libvirt hosts, as an asynchronous context manager.

    @ivar hosts: both.
    @ivar network: what joins them.
    """

    def __init__(
        self,
        edition: Edition = Edition.RELEASE,
        *,
        qemu_user: str = "libvirt-qemu",
        libvirt: Path | None = None,
    ) -> None:
        """
        @param qemu_user: whom QEMU runs as; C{"root"} or C{"libvirt-qemu"}.
        @param libvirt: the unpacked packages; None for those of C{edition}.
        @raise LibvirtUnavailable: they are not there.
        """
        tree = libvirt or installed_libvirt(edition)
        one, other = (
            Host(name, address, tree, qemu_user) for name, address in zip(HOST_NAMES, _ADDRESSES, strict=True)
        )
        self.hosts = (one, other)
        self.network = Network(one, other)

    async def __aenter__(self) -> Rig:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """
        Make both hosts.

        @raise RigUnavailable: not on this machine.
        @raise HostFailed: a host or its libvirtd did not come up.
        """
        await asyncio.to_thread(check_machine)
        try:
            for host in self.hosts:
                await host.start()
            await self.network.start()
            await asyncio.gather(*(host.start_libvirtd() for host in self.hosts))
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End both hosts, and with them all that runs and lies on them.  A second call does nothing."""
        await asyncio.gather(*(host.stop() for host in self.hosts))
