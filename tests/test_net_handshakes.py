"""Who connects, and what becomes of who says something wrong."""

from __future__ import annotations

from typing import Any, cast

from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.python.failure import Failure

from relaymux.core.handshake import Limits
from relaymux.core.link import HANDSHAKE_SECONDS
from relaymux.errors import ErrorCode, SessionLost, StreamReset
from relaymux.net.link import CLOSE_SECONDS, LinkProtocol
from relaymux.net.peer import Peer
from relaymux.testing.memory import MemoryConnection
from relaymux.testing.recording import HalfCloseRecorder
from tests.peers import LIMITS, Acceptor, Ends, PeerTestCase, Undecided
from tests.test_core_bad_input import CASES
from tests.wire import BYE, DATA, OPENED, REFUSED, REJECT, WELCOME, frame, hello, opening, parse, u16


class RawEnd:
    """
    A link of a peer over a C{StringTransport}: no buffers, no pausing, only bytes.

    @ivar lost: whether the link has closed or aborted its connection.
    """

    def __init__(self, peer: Peer, *, buffers: bool = False) -> None:
        link = peer.build_link()
        assert link is not None
        self.link: LinkProtocol = link
        self.clock = cast(Clock, peer._reactor)
        self.transport: Any = StringTransport()
        self._other = Ether() if buffers else None
        if self._other is not None:
            self._connection = MemoryConnection(self._other, self.link, clock=self.clock)
            self._connection.settle()
        else:
            self.link.makeConnection(self.transport)

    @property
    def lost(self) -> bool:
        if self._other is not None:
            return self._other.lost
        return bool(self.transport.disconnecting)

    def send(self, data: bytes) -> None:
        if self._other is not None:
            self._other.transport.write(data)
            self._connection.settle()
        else:
            self.link.dataReceived(data)
            if self.lost and not self.link._lost:
                self.lose()

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        if self._other is not None:
            self._connection.settle()
        elif self.lost and not self.link._lost:
            self.lose()

    def said(self) -> list[tuple[int, int, bytes]]:
        if self._other is not None:
            self._connection.settle()
            return parse(bytes(self._other.received))
        return parse(self.transport.value())

    def lose(self) -> None:
        if self._other is not None:
            self._connection.cut()
        else:
            self.link.connectionLost(Failure(ConnectionDone()))


class Ether(Protocol):
    """The other end of a raw connection."""

    transport: Any

    def __init__(self) -> None:
        self.received = bytearray()
        self.lost = False

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self.lost = True


