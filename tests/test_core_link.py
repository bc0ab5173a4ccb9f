"""A link by its bytes: handshake, liveness, acks, ends."""

from __future__ import annotations

from dataclasses import replace

from twisted.trial.unittest import SynchronousTestCase

from relaymux.core.events import (
    DataReceived,
    Event,
    HelloReceived,
    LinkEnded,
    StreamOpened,
    WelcomeReceived,
)
from relaymux.core.handshake import Hello, Limits, Welcome
from relaymux.core.link import ACK_SECONDS, CLOSED_SECONDS, HANDSHAKE_SECONDS, Link, LinkState
from relaymux.core.schedule import GREETING
from relaymux.errors import ErrorCode, LocalError
from tests.wire import (
    ACK,
    BYE,
    CLOSED,
    DATA,
    FIN,
    HELLO,
    INSTANCE,
    LIMITS,
    OPEN,
    OPENED,
    PING,
    PONG,
    REJECT,
    RESET,
    RESUME,
    WELCOME,
    Core,
    frame,
    hello,
    join,
    opening,
    parse,
    u16,
    u64,
    unhex,
    welcome,
)

INFINITY = float("inf")


def run(link: Link, data: bytes, now: float = 0.0) -> list[Event]:
    return list(link.receive([memoryview(data)], now))


