"""Who is let in over TLS, and what operators are told about who is not."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from OpenSSL import SSL
from twisted.internet.defer import CancelledError
from twisted.internet.task import Clock
from twisted.logger import Logger, formatEvent
from twisted.trial.unittest import SynchronousTestCase

from relaymux.certificates import CLIENT_AUTH, SERVER_AUTH, Authority, Credentials
from relaymux.errors import ConfigurationError, TransportError
from relaymux.net import tlsconnect, tlscontext, tlssockets
from relaymux.net.buffers import BufferPool
from relaymux.net.connect import connect_tcp
from relaymux.net.listen import bind_tcp, listen_on
from relaymux.net.quietlog import QuietLog
from relaymux.net.tlsconnect import connect_tls
from relaymux.net.tlspeer import PeerCheck
from relaymux.transports.tls import transport as tls
from tests.sockets import DEADLINE, Recorder, RecorderFactory, content, reactor
from tests.tls import AUTHORITY, CLIENT, NAMESAKE, SERVER, STRANGER, Files, TLSTestCase, days


class RefusedTests(TLSTestCase):
    """Who must not get in, and what the operator reads."""

    async def _refused_by_client(self, credentials: Credentials, *words: str, **options: Any) -> None:
        port = self.listen(credentials, believed=False)
        error = await self.assertFailure(self.connect(port, **options), TransportError)
        self.assertFalse(error.retry, error)
        for word in words:
            self.assertIn(word, str(error))
        self.assertEqual(self.client.made, [])
        await self.until(lambda: self.log, "the server logged why")
        self.assertEqual(self.server.made, [], "the server must not think that all is well")

    async def _refused_by_server(self, credentials: Credentials, *words: str, **options: Any) -> None:
        port = self.listen(**options)
        client = await self.connect(port, credentials, believed=False)
        error = await self.lost(client)
        self.assertIsInstance(error, TransportError)
        assert isinstance(error, TransportError)
        self.assertFalse(error.retry, error)
        self.assertIn("does not accept the certificate", str(error))
        self.assertIn("alert", str(error))
        await self.until(lambda: self.log, "the server logged why")
        for word in words:
            self.assertIn(word, self.log[-1])
        self.assertEqual(self.server.made, [])

    async def test_server_of_another_authority(self) -> None:
        """Only the configured authority counts."""
        await self._refused_by_client(
            STRANGER.issue("server.example"), "not issued by an authority in", "another authority"
        )

    async def test_server_of_a_namesake(self) -> None:
        """An authority of the same name with another key is another one."""
        await self._refused_by_client(NAMESAKE.issue("server.example"), "certificate")

    async def test_server_certified_by_a_host(self) -> None:
        """A host's certificate certifies nobody, though the authority signed it."""
        host = AUTHORITY.issue("other.example")
        fake = Authority(host).issue("server.example")
        files = self.files(fake, "client.example")
        files.write("host.pem", fake.certificate_pem + host.certificate_pem)
        error = await self.assertFailure(self.connect(self.serve(files.identity())), TransportError)
        self.assertIn("may not issue certificates", str(error))
        self.assertFalse(error.retry)

    async def test_server_expired(self) -> None:
        """An expired certificate is refused, with its dates."""
        old = AUTHORITY.issue("server.example", not_before=days(-3), not_after=days(-1))
        await self._refused_by_client(old, "has expired", f"{days(-1):%Y-%m-%d}", f"{days(0):%Y-%m-%d}")

    async def test_server_not_yet_valid(self) -> None:
        """A certificate of tomorrow is refused, with its dates."""
        early = AUTHORITY.issue("server.example", not_before=days(1))
        await self._refused_by_client(early, "is not valid yet", f"{days(1):%Y-%m-%d}")

    async def test_server_with_a_wrong_name(self) -> None:
        """A host of the same authority that is not the one asked for is refused, with both names."""
        await self._refused_by_client(
            AUTHORITY.issue("other.example", ["other.example", "192.0.2.1"]),
            "dns:other.example, ip:192.0.2.1",
            "dns:server.example",
        )

    async def test_server_with_a_wrong_address(self) -> None:
        """A name does not vouch for an address."""
        await self._refused_by_client(AUTHORITY.issue("127.0.0.2"), "ip:127.0.0.1", peer="127.0.0.1")

    async def test_server_without_names(self) -> None:
        """The subject's common name is no name."""
        await self._refused_by_client(AUTHORITY.issue("server.example", []), "no name at all")

    async def test_server_that_is_a_client(self) -> None:
        """A certificate for clients only is not one for servers."""
        await self._refused_by_client(
            AUTHORITY.issue("server.example", usages=[CLIENT_AUTH]), "not meant for servers"
        )

    async def test_client_of_another_authority(self) -> None:
        """Only the configured authority counts, and the client learns that it was refused."""
        await self._refused_by_server(
            STRANGER.issue("client.example"), "not issued by an authority in", "another authority"
        )

    async def test_client_expired(self) -> None:
        """An expired certificate is refused, with its dates."""
        old = AUTHORITY.issue("client.example", not_before=days(-3), not_after=days(-1))
        await self._refused_by_server(old, "has expired", f"{days(-1):%Y-%m-%d}")

    async def test_client_not_yet_valid(self) -> None:
        """A certificate of tomorrow is refused, with its dates."""
        await self._refused_by_server(AUTHORITY.issue("client.example", not_before=days(1)), "not valid yet")

    async def test_client_with_a_wrong_name(self) -> None:
        """A host of the same authority that is not on the list is refused, with both names."""
        await self._refused_by_server(
            AUTHORITY.issue("other.example"), "dns:other.example", "dns:client.example"
        )

    async def test_client_with_a_wildcard(self) -> None:
        """A certificate for a whole domain is not one for the host."""
        host = AUTHORITY.issue("a whole domain", ["*.hosts.example"])
        await self._refused_by_server(host, "dns:*.hosts.example", peer="client.hosts.example")

    async def test_client_with_a_longer_name(self) -> None:
        """Names are compared as a whole."""
        await self._refused_by_server(AUTHORITY.issue("client.example.org"), "dns:client.example.org")

    async def test_client_that_is_a_server(self) -> None:
        """A certificate for servers only is not one for clients."""
        await self._refused_by_server(
            AUTHORITY.issue("client.example", usages=[SERVER_AUTH]), "not meant for clients"
        )

    async def test_client_of_no_usage(self) -> None:
        """A certificate that does not say what it is for is refused, though OpenSSL takes it."""
        await self._refused_by_server(AUTHORITY.issue("client.example", usages=None), "extended key usage")

    async def test_failing_check(self) -> None:
        """An exception in the check of a peer lets nobody in."""

        def fail(*_: object) -> bool:
            raise RuntimeError("bug")

        self.patch(PeerCheck, "verify", fail)
        await self.assertFailure(self.connect(self.listen()), TransportError)
        await self.turns()
        self.assertEqual(self.client.made + self.server.made, [])
        self.assertGreaterEqual(len(self.flushLoggedErrors(RuntimeError)), 1)

    async def _raw_client(self, port: int, context: SSL.Context) -> Any:
        """Connect with a context of the test's own making."""
        files = self.files(CLIENT, "server.example")
        identity = files.identity()
        context.set_verify(SSL.VERIFY_PEER, tlscontext._verify)
        store = context.get_cert_store()
        context.load_verify_locations(str(files.directory / "ca.pem"))
        self.assertIsNotNone(store)
        identity._context = context
        return await connect_tls(reactor, "127.0.0.1", port, self.client, identity, DEADLINE, 5.0)

    async def test_client_without_certificate(self) -> None:
        """Who shows no certificate is refused."""
        client = await self._raw_client(self.listen(), SSL.Context(SSL.TLS_METHOD))
        self.assertIn("certificate required", str(await self.lost(client)))
        await self.until(lambda: self.log, "the server logged why")
        self.assertIn("shows no certificate", self.log[-1])
        self.assertEqual(self.server.made, [])

    async def test_old_tls(self) -> None:
        """TLS 1.2 is not spoken."""
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_max_proto_version(SSL.TLS1_2_VERSION)
        with self.assertRaises(TransportError) as caught:
            await self._raw_client(self.listen(), context)
        self.assertIn("does not speak TLS 1.3", str(caught.exception))
        self.assertEqual(self.server.made, [])

    async def test_server_that_does_not_speak_tls(self) -> None:
        """A client that reaches something else says so, and that trying again may help."""

        class Greeter(Recorder):
            def connectionMade(self) -> None:
                self.transport.write(b"220 mail.example ESMTP\r\n" * 10)

        factory = RecorderFactory(Greeter)
        port = listen_on(reactor, bind_tcp("127.0.0.1", 0), factory, BufferPool())
        self.addCleanup(port.stopListening)
        number: Any = port.getHost()
        error = await self.assertFailure(self.connect(number.port), TransportError)
        self.assertIn("does not speak TLS 1.3", str(error))
        self.assertTrue(error.retry)
        await self.lost(factory.made[0])

    async def test_garbage(self) -> None:
        """A client that sends rubbish costs one log line, and the next honest one gets in."""
        port = self.listen()
        for n in range(5):
            rubbish = Recorder()
            await connect_tcp(reactor, "127.0.0.1", port, rubbish, DEADLINE, BufferPool())
            rubbish.transport.write(content(100_000, n))
            await self.lost(rubbish)
        await self.connect(port)
        self.assertEqual(len(self.log), 1, self.log)
        self.assertIn("refused a connection from 127.0.0.1", self.log[0])

    async def test_silent_client(self) -> None:
        """Who says nothing is closed at the deadline, and so is one that says it very slowly."""
        self.patch(tlssockets, "HANDSHAKE_SECONDS", 0.2)
        port = self.listen()
        silent, slow = Recorder(), Recorder()
        for protocol in (silent, slow):
            await connect_tcp(reactor, "127.0.0.1", port, protocol, DEADLINE, BufferPool())
        for byte in b"\x16\x03\x01\x02\x00":
            slow.transport.write(bytes([byte]))
            await self.turns(3)
        await self.lost(silent)
        await self.lost(slow)
        await self.until(lambda: self.log, "it was logged")
        self.assertIn("no TLS handshake", self.log[0])

    async def test_limits(self) -> None:
        """Of one source and of all, only so many may be in their handshake; the rest are closed at once."""
        for limit, name in (("HANDSHAKES_PER_SOURCE", "from 127.0.0.1:"), ("HANDSHAKES", "the last is from")):
            self.log.clear()
            self.patch(tlsconnect, limit, 3)
            port = self.listen()
            waiting = [Recorder() for _ in range(3)]
            for protocol in waiting:
                await connect_tcp(reactor, "127.0.0.1", port, protocol, DEADLINE, BufferPool())
            for _ in range(5):
                more = Recorder()
                await connect_tcp(reactor, "127.0.0.1", port, more, DEADLINE, BufferPool())
                await self.lost(more)
            self.assertEqual([len(self.log), [p.reasons for p in waiting]], [1, [[], [], []]])
            self.assertIn(name, self.log[0])
            for protocol in waiting:
                protocol.transport.abortConnection()
                await self.lost(protocol)
            await self.admitted(port)
            self.patch(tlsconnect, limit, 100)

    async def admitted(self, port: int) -> None:
        """Wait until there is room for a handshake again."""
        end = reactor.seconds() + DEADLINE
        while True:
            try:
                await self.connect(port)
                return
            except TransportError:
                if reactor.seconds() > end:
                    raise
                await self.turns()

    async def test_cancel(self) -> None:
        """Giving up while the handshake runs closes the connection and fires once."""
        factory = RecorderFactory()
        port = listen_on(reactor, bind_tcp("127.0.0.1", 0), factory, BufferPool())
        self.addCleanup(port.stopListening)
        number: Any = port.getHost()
        connecting = self.connect(number.port)
        await self.until(lambda: factory.made and factory.made[0].received, "the handshake had begun")
        connecting.cancel()
        await self.assertFailure(connecting, CancelledError)
        await self.lost(factory.made[0])
        connecting = self.connect(number.port)
        connecting.cancel()
        await self.assertFailure(connecting, CancelledError)

    async def test_nobody_there(self) -> None:
        """A refused connection is worth another try."""
        error = await self.assertFailure(self.connect(1), TransportError)
        self.assertIn("127.0.0.1:1: Connection refused", str(error))
        self.assertTrue(error.retry)