class HandshakeTests(PeerTestCase):
    """Who comes, and who stays."""

    def raw(self, peer: Peer, *, buffers: bool = True) -> RawEnd:
        """Connect to C{peer} with nothing but bytes."""
        return RawEnd(peer, buffers=buffers)

    def test_up(self) -> None:
        """Both sides log whom they have, and by what name."""
        Ends()
        self.assertEqual(len(self.lines("link far: up", "hv-far")), 1)
        self.assertEqual(len(self.lines("link near: up", "hv-near")), 1)

    def test_identity(self) -> None:
        """The identity that the transport has checked is logged."""
        ends = Ends(connect=False)
        near, far = ends.near.build_link(), ends.far.build_link()
        assert near is not None and far is not None
        MemoryConnection(near, far, clock=ends.clock, identities=("dns:near.example", "dns:far.example"))
        ends.clock.advance(0)
        ends.clock.advance(0)
        self.assertEqual(far.peer_identity, "dns:near.example")
        self.assertEqual(len(self.lines("link near: up", "dns:near.example")), 1)

    def test_silent_stranger(self) -> None:
        """Who says nothing is rejected in time, closed, and logged."""
        ends = Ends(connect=False)
        end = self.raw(ends.far)
        end.advance(HANDSHAKE_SECONDS - 0.1)
        self.assertFalse(end.lost)
        end.advance(0.2)
        self.assertEqual(end.said()[-1][0], REJECT)
        self.assertTrue(end.lost)
        self.assertEqual(len(self.lines("link near", "HANDSHAKE_TIMEOUT")), 1)
        self.assert_no_timers(ends)

    def test_silent_acceptor(self) -> None:
        """The same on the dialling side; what waits for a link goes on waiting."""
        ends = Ends(connect=False)
        request = ends.near.open_stream("vda", 60.0)
        end = self.raw(ends.near)
        end.advance(HANDSHAKE_SECONDS + 0.1)
        self.assertTrue(end.lost)
        self.assertNoResult(request)
        ends.far.register("vda", Acceptor())
        ends.connect()
        ends.settle()
        self.successResultOf(request)

    def test_second_daemon(self) -> None:
        """A daemon of another name is told BUSY, and does not disturb the one that is there."""
        ends = Ends()
        ends.far.register("vda", Acceptor())
        stream = ends.open(HalfCloseRecorder())
        end = self.raw(ends.far)
        end.send(hello(name=b"hv-other"))
        kind, _, payload = end.said()[-1]
        self.assertEqual((kind, payload[:2]), (REJECT, u16(ErrorCode.BUSY)))
        self.assertIn(b"hv-near", payload)
        self.assertTrue(end.lost)
        self.assertEqual(len(self.lines("link near", "hv-other", "hv-near")), 1)
        self.assertTrue(stream.connected and ends.far.is_up)

    def test_restarted(self) -> None:
        """The same daemon with a new instance: its old streams fail at once, the new session is up."""
        ends = Ends()
        service = Acceptor()
        ends.far.register("vda", service)
        ends.open(HalfCloseRecorder())
        end = self.raw(ends.far)
        end.send(hello(name=b"hv-near", instance=b"m" * 16))
        self.assertEqual(end.said()[-1][0], WELCOME)
        error = self.assert_lost(service.protocols[0], SessionLost)
        self.assertEqual(error.code, ErrorCode.PEER_RESTARTED)
        self.assertTrue(ends.far.is_up)
        end.send(opening(1))
        self.assertEqual(len(service.streams), 2)

    def test_dialled_again(self) -> None:
        """The same daemon and instance: the newer link counts, the older is told why it ends."""
        ends = Ends()
        ends.far.register("vda", Acceptor())
        near = HalfCloseRecorder()
        ends.open(near)
        end = self.raw(ends.far)
        end.send(hello(name=b"hv-near", instance=b"n" * 16))
        self.assertEqual(end.said()[-1][0], WELCOME)
        ends.settle()
        self.assertEqual(self.assert_lost(near, SessionLost).code, ErrorCode.LINK_REPLACED)

    def test_goodbye_in_between(self) -> None:
        """A link that is lost in its handshake leaves nothing behind."""
        for peer in ("near", "far"):
            ends = Ends(connect=False)
            end = self.raw(getattr(ends, peer))
            end.lose()
            self.assertFalse(getattr(ends, peer).is_up)
            self.assert_no_timers(ends)

    def test_plain_transport(self) -> None:
        """A transport with nothing but ITransport's methods carries a link."""
        for buffers in (True, False):
            ends = Ends(connect=False)
            service = Acceptor()
            ends.far.register("vda", service)
            end = self.raw(ends.far, buffers=buffers)
            end.send(hello() + opening(1) + frame(DATA, 1, b"abc"))
            self.assertEqual(bytes(service.protocols[0].received), b"abc")
            service.streams[0].write(b"def")
            self.assertIn((DATA, 1, b"def"), end.said())

    def test_one_write_for_one_read(self) -> None:
        """What there is to say to the frames of one read leaves together, after the last of them."""
        ends = Ends(connect=False)
        end = self.raw(ends.far, buffers=False)
        writes: list[bytes] = []
        end.transport.writeSequence = lambda pieces: writes.append(b"".join(pieces))
        end.send(hello() + opening(1) + opening(3) + opening(5))
        [everything] = writes
        self.assertEqual([kind for kind, _, _ in parse(everything)], [WELCOME, REFUSED, REFUSED, REFUSED])

    def test_paused_link(self) -> None:
        """A transport that takes no more gets no more, and all that waits when it does again."""
        ends = Ends(connect=False)
        service = Acceptor()
        ends.far.register("vda", service)
        end = self.raw(ends.far, buffers=False)
        end.send(hello() + opening(1))
        end.link.pauseProducing()
        service.streams[0].write(b"waits")
        end.send(opening(3))
        self.assertEqual([kind for kind, _, _ in end.said()], [WELCOME, OPENED])
        end.link.resumeProducing()
        self.assertEqual(end.said()[2:], [(OPENED, 3, b""), (DATA, 1, b"waits")])

    def test_bytes_after_the_end(self) -> None:
        """What a transport delivers after it was closed is dropped."""
        ends = Ends(connect=False)
        end = self.raw(ends.far)
        end.send(frame(BYE, 0, u16(0)))
        self.assertTrue(end.link.link.ended)
        end.link.dataReceived(hello())
        self.assertFalse(ends.far.is_up)