class HandshakeTests(SynchronousTestCase):
    """From nothing to an open link."""

    def test_dialling(self) -> None:
        """The dialling side speaks first, and waits."""
        core = Core(dialing=True)
        said = core.raw()
        self.assertTrue(said.startswith(unhex("01 00 0000 00000000") + b"\x00\x00\x00\x41relaymux\x00\x01"))
        self.assertEqual([kind for kind, _, _ in parse(said)], [HELLO])
        self.assertIs(core.link.state, LinkState.WELCOME)
        [event] = run(core.link, welcome(name=b"hv-b"))
        assert isinstance(event, WelcomeReceived)
        self.assertEqual(event.welcome.name, "hv-b")
        self.assertEqual(event.welcome.limits, LIMITS)

    def test_accepting(self) -> None:
        """The accepting side says nothing before it has heard and decided."""
        link = Link(local=LIMITS, now=0.0)
        self.assertEqual(link.data_to_send(1000, 0.0), [])
        [event] = run(link, hello(name=b"hv-a"))
        assert isinstance(event, HelloReceived)
        self.assertEqual(event.hello, Hello("hv-a", INSTANCE, LIMITS))
        self.assertIs(link.state, LinkState.DECISION)
        self.assertEqual(link.data_to_send(1000, 0.0), [])
        link.welcome(Welcome("near", INSTANCE, LIMITS, session_id=b"s" * 16, resume_key=b"k" * 32))
        [(kind, stream_id, payload)] = parse(join(link.data_to_send(1000, 0.0)))
        self.assertEqual(
            (kind, stream_id, payload[:58]), (WELCOME, 0, b"relaymux\x00\x01" + b"s" * 16 + b"k" * 32)
        )

    def test_rejecting(self) -> None:
        """A rejection is a code, our version and a reason; it ends the link and no session."""
        link = Link(local=LIMITS, now=0.0)
        run(link, hello())
        self.assertEqual(
            link.reject(ErrorCode.BUSY, "busy"), LinkEnded(34, "busy", by_peer=False, session_over=False)
        )
        self.assertEqual(
            join(link.data_to_send(1000, 0.0)), unhex("05 00 0000 00000000 00000008 0022 0001 62757379")
        )
        self.assertTrue(link.ended)
        self.assertEqual(run(link, hello()), [])

    def test_rejected(self) -> None:
        """The reason why we are rejected is told; another version with both of them."""
        link = Core(dialing=True).link
        self.assertEqual(
            run(link, frame(REJECT, 0, u16(34) + u16(1) + b"busy")),
            [LinkEnded(34, "busy", by_peer=True, session_over=False)],
        )
        link = Core(dialing=True).link
        [event] = run(link, frame(REJECT, 0, u16(32) + u16(7) + b"you speak version 1, this side version 7"))
        assert isinstance(event, LinkEnded)
        self.assertEqual(event.code, ErrorCode.VERSION_UNSUPPORTED)
        self.assertIn("version 7", event.text)
        self.assertIn("version 1", event.text)

    def test_other_version(self) -> None:
        """Either side refuses another version, with both versions in what it says and in what it tells."""
        for dialing, data in ((False, hello(2)), (True, welcome(2))):
            core = Core(dialing=dialing)
            core.say()
            [event] = core.hear(data)
            assert isinstance(event, LinkEnded)
            self.assertEqual(event.code, ErrorCode.VERSION_UNSUPPORTED)
            [(kind, _, payload)] = core.say()
            self.assertEqual((kind, payload[:4]), (REJECT, u16(32) + u16(1)))
            for text in (event.text, payload[4:].decode()):
                self.assertIn("version 2", text)
                self.assertIn("version 1", text)

    def test_rejected_after_welcome(self) -> None:
        """A peer that cannot take our WELCOME may say why: that is no violation."""
        core = Core().shake()
        [event] = core.hear(frame(REJECT, 0, u16(35) + u16(1) + b"too late"))
        self.assertEqual(event, LinkEnded(35, "too late", by_peer=True, session_over=True))
        self.assertEqual(core.say(), [])

    def test_resuming_is_answered(self) -> None:
        """A RESUME that is none is a protocol error; whose it is, is for the holder of the session to say."""
        link = Link(local=LIMITS, now=0.0)
        [event] = run(link, frame(RESUME, 0, bytes(100)))
        assert isinstance(event, LinkEnded)
        self.assertEqual(event.code, ErrorCode.PROTOCOL_ERROR)

    def test_timeout(self) -> None:
        """A handshake that is not done within its time is over, on both sides."""
        for dialing in (False, True):
            core = Core(dialing=dialing)
            core.say()
            self.assertEqual(core.link.next_timer(), HANDSHAKE_SECONDS)
            self.assertEqual(core.link.handle_timer(HANDSHAKE_SECONDS - 0.01), [])
            [event] = core.link.handle_timer(HANDSHAKE_SECONDS)
            assert isinstance(event, LinkEnded)
            self.assertEqual(event.code, ErrorCode.HANDSHAKE_TIMEOUT)
            [(kind, _, payload)] = core.say()
            self.assertEqual((kind, payload[:2]), (REJECT, u16(35)))
            self.assertEqual(core.link.next_timer(), INFINITY)

    def test_dribbling_does_not_help(self) -> None:
        """The time for the handshake is absolute: a byte now and then does not extend it."""
        link = Link(local=LIMITS, now=0.0)
        for second, byte in enumerate(hello()[:4]):
            run(link, bytes([byte]), float(second))
        self.assertEqual(link.next_timer(), HANDSHAKE_SECONDS)

    def test_frames_with_the_handshake(self) -> None:
        """What comes in one read with HELLO or WELCOME is understood after it."""
        core = Core()
        self.assertEqual(core.hear(hello() + opening(1)), [StreamOpened(1, "vda")])
        core = Core(dialing=True)
        self.assertEqual(core.hear(welcome() + opening(2)), [StreamOpened(2, "vda")])

    def test_calls_in_the_wrong_state(self) -> None:
        """Welcoming nobody, or twice attaching, is the caller's mistake."""
        link = Link(local=LIMITS, now=0.0)
        with self.assertRaises(LocalError):
            link.welcome(Welcome("near", INSTANCE, LIMITS))
        core = Core().shake()
        with self.assertRaises(LocalError):
            core.link.attach(core.session, LIMITS, 0.0)


