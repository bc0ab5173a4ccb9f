"""What a host brings to a TLS connection: its certificate and key, and the authorities it believes."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from OpenSSL import SSL, crypto
from twisted.logger import Logger

from relaymux.errors import ConfigurationError
from relaymux.net.tlskeys import SUITES
from relaymux.net.tlspeer import PeerCheck, PeerName, validity
from relaymux.net.tlsrecords import prepare

__all__ = ["Credentials", "TLSIdentity"]


@dataclass(frozen=True)
class Credentials:
    """
    Whose files, and whom to accept.

    @ivar certificate: PEM: the host's certificate, then any intermediate ones.
    @ivar private_key: PEM, unencrypted, for the daemon's user alone.
    @ivar ca: PEM: the only authorities that are believed.
    @ivar peer: the name the other end must have.
    @ivar own_records: whether to protect records by ourselves where that is possible
        (L{relaymux.net.tlsrecords}); else OpenSSL does.
    """

    certificate: Path
    private_key: Path
    ca: Path
    peer: PeerName
    own_records: bool = True

    def context(self) -> SSL.Context:
        """
        Read the files.

        @return: a context for TLS 1.3 with certificates on both sides; it
            serves both ends.
        @raise ConfigurationError: a file is missing, unreadable or not what
            it should be; names the key.
        """
        chain = _load_certificates(self.certificate, "certificate")
        _check_validity(chain[0], self.certificate)
        key = self._load_key()
        if _public_bytes(key) != _public_bytes(chain[0]):
            raise ConfigurationError(
                f"this is not the key of the certificate in {self.certificate}",
                key="private-key",
                found=str(self.private_key),
                expected="the key that the certificate was issued for",
            )
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.set_max_proto_version(SSL.TLS1_3_VERSION)
        context.set_options(SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_TICKET | SSL.OP_NO_COMPRESSION)
        # Without a cache the tickets that TLS 1.3 still sends resume nothing.
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.set_tls13_ciphersuites(":".join(SUITES).encode("ascii"))
        if self.own_records:
            prepare(context)
        try:
            context.use_certificate(chain[0])
            for intermediate in chain[1:]:
                context.add_extra_chain_cert(intermediate)
            context.use_privatekey(key)
        except SSL.Error as error:
            raise ConfigurationError(
                f"OpenSSL does not accept this certificate or its key: {error}",
                key="certificate",
                found=str(self.certificate),
            ) from error
        store = context.get_cert_store()
        assert store is not None
        for authority in _load_certificates(self.ca, "ca"):
            store.add_cert(crypto.X509.from_cryptography(authority))
        # An intermediate authority may be all that is to be believed.
        store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, _verify)
        return context

    def _load_key(self) -> Any:
        path = self.private_key
        data = _read(path, "private-key")
        mode = stat.S_IMODE(os.stat(path).st_mode)
        if mode & 0o077:
            raise ConfigurationError(
                f"others than its owner may read or change this key (mode {mode:04o})",
                key="private-key",
                found=str(path),
                expected=f"a file for its owner alone: chmod 600 {path}",
            )
        try:
            return load_pem_private_key(data, None)
        except TypeError:
            problem, expected = "this key needs a passphrase", "a key without; nobody is there to type it"
        except (ValueError, UnsupportedAlgorithm) as error:
            problem, expected = f"not a private key: {error}", "a private key in PEM form"
        raise ConfigurationError(problem, key="private-key", found=str(path), expected=expected)


class TLSIdentity:
    """
    L{Credentials} as used by connections: files that were replaced are read again.

    A renewed certificate is used by the next connection, without a restart;
    those that are up keep what they began with.
    """

    _log = Logger()

    def __init__(self, credentials: Credentials) -> None:
        """@raise ConfigurationError: as of L{Credentials.context}."""
        self.credentials = credentials
        self._seen = self._signature()
        self._context = credentials.context()

    def connection(self, *, is_server: bool) -> tuple[SSL.Connection, PeerCheck]:
        """@return: a connection about to shake hands, and the check of its peer."""
        self._refresh()
        credentials = self.credentials
        connection = SSL.Connection(self._context, None)
        check = PeerCheck(credentials.peer, credentials.ca, is_server=is_server)
        connection.set_app_data(check)
        if is_server:
            connection.set_accept_state()
        else:
            connection.set_connect_state()
            if credentials.peer.server_name:
                connection.set_tlsext_host_name(credentials.peer.server_name.encode("ascii"))
        return connection, check

    def _refresh(self) -> None:
        signature = self._signature()
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._context = self.credentials.context()
        except ConfigurationError as error:
            self._log.error("keeping the certificate read before: {error}", error=error)
        else:
            self._log.info("using the certificate newly read from {file}", file=self.credentials.certificate)

    def _signature(self) -> list[object]:
        found: list[object] = []
        for path in (self.credentials.certificate, self.credentials.private_key, self.credentials.ca):
            try:
                s = os.stat(path)
                found.append((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_mode))
            except OSError as error:
                found.append(error.errno)
        return found


def _verify(connection: SSL.Connection, certificate: crypto.X509, error: int, depth: int, _ok: int) -> bool:
    check: PeerCheck = connection.get_app_data()
    return check.verify(certificate.to_cryptography(), error, depth)


def _read(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"cannot read this file: {error.strerror}",
            key=key,
            found=str(path),
            expected="a file in PEM form that the daemon's user may read",
        ) from error


def _load_certificates(path: Path, key: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_read(path, key))
    except ValueError as error:
        raise ConfigurationError(
            f"no certificates can be read from this file: {error}",
            key=key,
            found=str(path),
            expected="one or more certificates in PEM form",
        ) from error


def _check_validity(certificate: x509.Certificate, path: Path) -> None:
    now = datetime.now(timezone.utc)
    if now > certificate.not_valid_after_utc:
        problem, cure = "this certificate has expired", "one that is valid; renew it"
    elif now < certificate.not_valid_before_utc:
        problem, cure = "this certificate is not valid yet", "one that is valid; is the clock right?"
    else:
        return
    raise ConfigurationError(
        f"{problem}: {validity(certificate)}", key="certificate", found=str(path), expected=cure
    )


def _public_bytes(holder: Any) -> bytes:
    """@param holder: a private key or a certificate."""
    encoded: bytes = holder.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return encoded
