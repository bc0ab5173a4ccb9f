"""Listening and connecting: accept order, full backlogs, deadlines, and messages that say what to do."""

from __future__ import annotations

import errno
import os
import resource
import socket
from typing import Any

from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import CancelledError
from twisted.internet.error import ConnectionDone
from twisted.internet.interfaces import IListeningPort
from twisted.logger import LogLevel, formatEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from relaymux.errors import ConfigurationError, TransportError
from relaymux.net import connect, listen
from relaymux.net.addresses import describe, parse_host_port
from relaymux.net.buffers import BufferPool
from relaymux.net.connect import connect_tcp, connect_unix, connect_unix_at_once
from relaymux.net.families import tune_link
from relaymux.net.listen import bind_tcp, listen_on
from tests.sockets import DEADLINE, PlainRecorder, Recorder, RecorderFactory, SocketTestCase, reactor


class Base(SocketTestCase):
    """Log lines, and everything closed at the end."""

    def setUp(self) -> None:
        self.pool = BufferPool()
        self.factory = RecorderFactory()
        self.clients: list[Recorder] = []
        self.log: list[str] = []
        observer: Any = self._logged
        globalLogPublisher.addObserver(observer)
        self.addCleanup(globalLogPublisher.removeObserver, observer)
        self.addCleanup(self._all_closed)

    def _logged(self, event: Any) -> None:
        if event.get("log_level", LogLevel.debug) >= LogLevel.warn:
            self.log.append(formatEvent(event))

    async def _all_closed(self) -> None:
        for protocol in self.factory.made + self.clients:
            if protocol.transport is not None:
                protocol.transport.abortConnection()
                await self.lost(protocol)

    def client(self) -> Recorder:
        """A protocol to connect."""
        self.clients.append(Recorder())
        return self.clients[-1]

    def bind_unix(self, backlog: int = 5, listening: bool = True) -> tuple[socket.socket, str]:
        """A UNIX socket and its path."""
        path = self.directory() + "/s"
        sock = socket.socket(socket.AF_UNIX)
        self.addCleanup(sock.close)
        sock.bind(path)
        if listening:
            sock.listen(backlog)
        return sock, path

    async def refused(self, deferred: Any, *words: str) -> TransportError:
        """@return: the error that C{deferred} fails with; it says C{words}."""
        error: TransportError = await self.assertFailure(deferred, TransportError)
        for word in words:
            self.assertIn(word, str(error))
        return error


