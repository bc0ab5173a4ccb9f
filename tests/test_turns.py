"""
How much is read of a socket at once: much while bulk is alone, little while somebody talks beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from relaymux.net.turns import LONG_TURN, SHORT_TURN, TALK_SECONDS, ReadTurns, Talker, turns_for


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
    """Notes how much it is given at once."""

    def __init__(self) -> None:
        self.given: list[int] = []

    def buffersReceived(self, buffers: Sequence[memoryview]) -> None:
        self.given.append(sum(map(len, buffers)))

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