class LivenessTests(SynchronousTestCase):
    """Pings, silence, acks: all by the clock of the caller."""

    def test_ping_and_pong(self) -> None:
        """A PING is answered with the same number; of several the last."""
        core = Core().shake()
        core.hear(frame(PING, 0, u64(7)))
        self.assertEqual(core.raw(), unhex("08 00 0000 00000000 00000008 0000000000000007"))
        core.hear(b"".join(frame(PING, 0, u64(i)) for i in range(10_000)))
        self.assertEqual(core.say(), [(PONG, 0, u64(9999))])
        self.assertEqual(core.say(), [])

    def test_pinging(self) -> None:
        """A PING leaves three times per silence; its answer tells the round trip."""
        core = Core().shake()
        self.assertEqual(core.link.next_timer(), 5.0)
        self.assertEqual(core.link.handle_timer(4.9), [])
        self.assertEqual(core.say(), [])
        core.now = 5.0
        core.link.handle_timer(5.0)
        self.assertEqual(core.raw(), unhex("07 00 0000 00000000 00000008 0000000000000001"))
        core.now = 5.25
        core.hear(frame(PONG, 0, u64(1)))
        self.assertEqual(core.link.round_trip, 0.25)
        self.assertEqual(core.link.next_timer(), 10.0)

    def test_pong_that_was_not_asked_for(self) -> None:
        """An answer to another PING tells nothing and does no harm."""
        core = Core().shake()
        core.hear(frame(PONG, 0, u64(1)))
        core.link.handle_timer(5.0)
        core.hear(frame(PONG, 0, u64(77)))
        self.assertEqual(core.link.round_trip, 0.0)
        self.assertFalse(core.link.ended)

    def test_the_less_patient_decides(self) -> None:
        """Both speak often enough for whichever of them gives up first."""
        core = Core().shake(silence_ms=3000)
        self.assertEqual(core.link.next_timer(), 1.0)
        core = Core(limits=Limits(silence=6.0)).shake(silence_ms=60_000)
        self.assertEqual(core.link.next_timer(), 2.0)

    def test_silence(self) -> None:
        """A link on which nothing was heard for its time is over, and the session with it, or not yet."""
        core = Core().shake()
        for now in (5.0, 10.0):
            self.assertEqual(core.link.handle_timer(now), [])
        core.say()
        self.assertEqual(core.link.next_timer(), 15.0)
        [event] = core.link.handle_timer(15.0)
        assert isinstance(event, LinkEnded)
        self.assertEqual((event.code, event.by_peer, event.session_over), (36, False, False))
        self.assertEqual(core.say(), [], "nobody is there to hear it")

    def test_any_byte_counts(self) -> None:
        """Half a frame is a sign of life, too: a slow link is not a dead one."""
        core = Core().shake().opened_by_peer()
        slow = frame(DATA, 1, bytes(60))
        for second, byte in enumerate(slow):
            core.now = 10.0 * (second + 1)
            core.hear(bytes([byte]))
            for now in (core.now, core.now + 9.9):
                self.assertEqual(core.link.handle_timer(now), [])
            core.say()
        self.assertIsInstance(core.events[-1], DataReceived)

    def test_delayed_ack(self) -> None:
        """What was received is acknowledged a moment later, once, when little arrives."""
        core = Core().shake(replay=1 << 30)
        core.now = 1.0
        core.hear(opening(1))
        self.assertEqual(core.say(), [])
        self.assertEqual(core.link.next_timer(), 1.0 + ACK_SECONDS)
        core.now = 1.01
        core.hear(frame(DATA, 1, b"abc"))
        self.assertEqual(core.link.next_timer(), 1.0 + ACK_SECONDS, "later bytes do not put it off")
        core.link.handle_timer(1.0 + ACK_SECONDS)
        self.assertEqual(core.raw(), unhex("06 00 0000 00000000 00000008 000000000000001f"))
        core.link.handle_timer(4.9)
        self.assertEqual(core.say(), [])

    def test_delayed_closed(self) -> None:
        """CLOSED, which answers a FIN, leaves with the next thing to say, or with the ACK a moment later."""
        for speaks in (True, False):
            core = Core().shake(replay=1 << 30)
            core.now = 1.0
            core.opened_by_peer().hear(frame(DATA, 1, b"abc"))
            core.session.consumed(1, 3)
            self.assertEqual(core.link.next_timer(), 1.0 + ACK_SECONDS)
            core.now = 1.01
            core.hear(frame(FIN, 1, u64(3)))
            self.assertEqual((core.link.has_something, core.link.at_rest), (False, True))
            self.assertEqual(core.link.next_timer(), 1.01 + CLOSED_SECONDS)
            if speaks:
                core.session.finish(1)
                self.assertTrue(core.link.has_something)
                self.assertEqual([kind for kind, _, _ in core.say()], [CLOSED, FIN])
            core.link.handle_timer(1.01 + CLOSED_SECONDS)
            self.assertTrue(core.link.has_something)
            self.assertEqual([kind for kind, _, _ in core.say()], [ACK] if speaks else [ACK, CLOSED])
            self.assertFalse(core.link.has_something)

    def test_delayed_opened(self) -> None:
        """To an opener that has said a little already OPENED leaves with the answer, or a moment later."""
        for speaks in (True, False):
            core = Core().shake(replay=1 << 30)
            core.now = 1.0
            core.hear(opening(1))
            core.session.accept(1)
            core.hear(frame(DATA, 1, b"abc"))
            self.assertEqual((core.link.has_something, core.link.at_rest), (False, True))
            self.assertEqual(core.link.next_timer(), 1.0 + CLOSED_SECONDS)
            if speaks:
                core.session.write(1, b"xyz")
                self.assertTrue(core.link.has_something)
                self.assertEqual(core.say(), [(OPENED, 1, b""), (DATA, 1, b"xyz")])
            core.link.handle_timer(1.0 + CLOSED_SECONDS)
            self.assertEqual([kind for kind, _, _ in core.say()], [ACK] if speaks else [ACK, OPENED])
            self.assertFalse(core.link.has_something)

    def test_opened_at_once(self) -> None:
        """It waits for nothing if the opener has more to say, and neither does what is in front of it."""
        for size in (GREETING, GREETING + 1):
            core = Core(limits=replace(LIMITS, window=2 * GREETING, max_payload=2 * GREETING)).shake(
                replay=1 << 30
            )
            core.hear(opening(1))
            core.session.accept(1)
            core.hear(frame(DATA, 1, bytes(size)))
            self.assertEqual(core.link.has_something, size > GREETING)
        core = Core().shake(replay=1 << 30)
        core.hear(opening(1), opening(3))
        core.session.accept(1)
        core.session.accept(3)
        core.hear(frame(DATA, 1, b"abc"))
        self.assertTrue(core.link.has_something)
        core.hear(frame(DATA, 3, b"abc"))
        self.assertEqual(core.say(), [(OPENED, 1, b""), (OPENED, 3, b"")])
        core.session.reset(1, 17)
        core.hear(frame(DATA, 1, b"abc"))
        self.assertTrue(core.link.has_something, "RESET is no answer")
        self.assertEqual([kind for kind, _, _ in core.say()], [RESET])
        core = Core().shake(replay=1 << 30)
        core.hear(opening(1))
        core.session.accept(1)
        core.hear(frame(DATA, 1, b"abc"), opening(3))
        core.session.accept(3)
        core.hear(frame(DATA, 1, b"def"))
        self.assertTrue(core.link.has_something, "the opener of the second one waits")

    def test_last_closed(self) -> None:
        """Who opened a stream may let the last CLOSED wait; the other side has the place to give back."""
        near = Core(dialing=True).shake(replay=1 << 30)
        far = Core().shake(replay=1 << 30).opened_by_peer()
        self.assertEqual(near.session.open_stream("vda"), 1)
        near.say()
        near.hear(frame(OPENED, 1))
        for core, waits in ((near, True), (far, False)):
            core.session.finish(1)
            self.assertEqual([kind for kind, _, _ in core.say()], [FIN])
            core.hear(frame(CLOSED, 1, u16(0) + u64(0)) + frame(FIN, 1, u64(0)))
            self.assertEqual(core.session.streams, {})
            self.assertEqual(core.link.has_something, not waits)
        self.assertEqual(near.session.open_stream("vda"), 3)
        self.assertEqual([kind for kind, _, _ in near.say()], [CLOSED, OPEN])

    def test_closed_beside_bulk(self) -> None:
        """No fast path keeps CLOSED waiting: without an ACK that it could leave with it leaves by itself."""
        core = Core().shake(replay=1 << 30).opened_by_peer()
        core.hear(frame(FIN, 1, u64(0)))
        self.assertTrue(core.link.at_rest)
        session = core.session
        told, arrived = session.rx_next, session.rx_next + 1000
        core.link.carried([], session.replay.end, session.replay.acknowledged, arrived, told, core.now)
        self.assertTrue(core.link.has_something)
        self.assertEqual([kind for kind, _, _ in core.say()], [CLOSED])

    def test_prompt_closed(self) -> None:
        """Nothing waits that the consumer or an error caused, nor what is to be sent over another link."""
        core = Core().shake(replay=1 << 30).opened_by_peer().opened_by_peer(3)
        core.hear(frame(DATA, 1, b"abc") + frame(FIN, 1, u64(3)))
        self.assertFalse(core.link.has_something)
        core.session.consumed(1, 3)
        self.assertTrue(core.link.has_something)
        self.assertEqual([kind for kind, _, _ in core.say()], [CLOSED])
        core.hear(frame(FIN, 3, u64(0)))
        self.assertFalse(core.link.has_something)
        core.session.reset(1, ErrorCode.ABORTED)
        self.assertTrue(core.link.has_something)
        self.assertEqual([kind for kind, _, _ in core.say()], [CLOSED, RESET])
        core.opened_by_peer(5).hear(frame(FIN, 5, u64(0)))
        session = core.session
        core.link.detach()
        another = Core().shake(replay=1 << 30)
        another.link.session = session
        self.assertTrue(another.link.has_something)

    def test_early_ack(self) -> None:
        """... and at once when much arrives."""
        core = Core(limits=Limits(window=1 << 20)).shake(replay=8 * 4096).opened_by_peer()
        core.hear(frame(DATA, 1, bytes(4000)))
        self.assertEqual(core.say(), [])
        core.hear(frame(DATA, 1, bytes(100)))
        self.assertEqual(core.say(), [(ACK, 0, u64(len(opening(1)) + 4012 + 112))])
        self.assertEqual(core.link.next_timer(), 5.0)

    def test_ack_with_other_frames(self) -> None:
        """... or with a frame that leaves anyway, when it is worth it."""
        core = Core(limits=Limits(window=1 << 20)).shake(replay=8 * 4096).opened_by_peer()
        core.session.write(1, b"x")
        self.assertEqual(core.say(), [(DATA, 1, b"x")])
        core.hear(frame(DATA, 1, bytes(1024)))
        core.session.write(1, b"y")
        self.assertEqual(core.say(), [(ACK, 0, u64(core.session.rx_next)), (DATA, 1, b"y")])

    def test_link_frames_are_not_acknowledged(self) -> None:
        """Acks and pings cause no acks, or two idle sides would talk for ever."""
        core = Core().shake()
        core.hear(frame(ACK, 0, u64(0)), frame(PING, 0, u64(1)))
        self.assertEqual(core.say(), [(PONG, 0, u64(1))])
        self.assertEqual(core.link.next_timer(), 5.0)

    def test_timers_stop(self) -> None:
        """An ended link wants no more calls and makes nothing of them."""
        core = Core().shake()
        core.link.goodbye(37, "bye")
        self.assertEqual(core.link.next_timer(), INFINITY)
        self.assertEqual(core.link.handle_timer(1000.0), [])


