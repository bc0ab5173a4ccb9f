"""
Finding transports: what C{transport = NAME} may say.

A transport is a plugin: an object in a module of C{relaymux.plugins} that
provides C{IPlugin} and L{IRelayTransport}.  Every C{twistd} on a host may load
all such modules, so they hold L{LazyTransport}s, which import nothing until a
transport is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from twisted.internet.interfaces import IStreamClientEndpoint, IStreamServerEndpoint
from twisted.plugin import IPlugin, getPlugins
from twisted.python.reflect import namedAny
from zope.interface import implementer

import relaymux.plugins
from relaymux.errors import ConfigurationError
from relaymux.interfaces import IRelayTransport, TransportSettings

__all__ = ["LazyTransport", "find_transport", "transports"]


@implementer(IPlugin, IRelayTransport)
class LazyTransport:
    """Stands for a transport without importing it."""

    def __init__(self, name: str, target: str) -> None:
        """
        @param name: what the transport's own C{name} is.
        @param target: the dotted name of the L{IRelayTransport} provider.
        """
        self.name = name
        self._target = target

    @property
    def keys(self) -> Mapping[str, str]:
        """The transport's own keys, as L{IRelayTransport.keys}."""
        keys: Mapping[str, str] = self._transport().keys
        return keys

    def client(self, reactor: object, settings: TransportSettings) -> IStreamClientEndpoint:
        return self._transport().client(reactor, settings)

    def server(self, reactor: object, settings: TransportSettings) -> IStreamServerEndpoint:
        return self._transport().server(reactor, settings)

    def _transport(self) -> IRelayTransport:
        return IRelayTransport(namedAny(self._target))


def transports() -> dict[str, IRelayTransport]:
    """
    @return: all transports that are installed, by name.
    @raise ConfigurationError: two of them claim the same name.
    """
    found: dict[str, IRelayTransport] = {}
    for transport in getPlugins(IRelayTransport, relaymux.plugins):
        if transport.name in found:
            raise ConfigurationError(
                f"two installed packages provide a transport named {transport.name!r}",
                expected="only one of them in this Python environment; uninstall the other",
            )
        found[transport.name] = transport
    return found


def find_transport(name: str) -> IRelayTransport:
    """@raise ConfigurationError: no transport named C{name} is installed."""
    known = transports()
    if name not in known:
        near = get_close_matches(name, known, 1)
        raise ConfigurationError(
            "no such transport is installed",
            found=name,
            expected=(f"{near[0]!r}, or " if near else "") + "one of " + ", ".join(sorted(known)),
        )
    return known[name]