class SettingsTests(SynchronousTestCase):
    """Mistakes in the configuration, found before anything is connected."""

    def setUp(self) -> None:
        directory = Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, directory)
        self.files = Files(directory, SERVER, AUTHORITY.certificate_pem, "client.example")

    def refused(self, key: str, *words: str) -> None:
        """Both ends refuse, naming C{key} and saying C{words}."""
        for make in (tls.client, tls.server):
            error = self.assertRaises(ConfigurationError, make, reactor, self.files.settings())
            self.assertEqual(error.key, key)
            for word in words:
                self.assertIn(word, str(error))

    def test_good(self) -> None:
        """The files of these tests are good."""
        tls.client(reactor, self.files.settings())
        tls.server(reactor, self.files.settings())

    def test_keys(self) -> None:
        """Each key but one is needed, and its help says what it is."""
        self.assertNotIn("tls-records", self.files.options)
        for key in set(tls.keys) - {"tls-records"}:
            self.setUp()
            del self.files.options[key]
            self.refused(key, "missing", tls.keys[key])

    def test_records(self) -> None:
        """Records are protected by one of two, and by nobody else."""
        for name in ("relaymux", "openssl"):
            self.files.options["tls-records"] = name
            self.test_good()
        self.files.options["tls-records"] = "kernel"
        self.refused("tls-records", "kernel", "relaymux or openssl")

    def test_missing_files(self) -> None:
        """A file that is not there is named."""
        for key in ("certificate", "private-key", "ca"):
            self.setUp()
            self.files.options[key] = "nowhere.pem"
            self.refused(key, "nowhere.pem", "No such file")

    def test_unreadable_files(self) -> None:
        """What cannot be read is named with the reason."""
        for key in ("certificate", "private-key", "ca"):
            self.setUp()
            self.files.options[key] = "."
            self.refused(key, "Is a directory")

    def test_rubbish(self) -> None:
        """A file that is something else is named."""
        for key, name in (("certificate", "host.pem"), ("private-key", "host.key"), ("ca", "ca.pem")):
            self.setUp()
            self.files.write(name, b"-----BEGIN RUBBISH-----")
            self.refused(key, name, "PEM")

    def test_key_that_others_can_read(self) -> None:
        """A private key that is not private is refused, with the cure."""
        for mode in (0o640, 0o604, 0o620):
            (self.files.directory / "host.key").chmod(mode)
            self.refused("private-key", f"{mode:04o}", "chmod 600")

    def test_encrypted_key(self) -> None:
        """A key with a passphrase is refused and nobody is asked for it."""
        encryption = serialization.BestAvailableEncryption(b"secret")
        form = serialization.PrivateFormat.PKCS8
        data = SERVER.key.private_bytes(serialization.Encoding.PEM, form, encryption)
        self.files.write("host.key", data)
        self.refused("private-key", "passphrase")

    def test_other_key(self) -> None:
        """A key that belongs to another certificate is refused, naming both files."""
        self.files.write("host.key", CLIENT.key_pem)
        self.refused("private-key", "host.key", "host.pem")

    def test_own_certificate_out_of_date(self) -> None:
        """An own certificate that nobody will accept is found at once, with its dates."""
        for start, end, word in ((-3, -1, "expired"), (1, 3, "not valid yet")):
            own = AUTHORITY.issue("server.example", not_before=days(start), not_after=days(end))
            self.files.write("host.pem", own.certificate_pem)
            self.files.write("host.key", own.key_pem)
            self.refused("certificate", word, f"{days(start):%Y-%m-%d}", f"{days(end):%Y-%m-%d}")

    def test_names(self) -> None:
        """What no certificate can have as its name is refused; what one can is put into one form."""
        for wrong in ("a b", "host:123", "x" * 300, "*"):
            self.files.options["peer"] = wrong
            self.refused("peer", wrong)
        for right, identity in (
            ("Client.Example.", "dns:client.example"),
            ("bücher.example", "dns:xn--bcher-kva.example"),
            ("hv-a", "dns:hv-a"),
            ("2001:DB8::0:1", "ip:2001:db8::1"),
        ):
            self.files.options["peer"] = right
            self.assertEqual(self.files.identity().credentials.peer.identity, identity)

    def test_address(self) -> None:
        """A wrong address is named with the key it is from."""
        for make, key in ((tls.client, "connect"), (tls.server, "listen")):
            error = self.assertRaises(ConfigurationError, make, reactor, self.files.settings("nowhere"))
            self.assertEqual(error.key, key)


class QuietLogTests(SynchronousTestCase):
    """Log lines that cannot become a flood."""

    def test_once_in_a_while(self) -> None:
        """The same is logged once, then with the number of times it was not; other things at once."""
        lines: list[str] = []
        clock = Clock()
        observer: Any = lambda event: lines.append(formatEvent(event))  # noqa: E731
        quiet = QuietLog(Logger(observer=observer), clock.seconds)
        for _ in range(5):
            quiet.warn("a", "first {x}", x=1)
        quiet.warn("b", "second")
        self.assertEqual(lines, ["first 1", "second"])
        clock.advance(10)
        quiet.warn("a", "first {x}", x=2)
        self.assertEqual(lines[2:], ["first 2 (4 more like this since the last such line)"])

    def test_bounded(self) -> None:
        """What it remembers does not grow with the number of things."""
        observer: Any = lambda event: None  # noqa: E731
        quiet = QuietLog(Logger(observer=observer), Clock().seconds)
        for n in range(5000):
            quiet.warn(n, "something")
        self.assertLessEqual(len(quiet._said), 1000)
