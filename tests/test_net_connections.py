"""What the log tells of local connections: which disk, how far, who ended it, what is left over."""

from __future__ import annotations

import re
import socket

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone, ConnectionLost
from twisted.internet.task import deferLater
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from relaymux.errors import ErrorCode, GivenUp, SessionLost, StreamReset
from relaymux.net.amounts import exact_amount, rate, rough_amount
from relaymux.net.ending import Ending
from tests.bridges import LARGE, BridgeTestCase
from tests.peers import stamped
from tests.sockets import reactor
from tests.test_core_nbd import GREETING, QEMU


class DiskTests(BridgeTestCase):
    """Disks have their names."""

    async def handshake(self, near: socket.socket, far: socket.socket) -> None:
        """What QEMU's NBD client and server say, each waiting for the other."""
        for side, data in QEMU:
            sender, receiver = (near, far) if side == "client" else (far, near)
            await self.send(sender, data)
            self.assertEqual(await self.read(receiver, len(data)), data)

    async def test_names(self) -> None:
        """Each connection to one socket has its disk, on both sides, and in its last line, too."""
        self.serve("web1.nbd", is_nbd=True)
        near, far = await self.pair()
        await self.handshake(near, far)
        named = "is disk drive-virtio-disk0, 128.0 MiB (134217728 bytes)"
        self.assertEqual(len(self.lines("stream web1.nbd: connection 1", named)), 2)
        near2, far2 = await self.pair()
        self.assertEqual(len(self.lines(named)), 2)
        for program, other in ((near, far), (near2, far2)):
            program.close()
            self.assertEqual(await self.read(other), b"")
            other.close()
        last = "connection 1 (disk drive-virtio-disk0) closed by the program "
        await self.until(lambda: len(self.lines(last)) == 2, "both have said how it ended")
        last = "connection 2 closed by the program "
        await self.until(lambda: len(self.lines(last)) == 2, "the same of the one that said nothing")

    async def test_bytes_are_the_same(self) -> None:
        """What follows a handshake, what is none, and what comes in pieces, all go their way."""
        self.serve(is_nbd=True)
        for first in (b"", GREETING, GREETING[:7], b"QEVM"):
            near, far = await self.pair()
            await self.send(far, first)
            self.assertEqual(await self.read(near, len(first)), first)
            await self.exchange([(near, far, stamped(LARGE, 1)), (far, near, stamped(LARGE, 2))])
        near, far = await self.pair()
        await self.handshake(near, far)
        await self.exchange([(near, far, stamped(LARGE, 1)), (far, near, stamped(LARGE, 2))])

    async def test_not_watched_for_long(self) -> None:
        """Once it is decided, one way or the other, nothing looks at the bytes any more."""
        self.serve(is_nbd=True)
        near, far = await self.pair()
        bridges = [next(iter(section.connections._open)) for section in self.sections]
        self.assertNotIn(None, [bridge.watcher for bridge in bridges])
        await self.handshake(near, far)
        self.assertEqual([bridge.watcher for bridge in bridges], [None, None])

    async def test_other_sockets_are_not_watched(self) -> None:
        """A migration is nobody's disk, whatever it says."""
        self.serve()
        near, far = await self.pair()
        await self.handshake(near, far)
        self.assertEqual(self.lines("is disk"), [])


class ProgressTests(BridgeTestCase):
    """How far a connection is."""

    async def test_disk(self) -> None:
        """Bytes to the disk's server, of the disk's size, whichever way that is for a side."""
        self.serve(is_nbd=True)
        near, far = await self.pair()
        await DiskTests.handshake(self, near, far)  # type: ignore[arg-type]
        sending = Deferred.fromCoroutine(self.send(near, bytes(LARGE)))
        self.assertEqual(len(await self.read(far, LARGE)), LARGE)
        await sending
        for section in self.sections:
            section.connections.tell_progress()
        lines = self.lines(
            "connection 1 (disk drive-virtio-disk0): 4.0 MiB carried to a disk of 128.0 MiB (3 %)"
        )
        self.assertEqual(len(lines), 2)
        for line in lines:
            self.assertRegex(line, r"\), [\d.]+ [KMG]iB/s$")

    async def test_only_what_moves(self) -> None:
        """A connection that was quiet since the last time is not mentioned, nor one with a word or two."""
        self.serve()
        near, far = await self.pair()
        connections = self.listener.connections
        connections.tell_progress()
        await self.send(near, b"keepalive")
        await self.read(far, 9)
        connections.tell_progress()
        self.assertEqual(self.lines("/s"), [])
        data = bytes(100_000)
        sending = self.exchange_one(near, far, data)
        await sending
        connections.tell_progress()
        connections.tell_progress()
        [line] = self.lines("/s")
        self.assertIn("stream ram: connection 1: 97.7 KiB sent, 0 bytes received, ", line)

    async def exchange_one(self, near: socket.socket, far: socket.socket, data: bytes) -> None:
        sent = self.send(near, data)
        await sent
        self.assertEqual(await self.read(far, len(data)), data)


