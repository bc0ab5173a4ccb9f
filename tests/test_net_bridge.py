"""Bridges: two programs on UNIX sockets that talk as if the link were not there."""

from __future__ import annotations

import os
import socket
import struct

from twisted.internet.defer import ensureDeferred
from twisted.internet.task import deferLater

from relaymux.core import flight
from relaymux.core.budget import Budget
from relaymux.net.peer import Identity, Peer
from relaymux.net.turns import LONG_TURN, SHORT_TURN, TALK_SECONDS, turns_for
from tests.bridges import LARGE, LIMITS, BridgeTestCase
from tests.peers import stamped
from tests.sockets import reactor

NEAR, FAR = Identity("hv-near", b"n" * 16), Identity("hv-far", b"f" * 16)


class DataTests(BridgeTestCase):
    """Bytes."""

    async def test_both_ways(self) -> None:
        """Far more than any limit, both ways at once, on several connections."""
        self.serve()
        jobs = []
        for number in range(3):
            near, far = await self.pair()
            for sender, receiver, stream in ((near, far, 2 * number), (far, near, 2 * number + 1)):
                jobs.append((sender, receiver, stamped(LARGE, stream)))
        await self.exchange(jobs)

    async def test_stalled_reader(self) -> None:
        """A program that does not read stops the other one, and no other connection."""
        self.serve()
        near, far = await self.pair()
        sent = await self.overfill(near)
        other_near, other_far = await self.pair()
        data = stamped(LARGE, 7)
        await self.exchange([(other_near, other_far, data), (other_far, other_near, data)])
        near.shutdown(socket.SHUT_WR)
        self.assertEqual(len(await self.ended(far)), sent)

    async def test_last_words(self) -> None:
        """A program that writes and closes at once: all of it arrives, be the link stalled meanwhile."""
        for stalled in (False, True):
            if not stalled:
                self.serve()
            near, far = await self.pair()
            if stalled:
                self.connection.stall()
            data = self.fill(near)
            near.close()
            await self.turns(20)
            if stalled:
                self.connection.release()
            self.same(await self.ended(far), data)

    async def test_last_words_before_the_answer(self) -> None:
        """The same for one that has gone before the far end was even asked."""
        self.serve()
        self.connection.stall()
        near = self.connect()
        near.send(b"all I have to say")
        near.close()
        await self.turns(20)
        self.connection.release()
        far = await self.accept()
        self.assertEqual(await self.ended(far), b"all I have to say")

    async def test_little_makes_turns_short(self) -> None:
        """A small message, sent or received, is noticed where the length of turns is decided."""
        self.serve()
        near, far = await self.pair()
        turns = turns_for(reactor)
        for sender, receiver in ((near, far), (far, near)):
            began = reactor.seconds()
            self.assertEqual(LONG_TURN, turns.limit(began + TALK_SECONDS))
            await self.exchange([(sender, receiver, b"a request")])
            self.assertEqual(SHORT_TURN, turns.limit(began + TALK_SECONDS))

    async def test_bulk_beside_talk(self) -> None:
        """Bulk both ways, and questions with their answers: all of it arrives, though bulk is held back."""
        self.patch(flight, "FLIGHT_BYTES", 4096)
        self.patch(flight, "FASTEST", 0)
        self.near = Peer(reactor, "to-far", NEAR, LIMITS, dialing=True, budget=Budget(LARGE))
        self.far = Peer(reactor, "to-near", FAR, LIMITS, dialing=False, budget=Budget(LARGE))
        await self.close_link()
        await self.link()
        self.serve()
        asker, answerer = await self.pair()
        jobs = []
        for number in range(2):
            near, far = await self.pair()
            for sender, receiver, stream in ((near, far, 2 * number), (far, near, 2 * number + 1)):
                jobs.append((sender, receiver, stamped(LARGE, stream)))
        done = ensureDeferred(self.exchange(jobs))
        asked = 0
        while not done.called:
            for sender, receiver in ((asker, answerer), (answerer, asker)):
                await self.send(sender, stamped(64, asked % 1000))
                self.assertEqual(await self.read(receiver, 64), stamped(64, asked % 1000))
            asked += 1
        await done
        self.assertTrue(asked)

    async def test_server_speaks_first(self) -> None:
        """Nothing waits for a first byte of the client: an NBD server greets."""
        self.serve()
        near, far = await self.pair()
        await self.send(far, b"NBDMAGIC")
        self.assertEqual(await self.read(near, 8), b"NBDMAGIC")

    async def test_totals(self) -> None:
        """Each connection's bytes are logged and added up, on both sides."""
        self.serve()
        for number in range(3):
            near, far = await self.pair()
            data = stamped(1000 * (number + 1))
            await self.send(near, data)
            await self.read(far, len(data))
            await self.send(far, b"ok")
            await self.read(near, 2)
            near.close()
            far.close()
        await self.until(lambda: not self.open_connections, "all connections were over")
        for totals, sent, received in ((self.listener.totals, 6000, 6), (self.dialer.totals, 6, 6000)):
            self.assertEqual((totals.opened, totals.failed), (3, 0))
            self.assertEqual((totals.sent, totals.received), (sent, received))
        self.assertEqual(len(self.lines("ram: connection 2 closed", "(2000 bytes) sent", self.near_path)), 1)

    async def test_many_short_connections(self) -> None:
        """Two hundred that come and go; nothing is lost, mixed up or left open."""
        self.serve()
        for first in range(0, 200, 20):
            batch = [self.connect() for _ in range(20)]
            for number, near in enumerate(batch, first):
                near.send(stamped(64, number))
                if number % 2:
                    near.close()
                else:
                    near.shutdown(socket.SHUT_WR)
            for number in range(first, first + 20):
                far = await self.accept()
                self.assertEqual(await self.ended(far), stamped(64, number))
                if not number % 2:
                    await self.send(far, stamped(64, ~number & 0xFFFF))
                far.close()
            for number, near in enumerate(batch, first):
                if not number % 2:
                    self.assertEqual(await self.ended(near), stamped(64, ~number & 0xFFFF))
                    near.close()
        await self.until(lambda: not self.open_connections, "all connections were over")
        await self.turns()
        self.assertLessEqual(len(self.open_descriptors() - self.open_sockets), 2)


