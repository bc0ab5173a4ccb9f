"""
The daemon: builds everything that a configuration names, starts it, ends it.
"""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import Any

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from relaymux.core.budget import Budget
from relaymux.core.handshake import Limits
from relaymux.errors import ConfigurationError, RelaymuxError
from relaymux.net.compiled import describe_compiled
from relaymux.net.dialer import Dialer, LinkPort
from relaymux.net.disks import ensure_directory
from relaymux.net.peer import Identity, Peer
from relaymux.service.abandoned import AbandonedMoves
from relaymux.service.anyvm import AnyVm
from relaymux.service.config_sections import Configuration, LinkSection
from relaymux.service.sockets import LocalSockets
from relaymux.service.status import StatusSocket, describe_daemon
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
        self._dialers: list[Dialer] = []
        self._ports: list[LinkPort] = []
        self._peers: dict[str, Peer] = {}
        self._sockets = LocalSockets(reactor, self._peers)
        self._status: StatusSocket | None = None
        self._progress = LoopingCall(self._sockets.tell_progress)
        self._progress.clock = reactor
        self._budget = Budget(configuration.memory)
        identity = Identity(configuration.name, os.urandom(16))
        for link in configuration.links:
            self._add_link(link, identity)
        self._any_vm = self._serve_any_vm()
        self._abandoned = AbandonedMoves(reactor, self._sockets, self._peers)

    def startService(self) -> None:
        """
        Make the sockets and start.

        @raise RelaymuxError: a socket cannot be made; what was made is removed.
        """
        try:
            for directory in self._configuration.directories_to_make():
                ensure_directory(str(directory.path), directory.mode, directory.owner)
            for section in self._configuration.services:
                try:
                    self._sockets.serve(section)
                except ConfigurationError as error:
                    key = "" if section.vm else "listen"
                    raise error.within(self._configuration.file, section.section, key) from None
            self._serve_status()
        except RelaymuxError:
            self._sockets.close()
            raise
        if self._any_vm is not None:
            self._any_vm.start()
        vms = (*self._configuration.vms, self._configuration.any_vm)
        if any(vm is not None and vm.leaves for vm in vms):
            self._abandoned.start()
        super().startService()
        for port in self._ports:
            port.start().addErrback(self._cannot_start)
        for dialer in self._dialers:
            dialer.start()
        if self._configuration.progress:
            self._progress.start(self._configuration.progress, now=False)
        # The reactor sets its own handlers when it starts to run.
        self._reactor.callWhenRunning(self._take_signals)

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
        if self._any_vm is not None:
            self._any_vm.stop()
        self._abandoned.stop()
        self._sockets.close()
        drains = [peer.drain(seconds) for peer in self._peers.values()]
        # A link that is lost meanwhile is dialled, or listened for, until the end.
        undelivered = sum([await drain for drain in drains])
        for dialer in self._dialers:
            dialer.stop()
        for port in self._ports:
            await port.stop()
        if self._progress.running:
            self._progress.stop()
        self._sockets.tell_totals()
        self._close_status()
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
        if any(section.name in vm.links for vm in self._configuration.vms):
            peer.expected_daemon = section.name
        transport = find_transport(section.transport)
        settings = section.settings()
        if dialing:
            ways = [(s.address, transport.client(self._reactor, s)) for s in settings]
            self._dialers.append(Dialer(self._reactor, peer, ways))
        else:
            ports = [(s.address, transport.server(self._reactor, s)) for s in settings]
            self._ports.append(LinkPort(peer, ports))
        self._peers[section.name] = peer

    def _serve_status(self) -> None:
        path, began = self._configuration.status, self._reactor.seconds()
        if path is None:
            return

        def describe() -> dict[str, Any]:
            now = self._reactor.seconds()
            return describe_daemon(self._configuration, self._peers, self._sockets, now, began)

        try:
            self._status = StatusSocket(self._reactor, path, describe)
        except ConfigurationError as error:
            raise error.within(self._configuration.file, "relay", "status") from None

    def _close_status(self) -> None:
        status, self._status = self._status, None
        if status is not None:
            status.close()

    def _serve_any_vm(self) -> AnyVm | None:
        configuration = self._configuration
        vm = configuration.any_vm
        if vm is None:
            return None
        own = frozenset(other.name for other in configuration.vms)
        any_vm = AnyVm(self._reactor, self._sockets, vm, configuration.libvirt, own)
        for link in vm.links:
            self._peers[link].finder = partial(any_vm.find, link)
        return any_vm

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
        # Only now: whoever reads it may stop the daemon, and it ends in order.
        self._log.info(
            "relaymux {name} started: {links} links, {services} sockets, from {file}; compiled: {compiled}",
            name=self._configuration.name,
            links=len(self._peers),
            services=len(self._sockets),
            file=self._configuration.file,
            compiled=describe_compiled(),
        )

    def _on_signal(self, number: int, _: object) -> None:
        self._reactor.callFromThread(self._asked_to_stop, signal.Signals(number).name)

    def _asked_to_stop(self, name: str) -> None:
        if self._drain is not None:
            self._log.warn("{name} again: not waiting any longer", name=name)
            self.exit_status = self.exit_status or EXIT_UNDELIVERED
            self._close_status()
            self._stop_reactor()
            return
        self._log.info("{name}", name=name)
        self.drain().addBoth(lambda _: self._stop_reactor())

    def _stop_reactor(self) -> None:
        if self._reactor.running:
            self._reactor.stop()
