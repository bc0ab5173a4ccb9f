"""The built-in transports, by the suite that every transport must pass, and how they are found."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from twisted.internet.defer import maybeDeferred
from twisted.internet.interfaces import IListeningPort
from twisted.python.reflect import namedAny
from twisted.trial.unittest import SynchronousTestCase, TestCase
from zope.interface.verify import verifyObject

from relaymux.certificates import make_certificates
from relaymux.errors import ConfigurationError, TransportError
from relaymux.interfaces import IRelayTransport, TransportSettings
from relaymux.testing.conformance import BufferConformance, TransportConformance
from relaymux.transports import registry
from relaymux.transports.registry import LazyTransport, find_transport, transports
from tests.sockets import RecorderFactory, SocketTestCase, reactor


class Limits:
    """How much stricter ours are than transports must be."""

    late_bytes = 0
    gentle_close = True
    timeout = 120


class TCPTests(Limits, TransportConformance, TestCase):
    """C{transport = tcp}"""

    transport = find_transport("tcp")

    def server_settings(self) -> TransportSettings:
        return TransportSettings("127.0.0.1:0")

    def client_settings(self, port: IListeningPort) -> TransportSettings:
        address: Any = port.getHost()
        return TransportSettings(f"127.0.0.1:{address.port}")

    def unreachable_settings(self) -> TransportSettings:
        return TransportSettings("127.0.0.1:1")


class TCPBufferTests(BufferConformance, TCPTests):
    """The same with buffers."""


class TLSTests(TCPTests):
    """C{transport = tls}"""

    transport = find_transport("tls")

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rm"))
        self.addCleanup(shutil.rmtree, self.directory)
        make_certificates(self.directory, ["one.example", "other.example"])
        super().setUp()

    def server_settings(self) -> TransportSettings:
        return self._with_files(super().server_settings(), "one.example", "other.example")

    def client_settings(self, port: IListeningPort) -> TransportSettings:
        return self._with_files(super().client_settings(port), "other.example", "one.example")

    def unreachable_settings(self) -> TransportSettings:
        return self._with_files(super().unreachable_settings(), "other.example", "one.example")

    def _with_files(self, settings: TransportSettings, own: str, peer: str) -> TransportSettings:
        options = {"certificate": f"{own}.pem", "private-key": f"{own}.key", "ca": "ca.pem", "peer": peer}
        return TransportSettings(settings.address, options, self.directory)


class TLSBufferTests(BufferConformance, TLSTests):
    """The same with buffers."""


class TLSByOpenSSLTests(TLSBufferTests):
    """The same with records that OpenSSL protects."""

    def _with_files(self, settings: TransportSettings, own: str, peer: str) -> TransportSettings:
        found = super()._with_files(settings, own, peer)
        return TransportSettings(found.address, {**found.options, "tls-records": "openssl"}, self.directory)


class UNIXTests(Limits, TransportConformance, TestCase):
    """C{transport = unix}"""

    transport = find_transport("unix")

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rm"))
        self.addCleanup(shutil.rmtree, self.directory)
        super().setUp()

    def server_settings(self) -> TransportSettings:
        return TransportSettings("link.sock", {}, self.directory)

    def client_settings(self, port: IListeningPort) -> TransportSettings:
        return TransportSettings("link.sock", {}, self.directory)

    def unreachable_settings(self) -> TransportSettings:
        return TransportSettings("nowhere.sock", {}, self.directory)


class UNIXBufferTests(BufferConformance, UNIXTests):
    """The same with buffers."""


class UNIXSettingsTests(SocketTestCase):
    """What C{transport = unix} makes of its keys."""

    def settings(self, address: str = "s", **options: str) -> TransportSettings:
        return TransportSettings(address, options, Path(self.directory()))

    async def listen(self, settings: TransportSettings) -> Path:
        """@return: the path of the socket."""
        port = await find_transport("unix").server(reactor, settings).listen(RecorderFactory())
        self.addCleanup(port.stopListening)
        address: Any = port.getHost()
        return Path(os.fsdecode(address.name))

    async def test_private_by_default(self) -> None:
        """Only the daemon's own user may connect unless the file says otherwise."""
        path = await self.listen(self.settings())
        self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o600)

    async def test_mode_and_owner(self) -> None:
        """The socket gets the permissions and the owner that are asked for, by name or number."""
        user, group = str(os.getuid()), str(os.getgid())
        path = await self.listen(self.settings(mode="0660", owner=user, group=group))
        self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o660)
        await self.listen(self.settings(owner="root") if os.getuid() == 0 else self.settings())

    async def test_removed(self) -> None:
        """The socket is gone when listening has stopped."""
        unix = find_transport("unix")
        settings = self.settings()
        port = await unix.server(reactor, settings).listen(RecorderFactory())
        await maybeDeferred(port.stopListening)
        self.assertEqual(list(settings.directory.iterdir()), [])

    async def test_taken(self) -> None:
        """What is there already is left alone, and trying again does not help."""
        settings = self.settings()
        (settings.directory / "s").write_text("precious")
        listening = find_transport("unix").server(reactor, settings).listen(RecorderFactory())
        error: Any = await self.assertFailure(listening, TransportError)
        self.assertFalse(error.retry)
        self.assertIn(str(settings.directory / "s"), str(error))
        self.assertEqual((settings.directory / "s").read_text(), "precious")

    def test_mistakes(self) -> None:
        """Each wrong key is named, with what it should be."""
        unix = find_transport("unix")
        for make, settings, key in (
            (unix.server, self.settings(mode="rw"), "mode"),
            (unix.server, self.settings(mode="7777"), "mode"),
            (unix.server, self.settings(owner="no such user"), "owner"),
            (unix.server, self.settings(group="no such group"), "group"),
            (unix.server, self.settings("x" * 200), "listen"),
            (unix.client, self.settings("x" * 200), "connect"),
            (unix.client, self.settings(mode="0600"), "mode"),
        ):
            error = self.assertRaises(ConfigurationError, make, reactor, settings)
            self.assertEqual(error.key, key)
            self.assertTrue(error.expected)


