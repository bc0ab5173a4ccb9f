"""Socket addresses: as Twisted objects, as configuration text, as words in messages."""

from __future__ import annotations

from functools import lru_cache
from ipaddress import ip_address
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.interfaces import IAddress

from relaymux.errors import ConfigurationError

__all__ = ["address_of", "describe", "parse_host_port"]


def address_of(raw: Any) -> IAddress:
    """@param raw: what the socket module says, as from C{getsockname}: for UNIX sockets no tuple."""
    if not isinstance(raw, tuple):
        return _unix_address(raw or None)
    return IPv4Address("TCP", raw[0], raw[1]) if len(raw) == 2 else IPv6Address("TCP", *raw)


@lru_cache(maxsize=64)
def _unix_address(name: str | bytes | None) -> UNIXAddress:
    """All connections of a listener have the same two: its own, and that of a socket without a name."""
    return UNIXAddress(name)


def describe(address: IAddress) -> str:
    """C{address} as it would be written in a configuration file."""
    if isinstance(address, IPv4Address):
        return f"{address.host}:{address.port}"
    if isinstance(address, IPv6Address):
        return f"[{address.host}]:{address.port}"
    if isinstance(address, UNIXAddress):
        name = address.name
        if not name:
            return "an unnamed UNIX socket"
        return name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name
    return str(address)


def parse_host_port(text: str, *, listening: bool) -> tuple[str, int]:
    """
    Take C{host:port} apart; an IPv6 address stands in square brackets.

    @param listening: whether C{text} is to listen on: then C{*} stands for
        all addresses, port 0 for any free one, and a host must be an address.
    @return: host without brackets (empty for all addresses), and port.
    @raise ConfigurationError: C{text} is something else.
    """
    expected = "HOST:PORT, for example " + ("0.0.0.0:16515" if listening else "hv-b.example:16515")
    host, colon, port_text = text.strip().rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    if not colon or not host or (":" in host and not bracketed):
        raise ConfigurationError(
            "not an address with a port",
            found=text,
            expected=expected + " or [2001:db8::1]:16515",
        )
    port = int(port_text) if port_text.isascii() and port_text.isdigit() else -1
    if not (0 if listening else 1) <= port < 65536:
        raise ConfigurationError("not a port number", found=text, expected=expected)
    if listening and host == "*":
        return "", port
    if listening or bracketed:
        try:
            ip_address(host)
        except ValueError:
            raise ConfigurationError(
                "not an IP address of this host" if listening else "not an IPv6 address",
                found=text,
                expected=expected + (" or *:16515" if listening else " or [2001:db8::1]:16515"),
            ) from None
    return host, port
