"""
C{twistd relaymux}: the command line and the service that twistd runs.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import time
from typing import Any

from twisted.application.service import IService
from twisted.python import usage

from relaymux.errors import RelaymuxError
from relaymux.net.reactor import install as install_reactor
from relaymux.service.config import check_configuration, load_configuration
from relaymux.service.daemon import RelayService

__all__ = ["Options", "makeService"]


class Options(usage.Options):
    """What may follow C{twistd relaymux}."""

    longdesc = "Carry the streams of live migrations to another host through one connection."
    optParameters = [
        ["config", "c", None, "The configuration file (see docs/configuration.md); required."],
    ]

    def postOptions(self) -> None:
        """@raise usage.UsageError: no file was named."""
        if self["config"] is None:
            raise usage.UsageError("--config FILE is required; etc/relay.ini is an example")


class _StartingService(RelayService):
    """Ends the process with one sentence, not with a stack, if it cannot start."""

    def startService(self) -> None:
        try:
            super().startService()
        except RelaymuxError as error:
            self._log.critical("cannot start: {error}", error=error)
            raise SystemExit(f"relaymux: {error}") from None


def makeService(options: Options) -> IService:
    """@return: the daemon, not started.  Ends the process if the configuration is wrong."""
    install_reactor()
    from twisted.internet import reactor

    clock: Any = reactor
    # Twisted's timers follow the wall clock, and a clock that is set must not
    # kill a link.  Before the first timer, hence here.
    clock.seconds = time.monotonic
    try:
        configuration = load_configuration(options["config"])
        for problem in check_configuration(configuration, reactor):
            raise problem
        service = _StartingService(reactor, configuration)
    except RelaymuxError as error:
        raise SystemExit(f"relaymux: {error}") from None
    atexit.register(_exit_with, service)
    # Not when it begins to run: before the service has its signal handlers a SIGTERM kills.
    clock.callLater(0, _spare_the_collector)
    return service


def _spare_the_collector() -> None:
    """
    Take what is there now, and stays, out of the garbage collector's sight.

    Connections that come and go make it look through everything again and again: some
    50,000 objects, mostly code, in which there is nothing to find.  That takes 10 ms each
    time, during which nobody's bytes move.
    """
    gc.collect()
    gc.freeze()


def _exit_with(service: RelayService) -> None:
    """twistd returns 0 from whatever stopped the reactor; say what the service has to say."""
    # Python would take its handlers away next, and a signal that comes late kill a daemon that has
    # said already how it ended.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if service.exit_status:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(service.exit_status)
