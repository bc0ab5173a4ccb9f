"""
C{[vm *]}: whichever VM runs on this host may leave, and any may arrive.

A socket has to be there before libvirt is told to use it, and its name contains that of
the VM.  So libvirt's directory of running VMs is looked at: for each there are sockets.
For what arrives nothing needs to be there beforehand: the peer's stream names the VM.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from relaymux.core.handshake import NAME
from relaymux.errors import ConfigurationError
from relaymux.net.disks import clear_unix
from relaymux.net.streams import Service
from relaymux.service.config_sections import LONGEST_VM_NAME, LibvirtSection, VmSection
from relaymux.service.sockets import LocalSockets, Served

__all__ = ["AnyVm", "running_vms"]

#: Seconds between two looks: nobody migrates a VM sooner after its start, and to list the
#: few files of a directory in memory takes microseconds.
LOOK_SECONDS = 1.0

#: VMs that may be arriving over one link at once.  Each has three services.
MOST_ARRIVING = 256

_SERVICE = re.compile(r"(.+)\.(control|ram|nbd)")


def running_vms(libvirt: LibvirtSection) -> frozenset[str]:
    """
    @return: the names of the VMs that run here: libvirt keeps C{NAME.xml} for each.
    @raise OSError: that cannot be read.  Without the directory none runs.
    """
    try:
        names = os.listdir(libvirt.state_directory)
    except FileNotFoundError:
        return frozenset()
    return frozenset(name[: -len(".xml")] for name in names if name.endswith(".xml"))


@dataclass
class _Vm:
    """
    A VM that runs here.

    @ivar served: its sockets; none if they could not be made.
    @ivar problem: why they could not when that was tried last.
    """

    served: list[Served] = field(default_factory=list)
    problem: str = ""


class AnyVm:
    """Serves C{[vm *]}, for all VMs that have no section of their own."""

    _log = Logger("relaymux")

    def __init__(
        self, reactor: Any, sockets: LocalSockets, vm: VmSection, libvirt: LibvirtSection, own: frozenset[str]
    ) -> None:
        """@param own: the VMs that have a section of their own, which alone holds for them."""
        self._reactor = reactor
        self._sockets = sockets
        self._vm = vm
        self._libvirt = libvirt
        self._own = own
        self._running: dict[str, _Vm] = {}
        self._arriving: dict[str, dict[str, Served]] = {link: {} for link in vm.links}
        self._failure = ""
        self._looking = LoopingCall(self.look)
        self._looking.clock = reactor

    def start(self) -> None:
        """Make the sockets of the VMs that run now, and from now on of those that come."""
        if self._vm.leaves:
            self._clear()
            self._looking.start(LOOK_SECONDS)

    def _clear(self) -> None:
        """Remove what a daemon that was killed left of VMs that have gone since; of others it is replaced."""
        for section in self._vm.services:
            if section.role != "listen":
                continue
            before = section.path.name.removesuffix("*")
            for lock in section.path.parent.glob(f"{before}*.lock"):
                socket = lock.with_suffix("")
                if socket.name.removeprefix(before) in self._own:
                    continue
                try:
                    clear_unix(str(socket))
                except (ConfigurationError, OSError) as error:
                    self._log.warn("vm *: what an earlier daemon left is not removed: {error}", error=error)

    def stop(self) -> None:
        """Look no more."""
        if self._looking.running:
            self._looking.stop()

    # Leaving

    def look(self) -> None:
        """See who runs here."""
        try:
            running = running_vms(self._libvirt)
        except OSError as error:
            if str(error) != self._failure:
                self._failure = str(error)
                self._log.error("vm *: it cannot be seen which VMs run here: {error}", error=error)
            return
        self._failure = ""
        for name in self._running.keys() - running:
            self._gone(name)
        for name in sorted(running - self._own):
            if not NAME.fullmatch(name) or len(name) > LONGEST_VM_NAME:
                self._cannot_be(name)
            elif name not in self._running or self._running[name].problem:
                self._came(name, self._running.setdefault(name, _Vm()))

    def _cannot_be(self, name: str) -> None:
        if name in self._running:
            return
        self._running[name] = _Vm()
        self._log.warn(
            "vm *: {name!r} gets no sockets: relaymux takes names of 1 to {most} of A-Z a-z 0-9 . _ -",
            name=name,
            most=LONGEST_VM_NAME,
        )

    def _came(self, name: str, vm: _Vm) -> None:
        """Make the sockets of C{vm}; once more with every look if something is in the way."""
        before, vm.problem = vm.problem, ""
        try:
            for section in self._vm.called(name).services:
                if section.role == "listen":
                    vm.served.append(self._sockets.serve(section))
        except ConfigurationError as error:
            vm.problem = str(error)
            if vm.problem != before:
                self._log.error("vm {name}: it cannot leave: {error}", name=name, error=error)
            self._withdraw(vm)
        else:
            self._log.info("vm {name}: runs here, and may leave over {links}", name=name, links=self._links)

    def _gone(self, name: str) -> None:
        vm = self._running.pop(name)
        if vm.served:
            self._log.info("vm {name}: does not run here any more", name=name)
        self._withdraw(vm)

    def _withdraw(self, vm: _Vm) -> None:
        served, vm.served = vm.served, []
        for one in served:
            self._sockets.withdraw(one)

    @property
    def _links(self) -> str:
        return ", ".join(self._vm.links)

    # Arriving

    def find(self, link: str, service: str) -> Service | None:
        """
        The peer of C{link} asks for C{service}, which no section serves.

        @return: what answers it; L{None} if it is no VM's, or too many arrive.
        """
        match = _SERVICE.fullmatch(service)
        if not self._vm.arrives or match is None or match[1] in self._own:
            return None
        arriving = self._arriving[link]
        served = arriving.get(service)
        if served is None:
            if len(arriving) >= 3 * MOST_ARRIVING:
                self._forget_idle(arriving)
            if len(arriving) >= 3 * MOST_ARRIVING:
                return None
            served = arriving[service] = self._build(link, match[1], service)
        return served.dialer

    def _build(self, link: str, name: str, service: str) -> Served:
        for section in self._vm.called(name).services:
            if (section.role, section.link, section.name) == ("connect", link, service):
                return self._sockets.build(section)
        raise AssertionError(service)  # find() lets through what called() makes

    def _forget_idle(self, arriving: dict[str, Served]) -> None:
        for service, served in list(arriving.items()):
            if not served.connections.open_count:
                del arriving[service]
                self._sockets.withdraw(served)
