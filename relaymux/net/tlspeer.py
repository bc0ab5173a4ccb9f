"""
Who the other end of a TLS connection must be, checked while the handshake runs.

The check happens in OpenSSL's verification of the chain, at the peer's own
certificate, so a peer that is not the one expected is refused by an alert and
never sees a byte, and nobody who asks later can forget to ask.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from service_identity.cryptography import extract_patterns
from service_identity.exceptions import CertificateError, VerificationError
from service_identity.hazmat import DNS_ID, IPAddress_ID, ServiceID, verify_service_identity

from relaymux.errors import ConfigurationError

__all__ = ["PeerCheck", "PeerName", "names_of", "validity"]

# OpenSSL's X509_V_ERR_* that an operator can do something about.
_NOT_YET_VALID = 9
_EXPIRED = 10
_WRONG_ISSUER = {2, 18, 19, 20, 21, 27, 29, 30, 31}
_BAD_SIGNATURE = {4, 6, 7}
_NO_AUTHORITY = {25, 32, 79}
_WRONG_PURPOSE = 26
_REVOKED = 23


def names_of(certificate: x509.Certificate) -> list[str]:
    """@return: the subject alternative names that count, as C{"dns:..."} and C{"ip:..."}."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [f"dns:{name.lower()}" for name in names.get_values_for_type(x509.DNSName)] + [
        f"ip:{address}" for address in names.get_values_for_type(x509.IPAddress)
    ]


class PeerName:
    """
    The certificate name a peer must have: a DNS name or an IP address.

    @ivar identity: C{"dns:NAME"} or C{"ip:ADDRESS"}.
    @ivar server_name: what to ask the server for; empty for an address.
    """

    def __init__(self, text: str) -> None:
        """@raise ConfigurationError: C{text} is neither."""
        self._address: IPv4Address | IPv6Address | None = None
        self.server_name = ""
        try:
            self._address = ip_address(text)
            self.identity = f"ip:{self._address}"
        except ValueError:
            self.server_name = _ascii_name(text)
            self.identity = f"dns:{self.server_name}"

    def matches_exactly(self, certificate: x509.Certificate) -> bool:
        """Whether one of the names is this one, letter for letter: no wildcards."""
        return self.identity in names_of(certificate)

    def matches_service(self, certificate: x509.Certificate) -> bool:
        """Whether C{certificate} is valid for a server of this name (RFC 9525)."""
        wanted: ServiceID = IPAddress_ID(str(self._address)) if self._address else DNS_ID(self.server_name)
        try:
            verify_service_identity(extract_patterns(certificate), [wanted], [])
        except (VerificationError, CertificateError):
            return False
        return True


def _ascii_name(text: str) -> str:
    try:
        name = text.encode("idna").decode("ascii").lower().rstrip(".")
        DNS_ID(name)
    except (UnicodeError, ValueError):
        raise ConfigurationError(
            "not a name that a certificate can have",
            key="peer",
            found=text,
            expected="the DNS name or IP address in the peer's certificate, for example hv-b.example",
        ) from None
    return name


class PeerCheck:
    """
    The verification of one handshake.

    @ivar passed: whether the peer's own certificate was found good.
    @ivar problem: what was wrong with a certificate, as a sentence.
    """

    def __init__(self, peer: PeerName, ca: Path, *, is_server: bool) -> None:
        """
        @param ca: the file of the authorities, for messages.
        @param is_server: which end we are.
        """
        self.passed = False
        self.problem = ""
        self._peer = peer
        self._ca = ca
        self._is_server = is_server

    def verify(self, certificate: x509.Certificate, error: int, depth: int) -> bool:
        """
        Called for each certificate of the chain, from the authority's down.

        @param error: OpenSSL's finding, 0 if none.
        @param depth: 0 for the peer's own.
        @return: whether to go on.
        """
        if error:
            self.problem = self._explain(certificate, error, depth)
        elif depth == 0:
            self.problem = self._identity_problem(certificate)
            self.passed = not self.problem
        return not self.problem

    def _identity_problem(self, certificate: x509.Certificate) -> str:
        peer = self._peer
        if not (peer.matches_exactly if self._is_server else peer.matches_service)(certificate):
            names = ", ".join(names_of(certificate)) or "no name at all"
            return (
                f"the peer's certificate is for {names}, but 'peer' wants {peer.identity};"
                " connect to the right host, or correct 'peer'"
            )
        # OpenSSL takes a certificate without this extension as good for everything.
        if self._is_server and not _may_be_client(certificate):
            return (
                "the peer's certificate is not meant for clients: its extended key usage must be there"
                " and include clientAuth"
            )
        return ""

    def _explain(self, certificate: x509.Certificate, error: int, depth: int) -> str:
        whose = "the peer's certificate" if depth == 0 else "a certificate in the peer's chain"
        what = f"{whose} ({certificate.subject.rfc4514_string() or 'without a subject'})"
        valid = validity(certificate)
        simple: Mapping[int, str] = {
            _EXPIRED: f"{what} has expired: {valid}; renew it",
            _NOT_YET_VALID: f"{what} is not valid yet: {valid}; compare the clocks of both hosts",
            _WRONG_PURPOSE: (
                f"{what} is not meant for {'clients' if self._is_server else 'servers'}:"
                " see its extended key usage"
            ),
            _REVOKED: f"{what} was revoked",
        }
        if error in simple:
            return simple[error]
        if error in _WRONG_ISSUER:
            issuer = certificate.issuer.rfc4514_string() or "nobody named"
            return f"{what} was not issued by an authority in {self._ca}: its issuer is {issuer}"
        if error in _BAD_SIGNATURE:
            return f"{what} has a wrong signature: another authority of the same name as one in {self._ca}"
        if error in _NO_AUTHORITY:
            return f"{what} may not issue certificates"
        return f"{what} is not acceptable: OpenSSL's verification error {error}"


def validity(certificate: x509.Certificate) -> str:
    """@return: for messages: when C{certificate} is valid, and what time it is now."""
    begins, ends, now = (
        moment.strftime("%Y-%m-%d %H:%M")
        for moment in (
            certificate.not_valid_before_utc,
            certificate.not_valid_after_utc,
            datetime.now(timezone.utc),
        )
    )
    return f"it is valid from {begins} to {ends} UTC, and now it is {now} UTC"


def _may_be_client(certificate: x509.Certificate) -> bool:
    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return ExtendedKeyUsageOID.CLIENT_AUTH in usage