class UNIXTests(Base):
    """UNIX sockets."""

    async def test_connects(self) -> None:
        """Both ends carry bytes, and know the path and one another."""
        sock, path = self.bind_unix()
        port = listen_on(reactor, sock, self.factory, self.pool)
        self.addCleanup(port.stopListening)
        verifyObject(IListeningPort, port)
        self.assertEqual(port.getHost(), UNIXAddress(path))
        protocol: Any = await connect_unix(reactor, path, self.client(), DEADLINE, self.pool)
        self.assertIs(protocol, self.clients[0])
        transport: Any = protocol.transport
        self.assertEqual(transport.getPeer(), UNIXAddress(path))
        self.assertEqual(transport.peerIdentity, f"uid:{os.getuid()}")
        transport.write(b"hello")
        await self.until(lambda: self.factory.made, "it was accepted")
        await self.arrived(self.factory.made[0], 5)
        self.assertEqual(self.factory.made[0].transport.peerIdentity, f"uid:{os.getuid()}")
        self.assertEqual(self.factory.made[0].received, b"hello")

    async def test_factory(self) -> None:
        """A factory is asked when the connection is there, and may not want it."""
        _, path = self.bind_unix()
        protocol = await connect_unix(reactor, path, self.factory, DEADLINE, self.pool)
        self.assertEqual([protocol], self.factory.made)
        unwilling: Any = RecorderFactory()
        unwilling.buildProtocol = lambda address: None
        await self.refused(connect_unix(reactor, path, unwilling, DEADLINE, self.pool), "not wanted")

    async def test_nothing_there(self) -> None:
        """Where no socket is, that is said at once, as is what kind of thing is there instead."""
        _, path = self.bind_unix(listening=False)
        datagram = self.directory() + "/d"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(datagram)
            for where, words in (
                (path + "x", "there is no such socket"),
                (path, "nobody listens there any more"),
                (datagram, "not a stream socket"),
                ("/" + "x" * 200, "too long"),
            ):
                error = await self.refused(
                    connect_unix(reactor, where, self.client(), DEADLINE, self.pool), where, words
                )
                self.assertTrue(error.retry)

    async def test_no_descriptor(self) -> None:
        """Without a descriptor left it fails at once, and that is all: no timer is left to say so again."""
        _, path = self.bind_unix()
        before = set(reactor.getDelayedCalls())
        self.patch(connect, "socket", self.no_socket)
        connecting = connect_unix(reactor, path, self.client(), DEADLINE, self.pool)
        await self.refused(connecting, "Too many open files")
        self.assertEqual(set(reactor.getDelayedCalls()) - before, set())

    async def test_at_once(self) -> None:
        """Where nobody has to wait the protocol is connected when the call returns."""
        sock, path = self.bind_unix()
        client: Any = self.client()
        self.assertTrue(connect_unix_at_once(reactor, path, client, self.pool, follow_links=False))
        self.assertEqual(client.events, ["made"])
        self.assertEqual(client.transport.getPeer(), UNIXAddress(path))
        accepted, _ = sock.accept()
        self.addCleanup(accepted.close)
        client.transport.write(b"hello")
        self.assertEqual(accepted.recv(5), b"hello")
        client.transport.loseWriteConnection()
        self.assertEqual(accepted.recv(5), b"")

    async def test_not_at_once(self) -> None:
        """What has to wait, or fails, has not happened: the protocol may be connected otherwise."""
        _, full = self.bind_unix(backlog=0)
        _, served = self.bind_unix()
        link = self.directory() + "/link"
        os.symlink(served, link)
        client = self.client()
        self.assertTrue(connect_unix_at_once(reactor, full, self.client(), self.pool))
        for path in (full, served + "x", "/" + "x" * 200, link):
            self.assertFalse(connect_unix_at_once(reactor, path, client, self.pool, follow_links=False), path)
        self.patch(connect, "socket", self.no_socket)
        self.assertFalse(connect_unix_at_once(reactor, served, client, self.pool))
        self.assertEqual(client.events, [])

    def no_socket(self, *_: object) -> socket.socket:
        """There is no descriptor left."""
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def test_full_backlog(self) -> None:
        """A full backlog is waited for, until there is room."""
        sock, path = self.bind_unix(backlog=0)
        first = await connect_unix(reactor, path, self.client(), DEADLINE, self.pool)
        connecting = connect_unix(reactor, path, self.client(), DEADLINE, self.pool)
        await self.turns(30)
        self.assertNoResult(connecting)
        accepted, _ = sock.accept()
        self.addCleanup(accepted.close)
        self.assertIsNot(await connecting, first)

    async def test_backlog_stays_full(self) -> None:
        """A backlog that stays full is a failure at the deadline, and says so."""
        _, path = self.bind_unix(backlog=0)
        await connect_unix(reactor, path, self.client(), DEADLINE, self.pool)
        await self.refused(connect_unix(reactor, path, self.client(), 0.1, self.pool), "backlog stayed full")
        connecting = connect_unix(reactor, path, self.client(), DEADLINE, self.pool)
        connecting.cancel()
        await self.assertFailure(connecting, CancelledError)

    async def test_denied(self) -> None:
        """Missing permission is explained, with what else may be behind it."""
        self.patch(connect, "socket", Denied)
        await self.refused(
            connect_unix(reactor, "/run/x", self.client(), DEADLINE, self.pool), "permission", "SELinux"
        )

    async def test_order(self) -> None:
        """Protocols are built and connected in the order in which their clients connected."""
        sock, path = self.bind_unix(backlog=128)
        raw = []
        for number in range(100):
            raw.append(socket.socket(socket.AF_UNIX))
            self.addCleanup(raw[-1].close)
            raw[-1].connect(path)
            raw[-1].send(bytes([number]))
        order: list[Any] = []

        class Ordered(Recorder):
            def connectionMade(self) -> None:
                order.append(self)
                super().connectionMade()

        self.factory.kind = Ordered
        port = listen_on(reactor, sock, self.factory, self.pool)
        self.addCleanup(port.stopListening)
        await self.until(lambda: all(p.received for p in self.factory.made) and len(order) == 100, "all came")
        self.assertEqual(order, self.factory.made)
        self.assertEqual([p.received[0] for p in order], list(range(100)))


