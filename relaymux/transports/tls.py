"""
Links over TLS 1.3, with certificates on both sides.

Only the authorities in C{ca} are believed, never the system's; and of those
whom they certify, only the one named C{peer}.  Both ends check: the dialing
one as for any TLS server, the listening one by the exact name.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from twisted.internet.interfaces import IStreamClientEndpoint, IStreamServerEndpoint
from zope.interface import implementer

from relaymux.errors import ConfigurationError
from relaymux.interfaces import IRelayTransport, TransportSettings
from relaymux.net.tlsconnect import connect_tls, listen_tls
from relaymux.net.tlscontext import Credentials, TLSIdentity
from relaymux.net.tlspeer import PeerName
from relaymux.transports.endpoints import CONNECT_SECONDS, FLUSH_SECONDS, ClientEndpoint, ServerEndpoint
from relaymux.transports.tcp import host_and_port

__all__ = ["transport"]


@implementer(IRelayTransport)
class TLS:
    """C{transport = tls}"""

    name = "tls"
    keys: Mapping[str, str] = {
        "certificate": "PEM file: this host's certificate, then any intermediate ones",
        "private-key": "PEM file: the key of the certificate; readable by the daemon's user only",
        "ca": "PEM file: the only authorities whose certificates are accepted",
        "peer": "the DNS name or IP address that must be in the peer's certificate",
        "tls-records": "who protects what is sent: relaymux, for less CPU per byte, or openssl",
    }

    def client(self, reactor: Any, settings: TransportSettings) -> IStreamClientEndpoint:
        host, port = host_and_port(settings, listening=False)
        identity = self._identity(settings)
        return ClientEndpoint(
            lambda factory: connect_tls(
                reactor, host, port, factory, identity, CONNECT_SECONDS, FLUSH_SECONDS
            )
        )

    def server(self, reactor: Any, settings: TransportSettings) -> IStreamServerEndpoint:
        host, port = host_and_port(settings, listening=True)
        identity = self._identity(settings)
        return ServerEndpoint(partial(listen_tls, reactor, host, port, identity, FLUSH_SECONDS))

    def _identity(self, settings: TransportSettings) -> TLSIdentity:
        for key, meaning in self.keys.items():
            if key != "tls-records" and not settings.options.get(key):
                raise ConfigurationError("this key is missing", key=key, expected=meaning)
        records = settings.options.get("tls-records", "relaymux")
        if records not in ("relaymux", "openssl"):
            raise ConfigurationError(
                "nobody of this name protects records",
                key="tls-records",
                found=records,
                expected="relaymux or openssl",
            )
        return TLSIdentity(
            Credentials(
                certificate=settings.path("certificate"),
                private_key=settings.path("private-key"),
                ca=settings.path("ca"),
                peer=PeerName(settings.options["peer"]),
                own_records=records == "relaymux",
            )
        )


transport = TLS()
