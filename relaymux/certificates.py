"""
A certificate authority and host certificates, for trying out and for small sites.

L{make_certificates} is what C{relaymux make-certificates} runs.  It keeps the
authority's private key, unencrypted, beside the certificates it signs, it
cannot revoke, and it does not renew: enough for a test bench and for a
handful of hosts that one person looks after.  In production, let the PKI you
already have issue them (step-ca, Vault, FreeIPA, a corporate CA): relaymux
asks of a host certificate only that it names the host in a subject
alternative name, allows both server and client authentication, and is signed
by the CA in the configuration.  Give relaymux a CA that signs nothing else.

L{Authority} and L{Credentials} are the pieces, with every field settable, so
that tests can also make the certificates that must be refused.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from relaymux.errors import ConfigurationError

__all__ = ["CLIENT_AUTH", "SERVER_AUTH", "Authority", "Credentials", "make_certificates"]

SERVER_AUTH = ExtendedKeyUsageOID.SERVER_AUTH
CLIENT_AUTH = ExtendedKeyUsageOID.CLIENT_AUTH

#: Ten years: a CA outlives the hosts it was made for.
AUTHORITY_LIFETIME = timedelta(days=3650)

#: What most TLS stacks once capped a host certificate at, a little over two years.
HOST_LIFETIME = timedelta(days=825)

#: How far two hosts' clocks may disagree on the day a certificate is made.
CLOCK_SKEW = timedelta(hours=1)

#: X.520's upper bound of a common name, in characters.
_MAX_COMMON_NAME = 64

_LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")


def make_certificates(directory: Path, names: Sequence[str]) -> list[Path]:
    """
    Make C{NAME.pem} and C{NAME.key} in C{directory} for each of C{names},
    signed by the authority in C{ca.pem} and C{ca.key} there.

    The directory and the authority are made when missing; an authority that is
    there is used again, so that more hosts can be added later.  Every check is
    made before the first file is written, and no file is ever overwritten.
    Only C{ca.pem}, C{NAME.pem} and C{NAME.key} belong on host NAME; C{ca.key}
    should stay where it was made.

    @param names: host names (C{"hv-a.example"}) or IP addresses
        (C{"192.0.2.1"}, C{"2001:db8::1"}), as the peer's C{peer =} will say
        them.  Host names are put in lower case, addresses in their short form.
    @return: the files written, in order; the authority's only when it is new.
    @raise ConfigurationError: a name is not one or comes twice, a file is
        there already, or the directory or the authority cannot be used.
    """
    wanted = [_check_name(name) for name in names]
    for name in wanted:
        if wanted.count(name) > 1:
            raise ConfigurationError("the name is given twice", found=name, expected="each name once")
    for path in (directory / f"{name}.{suffix}" for name in wanted for suffix in ("key", "pem")):
        if os.path.lexists(path):
            raise _exists(path)
    authority_files = (directory / "ca.pem", directory / "ca.key")
    written: list[Path] = []
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(os.path.lexists(path) for path in authority_files):
            authority = Authority.load(*authority_files)
        else:
            authority = Authority.create()
            written += authority.credentials.save(directory, "ca")
        for name in wanted:
            written += authority.issue(name).save(directory, name)
    except OSError as e:
        raise ConfigurationError(
            f"cannot make certificates: {e.strerror}",
            file=str(e.filename or directory),
            expected="a directory in which this user can create files",
        ) from e
    return written


@dataclass(frozen=True)
class Credentials:
    """A certificate and the private key that belongs to it."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        """The certificate alone, without its issuer's."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The key as unencrypted PKCS #8."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )

    def __repr__(self) -> str:
        return f"<Credentials for {self.certificate.subject.rfc4514_string()!r}>"

    def save(self, directory: Path, name: str) -> tuple[Path, Path]:
        """
        Write C{NAME.pem} (mode 0644) and C{NAME.key} (mode 0600).

        @return: the two, in this order.
        @raise ConfigurationError: one of them is there already; it is left alone.
        @raise OSError: C{directory} is missing or not writable.
        """
        certificate_file, key_file = directory / f"{name}.pem", directory / f"{name}.key"
        _write_new(key_file, self.key_pem, 0o600)
        _write_new(certificate_file, self.certificate_pem, 0o644)
        return certificate_file, key_file


