"""
Migrations that libvirt gives up while their link is away.

It closes its control connection when its keepalive was not answered for 30 s, and before it says
anything it waits for QEMU to end the mirrors of the disks.  QEMU waits for the disks, and
relaymux holds those until the link is back, or C{resume-window} is over.  So they end as soon
as libvirt has closed (docs/decisions/0021-when-libvirt-gives-up.md).

What carries memory is left alone: QEMU closes that itself, and if the guest runs at the
destination already, it cannot do without.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import Any

from twisted.internet.task import LoopingCall
from twisted.python.failure import Failure

from relaymux.errors import GivenUp
from relaymux.net.connections import Connection
from relaymux.net.peer import Peer
from relaymux.service.config_sections import ServiceSection, VmPart
from relaymux.service.sockets import LocalSockets

__all__ = ["AbandonedMoves"]

#: Seconds between two looks at the control connections whose link is away.
LOOK_SECONDS = 1.0


class AbandonedMoves:
    """Ends the disks of such migrations, of all VMs that leave this host."""

    def __init__(self, reactor: Any, sockets: LocalSockets, peers: Mapping[str, Peer]) -> None:
        """@param peers: by the name of their link."""
        self._sockets = sockets
        self._peers = peers
        self._looking = LoopingCall(self.look)
        self._looking.clock = reactor

    def start(self) -> None:
        """Look from now on."""
        self._looking.start(LOOK_SECONDS, now=False)

    def stop(self) -> None:
        """Look no more."""
        if self._looking.running:
            self._looking.stop()

    def look(self) -> None:
        """See who has given up."""
        for served in self._sockets.served:
            section = served.section
            is_source = section.part == "nbd" and section.role == "listen"
            if is_source and served.connections.open_count and not self._peers[section.link].is_up:
                self._look_at(section, self._joined(section, "nbd"))

    def _look_at(self, section: ServiceSection, disks: list[Connection]) -> None:
        """
        libvirt dials the control connection before QEMU dials the disks.  Of several the operator
        may have used some, and one that is still there may be that of the migration.
        """
        gone: list[float] = []
        there: list[float] = []
        for control in self._joined(section, "control"):
            (gone if control.bridge.is_local_gone else there).append(control.began)
        text = f"link {section.link} is away, and libvirt here has closed its control connection"
        for disk in disks:
            if min(gone, default=inf) <= disk.began < min(there, default=inf):
                disk.bridge.give_up(Failure(GivenUp(text)))

    def _joined(self, section: ServiceSection, part: VmPart) -> list[Connection]:
        """@return: those of the same VM on the same way that have a stream, oldest first."""
        wanted = (section.vm, section.link, section.role, part)
        return [
            connection
            for served in self._sockets.served
            if (served.section.vm, served.section.link, served.section.role, served.section.part) == wanted
            for connection in served.connections.open_connections
            if connection.bridge.is_joined
        ]
