"""
The traffic keys of TLS 1.3 connections: from OpenSSL's handshake to what protects records.

OpenSSL tells the traffic secrets of a connection to whoever asks for a key log
(C{SSL_CTX_set_keylog_callback}).  Here nothing is logged: the two secrets of a
connection's data are kept until whoever protects its records fetches them, or the
connection is gone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, HashAlgorithm
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from OpenSSL import SSL

__all__ = ["SUITES", "Suite", "TrafficSecret", "keep_secrets", "take_secrets"]

#: Bytes of a nonce (RFC 8446, 5.3).
_NONCE = 12

_CLIENT, _SERVER = b"CLIENT_TRAFFIC_SECRET_0", b"SERVER_TRAFFIC_SECRET_0"

_secrets: WeakKeyDictionary[SSL.Connection, dict[bytes, bytes]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Suite:
    """
    A cipher suite of TLS 1.3.

    @ivar cipher: the class of what encrypts and decrypts, made with a key.
    @ivar key_bytes: length of that.
    @ivar hash: what keys are derived with.
    """

    cipher: Callable[[bytes], Any]
    key_bytes: int
    hash: HashAlgorithm


#: By the names that OpenSSL gives them; the best one first.  AES-128: a seventh less CPU time per
#: byte than AES-256, which OpenSSL would put first, and its strength is not what an attacker would
#: go for.
SUITES = {
    "TLS_AES_128_GCM_SHA256": Suite(AESGCM, 16, SHA256()),
    "TLS_AES_256_GCM_SHA384": Suite(AESGCM, 32, SHA384()),
    "TLS_CHACHA20_POLY1305_SHA256": Suite(ChaCha20Poly1305, 32, SHA256()),
}


@dataclass(frozen=True)
class TrafficSecret:
    """What the keys of one direction come from, until they are updated."""

    suite: Suite
    secret: bytes = field(repr=False)

    def cipher(self) -> Any:
        """@return: what encrypts and decrypts this direction's records."""
        return self.suite.cipher(self._expand(self.secret, b"key", self.suite.key_bytes))

    def iv(self) -> bytes:
        """@return: what makes a nonce of a record's number."""
        return self._expand(self.secret, b"iv", _NONCE)

    def updated(self) -> TrafficSecret:
        """@return: the one after a KeyUpdate (RFC 8446, 7.2)."""
        secret = self._expand(self.secret, b"traffic upd", self.suite.hash.digest_size)
        return TrafficSecret(self.suite, secret)

    def _expand(self, secret: bytes, label: bytes, length: int) -> bytes:
        """HKDF-Expand-Label without a context (RFC 8446, 7.1)."""
        full = b"tls13 " + label
        info = length.to_bytes(2, "big") + bytes([len(full)]) + full + b"\0"
        return HKDFExpand(self.suite.hash, length, info).derive(secret)


def keep_secrets(context: SSL.Context) -> None:
    """Have the secrets of C{context}'s connections kept for L{take_secrets}."""
    context.set_keylog_callback(_keep)


def _keep(connection: SSL.Connection, line: bytes) -> None:
    label, _, rest = line.partition(b" ")
    if label in (_CLIENT, _SERVER):
        _secrets.setdefault(connection, {})[label] = bytes.fromhex(rest.split()[-1].decode("ascii"))


def take_secrets(connection: SSL.Connection) -> tuple[TrafficSecret, TrafficSecret] | None:
    """
    Fetch the secrets of a connection that has just shaken hands; they are not kept any longer.

    @return: what the client's data and what the server's data is protected with;
        L{None} if they are not known.
    """
    found = _secrets.pop(connection, {})
    suite = SUITES.get(connection.get_cipher_name() or "")
    if suite is None or connection.get_protocol_version() != SSL.TLS1_3_VERSION or len(found) < 2:
        return None
    return TrafficSecret(suite, found[_CLIENT]), TrafficSecret(suite, found[_SERVER])
