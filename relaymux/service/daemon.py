"""
The daemon: builds everything that a configuration names, starts it, ends it.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger
from twisted.python.failure import Failure

from relaymux.core.budget import Budget
from relaymux.core.handshake import Limits
from relaymux.errors import ConfigurationError, RelaymuxError
from relaymux.net.buffers import pool_for
from relaymux.net.dialer import Dialer, LinkPort
from relaymux.net.disks import BoundSocket, bind_unix, ensure_private_directory
from relaymux.net.listen import listen_on
from relaymux.net.local import LocalDialer, LocalListener, LocalSocket, Totals
from relaymux.net.peer import Identity, Peer
from relaymux.service.config_sections import Configuration, LinkSection, ServiceSection
from relaymux.transports.registry import find_transport

__all__ = ["EXIT_UNDELIVERED", "RelayService"]

#: Exit status when bytes taken from a local program were not delivered: EX_TEMPFAIL
#: of sysexits.h.  An orchestrator must not take such an end for a success.
EXIT_UNDELIVERED = 75


class RelayService(Service):
    """
    One daemon.

    @ivar exit_status: 0, or what the process is to end with.
    """

    _log = Logger("relaymux")

    def __init__(self, reactor: Any, configuration: Configuration) -> None:
        """@raise ConfigurationError: a transport cannot be had, or refuses its settings."""
        self.exit_status = 0
        self._reactor = reactor
        self._configuration = configuration
        self._drain: Deferred[None] | None = None
        self._sockets: list[tuple[BoundSocket, IListeningPort]] = []
        self._dialers: list[Dialer] = []
        self._ports: list[LinkPort] = []
        self._peers: dict[str, Peer] = {}
        self._totals: list[tuple[str, Totals]] = []
        self._budget = Budget(configuration.memory)
        identity = Identity(configuration.name, os.urandom(16))
        for link in configuration.links:
            self._add_link(link, identity)

    def startService(self) -> None:
        """
        Make the sockets and start.

        @raise RelaymuxError: a socket cannot be made; what was made is removed.
        """
        try:
            for directory in self._configuration.directories_to_make():
                ensure_private_directory(str(directory))
            for section in self._configuration.services:
                try:
                    self._add_service(section)
                except ConfigurationError as error:
                    raise error.within(self._configuration.file, section.section, "listen") from None
        except RelaymuxError:
            self._remove_sockets()
            raise
        super().startService()
        for port in self._ports:
            port.start().addErrback(self._cannot_start)
        for dialer in self._dialers:
            dialer.start()
        # The reactor sets its own handlers when it starts to run.
        self._reactor.callWhenRunning(self._take_signals)
        self._log.info(
            "relaymux {name} started: {links} links, {services} sockets, from {file}",
            name=self._configuration.name,
            links=len(self._peers),
            services=len(self._configuration.services),
            file=self._configuration.file,
        )

    def stopService(self) -> Deferred[None]:
        """Drain, unless that was done, and close everything."""
        super().stopService()
        return self.drain()

    def drain(self) -> Deferred[None]:
        """
        Take nothing new, deliver what was taken, for at most C{drain-timeout}.

        @return: fires when every link is closed; C{exit_status} is set then.
            The same one for every call.
        """
        if self._drain is None:
            self._drain = Deferred.fromCoroutine(self._drain_and_close())
        return self._drain

    async def _drain_and_close(self) -> None:
        seconds = self._configuration.drain_timeout
        streams = sum(peer.open_streams for peer in self._peers.values())
        self._log.info(
            "stopping: {streams} streams open, waiting up to {seconds:g} s for them",
            streams=streams,
            seconds=seconds,
        )
        self._remove_sockets()
        drains = [peer.drain(seconds) for peer in self._peers.values()]
        # A link that is lost meanwhile is dialled, or listened for, until the end.
        undelivered = sum([await drain for drain in drains])
        for dialer in self._dialers:
            dialer.stop()
        for port in self._ports:
            await port.stop()
        for section, totals in self._totals:
            self._log.info("{section}: in all {totals}", section=section, totals=totals)
        if undelivered:
            self.exit_status = EXIT_UNDELIVERED
        log = self._log.error if undelivered else self._log.info
        log(
            "stopped: {undelivered} bytes taken from local programs were not delivered, exit status {status}",
            undelivered=undelivered,
            status=self.exit_status,
        )

    # Building

    def _add_link(self, section: LinkSection, identity: Identity) -> None:
        limits = Limits(
            max_streams=section.max_streams,
            window=section.window,
            replay=section.replay_buffer,
            silence=section.silence,
            resume_window=section.resume_window,
        )
        dialing = section.role == "connect"
        peer = Peer(self._reactor, section.name, identity, limits, dialing=dialing, budget=self._budget)
        transport = find_transport(section.transport)
        settings = section.settings()
        if dialing:
            ways = [(s.address, transport.client(self._reactor, s)) for s in settings]
            self._dialers.append(Dialer(self._reactor, peer, ways))
        else:
            ports = [(s.address, transport.server(self._reactor, s)) for s in settings]
            self._ports.append(LinkPort(peer, ports))
        self._peers[section.name] = peer

    def _add_service(self, section: ServiceSection) -> None:
        peer = self._peers[section.link]
        local = LocalSocket(
            section.section, section.name, str(section.path), section.open_timeout, section.max_connections
        )
        if section.role == "connect":
            dialer = LocalDialer(self._reactor, peer, local)
            peer.register(section.name, dialer)
            self._totals.append((section.section, dialer.totals))
            return
        bound = bind_unix(local.path, mode=section.mode, owner=section.owner, group=section.group)
        factory = LocalListener(self._reactor, peer, local)
        port = listen_on(self._reactor, bound.socket, factory, pool_for(self._reactor))
        self._sockets.append((bound, port))
        self._totals.append((section.section, factory.totals))

    def _remove_sockets(self) -> None:
        sockets, self._sockets = self._sockets, []
        for bound, port in sockets:
            port.stopListening()
            try:
                bound.remove()
            except OSError as error:
                self._log.warn(
                    "{path}: cannot be removed: {error}; remove it by hand", path=bound.path, error=error
                )

    # Ending

    def _cannot_start(self, reason: Failure) -> None:
        self._log.critical("cannot start: {reason}", reason=reason.getErrorMessage())
        self.exit_status = 1
        # Usually this is known before the reactor runs, when it cannot be stopped yet.
        self._reactor.callWhenRunning(self._stop_reactor)

    def _take_signals(self) -> None:
        """
        End by draining, with an exit status of our own: twistd's way would be
        to die of the signal, whatever was delivered.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: object) -> None:
        self._reactor.callFromThread(self._asked_to_stop, signal.Signals(number).name)

    def _asked_to_stop(self, name: str) -> None:
        if self._drain is not None:
            self._log.warn("{name} again: not waiting any longer", name=name)
            self.exit_status = self.exit_status or EXIT_UNDELIVERED
            self._stop_reactor()
            return
        self._log.info("{name}", name=name)
        self.drain().addBoth(lambda _: self._stop_reactor())

    def _stop_reactor(self) -> None:
        if self._reactor.running:
            self._reactor.stop()