class OrderTests(BridgeTestCase):
    """Connections keep their order."""

    async def check_order(self, count: int) -> None:
        for number in range(count):
            far = await self.accept()
            self.assertEqual(await self.read(far, 4), struct.pack("!I", number))

    async def test_late_accepts(self) -> None:
        """They are dialled in the order of accepting, at once, though nobody accepts there yet."""
        self.serve(backlog=50)
        for number in range(40):
            self.connect().send(struct.pack("!I", number))
        await self.until(lambda: self.dialer.totals.opened == 40, "all were dialled")
        await self.check_order(40)

    async def test_full_backlog(self) -> None:
        """A full backlog is waited for: every connection arrives, in order."""
        self.serve(backlog=1)
        for number in range(12):
            self.connect().send(struct.pack("!I", number))
        await deferLater(reactor, 0.2)
        self.assertLess(self.dialer.totals.opened, 12)
        await self.check_order(12)
        self.assertEqual(self.dialer.totals.failed, 0)

    async def test_backlog_that_stays_full(self) -> None:
        """One that nobody ever accepts fails in time, and says why on both sides."""
        self.serve(backlog=0, open_timeout=0.5)
        first = self.connect()
        await self.until(lambda: self.dialer.totals.opened == 1, "the first was dialled")
        near = self.connect()
        self.assertEqual(await self.ended(near), b"")
        await self.until(lambda: self.dialer.totals.failed == 1, "the failure was counted")
        await self.nothing(first)
        self.assertEqual(len(self.lines("stream ram", "failed", self.near_path, "to-far")), 1)
        self.assertEqual(len(self.lines("stream ram", "failed", self.far_path, "to-near")), 1)

    async def test_socket_vanishes_while_many_wait(self) -> None:
        """All that wait for a full backlog are refused when its socket goes, however many there are."""
        self.serve(backlog=0)
        near = [self.connect() for _ in range(60)]
        await self.until(lambda: self.dialer.totals.opened == 1, "the first was dialled")
        await self.turns()
        os.unlink(self.far_path)
        for program in near[1:]:
            self.assertEqual(await self.ended(program), b"")
        self.assertEqual(self.dialer.totals.failed, 59)

    async def test_given_up_while_waiting(self) -> None:
        """Connections that have gone while they waited are not dialled on, and hold up nobody."""
        self.serve(backlog=0, open_timeout=0.3, far_open_timeout=1000.0)
        self.connect()
        await self.until(lambda: self.dialer.totals.opened == 1, "the first was dialled")
        near = [self.connect() for _ in range(3)]
        for program in near:
            self.assertEqual(await self.ended(program), b"")
        await self.until(lambda: len(self.dialer.connections._open) == 1, "the far end knows, too")
        await self.accept()
        late = self.connect()
        late.send(b"late")
        far = await self.accept()
        self.assertEqual(await self.read(far, 4), b"late")


