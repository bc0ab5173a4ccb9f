"""
Whose turn it is to be read, and how much at once: much while bulk is alone, little while somebody
talks beside it, and those who talk before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from socket import SO_SNDBUF, SOL_SOCKET, socket, socketpair
from typing import Any

from twisted.internet.protocol import Protocol
from twisted.internet.testing import MemoryReactorClock
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from relaymux.core.schedule import LITTLE
from relaymux.interfaces import IBufferReceiver
from relaymux.net.buffers import BufferPool
from relaymux.net.sockets import SocketTransport
from relaymux.net.turns import (
    LONG_TURN,
    MOST_EXPECTED,
    SHORT_TURN,
    TALK_SECONDS,
    ReadTurns,
    Talker,
    turns_for,
)


class ReadTurnsTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.turns = ReadTurns()
        self.disk = Talker(self.turns)
        self.control = Talker(self.turns)

    def test_bulk_alone_has_long_turns(self) -> None:
        for step in range(10):
            self.disk.passed(LONG_TURN, float(step))
            self.assertEqual(LONG_TURN, self.turns.limit(float(step)))

    def test_short_while_somebody_talks_and_long_again(self) -> None:
        self.disk.passed(LONG_TURN, 0.0)
        self.control.passed(64, 1.0)
        self.disk.passed(SHORT_TURN, 1.1)
        self.assertEqual(SHORT_TURN, self.turns.limit(1.1))
        self.control.passed(LITTLE, 1.0 + TALK_SECONDS - 0.01)
        self.assertEqual(SHORT_TURN, self.turns.limit(1.0 + TALK_SECONDS))
        self.assertEqual(LONG_TURN, self.turns.limit(1.0 + 2 * TALK_SECONDS))

    def test_answers_to_bulk_are_no_talk(self) -> None:
        """An NBD server answers each write of a disk with 16 bytes."""
        for step in range(100):
            self.disk.passed(LITTLE + 1, 0.01 * step)
            self.disk.passed(16, 0.01 * step)
            self.assertEqual(LONG_TURN, self.turns.limit(0.01 * step))

    def test_what_was_bulk_may_talk_later(self) -> None:
        self.disk.passed(LONG_TURN, 0.0)
        self.disk.passed(16, TALK_SECONDS)
        self.assertEqual(SHORT_TURN, self.turns.limit(TALK_SECONDS))

    def test_all_of_a_reactor_share_turns(self) -> None:
        class Reactor:
            pass

        one, other = Reactor(), Reactor()
        self.assertIs(turns_for(one), turns_for(one))
        self.assertIsNot(turns_for(one), turns_for(other))


@implementer(IBufferReceiver)
class Recorder(Protocol):
    """Notes how much it is given at once, and tells C{heard}."""

    def __init__(self) -> None:
        self.given: list[int] = []
        self.heard: Callable[[], object] = lambda: None

    def buffersReceived(self, buffers: Sequence[memoryview]) -> None:
        self.given.append(sum(map(len, buffers)))
        self.heard()

    def buffersWritten(self, count: int) -> None:
        pass


class SocketTurnsTests(SynchronousTestCase):
    """A socket with much to read, and another one that may talk."""

    def setUp(self) -> None:
        self.reactor: Any = MemoryReactorClock()
        self.far, self.disk = self.connect()
        _, self.control = self.connect()

    def connect(self) -> tuple[socket, SocketTransport]:
        ours, theirs = socketpair()
        self.addCleanup(theirs.close)
        self.addCleanup(ours.close)
        theirs.setsockopt(SOL_SOCKET, SO_SNDBUF, 1024 * 1024)
        transport = SocketTransport(self.reactor, ours, Recorder(), BufferPool())
        transport.begin()
        return theirs, transport

    def read(self, count: int) -> list[int]:
        """@return: what was handed on in each of the turns that C{count} bytes took."""
        receiver = self.disk.protocol
        assert isinstance(receiver, Recorder)
        receiver.given.clear()
        self.far.sendall(bytes(count))
        while sum(receiver.given) < count:
            self.disk.doRead()
        return list(receiver.given)

    def test_much_at_once_while_nobody_talks(self) -> None:
        self.assertEqual([3 * SHORT_TURN], self.read(3 * SHORT_TURN))

    def test_little_at_once_while_somebody_talks(self) -> None:
        self.control.passed(64)
        self.assertEqual([SHORT_TURN] * 3, self.read(3 * SHORT_TURN))
        self.reactor.advance(TALK_SECONDS)
        self.assertEqual([3 * SHORT_TURN], self.read(3 * SHORT_TURN))


class LittleFirstTests(SynchronousTestCase):
    """A socket that brings bulk, and others that bring little now and then."""

    def setUp(self) -> None:
        self.reactor: Any = MemoryReactorClock()
        self.far, self.disk, self.bulk = self.connect()
        self.bring(self.far, self.disk, LITTLE + 1)
        self.guest, self.control, self.talk = self.talker()

    def connect(self) -> tuple[socket, SocketTransport, Recorder]:
        ours, theirs = socketpair()
        self.addCleanup(theirs.close)
        self.addCleanup(ours.close)
        recorder = Recorder()
        transport = SocketTransport(self.reactor, ours, recorder, BufferPool())
        transport.begin()
        return theirs, transport, recorder

    def talker(self) -> tuple[socket, SocketTransport, Recorder]:
        """@return: one that has said something just now."""
        theirs, transport, recorder = self.connect()
        self.bring(theirs, transport, 64)
        transport.passed(64)
        return theirs, transport, recorder

    def bring(self, theirs: socket, transport: SocketTransport, count: int) -> None:
        """C{count} bytes arrive, and the reactor sees them."""
        theirs.sendall(bytes(count))
        transport.doRead()

    def test_little_first(self) -> None:
        """What somebody says while bulk has its turn is read before the next one."""
        order: list[str] = []
        self.bulk.heard = lambda: order.append("bulk")
        self.talk.heard = lambda: order.append("talk")
        self.guest.sendall(b"x" * 64)
        self.bring(self.far, self.disk, 50_000)
        self.bring(self.far, self.disk, 50_000)
        self.assertEqual(order, ["talk", "bulk", "bulk"])
        self.assertEqual(self.talk.given, [64, 64])
        self.control.doRead()
        self.assertEqual(self.talk.given, [64, 64])

    def test_not_while_nobody_talks(self) -> None:
        """Bulk alone asks for nobody; the reactor brings what there is."""
        self.reactor.advance(TALK_SECONDS)
        self.guest.sendall(b"x")
        self.bring(self.far, self.disk, 50_000)
        self.assertEqual(self.talk.given, [64])
        self.control.doRead()
        self.assertEqual(self.talk.given, [64, 1])

    def test_not_those_who_were_silent(self) -> None:
        """Who has said nothing for long waits for the reactor, once."""
        theirs, other, heard = self.talker()
        self.reactor.advance(TALK_SECONDS)
        self.bring(self.guest, self.control, 1)
        self.control.passed(1)
        theirs.sendall(b"x")
        self.bring(self.far, self.disk, 50_000)
        self.assertEqual(heard.given, [64])
        other.doRead()
        theirs.sendall(b"x")
        self.bring(self.far, self.disk, 50_000)
        self.assertEqual(heard.given, [64, 1, 1])

    def test_not_bulk(self) -> None:
        """Two sources of bulk take turns as the reactor says."""
        self.bring(self.guest, self.control, LITTLE + 1)
        self.guest.sendall(bytes(50_000))
        self.bring(self.far, self.disk, 50_000)
        self.assertEqual(self.talk.given, [64, LITTLE + 1])

    def test_paused_by_what_was_said(self) -> None:
        """Bulk that is paused meanwhile is not read, and nothing of it is lost."""
        self.talk.heard = self.disk.pauseProducing
        self.guest.sendall(b"x")
        self.bring(self.far, self.disk, 50_000)
        self.assertEqual(self.bulk.given, [LITTLE + 1])
        self.disk.resumeProducing()
        self.disk.doRead()
        self.assertEqual(self.bulk.given, [LITTLE + 1, 50_000])

    def test_ended_by_what_was_said(self) -> None:
        """Bulk that is aborted, or closed, meanwhile is told nothing more."""
        for end in (self.disk.loseConnection, self.disk.abortConnection):
            self.talk.heard = end
            self.guest.sendall(b"x")
            self.bring(self.far, self.disk, 100)
            self.assertEqual(self.bulk.given, [LITTLE + 1])

    def test_paused_talker(self) -> None:
        """Who is paused is not read."""
        self.control.pauseProducing()
        self.guest.sendall(b"x")
        self.bring(self.far, self.disk, 50_000)
        self.assertEqual(self.talk.given, [64])

    def test_closed_by_another(self) -> None:
        """One of two that have something closes the other."""
        theirs, other, heard = self.talker()
        self.talk.heard = other.abortConnection
        heard.heard = self.control.abortConnection
        for guest in (self.guest, theirs):
            guest.sendall(b"x")
        self.bring(self.far, self.disk, 50_000)
        self.assertEqual(sorted([self.talk.given, heard.given]), [[64], [64, 1]])
        self.assertEqual(self.bulk.given, [LITTLE + 1, 50_000])

    def test_descriptor_used_again(self) -> None:
        """A socket that gets the number of a closed one does not get its place."""
        number = self.control.fileno()
        self.control.abortConnection()
        theirs, other, heard = self.connect()
        while other.fileno() != number:
            theirs, other, heard = self.connect()
        other.passed(1)
        theirs.sendall(b"x")
        self.bring(self.far, self.disk, 50_000)
        self.assertEqual(heard.given, [])

    def test_descriptor_used_again_before_the_end_was_told(self) -> None:
        """Nor does the late end of the closed one cost it its own."""
        number = self.control.fileno()
        self.control.abortConnection()
        theirs, other, heard = self.talker()
        while other.fileno() != number:
            theirs, other, heard = self.talker()
        self.reactor.advance(0)
        self.assertTrue(self.control.disconnected)
        theirs.sendall(b"x")
        self.bring(self.far, self.disk, 50_000)
        self.assertEqual(heard.given, [64, 1])

    def test_exception(self) -> None:
        """An exception of one's protocol ends that connection and no other."""

        def fail() -> None:
            raise RuntimeError("planted")

        self.talk.heard = fail
        self.guest.sendall(b"x")
        self.bring(self.far, self.disk, 50_000)
        self.assertEqual(self.bulk.given, [LITTLE + 1, 50_000])
        self.assertEqual(len(self.flushLoggedErrors(RuntimeError)), 1)
        self.assertTrue(self.control.disconnected)
        self.assertEqual(self.guest.recv(1), b"")

    def test_end_of_a_talker(self) -> None:
        """A peer that closes is noticed, and bulk goes on."""
        self.guest.close()
        self.bring(self.far, self.disk, 50_000)
        self.bring(self.far, self.disk, 50_000)
        self.assertTrue(self.control.disconnected)
        self.assertEqual(self.bulk.given, [LITTLE + 1, 50_000, 50_000])

    def test_so_many_at_most(self) -> None:
        """With many connections those that spoke last are looked at."""
        talkers = [self.talker() for _ in range(MOST_EXPECTED)]
        for theirs in (self.guest, talkers[0][0], talkers[-1][0]):
            theirs.sendall(b"x")
        self.bring(self.far, self.disk, 50_000)
        self.assertEqual(self.talk.given, [64])
        self.assertEqual(talkers[0][2].given, [64, 1])
        self.assertEqual(talkers[-1][2].given, [64, 1])