class Denied(socket.socket):
    """A socket that must not connect, whoever runs the tests."""

    def connect(self, address: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


class ListenerTests(Base):
    """What listeners do with connections and with trouble."""

    def listen(self, **options: Any) -> tuple[Any, int]:
        """@return: a TCP listener and its port."""
        port: Any = listen_on(reactor, bind_tcp("127.0.0.1", 0), self.factory, self.pool, **options)
        self.addCleanup(port.stopListening)
        return port, port.getHost().port

    async def test_stop(self) -> None:
        """A stopped listener accepts nothing, says so once, and leaves its connections alone."""
        closed: list[str] = []
        port, number = self.listen(closed=lambda: closed.append("closed"))
        client: Any = await connect_tcp(reactor, "127.0.0.1", number, self.client(), DEADLINE, self.pool)
        await self.until(lambda: self.factory.made, "it was accepted")
        await port.stopListening()
        await port.stopListening()
        self.assertEqual(closed, ["closed"])
        await self.refused(
            connect_tcp(reactor, "127.0.0.1", number, self.client(), DEADLINE, self.pool),
            "Connection refused",
        )
        transport: Any = client.transport
        transport.write(b"still here")
        await self.arrived(self.factory.made[0], 10)

    async def test_reactor_stops(self) -> None:
        """When the reactor stops, listening does."""
        port, _ = self.listen()
        reactor.removeReader(port)
        port.connectionLost(None)
        self.assertEqual(port.fileno(), -1)

    async def test_starts_the_factory(self) -> None:
        """The factory is told of the beginning and the end."""
        told: list[str] = []
        self.factory.startFactory = lambda: told.append("start")  # type: ignore[method-assign]
        self.factory.stopFactory = lambda: told.append("stop")  # type: ignore[method-assign]
        port, _ = self.listen()
        await port.stopListening()
        self.assertEqual(told, ["start", "stop"])

    async def test_prepares_sockets(self) -> None:
        """Each socket gets its options before anything is sent."""
        _, number = self.listen(prepare=tune_link)
        client: Any = await connect_tcp(
            reactor, "127.0.0.1", number, self.client(), DEADLINE, self.pool, prepare=tune_link
        )
        await self.until(lambda: self.factory.made, "it was accepted")
        for protocol in (client, *self.factory.made):
            transport: Any = protocol.transport
            self.assertTrue(transport.getTcpNoDelay() and transport.getTcpKeepAlive())

    async def test_unwanted_and_failing(self) -> None:
        """A factory that wants no protocol, or raises, closes that connection and no other."""
        _, number = self.listen()
        answers: list[Any] = [None, RuntimeError("bug"), Recorder()]

        def build(address: object) -> Any:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            self.factory.made.append(answer) if answer else None
            return answer

        factory: Any = self.factory
        factory.buildProtocol = build
        for _ in range(2):
            client = self.client()
            await connect_tcp(reactor, "127.0.0.1", number, client, DEADLINE, self.pool)
            self.assertIsInstance(await self.lost(client), ConnectionDone)
        await connect_tcp(reactor, "127.0.0.1", number, self.client(), DEADLINE, self.pool)
        await self.until(lambda: self.factory.made, "the third was accepted")
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)

    async def test_out_of_descriptors(self) -> None:
        """Short of descriptors the clients wait in order; it is logged once and ends by itself."""
        self.patch(listen, "SHORTAGE_PAUSE", 0.02)
        sock, path = self.bind_unix(backlog=16)
        waiting = []
        for number in range(5):
            waiting.append(socket.socket(socket.AF_UNIX))
            self.addCleanup(waiting[-1].close)
            waiting[-1].connect(path)
            waiting[-1].send(bytes([number]))
        await self.turns(2)  # a reactor that only starts now would want descriptors too
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
        fillers = []
        try:
            while True:
                try:
                    fillers.append(os.dup(0))
                except OSError:
                    break
            port = listen_on(reactor, sock, self.factory, self.pool)
            self.addCleanup(port.stopListening)
            await self.until(lambda: self.log, "it was logged")
            await self.turns(60)
            self.assertEqual(self.factory.made, [])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for filler in fillers:
                os.close(filler)
        await self.until(lambda: len(self.factory.made) == 5, "all were accepted")
        await self.until(lambda: all(p.received for p in self.factory.made), "all said their number")
        self.assertEqual([p.received[0] for p in self.factory.made], list(range(5)))
        self.assertEqual(len(self.log), 1)
        self.assertIn("Too many open files", self.log[0])
        self.assertIn("LimitNOFILE", self.log[0])

    async def test_stop_while_out_of_descriptors(self) -> None:
        """A listener that waits for descriptors can be stopped, and does not come back."""
        port, _ = self.listen()
        port._wait_for_descriptors(OSError(errno.EMFILE, "too many"))
        await port.stopListening()
        self.assertFalse(port._pause.active())

    async def test_stop_while_accepting(self) -> None:
        """A listener that is stopped by what it accepted accepts nothing after it."""
        port, number = self.listen()
        build = self.factory.buildProtocol

        def build_one(address: object) -> Any:
            port.stopListening()
            return build(address)

        factory: Any = self.factory
        factory.buildProtocol = build_one
        raw = []
        for _ in range(3):
            raw.append(socket.create_connection(("127.0.0.1", number)))
            self.addCleanup(raw[-1].close)
        await self.until(lambda: self.factory.made, "one was accepted")
        await self.turns()
        self.assertEqual(len(self.factory.made), 1)

    async def test_one_bad_connection(self) -> None:
        """An error that belongs to one waiting connection does not stop the listener."""
        port, number = self.listen()
        real = port._socket

        class Aborted:
            failed = False

            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

            def accept(self) -> Any:
                if not self.failed:
                    self.failed = True
                    raise OSError(errno.ECONNABORTED, "aborted")
                return real.accept()

        port._socket = Aborted()
        await connect_tcp(reactor, "127.0.0.1", number, self.client(), DEADLINE, self.pool)
        await self.until(lambda: self.factory.made, "it was accepted")