class OtherSocketTests(BridgeTestCase):
    """A program that may be found at one of several sockets."""

    async def test_first_that_answers(self) -> None:
        """No socket, one that is left over, one that is served: the last is taken, and named in the log."""
        left_over, served = f"{self.path}/left-over", f"{self.path}/served"
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(left_over)
        self.serve(listen=False, others=(left_over, served))
        self.far_path = served
        self.program = self.far_socket()
        near, far = await self.pair()
        await self.exchange([(near, far, stamped(100_000, 1)), (far, near, stamped(100_000, 2))])
        near.close()
        far.close()
        await self.until(lambda: len(self.lines("closed by", f"; {served}")) == 1, "it was told")

    async def test_none(self) -> None:
        """All are named in the log here, and no path travels to the peer."""
        others = (f"{self.path}/b", f"{self.path}/c")
        self.serve(listen=False, others=others)
        near = self.connect()
        self.assertEqual(await self.ended(near), b"")
        await self.until(lambda: len(self.lines("connection 1 failed")) == 2, "both sides have told")
        [here] = self.lines("connection 1 failed", "link to-near")
        for path in (self.far_path, *others):
            self.assertIn(f"{path}: there is no such socket", here)
        [there] = self.lines("connection 1 failed", "link to-far")
        self.assertIn("its socket: there is no such socket", there)
        self.assertNotIn(self.path, there.replace(self.near_path, ""))


class LineTests(BridgeTestCase):
    """What is said of a connection that was open for long, and of one that was not."""

    async def test_one_that_stays(self) -> None:
        """Its being open is said on both sides while it lasts, and its end again, without what was said."""
        self.serve()
        near, far = await self.pair()
        for path, link in ((self.near_path, "to-far"), (self.far_path, "to-near")):
            said = ("stream ram: connection 1 open", f", {path}, ", f"stream 1 of link {link}")
            await self.until(lambda said=said: len(self.lines(*said)) == 1, "it was said")  # type: ignore[misc]
        near.close()
        far.close()
        await self.until(lambda: len(self.lines("connection 1 closed by")) == 2, "both have told its end")
        self.assertEqual(self.lines("closed by", "of link"), [])

    async def test_one_that_is_over_soon(self) -> None:
        """One line on each side says all that two would."""
        self.serve()
        near, far = await self.pair()
        near.close()
        far.close()
        for path, link in ((self.near_path, "to-far"), (self.far_path, "to-near")):
            said = ("stream ram: connection 1 closed by", f"; {path}, stream 1 of link {link}")
            await self.until(lambda said=said: len(self.lines(*said)) == 1, "it was said")  # type: ignore[misc]
        self.assertEqual(self.lines("connection 1 open"), [])


class EndTests(BridgeTestCase):
    """Whose decision an end was, and what it left."""

    def told(self, *words: str) -> list[str]:
        return [line for line in self.lines("stream ram: connection", *words) if " sent, " in line]

    async def test_closed(self) -> None:
        """Who closes first has decided it, and each side says so from where it is."""
        self.serve()
        for closing, here in ((0, self.listener), (1, self.dialer)):
            self.events.clear()
            pair = await self.pair()
            await self.send(pair[0], b"question")
            await self.read(pair[1], 8)
            pair[closing].close()
            self.assertEqual(await self.read(pair[1 - closing]), b"")
            pair[1 - closing].close()
            await self.until(lambda: len(self.told()) == 2, "both sides have told")
            [line] = self.told("closed by the program here")
            self.assertIn(self.near_path if here is self.listener else self.far_path, line)
            self.assertEqual(len(self.told("closed by the program at the other end")), 1)
            self.assertEqual(len(self.told("relaymux has delivered all it had")), 2)

    async def test_reset_there(self) -> None:
        """A program that goes away with bytes unread: the sender's side says how many did not arrive."""
        self.serve()
        near, far = await self.pair()
        sent = await self.overfill(near)
        far.recv(10)
        far.close()
        await self.ended(near)
        await self.until(lambda: len(self.told("ended as an error")) == 2, "both sides have told")
        [line] = self.told(self.near_path)
        self.assertIn("the program at the other end ", line)
        match = re.search(r"; (\d+) bytes are not known to have been delivered at the other end;", line)
        assert match is not None, line
        self.assertGreater(int(match[1]), 0)
        self.assertLessEqual(int(match[1]), sent)
        [line] = self.told(self.far_path)
        self.assertIn("the connection to the program here broke: ", line)
        self.assertRegex(line, r"; \d+ bytes were not taken by the program here;")

    async def test_link_lost(self) -> None:
        """relaymux's own decision is called so, with the link and the reason."""
        self.serve()
        near, far = await self.pair()
        sent = self.fill(near)
        await self.turns(20)
        self.connection.cut()
        await self.ended(far)
        await self.ended(near)
        await self.until(lambda: len(self.told("ended as an error")) == 2, "both sides have told")
        for path, link in ((self.near_path, "to-far"), (self.far_path, "to-near")):
            [line] = self.told(path)
            self.assertIn(f"link {link}: ", line)
            self.assertRegex(line, "ended as an error: (relaymux gave up|the daemons lost their session): ")
        self.assertTrue(sent)

    async def test_given_up_before_it_began(self) -> None:
        """A program that connects and leaves while nobody answers."""
        self.serve(listen=False, far_open_timeout=5)
        self.connection.stall()
        near = self.connect()
        await self.until(lambda: self.listener.connections._open, "it was accepted")
        near.send(b"x")
        await deferLater(reactor, 0.05)
        near.close()
        self.connection.cut()
        await self.until(lambda: not self.open_connections, "it was over")
        self.assertEqual(len(self.lines("stream ram: connection 1 failed")), 1)