@dataclass(frozen=True)
class Authority:
    """A certificate authority of one level: it signs hosts, no further authorities."""

    credentials: Credentials

    @classmethod
    def create(cls, common_name: str = "") -> Authority:
        """
        Make a new authority, valid from an hour ago for ten years.

        @param common_name: its name; by default one that no other authority
            has, so that messages tell two of them apart.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _subject(common_name or f"relaymux CA {secrets.token_hex(4)}")
        not_before = _now() - CLOCK_SKEW
        builder = (
            _builder(subject, subject, key.public_key(), key.public_key())
            .not_valid_before(not_before)
            .not_valid_after(not_before + AUTHORITY_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        )
        return cls(Credentials(builder.sign(key, hashes.SHA256()), key))

    @classmethod
    def load(cls, certificate_file: Path, key_file: Path) -> Authority:
        """
        Read an authority that L{Credentials.save} wrote.

        @raise ConfigurationError: the two are not a usable authority; names
            the file.
        @raise OSError: a file that is there cannot be read.
        """
        for path, other in ((certificate_file, key_file), (key_file, certificate_file)):
            if not path.exists():
                raise ConfigurationError(
                    f"the authority is incomplete: {other.name} is there without {path.name}",
                    file=str(path),
                    expected="both files, from the place where the authority was made, or neither",
                )
        try:
            certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
            is_authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension) as e:
            raise _unusable(certificate_file, "a PEM certificate of an authority") from e
        try:
            key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
        except (ValueError, TypeError) as e:
            raise _unusable(key_file, "an unencrypted private key in PEM form") from e
        if not is_authority:
            raise _unusable(certificate_file, "a certificate that may sign others (CA:TRUE)")
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise _unusable(key_file, f"the elliptic curve key that belongs to {certificate_file.name}")
        end = certificate.not_valid_after_utc
        if end <= _now():
            raise _unusable(certificate_file, f"one that has not expired; this one did on {end:%Y-%m-%d}")
        return cls(Credentials(certificate, key))

    @property
    def certificate_pem(self) -> bytes:
        """What hosts trust: the content of C{ca.pem}."""
        return self.credentials.certificate_pem

    def issue(
        self,
        common_name: str,
        names: Sequence[str] | None = None,
        *,
        usages: Sequence[x509.ObjectIdentifier] | None = (SERVER_AUTH, CLIENT_AUTH),
        not_before: datetime | None = None,
        not_after: datetime | None = None,
    ) -> Credentials:
        """
        Make a key and a certificate for it.  Nothing is checked: a test may ask
        for a certificate that must be refused.

        @param common_name: the subject's name, for people; never matched
            against.  Left out of the certificate when longer than 64 characters.
        @param names: the subject alternative names, each an IP address if it
            reads as one, else a host name; by default the common name; empty
            for a certificate without any.
        @param usages: the extended key usages; L{None} for a certificate without
            that extension.
        @param not_before: aware; an hour ago by default.
        @param not_after: aware; 825 days later by default, or when the
            authority expires if that is earlier.
        """
        issuer = self.credentials.certificate
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _subject(common_name)
        start = not_before or _now() - CLOCK_SKEW
        end = not_after or min(start + HOST_LIFETIME, issuer.not_valid_after_utc)
        builder = (
            _builder(subject, issuer.subject, key.public_key(), self.credentials.key.public_key())
            .not_valid_before(start)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(digital_signature=True), critical=True)
        )
        alternatives = [_general_name(name) for name in ((common_name,) if names is None else names)]
        if alternatives:
            # RFC 5280 4.2.1.6: critical when the subject is empty.
            critical = not list(subject)
            builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=critical)
        if usages is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        return Credentials(builder.sign(self.credentials.key, hashes.SHA256()), key)


def _now() -> datetime:
    """The time, to the second: certificates know no fractions."""
    return datetime.now(timezone.utc).replace(microsecond=0)


def _check_name(name: str) -> str:
    """@return: C{name} in the one form it is written in.  @raise ConfigurationError: it is no name."""
    lowered = name.lower()
    labels = lowered.split(".")
    problem = ""
    try:
        address = str(ipaddress.ip_address(lowered))
    except ValueError:
        address = ""
    if "%" in address:
        problem = "an address with a scope means something else on every host"
    elif address:
        return address
    elif not all(_LABEL.fullmatch(label) for label in labels) or len(lowered) > 253:
        problem = "not a host name or an IP address"
    elif labels[-1].isdigit():
        problem = "neither an IP address nor, as it ends in a number, a host name"
    elif lowered == "ca":
        problem = "the name is taken by the authority's own files"
    if problem:
        raise ConfigurationError(problem, found=name, expected="such as 'hv-a.example' or '192.0.2.1'")
    return lowered


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _subject(common_name: str) -> x509.Name:
    if len(common_name) > _MAX_COMMON_NAME:
        return x509.Name([])
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write_new(path: Path, content: bytes, mode: int) -> None:
    """Make C{path} appear whole and with its mode, or raise L{ConfigurationError} if it is there."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.link(temporary, path)  # unlike a rename, never replaces
    except FileExistsError:
        raise _exists(path) from None
    finally:
        os.unlink(temporary)


def _exists(path: Path) -> ConfigurationError:
    return ConfigurationError(
        "the file is there already and is not overwritten",
        file=str(path),
        expected="a name that is new here; to renew one, first move its .pem and .key away",
    )


def _unusable(path: Path, expected: str) -> ConfigurationError:
    return ConfigurationError("not usable as the authority", file=str(path), expected=expected)
