"""Relaymux's own suite, run for this transport: C{python -m twisted.trial relaymux_loop.conformance}."""

from __future__ import annotations

from typing import Any

from twisted.internet.interfaces import IListeningPort
from twisted.trial.unittest import TestCase

from relaymux.interfaces import TransportSettings
from relaymux.testing.conformance import BufferConformance, TransportConformance
from relaymux.transports.registry import find_transport


class LoopTests(TransportConformance, TestCase):
    """C{transport = loop}"""

    transport = find_transport("loop")

    def server_settings(self) -> TransportSettings:
        return TransportSettings("0")

    def client_settings(self, port: IListeningPort) -> TransportSettings:
        address: Any = port.getHost()
        return TransportSettings(str(address.port))

    def unreachable_settings(self) -> TransportSettings:
        return TransportSettings("1")


class LoopBufferTests(BufferConformance, LoopTests):
    """The same with a protocol that would rather have buffers."""