class BadInputTests(PeerTestCase):
    """What a peer must not say, as seen by the daemon it says it to."""

    def test_every_case(self) -> None:
        """Each ends its connection with its code and one line in the log; the other link does not notice."""
        other = Ends()
        other.far.register("vda", Acceptor())
        stream = other.open(HalfCloseRecorder())
        checked = 0
        for name, case in CASES.items():
            if case.begin.__name__ not in ("accepting", "open_link", "dialling", "asked", "incoming"):
                continue  # these need a core whose own actions led there
            for buffers in (True, False):
                ends = Ends(
                    connect=False,
                    far=Limits(**vars(LIMITS) | {"window": 2048, "max_payload": 4096, "max_streams": 3}),
                )
                service = Undecided() if case.begin.__name__ == "asked" else Acceptor()
                ends.far.register("vda", service)
                dialling = case.begin.__name__ == "dialling"
                end = RawEnd(ends.near if dialling else ends.far, buffers=buffers)
                del self.events[:]
                if case.begin.__name__ not in ("accepting", "dialling"):
                    end.send(hello())
                if case.begin.__name__ in ("asked", "incoming"):
                    end.send(opening(1))
                if case.begin.__name__ == "incoming":
                    service.streams[0].pauseProducing()
                for data in case.data:
                    end.send(data)
                kind, _, payload = end.said()[-1]
                self.assertIn(kind, (REJECT, BYE), name)
                self.assertEqual(payload[:2], u16(case.code), name)
                self.assertTrue(end.lost, name)
                self.assertFalse(ends.far.is_up, name)
                self.assertEqual(len(self.lines(case.code.name)), 1, (name, self.lines()))
                self.assertFalse([event for event in self.events if "log_failure" in event], name)
                self.assertFalse([line for line in self.lines() if "\n" in line], name)
                for protocol in getattr(service, "protocols", ()):
                    self.assertIsNotNone(protocol.reason, name)
                    self.assertIn(protocol.reason.type, (SessionLost, StreamReset), name)
                ends.clock.advance(CLOSE_SECONDS + 0.1)
                self.assert_no_timers(ends)
                checked += 1
        self.assertGreater(checked, 150)
        self.assertTrue(stream.connected and other.near.is_up and other.far.is_up)

    def test_log_injection(self) -> None:
        """Whatever a peer calls itself, or says, is one line of the log."""
        ends = Ends(connect=False)
        end = RawEnd(ends.near)
        end.send(frame(REJECT, 0, u16(34) + u16(1) + b"busy\nlink far: up, daemon \x1b[32mhv-b\x00"))
        end = RawEnd(ends.far)
        end.send(hello() + frame(BYE, 0, u16(999) + b"a\nb\x1b[2J" + b"x" * 3000))
        for line in self.lines():
            self.assertTrue(line.isprintable(), line)
            self.assertLess(len(line), 500)

    def test_wrong_version_is_told_on_both_sides(self) -> None:
        """Each operator reads both versions."""
        ends = Ends(connect=False)
        end = RawEnd(ends.far)
        end.send(hello(7))
        self.assertEqual(len(self.lines("VERSION_UNSUPPORTED", "version 7", "version 1")), 1)
        kind, _, payload = end.said()[-1]
        self.assertEqual(kind, REJECT)
        self.assertIn(b"version 7", payload)
        self.assertIn(b"version 1", payload)
