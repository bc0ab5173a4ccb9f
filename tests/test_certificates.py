"""Certificates for trying out: what is in them, what is written, what is refused."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shutil
import stat
import tempfile
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from OpenSSL import SSL, crypto
from twisted.trial.unittest import SynchronousTestCase

from relaymux.certificates import SERVER_AUTH, Authority, Credentials, make_certificates
from relaymux.errors import ConfigurationError


def mode(path: Path) -> int:
    """@return: the permission bits of C{path} itself."""
    return stat.S_IMODE(path.lstat().st_mode)


def handshake(server: Credentials, client: Credentials, trusted: Authority) -> None:
    """
    Let two OpenSSL ends in memory authenticate each other, TLS 1.3, both
    trusting C{trusted} only.

    @raise SSL.Error: one of them refused the other's certificate.
    """
    ends = []
    for credentials, start in ((client, "set_connect_state"), (server, "set_accept_state")):
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.use_certificate(credentials.certificate)
        context.use_privatekey(credentials.key)
        store = context.get_cert_store()
        assert store is not None
        store.add_cert(crypto.X509.from_cryptography(trusted.credentials.certificate))
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
        connection = SSL.Connection(context, None)
        getattr(connection, start)()
        ends.append(connection)
    for _ in range(4):
        for here, there in ((ends[0], ends[1]), (ends[1], ends[0])):
            with contextlib.suppress(SSL.WantReadError):
                here.do_handshake()
            with contextlib.suppress(SSL.WantReadError):
                there.bio_write(here.bio_read(1 << 16))


class WithDirectory(SynchronousTestCase):
    """Gives each test a directory of its own."""

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rmx"))
        self.addCleanup(shutil.rmtree, self.directory)

    def assert_refused(self, *words: str, names: tuple[str, ...] = ("hv-a",)) -> None:
        """Making certificates for C{names} must fail with all of C{words}, and write nothing."""
        before = self.content()
        with self.assertRaises(ConfigurationError) as caught:
            make_certificates(self.directory, names)
        for word in words:
            self.assertIn(word, str(caught.exception))
        self.assertEqual(self.content(), before)

    def content(self) -> dict[str, bytes]:
        """@return: every file in the directory."""
        return {path.name: path.read_bytes() for path in self.directory.iterdir()}


class MakeCertificatesTests(WithDirectory):
    """L{make_certificates}: the files."""

    def test_files_and_modes(self) -> None:
        """The authority and each host get two files; keys are for the owner only, whatever the umask."""
        self.addCleanup(os.umask, os.umask(0))
        written = make_certificates(self.directory, ["hv-a", "HV-B.example", "192.0.2.1", "2001:DB8:0::1"])
        stems = ["ca", "hv-a", "hv-b.example", "192.0.2.1", "2001:db8::1"]
        self.assertEqual(
            written, [self.directory / f"{stem}.{suffix}" for stem in stems for suffix in ("pem", "key")]
        )
        self.assertEqual(sorted(self.directory.iterdir()), sorted(written))
        self.assertEqual({mode(path) for path in written if path.suffix == ".key"}, {0o600})
        self.assertEqual({mode(path) for path in written if path.suffix == ".pem"}, {0o644})

    def test_directory_is_made(self) -> None:
        """A missing directory is made, for its owner only."""
        inner = self.directory / "etc" / "pki"
        make_certificates(inner, ["hv-a"])
        self.assertEqual(mode(inner), 0o700)

    def test_authority_is_used_again(self) -> None:
        """A host added later is signed by the same authority, whose files stay as they are."""
        make_certificates(self.directory, ["hv-a"])
        before = self.content()
        written = make_certificates(self.directory, ["hv-b"])
        self.assertEqual([path.name for path in written], ["hv-b.pem", "hv-b.key"])
        after = self.content()
        self.assertEqual({name: after[name] for name in before}, before)
        authority = x509.load_pem_x509_certificate(after["ca.pem"])
        for name in ("hv-a", "hv-b"):
            x509.load_pem_x509_certificate(after[f"{name}.pem"]).verify_directly_issued_by(authority)

    def test_nothing_is_overwritten(self) -> None:
        """One file of one host being there refuses the whole request before anything is written."""
        make_certificates(self.directory, ["hv-a"])
        self.assert_refused("hv-a.key", "not overwritten", names=("hv-b", "hv-a"))
        (self.directory / "hv-a.key").unlink()
        self.assert_refused("hv-a.pem", "not overwritten")
        (self.directory / "hv-c.key").symlink_to("nowhere")
        with self.assertRaises(ConfigurationError):
            make_certificates(self.directory, ["hv-c"])
        self.assertFalse((self.directory / "nowhere").exists())

    def test_save_loses_a_race(self) -> None:
        """A file that appears after the check is still not overwritten, and no temporary file stays."""
        credentials = Authority.create().credentials
        (self.directory / "ca.key").write_bytes(b"theirs")
        with self.assertRaises(ConfigurationError):
            credentials.save(self.directory, "ca")
        self.assertEqual(self.content(), {"ca.key": b"theirs"})

    def test_bad_names(self) -> None:
        """What is neither a host name nor an address is refused: no paths, wildcards or broken addresses."""
        for name in (
            "", ".", "a..b", "a.", "-a", "a-", "a b", "../a", "a/b", "*.example", "hv_a", "h\u00f6st",
            "10.0.0.300", "a.123", "fe80::1%eth0", "fe80::1%../x", "x" * 64, "x." * 130 + "com", "a\n", "ca",
        ):  # fmt: skip
            self.assert_refused(repr(name), names=("fine", name))
        self.assert_refused("twice", names=("hv-a", "HV-A"))

    def test_incomplete_authority(self) -> None:
        """Half an authority is never completed with a new half."""
        for missing in ("ca.key", "ca.pem"):
            directory = self.directory
            self.directory = directory / missing
            make_certificates(self.directory, [])
            (self.directory / missing).unlink()
            self.assert_refused(f"without {missing}")
            self.directory = directory

    def test_unusable_authority(self) -> None:
        """A broken, foreign, mismatched or expired authority is named and refused."""
        good, other = Authority.create().credentials, Authority.create()
        host = other.issue("hv-x")
        day = timedelta(days=1)
        now = datetime.now(timezone.utc)
        expired = Credentials(
            x509.CertificateBuilder()
            .subject_name(good.certificate.subject)
            .issuer_name(good.certificate.subject)
            .public_key(good.key.public_key())
            .serial_number(1)
            .not_valid_before(now - 2 * day)
            .not_valid_after(now - day)
            .add_extension(x509.BasicConstraints(True, None), True)
            .sign(good.key, hashes.SHA256()),
            good.key,
        )
        for certificate, key, words in (
            (b"junk", good.key_pem, ("ca.pem", "PEM certificate")),
            (good.certificate_pem, b"junk", ("ca.key", "private key")),
            (good.certificate_pem, other.credentials.key_pem, ("ca.key", "belongs to ca.pem")),
            (host.certificate_pem, host.key_pem, ("ca.pem", "CA:TRUE")),
            (expired.certificate_pem, expired.key_pem, ("ca.pem", "expired", f"{now - day:%Y-%m-%d}")),
        ):  # fmt: skip
            (self.directory / "ca.pem").write_bytes(certificate)
            (self.directory / "ca.key").write_bytes(key)
            self.assert_refused(*words)

    def test_directory_is_a_file(self) -> None:
        """A directory that cannot be used is named."""
        path = self.directory / "pki"
        path.write_bytes(b"")
        with self.assertRaises(ConfigurationError) as caught:
            make_certificates(path, ["hv-a"])
        self.assertIn(str(path), str(caught.exception))
        self.assertEqual(path.read_bytes(), b"")

    def test_repr_keeps_the_key(self) -> None:
        """What may end up in a log shows no key."""
        text = repr(Authority.create("test CA"))
        self.assertIn("test CA", text)
        self.assertNotIn("Key", text)


class AuthorityTests(WithDirectory):
    """L{Authority}: what is in the certificates, and that OpenSSL agrees."""

    def setUp(self) -> None:
        super().setUp()
        self.authority = Authority.create()

    def extension(self, credentials: Credentials, kind: type[x509.ExtensionType]) -> object:
        """@return: the value of one extension; C{None} without it."""
        try:
            return credentials.certificate.extensions.get_extension_for_class(kind).value
        except x509.ExtensionNotFound:
            return None

    def test_host_certificate(self) -> None:
        """A host certificate carries its name, both usages, and the promised validity."""
        credentials = self.authority.issue("hv-a.example")
        certificate = credentials.certificate
        alternatives = cast(
            x509.SubjectAlternativeName, self.extension(credentials, x509.SubjectAlternativeName)
        )
        self.assertEqual(list(alternatives), [x509.DNSName("hv-a.example")])
        usages = cast(x509.ExtendedKeyUsage, self.extension(credentials, x509.ExtendedKeyUsage))
        self.assertEqual(set(usages), {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH})
        self.assertEqual(
            self.extension(credentials, x509.BasicConstraints), x509.BasicConstraints(False, None)
        )
        self.assertEqual(
            certificate.not_valid_after_utc - certificate.not_valid_before_utc, timedelta(days=825)
        )
        age = datetime.now(timezone.utc) - certificate.not_valid_before_utc
        self.assertTrue(timedelta(hours=1) <= age < timedelta(hours=1, minutes=5), age)

    def test_address(self) -> None:
        """An address becomes an address entry, which TLS clients compare as such, not as text."""
        for name in ("192.0.2.1", "2001:db8::1"):
            alternatives = cast(
                x509.SubjectAlternativeName,
                self.extension(self.authority.issue(name), x509.SubjectAlternativeName),
            )
            self.assertEqual(list(alternatives), [x509.IPAddress(ipaddress.ip_address(name))])

    def test_long_name(self) -> None:
        """A name longer than a common name may be stands in the alternative names alone, critical."""
        name = ".".join(["x" * 40] * 3)
        certificate = self.authority.issue(name).certificate
        self.assertEqual(list(certificate.subject), [])
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        self.assertTrue(extension.critical)
        self.assertEqual(extension.value.get_values_for_type(x509.DNSName), [name])

    def test_two_authorities_differ_in_name(self) -> None:
        """Messages of TLS libraries name the issuer: two authorities must not share a name."""
        self.assertNotEqual(
            Authority.create().credentials.certificate.subject,
            self.authority.credentials.certificate.subject,
        )

    def test_host_ends_with_its_authority(self) -> None:
        """No host certificate is made to outlive the authority."""
        issuer = self.authority.credentials.certificate
        late = issuer.not_valid_after_utc - timedelta(days=3)
        self.assertEqual(
            self.authority.issue("hv-a", not_before=late).certificate.not_valid_after_utc,
            issuer.not_valid_after_utc,
        )

    def test_good_handshake(self) -> None:
        """Two hosts authenticate each other in both roles, also after a way over the disk."""
        make_certificates(self.directory, [])
        reloaded = Authority.load(self.directory / "ca.pem", self.directory / "ca.key")
        one, two = reloaded.issue("hv-a"), reloaded.issue("hv-b")
        handshake(one, two, reloaded)
        handshake(two, one, reloaded)

    def test_bad_certificates_are_refused(self) -> None:
        """Each kind of bad certificate that a test can ask for is one to OpenSSL, too."""
        day = timedelta(days=1)
        now = datetime.now(timezone.utc)
        good = self.authority.issue("hv-a")
        for bad, reason in (
            (self.authority.issue("hv-b", not_before=now - 2 * day, not_after=now - day), "expired"),
            (self.authority.issue("hv-b", not_before=now + day), "not yet valid"),
            (self.authority.issue("hv-b", usages=[SERVER_AUTH]), "wrong usage"),
            (Authority.create().issue("hv-b"), "other authority"),
        ):
            with self.assertRaises(SSL.Error, msg=reason):
                handshake(good, bad, self.authority)

    def test_certificates_that_lack_something(self) -> None:
        """Without names or usages the extension is absent; the common name stays."""
        bare = self.authority.issue("hv-b", (), usages=None)
        self.assertIsNone(self.extension(bare, x509.SubjectAlternativeName))
        self.assertIsNone(self.extension(bare, x509.ExtendedKeyUsage))
        name = bare.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
        self.assertEqual(name, "hv-b")
        several = self.authority.issue("hv-b", ["hv-b", "hv-b.example", "192.0.2.7"])
        alternatives = cast(x509.SubjectAlternativeName, self.extension(several, x509.SubjectAlternativeName))
        self.assertEqual(alternatives.get_values_for_type(x509.DNSName), ["hv-b", "hv-b.example"])