class TCPTests(Base):
    """Connecting over TCP."""

    def listen(self, host: str) -> int:
        """@return: the port."""
        port: Any = listen_on(reactor, bind_tcp(host, 0), self.factory, self.pool)
        self.addCleanup(port.stopListening)
        number: int = port.getHost().port
        return number

    async def test_families(self) -> None:
        """IPv4 and IPv6 addresses are reached, and one socket listens for all of both."""
        for host in ("127.0.0.1", "::1", "", "::"):
            number = self.listen(host)
            for target in (host,) if "1" in host else ("127.0.0.1", "::1"):
                protocol: Any = await connect_tcp(reactor, target, number, self.client(), DEADLINE, self.pool)
                transport: Any = protocol.transport
                self.assertEqual(transport.getPeer().port, number)
                self.assertIsInstance(transport.getPeer(), IPv6Address if ":" in target else IPv4Address)

    async def test_name(self) -> None:
        """A name is looked up, and its addresses are tried in turn until one answers."""
        number = self.listen("127.0.0.1")
        protocol = await connect_tcp(reactor, "localhost", number, self.client(), DEADLINE, self.pool)
        self.assertIsInstance(protocol, Recorder)

    async def test_all_addresses_fail(self) -> None:
        """Each address that was tried is named with its reason."""
        self.resolve([IPv4Address("TCP", "127.0.0.1", 1), IPv6Address("TCP", "::1", 1)])
        await self.refused(
            connect_tcp(reactor, "hv-b.example", 1, self.client(), DEADLINE, self.pool),
            "127.0.0.1:1: Connection refused",
            "[::1]:1: Connection refused",
        )

    async def test_second_address(self) -> None:
        """An address that refuses does not keep the next from being tried."""
        number = self.listen("127.0.0.1")
        self.resolve([IPv4Address("TCP", "127.0.0.1", 1), IPv4Address("TCP", "127.0.0.1", number)])
        await connect_tcp(reactor, "hv-b.example", 1, self.client(), DEADLINE, self.pool)

    async def test_silent_address(self) -> None:
        """An address that does not answer gets its share of the time, and the next the rest."""
        number = self.listen("127.0.0.1")
        with socket.create_server(("127.0.0.1", 0), backlog=0) as silent:
            full = []
            for _ in range(3):  # a backlog that is full lets SYNs go unanswered
                full.append(socket.socket())
                self.addCleanup(full[-1].close)
                full[-1].setblocking(False)
                full[-1].connect_ex(silent.getsockname())
            self.resolve([IPv4Address("TCP", *silent.getsockname()), IPv4Address("TCP", "127.0.0.1", number)])
            await connect_tcp(reactor, "hv-b.example", 1, self.client(), 1.0, self.pool)
            self.resolve([IPv4Address("TCP", *silent.getsockname())])
            connecting = connect_tcp(reactor, "hv-b.example", 1, self.client(), 0.1, self.pool)
            await self.refused(connecting, "timed out")
            connecting = connect_tcp(reactor, "hv-b.example", 1, self.client(), DEADLINE, self.pool)
            connecting.cancel()
            await self.assertFailure(connecting, CancelledError)

    async def test_unknown_name(self) -> None:
        """A name without addresses is said to be one; so is a name service that does not answer."""
        self.resolve([])
        await self.refused(
            connect_tcp(reactor, "hv-x.example", 1, self.client(), DEADLINE, self.pool),
            "hv-x.example",
            "no address",
        )
        self.resolve(None)
        await self.refused(
            connect_tcp(reactor, "hv-x.example", 1, self.client(), 0.05, self.pool), "no answer"
        )

    def resolve(self, addresses: list[Any] | None) -> None:
        """Let every name have C{addresses}; L{None}: no answer ever comes."""

        class Resolver:
            def resolveHostName(self, receiver: Any, *_: object) -> None:
                receiver.resolutionBegan(None)
                for address in addresses or ():
                    receiver.addressResolved(address)
                if addresses is not None:
                    receiver.resolutionComplete()

        self.addCleanup(reactor.installNameResolver, reactor.installNameResolver(Resolver()))

    async def test_address_in_use(self) -> None:
        """Where another listens already, that is said."""
        number = self.listen("127.0.0.1")
        with self.assertRaises(TransportError) as caught:
            bind_tcp("127.0.0.1", number)
        self.assertIn(f"127.0.0.1:{number}: Address already in use", str(caught.exception))

    async def test_plain_protocols(self) -> None:
        """Protocols that know nothing of buffers are connected just so."""
        self.factory.kind = PlainRecorder
        number = self.listen("127.0.0.1")
        protocol: Any = await connect_tcp(reactor, "127.0.0.1", number, PlainRecorder(), DEADLINE, self.pool)
        protocol.transport.write(b"hello")
        await self.until(lambda: self.factory.made, "it was accepted")
        await self.arrived(self.factory.made[0], 5)
        protocol.transport.loseConnection()
        await self.lost(protocol)