class RegistryTests(SynchronousTestCase):
    """Finding transports."""

    def test_built_in(self) -> None:
        """The three that come with relaymux are there."""
        self.assertLessEqual({"tcp", "tls", "unix"}, set(transports()))
        for transport in transports().values():
            verifyObject(IRelayTransport, transport)

    def test_unknown(self) -> None:
        """A name that is not installed is answered with those that are, the nearest first."""
        error = self.assertRaises(ConfigurationError, find_transport, "tsl")
        self.assertIn("'tls', or one of tcp, tls, unix", str(error))
        error = self.assertRaises(ConfigurationError, find_transport, "carrier-pigeon")
        self.assertIn("expected one of tcp", str(error))

    def test_two_of_a_name(self) -> None:
        """Two packages that both claim a name are an error, not a lottery."""
        two = [LazyTransport("tcp", "a.b"), LazyTransport("tcp", "c.d")]
        self.patch(registry, "getPlugins", lambda *_: two)
        self.assertIn("'tcp'", str(self.assertRaises(ConfigurationError, find_transport, "tcp")))

    def test_document(self) -> None:
        """What docs/transports.md names is there."""
        text = (Path(__file__).parent.parent / "docs" / "transports.md").read_text(encoding="utf-8")
        names = set(re.findall(r"\brelaymux\.[A-Za-z_.]*[A-Za-z_]", text))
        self.assertGreater(len(names), 5)
        for name in names:
            namedAny(name)
        for attribute in ("late_bytes", "gentle_close"):
            self.assertIn(f"`{attribute}`", text)
            self.assertTrue(hasattr(TransportConformance, attribute))

    def test_lazy(self) -> None:
        """Listing the transports, as any twistd does, imports neither OpenSSL nor the transports."""
        code = (
            "import sys; from relaymux.transports.registry import transports; assert 'tls' in transports();"
            " print([m for m in ('OpenSSL', 'cryptography', 'relaymux.transports.tls') if m in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=Path(__file__).parent.parent,
            check=True,
        )
        self.assertEqual(done.stdout.strip(), "[]", done.stderr)
