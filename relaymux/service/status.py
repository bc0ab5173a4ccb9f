"""
What a daemon tells of itself: one JSON document for each connection to its status socket.

Read-only, and nothing that is not in the log, too: names, paths, counts.  The form is in
docs/configuration.md; keys may be added, and C{format} rises if one changes its meaning.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.logger import Logger
from twisted.python.failure import Failure

from relaymux import __version__
from relaymux.net.buffers import pool_for
from relaymux.net.connections import Connection
from relaymux.net.disks import bind_unix
from relaymux.net.listen import listen_on
from relaymux.net.peer import Peer
from relaymux.service.config_sections import Configuration, LinkSection
from relaymux.service.sockets import LocalSockets, Served

__all__ = ["FORMAT", "StatusSocket", "describe_daemon"]

#: Of the document.
FORMAT = 1

#: Who reads the status at the same time; more are closed.
MOST_READERS = 16

#: Seconds for a reader to take it all.
FLUSH_SECONDS = 5.0


def describe_daemon(
    configuration: Configuration, peers: Mapping[str, Peer], sockets: LocalSockets, now: float, began: float
) -> dict[str, Any]:
    """
    @param now: the reactor's time.
    @param began: when the daemon was started.
    @return: what is true now, as JSON has it.
    """
    return {
        "format": FORMAT,
        "daemon": configuration.name,
        "version": __version__,
        "pid": os.getpid(),
        "seconds": round(now - began, 3),
        "links": [_describe_link(link, peers[link.name], now) for link in configuration.links],
        "sockets": [_describe_served(served, now) for served in sockets.served],
    }


def _describe_link(link: LinkSection, peer: Peer, now: float) -> dict[str, Any]:
    held = peer.held
    state = "up" if peer.is_up else "waiting" if held is not None else "down"
    away = now - held.lost_at if held is not None and held.lost_at is not None else None
    return {
        "link": link.name,
        "transport": link.transport,
        link.role: list(link.addresses),
        "state": state,
        "peer": peer.daemon,
        "streams": peer.open_streams,
        "unacknowledged_bytes": held.streams.session.replay.held_bytes if held is not None else 0,
        "resumes": held.generation if held is not None else 0,
        "away_seconds": None if away is None else round(away, 3),
        "resume_window_seconds": None if held is None else held.window,
    }


def _describe_served(served: Served, now: float) -> dict[str, Any]:
    section, connections = served.section, served.connections
    still_open = connections.open_connections
    return {
        "section": section.section,
        "service": section.name,
        "part": section.part,
        "link": section.link,
        section.role: str(section.path),
        "opened": connections.totals.opened,
        "failed": connections.totals.failed,
        "sent_bytes": connections.totals.sent + sum(one.bridge.sent for one in still_open),
        "received_bytes": connections.totals.received + sum(one.bridge.received for one in still_open),
        "connections": [_describe_connection(one, now) for one in still_open],
    }


def _describe_connection(connection: Connection, now: float) -> dict[str, Any]:
    disk = connection.disk
    return {
        "number": connection.number,
        "joined": connection.bridge.is_joined,
        "seconds": round(now - connection.began, 3),
        "sent_bytes": connection.bridge.sent,
        "received_bytes": connection.bridge.received,
        "disk": None if disk is None else {"name": disk.name, "bytes": disk.size},
    }


class _Teller(Protocol):
    """Says it and closes."""

    def __init__(self, factory: _Tellers) -> None:
        self._factory = factory

    def connectionMade(self) -> None:
        self._factory.readers += 1
        assert self.transport is not None
        self.transport.write(json.dumps(self._factory.describe()).encode() + b"\n")
        self.transport.loseConnection()

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._factory.readers -= 1


class _Tellers(Factory):
    """
    @ivar describe: gives the document.
    @ivar readers: connections that are open.
    """

    noisy = False

    def __init__(self, describe: Callable[[], Mapping[str, Any]]) -> None:
        self.describe = describe
        self.readers = 0

    def buildProtocol(self, addr: IAddress | None) -> _Teller | None:
        """See C{IProtocolFactory.buildProtocol}."""
        return _Teller(self) if self.readers < MOST_READERS else None


class StatusSocket:
    """The socket, for this user alone."""

    _log = Logger("relaymux")

    def __init__(self, reactor: Any, path: Path, describe: Callable[[], Mapping[str, Any]]) -> None:
        """
        Make it.

        @param describe: gives the document.
        @raise ConfigurationError: it cannot be made.
        """
        self._bound = bind_unix(str(path))
        factory, pool = _Tellers(describe), pool_for(reactor)
        self._port = listen_on(reactor, self._bound.socket, factory, pool, flush_seconds=FLUSH_SECONDS)

    def close(self) -> None:
        """Answer nobody any more, and remove it."""
        self._port.stopListening()
        try:
            self._bound.remove()
        except OSError as error:
            self._log.warn("{path}: cannot be removed: {error}", path=self._bound.path, error=error)
