"""
The local sockets of a daemon: made and dialled as the sections say, and taken down again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger

from relaymux.net.buffers import pool_for
from relaymux.net.connections import Connections, LocalSocket
from relaymux.net.disks import BoundSocket, bind_unix
from relaymux.net.listen import listen_on
from relaymux.net.local import LocalDialer, LocalListener
from relaymux.net.peer import Peer
from relaymux.service.config_sections import ServiceSection

__all__ = ["LocalSockets", "Served"]


@dataclass(eq=False)
class Served:
    """
    A section at work.

    @ivar connections: through its socket.
    @ivar bound: the socket that was made for it, while it is there.
    @ivar dialer: what answers the peer's streams, with C{connect}.
    """

    section: ServiceSection
    connections: Connections
    bound: tuple[BoundSocket, IListeningPort] | None = None
    dialer: LocalDialer | None = None


class LocalSockets:
    """All of them; at most one for each section and link, and those whose last connections still go on."""

    _log = Logger("relaymux")

    def __init__(self, reactor: Any, peers: Mapping[str, Peer]) -> None:
        """@param peers: by the name of their link."""
        self._reactor = reactor
        self._peers = peers
        self._served: list[Served] = []
        self._leaving: list[Served] = []

    def serve(self, section: ServiceSection) -> Served:
        """
        Make the socket of a section with C{listen}, or register the service of one with C{connect}.

        @raise ConfigurationError: the socket cannot be made.
        """
        served = self.build(section)
        if served.dialer is not None:
            self._peers[section.link].register(section.name, served.dialer)
        return served

    def build(self, section: ServiceSection) -> Served:
        """As L{serve}, but a service is not registered: whoever called this hands it out."""
        peer = self._peers[section.link]
        local = LocalSocket(
            section.label,
            section.name,
            str(section.path),
            section.open_timeout,
            section.max_connections,
            others=tuple(map(str, section.others)),
            is_nbd=section.kind == "disk" or section.part == "nbd",
            # On the source: libvirt is at the other end of what these carry.
            ends_apart=section.part == "nbd" and section.role == "listen",
            # QEMU's user makes them in a directory of its own.
            follow_links=section.part not in ("ram", "nbd"),
        )
        if section.role == "connect":
            dialer = LocalDialer(self._reactor, peer, local)
            served = Served(section, dialer.connections, dialer=dialer)
        else:
            bound = bind_unix(local.path, mode=section.mode, owner=section.owner, group=section.group)
            factory = LocalListener(self._reactor, peer, local)
            port = listen_on(self._reactor, bound.socket, factory, pool_for(self._reactor))
            served = Served(section, factory.connections, bound=(bound, port))
        self._served.append(served)
        return served

    def withdraw(self, served: Served) -> None:
        """Take no more connections for it; those that there are go on."""
        self._served.remove(served)
        self._close(served)
        if not served.connections.open_count:
            served.connections.rest()
        self._leaving = [other for other in (*self._leaving, served) if other.connections.open_count]

    def close(self) -> None:
        """Take no more connections from local programs, as the daemon stops; the sockets are removed."""
        for served in self._served:
            self._close(served)
        for served in self.served:
            served.connections.hurry()

    def tell_progress(self) -> None:
        """Log what moves."""
        for served in self.served:
            served.connections.tell_progress()

    def tell_totals(self) -> None:
        """Log what there was in all, after what is left to say of each connection."""
        for served in self.served:
            served.connections.rest()
            self._log.info(
                "{section}: in all {totals}", section=served.section.label, totals=served.connections.totals
            )

    @property
    def served(self) -> tuple[Served, ...]:
        """All that is served, and what was withdrawn and has connections."""
        return (*self._served, *(served for served in self._leaving if served.connections.open_count))

    def __len__(self) -> int:
        return len(self._served)

    def _close(self, served: Served) -> None:
        if served.bound is None:
            return
        (bound, port), served.bound = served.bound, None
        port.stopListening()
        try:
            bound.remove()
        except OSError as error:
            self._log.warn(
                "{path}: cannot be removed: {error}; remove it by hand", path=bound.path, error=error
            )
