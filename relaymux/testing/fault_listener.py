"""The fault proxy's addresses: a listening socket that can go away and come back, and dialling the target."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any, Final

from twisted.internet.defer import Deferred, maybeDeferred, succeed
from twisted.internet.endpoints import HostnameEndpoint, UNIXClientEndpoint, connectProtocol
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IProtocol
from twisted.internet.protocol import Factory

from relaymux.errors import TransportError
from relaymux.net.addresses import parse_host_port

__all__ = ["Listener", "cannot_listen", "dial", "parse_address"]

#: Seconds until an attempt to reach the target is given up.
_DIAL_SECONDS: Final = 10.0

#: Seconds between attempts to listen again where something else has the address.
_RETRY_SECONDS: Final = 0.2


def parse_address(text: str, *, listening: bool) -> str | tuple[str, int]:
    """
    @return: the path of a UNIX socket, which is what has a slash in it; else host and port.
    @raise ConfigurationError: it is neither.
    """
    return text if "/" in text else parse_host_port(text, listening=listening)


def dial(reactor: Any, address: str | tuple[str, int], protocol: IProtocol) -> Deferred[Any]:
    """Connect C{protocol} to what L{parse_address} gave."""
    endpoint = (
        UNIXClientEndpoint(reactor, address, _DIAL_SECONDS)
        if isinstance(address, str)
        else HostnameEndpoint(reactor, *address, _DIAL_SECONDS)
    )
    connecting: Deferred[Any] = connectProtocol(endpoint, protocol)
    return connecting


class Listener:
    """
    A TCP or UNIX socket to listen on, closed and opened again at will.

    A TCP port stays reserved while it is closed: a second socket is bound to it
    which never listens, so that the kernel refuses connections but gives the
    number to nobody else.

    @ivar name: where it listens, as it would be written; with the real port once opened.
    """

    def __init__(self, reactor: Any, listen: str, factory: Factory, trouble: Callable[[str], object]) -> None:
        """
        @param trouble: called with words when the address cannot be had again.
        @raise ConfigurationError: C{listen} is no address.
        """
        self.name = listen
        self._reactor = reactor
        self._address = parse_address(listen, listening=True)
        self._factory = factory
        self._trouble = trouble
        self._reserved: socket.socket | None = None
        self._port: Any = None
        self._closing: Deferred[Any] = succeed(None)
        self._retry: Any = None
        self._wanted = False

    def start(self) -> None:
        """
        Open it for the first time.

        @raise TransportError: it cannot be had.
        """
        try:
            if not isinstance(self._address, str):
                self._address = self._reserve(*self._address)
            self._open()
        except (OSError, CannotListenError) as error:
            self.stop()
            raise TransportError(cannot_listen(self.name, error)) from error
        self._wanted = True

    def _reserve(self, host: str, port: int) -> tuple[str, int]:
        is_ipv6 = ":" in host
        self._reserved = socket.socket(socket.AF_INET6 if is_ipv6 else socket.AF_INET)
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reserved.bind((host, port))
        port = self._reserved.getsockname()[1]
        self.name = f"[{host}]:{port}" if is_ipv6 else f"{host or '*'}:{port}"
        return host, port

    def _open(self) -> None:
        if isinstance(self._address, str):
            self._port = self._reactor.listenUNIX(self._address, self._factory, mode=0o600)
        else:
            host, port = self._address
            self._port = self._reactor.listenTCP(port, self._factory, interface=host)

    def open(self) -> None:
        """Listen again, as soon as the closing is done."""
        self._wanted = True
        if self._retry is None:
            self._closing.addCallback(lambda _: self._reopen())

    def close(self) -> None:
        """Let the kernel refuse connections; a UNIX socket's path disappears."""
        self._wanted = False
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._port is not None:
            port, self._port = self._port, None
            self._closing = maybeDeferred(port.stopListening)

    def _reopen(self) -> None:
        self._retry = None
        if not self._wanted or self._port is not None:
            return
        try:
            self._open()
        except CannotListenError as error:
            self._trouble(f"{cannot_listen(self.name, error)}; trying again every {_RETRY_SECONDS:g} s")
            self._retry = self._reactor.callLater(_RETRY_SECONDS, self._reopen)

    def stop(self) -> Deferred[Any]:
        """Close it for good.  @return: fires when that is done."""
        self.close()
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None
        return self._closing


def cannot_listen(name: str, error: OSError | CannotListenError) -> str:
    cause = error.socketError if isinstance(error, CannotListenError) else error
    why = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else str(cause)
    hint = "; remove the file if nothing listens there" if "/" in name else ""
    return f"cannot listen on {name}: {why}{hint}"
