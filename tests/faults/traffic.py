"""
Programs at both ends of some connections, as threads with blocking sockets.

Each connection has two flows of stamped bytes.  What is known of a flow: how
many bytes the kernel took from the sender, how many arrived and were right,
the hash of both, and how it ended.
"""

from __future__ import annotations

import hashlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.faults.content import BLOCK, Checker, WrongContent, block

__all__ = ["PATIENCE", "Conversation", "Flow", "Traffic", "wait_until"]

#: Seconds for anything that is to happen at all, on a machine with other things to do.
PATIENCE = 180.0

#: Bytes read at once.
_READ = 256 * 1024


def wait_until(
    condition: Callable[[], object], what: str, seconds: float = PATIENCE, explain: Callable[[], str] = str
) -> float:
    """
    @param explain: more for the message.
    @return: how many seconds it took.
    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise AssertionError(f"not within {seconds:g} s: {what}\n{explain()}")
        time.sleep(0.01)
    return time.monotonic() - began


class Flow:
    """
    One direction of a connection.

    @ivar number: in the stamps.
    @ivar size: bytes to send; then comes the half-close.
    @ivar sent: bytes that the kernel took.
    @ivar end: how the receiver's input ended: empty while it did not, C{"eof"},
        or the error's name.
    @ivar ended_at: when that was.
    @ivar half_closed: whether at that moment only this direction was closed.
    @ivar send_error: the error that the sender got, if any.
    @ivar wrong: what was wrong with the content.
    """

    def __init__(self, number: int, size: int, source: socket.socket, target: socket.socket) -> None:
        self.number = number
        self.size = size
        self.sent = 0
        self.end = self.send_error = ""
        self.ended_at = self.send_ended_at = 0.0
        self.half_closed = False
        self.wrong: WrongContent | None = None
        self.may_read = threading.Event()
        self.may_read.set()
        self._source, self._target = source, target
        self._checker = Checker(number)
        self._hashes = hashlib.sha256(), hashlib.sha256()
        self._threads = [
            threading.Thread(target=run, name=f"flow {number:#x} {run.__name__}", daemon=True)
            for run in (self._send, self._receive)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), f"{thread.name} hangs: {self}"

    @property
    def received(self) -> int:
        return self._checker.position

    @property
    def over(self) -> bool:
        """Whether the sender and the receiver have come to an end."""
        return not any(thread.is_alive() for thread in self._threads)

    def __str__(self) -> str:
        error = f", sender: {self.send_error}" if self.send_error else ""
        return (
            f"flow {self.number:#x}: {self.sent:,} of {self.size:,} bytes sent, {self.received:,} received,"
            f" end {self.end or 'not reached'}{error}"
        )

    def check(self) -> None:
        """@raise WrongContent: what arrived was wrong."""
        if self.wrong is not None:
            raise self.wrong

    def assert_complete(self) -> None:
        """Everything arrived, once and in order, and then the half-close."""
        self.check()
        assert (self.sent, self.received, self.end) == (self.size, self.size, "eof"), str(self)
        sent, received = (digest.hexdigest() for digest in self._hashes)
        assert sent == received, f"{self}: hashes {sent} and {received}"

    def assert_failed(self) -> None:
        """What arrived is a strict prefix, and its end could not be taken for a half-close."""
        self.check()
        assert self.end and self.received < self.size, f"not a strict prefix: {self}"
        assert not self.half_closed, f"ended with a half-close alone: {self}"

    def _send(self) -> None:
        try:
            for number in range((self.size + BLOCK - 1) // BLOCK):
                data = memoryview(block(self.number, number))[: self.size - number * BLOCK]
                while data:
                    count = self._source.send(data)
                    self._hashes[0].update(data[:count])
                    self.sent += count
                    data = data[count:]
            self._source.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.send_error = type(error).__name__
            self.send_ended_at = time.monotonic()

    def _receive(self) -> None:
        buffer = memoryview(bytearray(_READ))
        try:
            while True:
                self.may_read.wait(PATIENCE)
                count = self._target.recv_into(buffer)
                if not count:
                    break
                self._checker.feed(buffer[:count])
                self._hashes[1].update(buffer[:count])
        except WrongContent as error:
            self.wrong = error
            self.end = "wrong"
        except OSError as error:
            self.ended_at = time.monotonic()
            self.end = type(error).__name__
        else:
            self.ended_at = time.monotonic()
            self.half_closed = not _is_closed(self._target)
            self.end = "eof"


def _is_closed(end: socket.socket) -> bool:
    """Whether the other side has closed its socket, not only shut its output."""
    poll = select.poll()
    poll.register(end, 0)  # which asks for POLLHUP, too
    return bool(poll.poll(0))


class Conversation:
    """
    One connection through the daemons.

    @ivar near: the socket of the program that connected.
    @ivar far: the one that was accepted.
    @ivar up: the flow from near to far.
    @ivar down: the other.
    """

    def __init__(self, number: int, near: socket.socket, far: socket.socket, up: int, down: int) -> None:
        self.near, self.far = near, far
        self.up = Flow(2 * number, up, near, far)
        self.down = Flow(2 * number + 1, down, far, near)

    @property
    def flows(self) -> tuple[Flow, Flow]:
        return self.up, self.down

    def close(self) -> None:
        for end in (self.near, self.far):
            end.close()


class Traffic:
    """
    Several conversations.

    @ivar conversations: in the order of their connecting.
    """

    _numbers = iter(range(0x10, 0x8000))

    def __init__(self, near: Path, far: Path) -> None:
        """
        @param near: the socket that one daemon listens on.
        @param far: where the other one connects to, listened on from now on.
        """
        self.conversations: list[Conversation] = []
        self._near = near
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(str(far))
        self.listening.listen(64)
        self.listening.settimeout(PATIENCE)

    def connect(self) -> socket.socket:
        """@return: a new connection to the near daemon."""
        near = socket.socket(socket.AF_UNIX)
        near.settimeout(PATIENCE)
        near.connect(str(self._near))
        return near

    def accept(self) -> socket.socket:
        """@return: the next connection from the far daemon."""
        far, _ = self.listening.accept()
        far.settimeout(PATIENCE)
        return far

    def open(self, streams: int, up: int, down: int) -> list[Conversation]:
        """
        Begin some conversations.

        @param up: bytes of each from near to far; @param down: and back.
        """
        made = []
        for _ in range(streams):
            near = self.connect()
            made.append(Conversation(next(self._numbers), near, self.accept(), up, down))
        self.conversations += made
        for conversation in made:
            for flow in conversation.flows:
                flow.start()
        return made

    @property
    def flows(self) -> Iterable[Flow]:
        return [flow for conversation in self.conversations for flow in conversation.flows]

    @property
    def over(self) -> bool:
        """Whether all flows are."""
        return all(flow.over for flow in self.flows)

    @property
    def received(self) -> int:
        """Bytes that arrived, of all flows."""
        return sum(flow.received for flow in self.flows)

    @property
    def size(self) -> int:
        """Bytes that are to arrive."""
        return sum(flow.size for flow in self.flows)

    def check(self) -> None:
        """@raise WrongContent: something wrong has arrived so far."""
        for flow in self.flows:
            flow.check()

    def wait_received(self, count: int, seconds: float = PATIENCE) -> None:
        """Wait until this many bytes have arrived."""

        def reached() -> bool:
            self.check()
            return self.received >= count or self.over

        wait_until(reached, f"{count:,} bytes received", seconds, self.__str__)

    def join(self) -> None:
        """Wait until all flows are over."""
        began = time.monotonic()
        last, since = -1, began
        while not self.over:
            self.check()
            now = time.monotonic()
            if self.received != last:
                last, since = self.received, now
            assert now - since < PATIENCE, f"nothing moves any more\n{self}"
            time.sleep(0.02)
        self.check()

    def assert_complete(self) -> None:
        """All is done, and complete."""
        self.join()
        for flow in self.flows:
            flow.assert_complete()

    def __str__(self) -> str:
        return "\n".join(map(str, self.flows))

    def hang_up(self) -> None:
        """Close the programs' sockets."""
        for conversation in self.conversations:
            conversation.close()

    def close(self) -> None:
        self.hang_up()
        self.listening.close()
