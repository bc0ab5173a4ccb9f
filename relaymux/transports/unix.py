"""
Links over a UNIX socket: two daemons on one host, or a tunnel of one's own between them.

Who may connect is decided by the permissions of the socket; who did is told
by the kernel, as the peer's user id.
"""

from __future__ import annotations

import grp
import pwd
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from twisted.internet.address import UNIXAddress
from twisted.internet.interfaces import (
    IListeningPort,
    IProtocolFactory,
    IStreamClientEndpoint,
    IStreamServerEndpoint,
)
from zope.interface import implementer

from relaymux.errors import ConfigurationError, TransportError
from relaymux.interfaces import IRelayTransport, TransportSettings
from relaymux.net.buffers import pool_for
from relaymux.net.connect import connect_unix
from relaymux.net.disks import MAX_PATH_BYTES, bind_unix
from relaymux.net.listen import listen_on
from relaymux.transports.endpoints import CONNECT_SECONDS, FLUSH_SECONDS, ClientEndpoint, ServerEndpoint

__all__ = ["transport"]


@implementer(IRelayTransport)
class UNIX:
    """C{transport = unix}"""

    name = "unix"
    keys: Mapping[str, str] = {
        "mode": "with listen: permission bits of the socket, octal (0600)",
        "owner": "with listen: the user the socket belongs to, by name or number",
        "group": "with listen: the group the socket belongs to, by name or number",
    }

    def client(self, reactor: Any, settings: TransportSettings) -> IStreamClientEndpoint:
        path = _path(settings, "connect")
        for key in self.keys:
            if key in settings.options:
                raise ConfigurationError(
                    "only a socket that is made here has permissions to set",
                    key=key,
                    found=settings.options[key],
                    expected="this key beside listen, or not at all",
                )
        return ClientEndpoint(
            lambda factory: connect_unix(
                reactor, path, factory, CONNECT_SECONDS, pool_for(reactor), FLUSH_SECONDS
            )
        )

    def server(self, reactor: Any, settings: TransportSettings) -> IStreamServerEndpoint:
        path = _path(settings, "listen")
        mode = _mode(settings)
        owner = _id(settings, "owner", lambda name: pwd.getpwnam(name).pw_uid)
        group = _id(settings, "group", lambda name: grp.getgrnam(name).gr_gid)
        return ServerEndpoint(partial(self._listen, reactor, path, mode, owner, group))

    def _listen(
        self,
        reactor: Any,
        path: str,
        mode: int,
        owner: int | None,
        group: int | None,
        factory: IProtocolFactory,
    ) -> IListeningPort:
        try:
            bound = bind_unix(path, mode=mode, owner=owner, group=group)
        except ConfigurationError as error:
            raise TransportError(str(error), retry=False) from error
        return listen_on(
            reactor,
            bound.socket,
            factory,
            pool_for(reactor),
            flush_seconds=FLUSH_SECONDS,
            address=UNIXAddress(path),
            closed=bound.remove,
        )


def _path(settings: TransportSettings, key: str) -> str:
    path = str(settings.directory / settings.address)
    size = len(path.encode("utf-8", "surrogateescape"))
    if size > MAX_PATH_BYTES:
        raise ConfigurationError(
            f"the path has {size} bytes",
            key=key,
            found=path,
            expected=f"at most {MAX_PATH_BYTES}, which is the kernel's limit for UNIX sockets",
        )
    return path


def _mode(settings: TransportSettings) -> int:
    text = settings.options.get("mode", "0600")
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise ConfigurationError(
            "not permission bits", key="mode", found=text, expected="an octal number such as 0660"
        )
    return mode


def _id(settings: TransportSettings, key: str, look_up: Callable[[str], int]) -> int | None:
    text = settings.options.get(key)
    if text is None:
        return None
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        return look_up(text)
    except KeyError:
        raise ConfigurationError(
            f"no such {'user' if key == 'owner' else 'group'} on this host",
            key=key,
            found=text,
            expected="a name that exists, or a number",
        ) from None


transport = UNIX()
