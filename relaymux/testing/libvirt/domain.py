"""
A virtual machine under libvirt: its definition, its disks, and what its guest says.

The guest is L{relaymux.testing.qemu.guest}, which verifies its memory and disks without
pause and counts aloud.  Its serial port is a file on either host.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from xml.sax.saxutils import quoteattr

from relaymux.testing.libvirt.heartbeat import Heartbeat
from relaymux.testing.libvirt.host import CommandFailed, Host
from relaymux.testing.libvirt.rig import Rig
from relaymux.testing.qemu.guest import SECTOR_BYTES, GuestSettings, boot_sector

__all__ = ["DISK_NAMES", "Domain", "VirtualMachine", "guest_for"]

DISK_NAMES = ("vda", "vdb", "vdc")

#: Where a host has its images.
_IMAGES = "/var/lib/libvirt/images"

_DEFINITION = "/run/domain.xml"

_CHUNK = 1 << 20

#: The BIOS's number of the first disk.
_FIRST_DRIVE = 0x80

_DOMAIN = """
<domain type="qemu">
  <name>{name}</name>
  <memory unit="MiB">{memory}</memory>
  <vcpu>1</vcpu>
  <os><type arch="x86_64" machine="{machine}">hvm</type></os>
  <features><acpi/></features>
  <clock offset="utc"/>
  <on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot><on_crash>destroy</on_crash>
  <devices>
    <emulator>{emulator}</emulator>
    {disks}
    <controller type="usb" model="none"/>
    <memballoon model="none"/>
    <serial type="file"><source path={console} append="on"/><target port="0"/></serial>
  </devices>
</domain>
"""

#: All have a boot order, else SeaBIOS leaves those without out and the guest cannot write to them.
_DISK = """<disk type="file" device="disk">
      <driver name="qemu" type="raw"/><source file={path}/><target dev="{name}" bus="virtio"/>
      <boot order="{number}"/>
    </disk>"""


@dataclass(frozen=True)
class Domain:
    """
    @ivar name: a short one, unique on both hosts.
    @ivar guest: what its guest does.
    @ivar disks: their target names, the one to boot from first.
    @ivar directory: where its images are, on either host.
    @ivar machine: QEMU's machine type; the same on both.
    """

    name: str
    guest: GuestSettings
    disks: Sequence[str] = DISK_NAMES
    directory: str = _IMAGES
    machine: str = "pc"
    emulator: str = "/usr/bin/qemu-system-x86_64"

    def image(self, disk: str) -> str:
        """@return: the path of the disk's image, on either host."""
        return f"{self.directory}/{self.name}-{disk}.img"

    @property
    def console(self) -> str:
        """The path of what the guest says, on either host."""
        return f"/var/log/libvirt/qemu/{self.name}.console"

    def definition(self) -> str:
        """@return: libvirt's XML."""
        disks = [
            _DISK.format(path=quoteattr(self.image(name)), name=name, number=number)
            for number, name in enumerate(self.disks, start=1)
        ]
        return _DOMAIN.format(
            name=self.name,
            memory=self.guest.memory,
            machine=self.machine,
            emulator=self.emulator,
            disks="\n    ".join(disks),
            console=quoteattr(self.console),
        )


class VirtualMachine:
    """
    One domain, wherever it is.

    @ivar heartbeat: what its guest says.
    """

    def __init__(self, rig: Rig, domain: Domain, disk_bytes: int = 64 << 20) -> None:
        """@param disk_bytes: size of each disk, a multiple of 1 MiB."""
        self.rig = rig
        self.domain = domain
        self.disk_bytes = disk_bytes
        one, other = rig.hosts
        self.heartbeat = Heartbeat((one.path(domain.console), other.path(domain.console)))

    async def start(self, host: Host, written: Sequence[str]) -> None:
        """
        Make the images and boot the guest.

        @param written: the disks that the guest writes to.  All others have
            random contents of their own on either host.
        @raise CommandFailed: libvirt does not like it.
        """
        await asyncio.to_thread(self._make_images, host, written)
        self.heartbeat.start()
        host.path(_DEFINITION).write_text(self.domain.definition(), encoding="ascii")
        await host.virsh("create", _DEFINITION)

    async def destroy(self) -> None:
        """End it on either host, if it is there."""
        for host in self.rig.hosts:
            with suppress(CommandFailed):
                await host.virsh("destroy", self.domain.name)
        await self.heartbeat.stop()

    async def where(self) -> list[Host]:
        """@return: the hosts whose libvirt knows it."""
        listings = [(await host.virsh("list", "--all", "--name")).split() for host in self.rig.hosts]
        return [
            host for host, names in zip(self.rig.hosts, listings, strict=True) if self.domain.name in names
        ]

    def image(self, host: Host, disk: str) -> Path:
        """@return: the image, for this process."""
        return host.path(self.domain.image(disk))

    def digest(self, host: Host, disk: str) -> str:
        """@return: of the whole image."""
        digest = hashlib.sha256()
        with self.image(host, disk).open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def difference(self, disk: str, *, whole: bool) -> int | None:
        """
        Compare one disk's two images.

        @param whole: whether to compare the area, too, that the guest writes to
            as long as it runs.
        @return: where they first differ; None if they do not.
        """
        guest = self.domain.guest
        area = range(
            guest.first_sector * SECTOR_BYTES,
            (guest.first_sector + guest.blocks * guest.sectors_per_block) * SECTOR_BYTES,
        )
        one, other = (self.image(host, disk) for host in self.rig.hosts)
        place = 0
        with one.open("rb") as first, other.open("rb") as second:
            while True:
                a, b = first.read(_CHUNK), second.read(_CHUNK)
                if a != b:
                    for offset, (x, y) in enumerate(zip_longest(a, b)):
                        if x != y and (whole or place + offset not in area):
                            return place + offset
                if not a and not b:
                    return None
                place += len(a)

    def _make_images(self, source: Host, written: Sequence[str]) -> None:
        sector = boot_sector(self.domain.guest)
        for host in self.rig.hosts:
            self.image(host, "").parent.mkdir(exist_ok=True, mode=0o711)
            for disk in self.domain.disks:
                with self.image(host, disk).open("wb") as file:
                    if host is source or disk not in written:
                        for _ in range(0, self.disk_bytes, _CHUNK):
                            file.write(os.urandom(_CHUNK))
                    else:
                        file.truncate(self.disk_bytes)
            boot = self.domain.disks[0]
            if host is source or boot not in written:
                with self.image(host, boot).open("r+b") as file:
                    file.write(sector)


def guest_for(
    memory: int, pages_per_tick: int, written: Sequence[str], disks: Sequence[str] = DISK_NAMES
) -> GuestSettings:
    """
    @param memory: in MiB.
    @param written: the disks, of C{disks}, that it writes to.
    """
    drives = tuple(_FIRST_DRIVE + disks.index(name) for name in written)
    return GuestSettings(memory=memory, pages_per_tick=pages_per_tick, drives=drives)