class AddressTests(SynchronousTestCase):
    """Addresses as text."""

    def test_host_and_port(self) -> None:
        """What may be written, and what it means."""
        for text, listening, expected in (
            ("hv-b.example:16515", False, ("hv-b.example", 16515)),
            (" 192.0.2.1:1 ", False, ("192.0.2.1", 1)),
            ("[2001:db8::1]:16515", False, ("2001:db8::1", 16515)),
            ("[::]:16515", True, ("::", 16515)),
            ("0.0.0.0:0", True, ("0.0.0.0", 0)),
            ("*:16515", True, ("", 16515)),
        ):
            self.assertEqual(parse_host_port(text, listening=listening), expected)

    def test_mistakes(self) -> None:
        """What may not be written, with what was expected."""
        for text, listening in (
            ("", False),
            ("16515", False),
            (":16515", False),
            ("hv-b:", False),
            ("hv-b:x", False),
            ("hv-b:0", False),
            ("hv-b:65536", False),
            ("hv-b:\u0661", False),
            ("2001:db8::1:16515", False),
            ("[hv-b]:1", False),
            ("hv-b:1", True),
            ("*:-1", True),
        ):
            error = self.assertRaises(ConfigurationError, parse_host_port, text, listening=listening)
            self.assertIn("HOST:PORT", error.expected)
            self.assertEqual(error.found, text)

    def test_in_words(self) -> None:
        """Addresses in messages look as in the configuration."""
        for address, text in (
            (IPv4Address("TCP", "192.0.2.1", 5), "192.0.2.1:5"),
            (IPv6Address("TCP", "2001:db8::1", 5), "[2001:db8::1]:5"),
            (UNIXAddress("/run/x"), "/run/x"),
            (UNIXAddress(None), "an unnamed UNIX socket"),
        ):
            self.assertEqual(describe(address), text)