class EndingTests(SynchronousTestCase):
    """L{Ending}: what is said of which order of events."""

    DONE = Failure(ConnectionDone())

    def test_first_closer(self) -> None:
        """An end in order was decided by who ended first, whatever follows in order."""
        for here, said in (
            (True, "closed by the program here"),
            (False, "closed by the program at the other end"),
        ):
            ending = Ending()
            ending.finished(here=here)
            ending.finished(here=not here)
            self.assertFalse(ending.is_clean)
            ending.lost(self.DONE, here=not here)
            self.assertTrue(ending.is_clean)
            self.assertEqual(str(ending), said)
            ending = Ending()
            ending.lost(self.DONE, here=here)
            self.assertEqual(str(ending), said)

    def test_first_error(self) -> None:
        """An error outweighs an end in order, and is the cause of later ones."""
        ending = Ending()
        ending.lost(self.DONE, here=True)
        ending.lost(Failure(StreamReset(ErrorCode.LOCAL_RESET)), here=False)
        ending.lost(Failure(ConnectionLost("later")), here=True)
        self.assertFalse(ending.is_clean)
        self.assertEqual(
            str(ending), "ended as an error: the program at the other end reset it: LOCAL_RESET (20)"
        )

    def test_causes(self) -> None:
        """Each kind of error names who is responsible."""
        for error, here, said in (
            (ConnectionLost("gone"), True, "the connection to the program here broke: "),
            (StreamReset(ErrorCode.LOCAL_CLOSED), False, "the program at the other end closed it before"),
            (StreamReset(ErrorCode.ABORTED), False, "the other daemon gave it up: ABORTED (22)"),
            (StreamReset(999), False, "the other daemon ended it: code 999"),
            (
                SessionLost("no connection for 60 s", ErrorCode.SESSION_EXPIRED),
                False,
                "relaymux gave up: no c",
            ),
            (SessionLost("x", ErrorCode.SHUTTING_DOWN), False, "a daemon was stopped: x"),
            (SessionLost("x", ErrorCode.PEER_RESTARTED), False, "the other daemon is another process now: x"),
            (SessionLost("x", ErrorCode.UNKNOWN_SESSION), False, "the other daemon was restarted, or has gi"),
            (GivenUp("x"), False, "relaymux gave up: x"),
            (SessionLost("x", ErrorCode.ACK_ERROR), False, "the daemons lost their session: x"),
            (ValueError("x"), False, "relaymux ended it: x"),
        ):
            ending = Ending()
            ending.lost(Failure(error), here=here)
            self.assertTrue(str(ending).startswith(f"ended as an error: {said}"), str(ending))


class AmountTests(SynchronousTestCase):
    """Numbers for people."""

    def test_amounts(self) -> None:
        """One to read, one to add up; below a KiB they are the same."""
        self.assertEqual((exact_amount(1023), rough_amount(1023)), ("1023 bytes", "1023 bytes"))
        self.assertEqual(exact_amount(1536 * 1024), "1.5 MiB (1572864 bytes)")
        self.assertEqual(rough_amount(2**60), "1048576.0 TiB")

    def test_rates(self) -> None:
        """No division by no time."""
        self.assertEqual((rate(3 * 1024, 2), rate(5, 2), rate(5, 0)), ("1.5 KiB/s", "2 bytes/s", "-"))
