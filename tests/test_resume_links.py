"""Links that resume a session, and links that must not: old, forged, silent and slow ones."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from relaymux.core.link import HANDSHAKE_SECONDS
from relaymux.core.resume import Role, encode_resume
from relaymux.errors import ErrorCode
from relaymux.testing.ends import MemoryTransport
from relaymux.testing.memory import MemoryConnection
from tests.resumecase import SILENCE, PeerTests, Raw, changed
from tests.resuming import SMALL, Hosts, Talker, stamped
from tests.wire import BYE, DATA, REJECT, RESUME, RESUMED, frame, u16


class SplitBrainTests(PeerTests):
    """More than one link at a time, and who may have which."""

    def test_old_link_at_the_acceptor(self) -> None:
        """A link that only the dialling side has lost is replaced; what it still brings is void."""
        for flavour in (True, False):
            hosts = self.pair(buffers=flavour)
            near, far = self.open(hosts)
            old = hosts.wire
            old.stall(old.server)
            near.say(stamped(1, 3000), finish=False)
            hosts.run(0.0)
            held_back = bytes(old._pipes[old.server].held)
            self.assertGreater(len(held_back), 1000)
            old.cut(old.client)
            hosts.connect()
            self.feed(old.server, held_back[:1500])
            hosts.run(0.0)
            self.feed(old.server, held_back[1500:])
            self.feed(old.server, frame(BYE, 0, u16(0)))
            hosts.run(0.0)
            self.assertFalse(old.server.connected)
            self.assert_same(far.received, stamped(1, 3000))
            near.say(stamped(2, 3000))
            hosts.run(0.0)
            self.assert_same(far.received, stamped(1, 3000) + stamped(2, 3000))
            self.assert_works(hosts)

    def feed(self, end: MemoryTransport, data: bytes) -> None:
        """Bytes reach the protocol of C{end}, whatever its connection thinks."""
        end.protocol.dataReceived(data)

    def test_old_link_at_the_dialer(self) -> None:
        """The same the other way round: after a silence the dialling side has left its old link."""
        hosts = self.pair()
        near, far = self.open(hosts)
        old = hosts.wire
        old.stall(old.client)
        far.say(stamped(1, 3000), finish=False)
        hosts.run(SILENCE + 0.1)
        self.assertFalse(hosts.a.peer.is_up)
        held_back = bytes(old._pipes[old.client].held)
        hosts.connect()
        self.feed(old.client, held_back[:1000])
        hosts.run(0.0)
        self.feed(old.client, held_back[1000:])
        hosts.run(0.0)
        self.assert_same(near.received, stamped(1, 3000))
        far.say(stamped(2, 3000))
        hosts.run(0.0)
        self.assert_same(near.received, stamped(1, 3000) + stamped(2, 3000))

    def test_old_link_has_no_session(self) -> None:
        """The protocol of a link that was replaced knows nothing of the session any more."""
        hosts = self.pair()
        old = hosts.b.link
        hosts.wire.cut(hosts.wire.client)
        hosts.connect()
        hosts.run(0.0)
        self.assertIsNone(old.link.session)
        self.assertTrue(old.link.ended)
        self.assertIsNot(hosts.b.link, old)
        self.assertIs(hosts.b.link.link.session, hosts.b.session)

    def test_old_link_that_cannot_be_closed(self) -> None:
        """A replaced link whose transport goes on, both ways: it neither hears nor says anything."""
        hosts = self.pair()
        near, far = self.open(hosts)
        old, protocol = hosts.wire, hosts.b.link
        old.server.abortConnection = lambda: None  # type: ignore[method-assign]
        old.stall(old.server)
        near.say(stamped(1, 3000), finish=False)
        hosts.run(0.0)
        held_back = bytes(old._pipes[old.server].held)
        old.cut(old.client)
        hosts.connect()
        hosts.run(0.0)
        self.assertTrue(old.server.connected)
        self.feed(old.server, held_back)
        far.say(stamped(2, 3000), finish=False)
        protocol.resumeProducing()
        hosts.run(6.0)
        self.assertIs(hosts.b.link.transport, hosts.wire.server)
        self.assertEqual(bytes(old._pipes[old.client].held), b"")
        self.assert_same(far.received, stamped(1, 3000))
        self.assert_same(near.received, stamped(2, 3000))
        self.feed(old.server, frame(BYE, 0, u16(0)))
        hosts.run(60.0)
        self.assertIs(hosts.b.link.transport, hosts.wire.server)
        self.assert_untouched(near, far)

    def test_higher_generation_wins(self) -> None:
        """
        Of two that resume one session the higher generation has it, in whichever order they come;
        an equal one is stale.
        """
        hosts = self.pair()
        self.open(hosts)
        hosts.wire.cut()
        self.assertEqual(self.raw(hosts, self.resume_frame(hosts.b, 5)).frames()[0][0], RESUMED)
        first = hosts.b.link
        for generation in (0, 4, 5):
            [(kind, _, payload)] = self.raw(hosts, self.resume_frame(hosts.b, generation)).frames()
            self.assertEqual((kind, payload[:2]), (REJECT, u16(ErrorCode.STALE_GENERATION)))
        self.assertIs(hosts.b.link, first)
        self.assertEqual(self.raw(hosts, self.resume_frame(hosts.b, 6)).frames()[0][0], RESUMED)
        self.assertIsNot(hosts.b.link, first)
        self.assertEqual(hosts.b.held.generation, 6)

    def test_races(self) -> None:
        """
        Many at once, in any order: one link is left, of the highest generation, and the streams are
        unhurt.
        """
        hosts = self.pair()
        _, far = self.open(hosts)
        hosts.wire.cut()
        for _ in range(30):
            base = hosts.b.held.generation
            generations = [base + random.randint(1, 4) for _ in range(4)]
            for generation in generations:
                self.raw(hosts, self.resume_frame(hosts.b, generation))
            self.assertEqual(hosts.b.held.generation, max(generations))
            self.assertTrue(hosts.b.peer.is_up)
        self.assert_untouched(far)

    def test_stale_dialer_tries_again(self) -> None:
        """A dialler that is told STALE counts on, and is back."""
        hosts = self.pair()
        near, far = self.open(hosts)
        hosts.wire.cut()
        hosts.b.held.generation = 3
        for _ in range(3):
            hosts.connect()
            hosts.run(0.0)
            self.assertFalse(hosts.a.peer.is_up)
        hosts.connect()
        hosts.run(0.0)
        self.assertTrue(hosts.a.peer.is_up)
        self.assert_untouched(near, far)
        self.assert_works(hosts)


class ForgeryTests(PeerTests):
    """Whoever does not have the key changes nothing."""

    def test_ten_thousand(self) -> None:
        """Forged RESUMEs of all kinds: all refused in the same words, and the live link is not touched."""
        hosts = self.pair()
        near, far = self.open(hosts)
        link, timers = hosts.b.link, len(hosts.clock.getDelayedCalls())
        good = self.resume_frame(hosts.b, 1)[12:]
        seed = int(os.environ.get("RELAYMUX_SEED") or random.randrange(2**32))
        dice = random.Random(seed)
        answers: Counter[tuple[int, bytes]] = Counter()
        for number in range(10_000):
            forged = bytearray(good)
            if number % 3 == 0:
                forged[70:102] = dice.randbytes(32)
            elif number % 3 == 1:
                forged[dice.randrange(10, 102)] ^= 1 << dice.randrange(8)
            else:
                forged[10:] = dice.randbytes(len(good) - 10)
            [(kind, _, payload)] = self.raw(hosts, frame(RESUME, 0, bytes(forged))).frames()
            answers[kind, payload] += 1
            self.last.client.loseConnection()
        [(kind, payload)] = answers
        self.assertEqual((kind, payload[:2]), (REJECT, u16(ErrorCode.UNKNOWN_SESSION)), f"seed {seed}")
        hosts.run(0.0)
        self.assertIs(hosts.b.link, link)
        self.assertEqual(len(hosts.clock.getDelayedCalls()), timers)
        self.assertEqual(hosts.b.held.generation, 0)
        near.say(stamped(1, 5000))
        hosts.run(0.0)
        self.assert_same(far.received, stamped(1, 5000))

    def test_no_session(self) -> None:
        """Without a session the answer is the same as to a wrong proof, to the letter."""
        hosts = self.pair()
        true = self.resume_frame(hosts.b, 1)[12:]
        forged = frame(RESUME, 0, true[:-1] + bytes([true[-1] ^ 1]))
        with_session = self.raw(hosts, forged).frames()
        without = self.raw(Hosts(), forged).frames()
        self.assertEqual(with_session, without)

    def test_late_bytes_of_the_old_link(self) -> None:
        """What an old link still brings after a new one has resumed reaches nobody, and changes nothing."""
        hosts = self.pair()
        near, far = self.open(hosts)
        near.say(stamped(1, 300), finish=False)
        hosts.run(0.0)
        old = hosts.b.peer._link
        assert old is not None
        hosts.wire.cut(hosts.wire.client)
        hosts.connect()
        hosts.run(1.0)
        heard = hosts.b.session.rx_next
        old.buffersReceived([memoryview(frame(DATA, 1, b"late"))])
        hosts.run(0.0)
        self.assertEqual(hosts.b.session.rx_next, heard)
        self.assert_same(far.received, stamped(1, 300))
        self.assert_untouched(near, far)
        self.assert_works(hosts)

    def test_identity(self) -> None:
        """The right key under another name: refused; and the right one is let in afterwards."""
        hosts = self.pair()
        near, far = self.open(hosts)
        hosts.wire.cut()
        for identity in ("dns:hv-c.example", ""):
            [(kind, _, payload)] = self.raw(hosts, self.resume_frame(hosts.b, 1), identity=identity).frames()
            self.assertEqual((kind, payload[:2]), (REJECT, u16(ErrorCode.UNKNOWN_SESSION)))
        self.assertFalse(hosts.b.peer.is_up)
        hosts.connect()
        hosts.run(0.0)
        self.assert_untouched(near, far)
        self.assert_works(hosts)

    def test_recorded(self) -> None:
        """
        A RESUME that was heard on another connection: stale, or not for this one if the transport
        can tell.
        """
        for exporting, code in ((False, ErrorCode.STALE_GENERATION), (True, ErrorCode.UNKNOWN_SESSION)):
            hosts = self.pair(exporting=exporting)
            near, far = self.open(hosts)
            hosts.wire.cut()
            recorded: list[bytes] = []

            def record(wire: Any, recorded: list[bytes] = recorded) -> None:
                recorded.append(bytes(wire._pipes[wire.server].held))

            hosts.plan = [record]
            hosts.connect()
            hosts.run(0.0)
            self.assertTrue(hosts.a.peer.is_up)
            self.assertEqual(recorded[0][0], RESUME)
            link = hosts.b.link
            [(kind, _, payload)] = self.raw(hosts, recorded[0]).frames()
            self.assertEqual((kind, payload[:2]), (REJECT, u16(code)))
            self.assertIs(hosts.b.link, link)
            self.assert_untouched(near, far)

    def test_bound_to_the_connection(self) -> None:
        """
        With key material of the connection: resumed as ever; with another's: refused, the session
        stays.
        """
        hosts = self.pair(exporting=True)
        near, far = self.open(hosts)
        for _ in range(3):
            hosts.wire.cut()
            hosts.connect()
            hosts.run(0.0)
            self.assertTrue(hosts.a.peer.is_up)
        self.assert_untouched(near, far)
        self.assert_works(hosts)

    def test_impostor(self) -> None:
        """
        Somebody else answers the RESUME: whatever he says but REJECT, the
        session stays as it is, and is resumed with the right one.
        """
        hosts = self.pair()
        near, far = self.open(hosts, Talker(stamped(1, 3000), finish=False))
        good = encode_resume(hosts.b.held._ticket, Role.ACCEPTOR, 1, 0, b"")
        hosts.wire.cut()
        end = hosts.a.session.replay.end
        for payload in (
            good[:70] + bytes(32),
            good[:69] + b"?" + good[70:],
            encode_resume(hosts.b.held._ticket, Role.DIALER, 5, end, b""),  # an echo
            encode_resume(hosts.b.held._ticket, Role.ACCEPTOR, 1, end, b""),  # of another generation
            good[:50],
            b"",
        ):
            client = hosts.a.peer.build_link()
            impostor = Raw()
            wire = MemoryConnection(client, impostor, clock=hosts.clock)
            if payload is good:
                continue
            wire.server.write(frame(RESUMED, 0, payload))
            hosts.run(0.1)
            self.assertEqual([kind for kind, _, _ in impostor.frames()], [RESUME, REJECT])
            self.assertFalse(hosts.a.peer.is_up)
            self.assert_untouched(near, far)
        hosts.connect()
        hosts.run(0.0)
        self.assert_same(far.received, stamped(1, 3000))
        self.assert_works(hosts)

    def test_offsets_that_do_not_fit(self) -> None:
        """
        One that has the key but is wrong about the bytes: nothing can be saved, both sides' streams
        are errors.
        """
        for wrong_side in ("a", "b"):
            hosts = self.pair()
            near, far = self.open(hosts, Talker(stamped(1, 100), finish=False))
            hosts.run(1.0)
            hosts.wire.cut()
            getattr(hosts, wrong_side).session.rx_next += 1
            hosts.connect()
            hosts.run(0.0)
            self.assert_failed(near, ErrorCode.OFFSET_MISMATCH)
            self.assert_failed(far, ErrorCode.OFFSET_MISMATCH)
            hosts.connect()
            hosts.run(0.0)
            self.assert_works(hosts)


class LostAnswerTests(PeerTests):
    """What happens to the handshake itself."""

    def test_resumed_lost(self) -> None:
        """RESUMED never arrives, ten times: the next generation has the session, and nothing is hurt."""
        hosts = self.pair()
        near, far = self.open(hosts, Talker(stamped(1, 9000), finish=False))
        far.say(stamped(2, 9000), finish=False)
        hosts.wire.cut()
        near.say(stamped(3, 9000), finish=False)
        for attempt in range(10):
            hosts.plan = [lambda wire: wire.stall(wire.client)]
            hosts.connect()
            hosts.run(1.0)
            self.assertTrue(hosts.b.peer.is_up)
            self.assertFalse(hosts.a.peer.is_up)
            self.assertEqual(hosts.b.held.generation, attempt + 1)
            hosts.wire.cut()
        hosts.connect()
        hosts.run(0.0)
        self.assert_same(far.received, stamped(1, 9000) + stamped(3, 9000))
        self.assert_same(near.received, stamped(2, 9000))

    def test_one_way(self) -> None:
        """
        The way back is blocked while resuming: the dialling side gives the link up, and the session
        outlives that.
        """
        hosts = Hosts()
        self.serve(hosts.b)
        hosts.dial()
        near, far = self.open(hosts, Talker(stamped(1, 9000), finish=False))
        block: Callable[[Any], object] = lambda wire: wire.stall(wire.client)  # noqa: E731
        hosts.plan = [block] * 4
        hosts.wire.cut()
        hosts.run(4 * HANDSHAKE_SECONDS)
        self.assertFalse(hosts.a.peer.is_up)
        self.assert_untouched(near, far)
        hosts.run(20.0, lambda: hosts.a.peer.is_up)
        self.assert_untouched(near, far)
        near.say(stamped(2, 9000), finish=False)
        hosts.run(0.0)
        self.assert_same(far.received, stamped(1, 9000) + stamped(2, 9000))

    def test_delayed_answer(self) -> None:
        """RESUMED comes after the next RESUME was sent: only the newer link counts."""
        hosts = self.pair()
        near, far = self.open(hosts)
        hosts.wire.cut()
        hosts.plan = [lambda wire: wire.stall(wire.client)]
        hosts.connect()
        slow = hosts.wire
        hosts.run(HANDSHAKE_SECONDS + 0.1)
        hosts.connect()
        slow.release()
        hosts.run(0.0)
        self.assertTrue(hosts.a.peer.is_up)
        self.assertIs(hosts.a.link.transport, hosts.wire.client)
        self.assertIs(hosts.b.link.transport, hosts.wire.server)
        self.assert_untouched(near, far)
        self.assert_works(hosts)

    def test_delayed_question(self) -> None:
        """RESUME comes after the next one was answered: it is stale, and the newer link is not touched."""
        hosts = self.pair()
        near, far = self.open(hosts)
        hosts.wire.cut()
        hosts.plan = [lambda wire: wire.stall(wire.server)]
        hosts.connect()
        slow = hosts.wire
        hosts.run(1.0)
        late = bytes(slow._pipes[slow.server].held)
        slow.cut(slow.client)
        hosts.connect()
        hosts.run(0.0)
        slow.server.protocol.dataReceived(late)
        hosts.run(0.0)
        self.assertIs(hosts.b.link.transport, hosts.wire.server)
        self.assert_untouched(near, far)
        self.assert_works(hosts)


class SilenceTests(PeerTests):
    """Links that die without a word, and links that only seem to."""

    def test_both_ways(self) -> None:
        """Nothing arrives any more: both sides give the link up after the silence, and not before."""
        for buffers in (True, False):
            hosts = self.pair(buffers=buffers)
            talkers = self.open(hosts)
            hosts.run(6.0)  # pings were exchanged
            heard = hosts.clock.seconds()
            hosts.wire.stall()
            hosts.run(SILENCE - 1.0 - 1.1)
            self.assertTrue(hosts.a.peer.is_up and hosts.b.peer.is_up)
            hosts.run(heard + SILENCE + 0.1 - hosts.clock.seconds())
            self.assertFalse(hosts.a.peer.is_up or hosts.b.peer.is_up)
            self.assert_untouched(*talkers)
            hosts.connect()
            hosts.run(0.0)
            self.assert_works(hosts)

    def test_one_way(self) -> None:
        """
        Only one direction is dead: whoever hears nothing finds out, and the other one when that one
        leaves.
        """
        for deaf in ("a", "b"):
            hosts = self.pair()
            talkers = self.open(hosts)
            hosts.run(6.0)
            hosts.wire.stall(hosts.wire.client if deaf == "a" else hosts.wire.server)
            hosts.run(SILENCE + 0.1)
            self.assertFalse(getattr(hosts, deaf).peer.is_up)
            self.assert_untouched(*talkers)
            hosts.connect()
            hosts.run(0.0)
            self.assert_works(hosts)

    def test_dead_with_everything_full(self) -> None:
        """The same with every buffer on the way full: nothing that waits to be sent delays it."""
        limits = changed(SMALL, window=1 << 20, replay=1 << 20)
        hosts = self.pair(limits=limits, capacity=2000)
        near, far = self.open(hosts)
        hosts.wire.stall()
        near.say(stamped(1, 300_000), finish=False)
        far.say(stamped(2, 300_000), finish=False)
        hosts.run(SILENCE + 0.1)
        self.assertFalse(hosts.a.peer.is_up or hosts.b.peer.is_up)
        hosts.connect()
        hosts.run(10.0)
        self.assert_same(near.received, stamped(2, 300_000))
        self.assert_same(far.received, stamped(1, 300_000))

    def test_less_patient_side(self) -> None:
        """With different silences each keeps its own, and an idle link is alive for both."""
        hosts = self.pair(limits=changed(SMALL, silence=3.0), other=changed(SMALL, silence=30.0))
        talkers = self.open(hosts)
        hosts.run(300.0)
        self.assertTrue(hosts.a.peer.is_up and hosts.b.peer.is_up)
        hosts.wire.stall()
        hosts.run(3.1)
        self.assertFalse(hosts.a.peer.is_up)
        self.assertTrue(hosts.b.peer.is_up)
        self.assert_untouched(*talkers)

    def test_idle(self) -> None:
        """A link on which nobody says anything for an hour is alive."""
        hosts = self.pair()
        talkers = self.open(hosts)
        hosts.run(3600.0)
        self.assertEqual(len(hosts.wires), 1)
        self.assertTrue(hosts.a.peer.is_up and hosts.b.peer.is_up)
        self.assert_untouched(*talkers)

    def trickle(self, hosts: Hosts, seconds: float, every: float, to_server: int, to_client: int) -> None:
        """Let so many bytes arrive at either end every so many seconds, and no more."""
        wire = hosts.wire
        wire.stall()
        until = hosts.clock.seconds() + seconds
        while hosts.clock.seconds() < until:
            for end, count in ((wire.server, to_server), (wire.client, to_client)):
                pipe = wire._pipes[end]
                piece = bytes(pipe.held[:count])
                del pipe.held[:count]
                pipe.total += len(piece)
                if piece:
                    end._deliver(piece)
            hosts.run(every)

    def test_very_slow(self) -> None:
        """A byte now and then is a sign of life, however little it is of a frame: no false alarm."""
        hosts = self.pair(limits=changed(SMALL, window=1 << 20, replay=1 << 20))
        near, far = self.open(hosts)
        near.say(stamped(1, 100_000), finish=False)
        far.say(stamped(2, 100_000), finish=False)
        self.trickle(hosts, 1800.0, SILENCE - 0.5, 1, 1)
        self.assertTrue(hosts.a.peer.is_up and hosts.b.peer.is_up)
        self.assertEqual(len(hosts.wires), 1)

    def test_saturated(self) -> None:
        """
        A slow link that is full in one direction, for minutes, with pings far behind the data, is
        alive.
        """
        hosts = self.pair(limits=changed(SMALL, window=1 << 20, replay=1 << 20), capacity=4000)
        talkers = [self.open(hosts)[0] for _ in range(4)]
        for number, talker in enumerate(talkers):
            talker.say(stamped(number, 300_000), finish=False)
        self.trickle(hosts, 300.0, 0.5, 500, 4000)
        self.assertTrue(hosts.a.peer.is_up and hosts.b.peer.is_up)
        self.assertEqual(len(hosts.wires), 1)
        hosts.wire.release()
        hosts.run(10.0)
        for number, served in enumerate(self.served_by_b.talkers):
            self.assert_same(served.received, stamped(number, 300_000))

    def test_short_stalls(self) -> None:
        """Stalls of 5 and 14 s, again and again, are no loss."""
        hosts = self.pair()
        near, far = self.open(hosts)
        data = b""
        for number in range(20):
            piece = stamped(number, 2000)
            data += piece
            near.say(piece, finish=False)
            hosts.wire.stall()
            hosts.run(5.0 if number % 2 else 9.9)
            hosts.wire.release()
            hosts.run(0.5)
        self.assertEqual(len(hosts.wires), 1)
        self.assert_same(far.received, data)