class EndTests(SynchronousTestCase):
    """Saying and hearing goodbye."""

    def test_goodbye(self) -> None:
        """A goodbye says why; nothing follows it, and nothing is heard any more."""
        core = Core().shake().opened_by_peer()
        session = core.session
        session.write(1, b"never sent")
        self.assertEqual(core.link.goodbye(37, "bye"), LinkEnded(37, "bye", by_peer=False, session_over=True))
        self.assertEqual(core.raw(), unhex("09 00 0000 00000000 00000005 0025 627965"))
        self.assertEqual(core.raw(), b"")
        self.assertEqual(core.hear(frame(DATA, 1, b"abc")), [])

    def test_goodbye_heard(self) -> None:
        """The peer's goodbye ends the session; frames behind it are not looked at."""
        core = Core().shake()
        self.assertEqual(
            core.hear(frame(BYE, 0, u16(37) + b"bye") + b"\xff" * 50),
            [LinkEnded(37, "bye", by_peer=True, session_over=True)],
        )
        self.assertEqual(core.say(), [])

    def test_frames_before_a_fault(self) -> None:
        """Good frames in front of a bad one are told, in order; then the end, on the wire, too."""
        core = Core().shake().opened_by_peer()
        data, end = core.hear(frame(DATA, 1, b"abc") + frame(0x7F) + frame(DATA, 1, b"def"))
        assert isinstance(data, DataReceived) and isinstance(end, LinkEnded)
        self.assertEqual(b"".join(data.buffers), b"abc")
        self.assertEqual((end.code, end.session_over), (1, True))
        [(kind, _, payload)] = core.say()
        self.assertEqual((kind, payload[:2]), (BYE, u16(1)))

    def test_the_text_says_where(self) -> None:
        """The text of a fault names the stream, and the code only once."""
        core = Core().shake()
        [end] = core.hear(frame(OPENED, 77))
        assert isinstance(end, LinkEnded)
        self.assertIn("stream 77", end.text)
        self.assertIn("OPENED", end.text)
        self.assertNotIn("UNKNOWN_STREAM", end.text, "whoever shows it has the code beside it")

    def test_ended_by_an_answer(self) -> None:
        """An owner may end the link because of an event: what follows in the read is dropped."""
        core = Core().shake()
        heard = []
        for event in core.link.receive([memoryview(opening(1) + opening(3))], 0.0):
            heard.append(event)
            core.link.goodbye(37, "enough")
        self.assertEqual(heard, [StreamOpened(1, "vda")])