class RefusalTests(BridgeTestCase):
    """What cannot be had."""

    async def test_nobody_there(self) -> None:
        """The local program sees its connection end, at once; both logs say which socket, whose, and why."""
        self.serve(listen=False)
        near = self.connect()
        near.send(b"unread")
        with self.assertRaises(ConnectionResetError):
            await self.read(near)
        [here] = self.lines("stream ram: connection 1 failed", self.near_path, "to-far")
        self.assertIn("no such socket", here)
        self.assertNotIn(self.far_path, here, "no path travels")
        [there] = self.lines("stream ram: connection 1 failed", self.far_path, "to-near")
        self.assertIn("no such socket", there)
        self.assertEqual((self.listener.totals.failed, self.listener.totals.opened), (1, 0))

    async def test_left_over_socket(self) -> None:
        """The same for a socket file that nobody listens on."""
        self.serve()
        self.program.close()
        self.assertEqual(await self.ended(self.connect()), b"")
        self.assertEqual(len(self.lines("nobody listens", self.far_path)), 1)

    async def test_unknown_service(self) -> None:
        """A name that the other daemon does not have."""
        self.serve()
        self.far.unregister("ram")
        self.assertEqual(await self.ended(self.connect()), b"")
        self.assertEqual(len(self.lines("connection 1 failed", "'ram'", self.near_path)), 1)
        self.far.register("ram", self.dialer)

    async def test_no_link(self) -> None:
        """Without a link the connection waits for the open timeout, and is closed then."""
        self.serve(open_timeout=0.3)
        self.connection.cut()
        near = self.connect()
        await self.nothing(near)
        self.assertEqual(await self.ended(near), b"")
        self.assertEqual(len(self.lines("connection 1 failed", "not up", "0.3 s", "to-far")), 1)

    async def test_link_comes_in_time(self) -> None:
        """... and is served when a link comes before."""
        self.serve()
        self.connection.cut()
        near = [self.connect() for _ in range(3)]
        for number, program in enumerate(near):
            program.send(bytes([number]))
        await self.turns()
        self.pump.stop()
        await self.link()
        for number in range(3):
            self.assertEqual(await self.read(await self.accept(), 1), bytes([number]))

    async def test_too_many_connections(self) -> None:
        """More than max-connections are refused here, with a line in the log; one that ends makes room."""
        self.serve(max_connections=2)
        near, far = await self.pair()
        await self.pair()
        self.assertEqual(await self.ended(self.connect()), b"")
        self.assertEqual(len(self.lines("max-connections", self.near_path)), 1)
        near.close()
        far.close()
        await self.until(lambda: self.near.open_streams == 1, "the first was over")
        await self.pair()

    async def test_too_many_connections_there(self) -> None:
        """The same at the far end, which tells the near one why."""
        self.serve(far_max_connections=1)
        await self.pair()
        self.assertEqual(await self.ended(self.connect()), b"")
        self.assertEqual(len(self.lines("refused", "max-connections", self.far_path)), 1)
        self.assertEqual(len(self.lines("connection 2 failed", "1 connections open", self.near_path)), 1)

    async def test_client_gone_before_the_answer(self) -> None:
        """A client that gives up while the far end is asked leaves nothing behind."""
        self.serve()
        self.connection.stall()
        self.connect().close()
        await self.turns()
        self.connection.release()
        far = await self.accept()
        self.assertEqual(await self.ended(far), b"")
        far.close()
        await self.until(lambda: not self.open_connections, "the stream was over")
