"""Resuming by its bytes: RESUME and RESUMED, who is believed, and what is said again."""

from __future__ import annotations

import hashlib
import hmac
import struct
from typing import cast

from twisted.logger import Logger
from twisted.trial.unittest import SynchronousTestCase

from relaymux.core.events import (
    DataReceived,
    Event,
    LinkEnded,
    ResumedReceived,
    ResumeReceived,
    StreamOpened,
)
from relaymux.core.handshake import Hello, Limits
from relaymux.core.link import HANDSHAKE_SECONDS, Link, LinkState
from relaymux.core.resume import Resume, Role, Ticket, decode_resume, encode_resume
from relaymux.core.session import Session
from relaymux.errors import ErrorCode, LocalError, RemoteProtocolError
from relaymux.net.held import HeldSession
from relaymux.net.quietlog import QuietLog
from relaymux.net.streams import SessionStreams
from tests.wire import (
    ACK,
    BYE,
    DATA,
    LIMITS,
    OPEN,
    PING,
    REJECT,
    RESUME,
    RESUMED,
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

TICKET = Ticket(
    session_id=bytes(range(0x20, 0x30)),
    resume_key=bytes(range(0x40, 0x60)),
    dialer=bytes(range(16)),
    acceptor=bytes(range(0x10, 0x20)),
)

EXPORTER = bytes(range(0xA0, 0xC0))


def payload_of(
    role: int = 1,
    *,
    ticket: Ticket = TICKET,
    generation: int = 1,
    rx_next: int = 0,
    extensions: bytes = b"",
    exporter: bytes = b"",
    magic: bytes = b"relaymux",
    version: int = 1,
) -> bytes:
    """The payload of a RESUME (role 1) or RESUMED (role 2), made by hand."""
    fields = (
        magic
        + struct.pack("!H", version)
        + ticket.session_id
        + struct.pack("!I", generation)
        + ticket.dialer
        + ticket.acceptor
        + struct.pack("!Q", rx_next)
    )
    covered = b"relaymux resume 1" + bytes([role]) + fields
    covered += struct.pack("!H", len(extensions)) + extensions + exporter
    return fields + hmac.new(ticket.resume_key, covered, hashlib.sha256).digest() + extensions


class LayoutTests(SynchronousTestCase):
    """The two frames, byte by byte."""

    def test_resume(self) -> None:
        """A RESUME without an exporter: generation 1, 500 bytes received."""
        self.assertEqual(
            encode_resume(TICKET, Role.DIALER, 1, 500, b""),
            unhex(
                """
                72656c61796d7578 0001
                202122232425262728292a2b2c2d2e2f 00000001
                000102030405060708090a0b0c0d0e0f 101112131415161718191a1b1c1d1e1f
                00000000000001f4
                8fd13d34734986375996a240d9feb9a2 1ebd5723db99d45e59443d1cbf2950a1
                """
            ),
        )

    def test_resumed(self) -> None:
        """The answer differs in the role, which is in the proof alone; the exporter is in there, too."""
        self.assertEqual(
            encode_resume(TICKET, Role.ACCEPTOR, 0x01020304, 2**63, EXPORTER),
            unhex(
                """
                72656c61796d7578 0001
                202122232425262728292a2b2c2d2e2f 01020304
                000102030405060708090a0b0c0d0e0f 101112131415161718191a1b1c1d1e1f
                8000000000000000
                5e7c2235532b4dc1fa76945bfcfd5dfb 431fd1e54fa9d3417714c1bd1f07d630
                """
            ),
        )

    def test_by_hand(self) -> None:
        """Both sides' frames are what this module makes of the specification."""
        for role in Role:
            for exporter in (b"", EXPORTER):
                for generation, rx_next in ((1, 0), (2**32 - 1, 2**64 - 1)):
                    self.assertEqual(
                        encode_resume(TICKET, role, generation, rx_next, exporter),
                        payload_of(role, generation=generation, rx_next=rx_next, exporter=exporter),
                    )

    def test_decoding(self) -> None:
        """All fields are found."""
        resume = decode_resume(payload_of(generation=7, rx_next=1234567890123))
        self.assertEqual(
            (resume.session_id, resume.generation, resume.dialer, resume.acceptor, resume.rx_next),
            (TICKET.session_id, 7, TICKET.dialer, TICKET.acceptor, 1234567890123),
        )

    def test_secrets_stay_inside(self) -> None:
        """Neither the key nor a proof gets into a log by way of C{repr}."""
        resume = decode_resume(payload_of())
        for secret in (TICKET.resume_key, resume.proof):
            for shown in (repr(TICKET), repr(resume)):
                self.assertNotIn(repr(secret)[2:-1], shown)
                self.assertNotIn(secret.hex(), shown)

    def assert_malformed(self, payload: bytes, code: int = ErrorCode.PROTOCOL_ERROR) -> str:
        with self.assertRaises(RemoteProtocolError) as caught:
            decode_resume(payload)
        self.assertEqual(caught.exception.code, code)
        return str(caught.exception)

    def test_too_short(self) -> None:
        """Every payload that ends before the proof does is malformed."""
        whole = payload_of()
        for size in range(len(whole)):
            self.assert_malformed(whole[:size])

    def test_magic_and_version(self) -> None:
        """Of another protocol, and of another version: the latter names both."""
        self.assert_malformed(payload_of(magic=b"relaymus"))
        text = self.assert_malformed(payload_of(version=2), ErrorCode.VERSION_UNSUPPORTED)
        self.assertIn("version 2", text)
        self.assertIn("version 1", text)

    def test_version_comes_first(self) -> None:
        """Another version may have any layout behind the version."""
        self.assert_malformed(b"relaymux" + u16(9), ErrorCode.VERSION_UNSUPPORTED)

    def test_extensions(self) -> None:
        """Unknown extensions are ignored, and covered by the proof; broken ones are malformed."""
        extensions = struct.pack("!HH", 0x8001, 3) + b"abc" + struct.pack("!HH", 2, 0)
        resume = decode_resume(payload_of(extensions=extensions))
        self.assertTrue(resume.is_proven_by(TICKET, Role.DIALER, b""))
        for broken in (b"\0", extensions[:-1], extensions[:5], extensions + extensions[:7]):
            self.assert_malformed(payload_of(extensions=broken))

    def test_lengths_of_extensions(self) -> None:
        """Bytes cannot move between extensions and exporter: both lengths are covered."""
        one = struct.pack("!HH", 1, 0)
        moved = payload_of(exporter=one)
        resume = decode_resume(moved + one)
        self.assertFalse(resume.is_proven_by(TICKET, Role.DIALER, b""))


class ProofTests(SynchronousTestCase):
    """A proof is good for one session, one role, one connection, and these very fields."""

    def proven(self, payload: bytes, ticket: Ticket = TICKET, role: Role = Role.DIALER) -> bool:
        return decode_resume(payload).is_proven_by(ticket, role, EXPORTER)

    def test_right(self) -> None:
        """What the other daemon says is believed."""
        self.assertTrue(self.proven(payload_of(exporter=EXPORTER)))
        self.assertTrue(self.proven(payload_of(2, exporter=EXPORTER), role=Role.ACCEPTOR))

    def test_every_bit(self) -> None:
        """No bit of the frame can be changed, extensions included."""
        extensions = struct.pack("!HH", 0x8001, 2) + b"ab"
        whole = payload_of(generation=5, rx_next=77, extensions=extensions, exporter=EXPORTER)
        self.assertTrue(self.proven(whole))
        refused = 0
        for bit in range(len(whole) * 8):
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            try:
                self.assertFalse(self.proven(bytes(changed)), f"bit {bit} of {whole.hex()}")
            except RemoteProtocolError:
                refused += 1
        # Magic and version, and the lengths in the extension that make it end elsewhere.
        self.assertLess(refused, (10 + 4) * 8 + 1)

    def test_added_and_removed(self) -> None:
        """Nothing can be appended, and no extension removed."""
        extension = struct.pack("!HH", 1, 0)
        self.assertFalse(self.proven(payload_of(exporter=EXPORTER) + extension))
        self.assertFalse(self.proven(payload_of(extensions=extension, exporter=EXPORTER)[: -len(extension)]))

    def test_roles(self) -> None:
        """A question cannot be sent back as its answer, nor an answer be used as a question."""
        self.assertFalse(self.proven(payload_of(1, exporter=EXPORTER), role=Role.ACCEPTOR))
        self.assertFalse(self.proven(payload_of(2, exporter=EXPORTER), role=Role.DIALER))

    def test_exporter(self) -> None:
        """A proof for another connection, or for none in particular, is none for this one."""
        for exporter in (b"", EXPORTER[:-1], EXPORTER[:-1] + b"?", bytes(32)):
            self.assertFalse(self.proven(payload_of(exporter=exporter)))
        resume = decode_resume(payload_of(exporter=EXPORTER))
        self.assertFalse(resume.is_proven_by(TICKET, Role.DIALER, b""))

    def test_other_sessions(self) -> None:
        """Of a ticket, everything has to be right: the key, and who was talking to whom."""
        for field in ("session_id", "resume_key", "dialer", "acceptor"):
            values = {
                name: getattr(TICKET, name) for name in ("session_id", "resume_key", "dialer", "acceptor")
            }
            values[field] = bytes(byte ^ 1 for byte in values[field])
            other = Ticket(**values)
            self.assertTrue(self.proven(payload_of(ticket=other, exporter=EXPORTER), ticket=other))
            self.assertFalse(self.proven(payload_of(ticket=other, exporter=EXPORTER)), field)

    def test_names_without_key(self) -> None:
        """A right proof over another session's name, which only whoever has the key can make, is refused."""
        for field in ("session_id", "dialer", "acceptor"):
            values = {
                name: getattr(TICKET, name) for name in ("session_id", "resume_key", "dialer", "acceptor")
            }
            values[field] = bytes(16)
            self.assertFalse(self.proven(payload_of(ticket=Ticket(**values), exporter=EXPORTER)), field)


class Half:
    """
    One session whose peer is played by a test: links come and go.

    @ivar said: all sequenced bytes that it sent, as numbered.
    """

    def __init__(self, *, dialing: bool = False, limits: Limits = LIMITS) -> None:
        self.dialing = dialing
        self.limits = limits
        self.session = Session(dialing=dialing, local=limits, remote=limits)
        remote = Hello("far", bytes(16), limits)
        streams = SessionStreams(
            self.session, "far", lambda _: None, lambda: None, lambda: None, QuietLog(Logger(), lambda: 0.0)
        )
        self.held = HeldSession(TICKET, remote, streams, "dns:far", 60.0)
        self.link = self.resume(0)
        self.said = b""

    def resume(self, offset: int) -> Link:
        """
        Have a new link, as of a peer that has C{offset} bytes.

        @return: the link, whose RESUME or RESUMED was read already.
        """
        if self.dialing:
            link = Link(local=self.limits, now=0.0, resume=self.held.ask(b""))
        else:
            link = Link(local=self.limits, now=0.0)
            generation = self.held.generation + 1
            [event] = run(link, frame(RESUME, 0, payload_of(generation=generation, rx_next=offset)))
            assert isinstance(event, ResumeReceived)
            assert self.held.refusal(event.resume, "dns:far", b"") is None
            link.resumed(self.held.agree(event.resume, b"")[0])
        [self.greeting] = parse(join(link.data_to_send(1 << 20, 0.0)))
        if self.dialing:
            answer = payload_of(2, generation=self.held.generation, rx_next=offset)
            [answered] = run(link, frame(RESUMED, 0, answer))
            assert isinstance(answered, ResumedReceived)
            assert self.held.is_answered_by(answered.resume, b"")
            self.session.resume(offset)
        link.attach(self.session, self.limits, 0.0)
        self.link = link
        return link

    def say(self, limit: int = 1 << 20) -> bytes:
        """@return: the sequenced bytes that it wants to send in one go."""
        frames = parse(join(self.link.data_to_send(limit, 0.0)))
        return b"".join(frame(*said) for said in frames if said[0] >= 0x10)

    def hear(self, data: bytes) -> list[Event]:
        return run(self.link, data)


def run(link: Link, data: bytes, now: float = 0.0) -> list[Event]:
    return list(link.receive([memoryview(data)], now))


class AcceptorTests(SynchronousTestCase):
    """What the accepting side checks, in which order, and that it changes nothing before."""

    def setUp(self) -> None:
        self.half = Half()
        self.half.hear(opening(1))
        session = self.half.session
        session.accept(1)
        for number in range(4):
            session.write(1, bytes([number]) * 100)
            self.half.say()
        # OPENED and four DATA of 112: frames end at 12, 124, 236, 348, 460.
        self.half.hear(frame(ACK, 0, u64(124)))
        self.half.held.generation = 5
        self.edges = (124, 236, 348, 460)

    def refusal(
        self, payload: bytes, *, identity: str = "dns:far", exporter: bytes = b""
    ) -> ErrorCode | None:
        """Also looks that nothing was changed."""
        held, session = self.half.held, self.half.session
        before = (held.generation, session.replay.acknowledged, session.replay.end, session.rx_next)
        refused = held.refusal(decode_resume(payload), identity, exporter)
        self.assertEqual(
            before, (held.generation, session.replay.acknowledged, session.replay.end, session.rx_next)
        )
        self.assertEqual(len(list(session.replay.unacknowledged())), 3)
        self.assertIs(self.half.link.session, session)
        self.assertIs(self.half.link.state, LinkState.OPEN)
        return None if refused is None else refused[0]

    def test_agreed(self) -> None:
        """With a higher generation and an offset where sending can go on."""
        for generation in (6, 7, 1000, 2**32 - 1):
            for edge in self.edges:
                self.assertIsNone(self.refusal(payload_of(generation=generation, rx_next=edge)))

    def test_identity(self) -> None:
        """The same key in another host's hands is worth nothing."""
        for identity in ("", "dns:other", "dns:fa", "dns:far.example"):
            self.assertEqual(
                self.refusal(payload_of(generation=6, rx_next=124), identity=identity),
                ErrorCode.UNKNOWN_SESSION,
            )

    def test_proof(self) -> None:
        """A wrong proof is an unknown session, in the same words."""
        good = payload_of(generation=6, rx_next=124)
        forged = decode_resume(good[:70] + bytes(32))
        held = self.half.held
        self.assertEqual(self.refusal(good[:70] + bytes(32)), ErrorCode.UNKNOWN_SESSION)
        self.assertEqual(
            held.refusal(forged, "dns:far", b""), held.refusal(decode_resume(good), "dns:other", b"")
        )
        self.assertEqual(self.refusal(good, exporter=EXPORTER), ErrorCode.UNKNOWN_SESSION)
        self.assertIsNone(
            self.refusal(payload_of(generation=6, rx_next=124, exporter=EXPORTER), exporter=EXPORTER)
        )

    def test_echo(self) -> None:
        """Our own RESUMED, sent back to us, is no RESUME."""
        self.assertEqual(self.refusal(payload_of(2, generation=6, rx_next=124)), ErrorCode.UNKNOWN_SESSION)

    def test_generation(self) -> None:
        """One that was used, or one before it, is stale."""
        for generation in range(6):
            self.assertEqual(
                self.refusal(payload_of(generation=generation, rx_next=124)), ErrorCode.STALE_GENERATION
            )

    def test_offset(self) -> None:
        """Below what was acknowledged, above what was sent, or within a frame."""
        for offset in range(600):
            expected = None if offset in self.edges else ErrorCode.OFFSET_MISMATCH
            self.assertEqual(self.refusal(payload_of(generation=6, rx_next=offset)), expected, offset)
        for offset in (2**32, 2**63, 2**64 - 1):
            self.assertEqual(
                self.refusal(payload_of(generation=6, rx_next=offset)), ErrorCode.OFFSET_MISMATCH
            )

    def test_order(self) -> None:
        """Of several faults the first is told: a stranger never learns the generation or the offset."""
        faults: list[tuple[ErrorCode, bytes, str]] = [
            (ErrorCode.UNKNOWN_SESSION, payload_of(generation=5, rx_next=1), "dns:other"),
            (ErrorCode.UNKNOWN_SESSION, payload_of(generation=5, rx_next=1)[:-1] + b"?", "dns:far"),
            (ErrorCode.STALE_GENERATION, payload_of(generation=5, rx_next=1), "dns:far"),
            (ErrorCode.OFFSET_MISMATCH, payload_of(generation=6, rx_next=1), "dns:far"),
        ]
        for code, payload, identity in faults:
            self.assertEqual(self.refusal(payload, identity=identity), code)

    def test_agreement(self) -> None:
        """The generation is the dialler's, the offset counts as acknowledged, ours is told as of now."""
        half = self.half
        half.hear(frame(DATA, 1, b"x" * 50))
        resume = decode_resume(payload_of(generation=9, rx_next=236))
        payload, again = half.held.agree(resume, b"")
        self.assertEqual(payload, payload_of(2, generation=9, rx_next=16 + 62))
        self.assertEqual(again, 460 - 236)
        self.assertEqual(half.held.generation, 9)
        self.assertEqual(half.session.replay.acknowledged, 236)
        self.assertEqual(
            half.held.refusal(resume, "dns:far", b""),
            (ErrorCode.STALE_GENERATION, "generation 9 was resumed before"),
        )


class DialerTests(SynchronousTestCase):
    """What the dialling side says and whom it believes."""

    def setUp(self) -> None:
        self.half = Half(dialing=True)

    def test_generations(self) -> None:
        """Each question has a number of its own, whether the one before was answered or not."""
        held = self.half.held
        first = held.generation
        said = [decode_resume(held.ask(b"")).generation for _ in range(3)]
        self.assertEqual(said, [first + 1, first + 2, first + 3])

    def test_question(self) -> None:
        """It tells what this side has."""
        self.half.hear(opening(2) + frame(DATA, 2, b"abc"))
        self.assertEqual(
            self.half.held.ask(EXPORTER), payload_of(generation=2, rx_next=16 + 15, exporter=EXPORTER)
        )

    def test_answers(self) -> None:
        """Only the acceptor's answer to the latest question, on this connection, is one."""
        held = self.half.held
        held.ask(EXPORTER)
        held.ask(EXPORTER)
        self.assertEqual(held.generation, 3)

        def answered(payload: bytes) -> bool:
            return held.is_answered_by(decode_resume(payload), EXPORTER)

        self.assertTrue(answered(payload_of(2, generation=3, exporter=EXPORTER)))
        self.assertFalse(answered(payload_of(2, generation=2, exporter=EXPORTER)))
        self.assertFalse(answered(payload_of(2, generation=4, exporter=EXPORTER)))
        self.assertFalse(answered(payload_of(1, generation=3, exporter=EXPORTER)), "our own question")
        self.assertFalse(answered(payload_of(2, generation=3)), "another connection's")
        restarted = Ticket(TICKET.session_id, TICKET.resume_key, TICKET.dialer, bytes(16))
        self.assertFalse(answered(payload_of(2, ticket=restarted, generation=3, exporter=EXPORTER)))


class LinkTests(SynchronousTestCase):
    """RESUME and RESUMED as a link's first frames."""

    def test_dialing(self) -> None:
        """RESUME is the first thing said, and nothing follows before the answer."""
        link = Link(local=LIMITS, now=0.0, resume=payload_of())
        self.assertIs(link.state, LinkState.RESUMED)
        self.assertEqual(parse(join(link.data_to_send(1 << 20, 0.0))), [(RESUME, 0, payload_of())])
        self.assertEqual(link.data_to_send(1 << 20, 0.0), [])

    def test_literal(self) -> None:
        """The header in front of it."""
        link = Link(local=LIMITS, now=0.0, resume=payload_of())
        self.assertEqual(join(link.data_to_send(1 << 20, 0.0))[:12], unhex("03 00 0000 00000000 00000066"))
        link = Link(local=LIMITS, now=0.0)
        run(link, frame(RESUME, 0, payload_of()))
        link.resumed(payload_of(2))
        self.assertEqual(join(link.data_to_send(1 << 20, 0.0))[:12], unhex("04 00 0000 00000000 00000066"))

    def test_accepting(self) -> None:
        """RESUME is reported and waits for the decision."""
        link = Link(local=LIMITS, now=0.0)
        [event] = run(link, frame(RESUME, 0, payload_of(generation=3)))
        assert isinstance(event, ResumeReceived)
        self.assertEqual(event.resume.generation, 3)
        self.assertIs(link.state, LinkState.DECISION)
        self.assertEqual(link.data_to_send(1 << 20, 0.0), [])

    def assert_ends(self, link: Link, data: bytes, code: int, *, kind: int = REJECT) -> LinkEnded:
        link.data_to_send(1 << 20, 0.0)
        ended = run(link, data)[-1]
        assert isinstance(ended, LinkEnded)
        self.assertEqual(ended.code, code)
        [(said, _, payload)] = parse(join(link.data_to_send(1 << 20, 0.0)))
        self.assertEqual((said, payload[:2]), (kind, u16(code)))
        return ended

    def test_malformed(self) -> None:
        """A broken RESUME or RESUMED ends the link and says why; another version says both versions."""
        for kind, dialing in ((RESUME, None), (RESUMED, payload_of())):
            for payload, code in (
                (payload_of()[:-1], ErrorCode.PROTOCOL_ERROR),
                (b"", ErrorCode.PROTOCOL_ERROR),
                (payload_of(extensions=b"x"), ErrorCode.PROTOCOL_ERROR),
                (payload_of(version=3), ErrorCode.VERSION_UNSUPPORTED),
            ):
                link = Link(local=LIMITS, now=0.0, resume=dialing)
                ended = self.assert_ends(link, frame(kind, 0, payload), code)
                self.assertFalse(ended.session_over)
            link = Link(local=LIMITS, now=0.0, resume=dialing)
            self.assert_ends(link, frame(kind, 1, payload_of()), ErrorCode.PROTOCOL_ERROR)

    def test_too_long(self) -> None:
        """Longer than any control frame may be: refused by its header."""
        link = Link(local=LIMITS, now=0.0)
        self.assert_ends(link, frame(RESUME, 0, length=4097), ErrorCode.FRAME_TOO_LARGE)

    def test_not_now(self) -> None:
        """Either frame is allowed in one place only."""
        for dialing in (False, True):
            for kind in (RESUME, RESUMED):
                core = Core(dialing=dialing).shake()
                self.assert_ends(core.link, frame(kind, 0, payload_of()), ErrorCode.PROTOCOL_ERROR, kind=BYE)
        for link, kind in (
            (Link(local=LIMITS, now=0.0), RESUMED),
            (Link(local=LIMITS, now=0.0, resume=payload_of()), RESUME),
            (Core(dialing=True).link, RESUME),
            (Core(dialing=True).link, RESUMED),
        ):
            self.assert_ends(link, frame(kind, 0, payload_of()), ErrorCode.PROTOCOL_ERROR)
        link = Link(local=LIMITS, now=0.0)
        self.assert_ends(link, frame(RESUME, 0, payload_of()) * 2, ErrorCode.PROTOCOL_ERROR)

    def test_instead_of_the_answer(self) -> None:
        """Nothing but RESUMED or REJECT answers RESUME; the session is not touched by that."""
        for data in (
            welcome(),
            hello(),
            opening(2),
            frame(DATA, 1, b"x"),
            frame(ACK, 0, u64(0)),
            frame(PING, 0, u64(1)),
            frame(BYE, 0, u16(0)),
        ):
            link = Link(local=LIMITS, now=0.0, resume=payload_of())
            self.assertFalse(self.assert_ends(link, data, ErrorCode.PROTOCOL_ERROR).session_over)

    def test_silence(self) -> None:
        """An answer that does not come is waited for as long as for a WELCOME."""
        link = Link(local=LIMITS, now=10.0, resume=payload_of())
        self.assertEqual(link.next_timer(), 10.0 + HANDSHAKE_SECONDS)
        [ended] = link.handle_timer(10.0 + HANDSHAKE_SECONDS)
        assert isinstance(ended, LinkEnded)
        self.assertEqual((ended.code, ended.session_over), (ErrorCode.HANDSHAKE_TIMEOUT, False))

    def test_frames_with_the_answer(self) -> None:
        """What comes in one read with RESUMED is understood after it, and counted on from before."""
        half = Half(dialing=True)
        half.hear(opening(2))
        link = Link(local=LIMITS, now=0.0, resume=half.held.ask(b""))
        link.data_to_send(1 << 20, 0.0)
        events = link.receive(
            [memoryview(frame(RESUMED, 0, payload_of(2, generation=2)) + frame(DATA, 2, b"abc"))], 0.0
        )
        self.assertIsInstance(next(events), ResumedReceived)
        half.session.resume(0)
        link.attach(half.session, LIMITS, 0.0)
        [data] = events
        assert isinstance(data, DataReceived)
        self.assertEqual(join(data.buffers), b"abc")
        self.assertEqual(half.session.rx_next, 16 + 15)

    def test_rejected_by_the_dialer(self) -> None:
        """
        A dialling side that does not understand our RESUMED ends the link with
        REJECT, and the session goes on; only OFFSET_MISMATCH ends that as well.
        """
        for code, over in (
            (ErrorCode.HANDSHAKE_TIMEOUT, False),
            (ErrorCode.PROTOCOL_ERROR, False),
            (ErrorCode.VERSION_UNSUPPORTED, False),
            (ErrorCode.OFFSET_MISMATCH, True),
        ):
            half = Half()
            self.assertEqual(
                half.hear(frame(REJECT, 0, u16(code) + u16(1) + b"no")),
                [LinkEnded(code, "no", by_peer=True, session_over=over)]
                if code != ErrorCode.VERSION_UNSUPPORTED
                else [LinkEnded(code, "no (the peer speaks version 1)", by_peer=True, session_over=over)],
            )

    def test_detached(self) -> None:
        """A link whose session went elsewhere hears, says and wants nothing any more."""
        half = Half()
        half.hear(opening(1))
        half.hear(frame(DATA, 1, b"whole") + frame(DATA, 1, b"cut in two")[:15])
        old, before = half.link, half.session.rx_next
        half.session.accept(1)
        old.detach()
        late = frame(DATA, 1, b"cut in two")[15:] + frame(DATA, 1, b"more") + frame(ACK, 0, u64(12))
        self.assertEqual(run(old, late), [])
        self.assertEqual(run(old, frame(BYE, 0, u16(0))), [])
        self.assertEqual(old.data_to_send(1 << 20, 0.0), [])
        self.assertEqual(old.handle_timer(1e9), [])
        self.assertEqual(old.next_timer(), float("inf"))
        self.assertEqual((half.session.rx_next, half.session.replay.acknowledged), (before, 0))

    def test_calls_in_the_wrong_state(self) -> None:
        """Agreeing to what nobody asked for is the caller's mistake."""
        for link in (Link(local=LIMITS, now=0.0), Core().shake().link, Core(dialing=True).link):
            with self.assertRaises(LocalError):
                link.resumed(payload_of(2))


class GoingOnTests(SynchronousTestCase):
    """What is said over a new link, and what was heard over the old one."""

    def talk(self, half: Half) -> tuple[bytes, list[int]]:
        """Say frames of many kinds.  @return: their bytes, and where each ends."""
        session = half.session
        half.hear(opening(2 if half.dialing else 1))
        mine = session.open_stream("vda")
        theirs = 2 if half.dialing else 1
        session.accept(theirs)
        session.write(mine, b"m" * 700)
        said = half.say()
        session.write(theirs, bytes(range(256)))
        session.finish(theirs)
        session.write(mine, b"n" * 300)
        said += half.say()
        session.reset(mine, 20)
        session.goaway(37, "bye")
        said += half.say()
        edges = [0]
        for kind, stream_id, payload in parse(said):
            edges.append(edges[-1] + len(frame(kind, stream_id, payload)))
        return said, edges

    def test_said_again(self) -> None:
        """From every offset that the peer may have: the very same bytes, up to the end, and nothing twice."""
        for dialing in (False, True):
            said, edges = self.talk(Half(dialing=dialing))
            self.assertGreater(len(edges), 7)
            for edge in edges:
                half = Half(dialing=dialing)
                self.assertEqual(self.talk(half)[0], said)
                half.link.detach()
                half.resume(edge)
                self.assertEqual(half.say(), said[edge:], edge)
                self.assertEqual(half.say(), b"")
                self.assertEqual(half.session.replay.acknowledged, edge)
                self.assertEqual(half.session.replay.end, len(said))

    def test_said_again_in_parts(self) -> None:
        """However little fits at once, and with a link lost after each part."""
        for limit in (1, 100, 400, 1000):
            half = Half()
            said, edges = self.talk(half)
            heard = 0
            while heard < len(said):
                half.link.detach()
                half.resume(heard)
                part = half.say(limit)
                self.assertTrue(part)
                self.assertEqual(part, said[heard : heard + len(part)])
                self.assertIn(heard + len(part), edges)
                heard += len(part)
            half.resume(heard)
            self.assertEqual(half.say(), b"")
            self.assertEqual(half.session.replay.held_bytes, 0)

    def test_same_part_again(self) -> None:
        """A peer that lost what was said again gets it once more, from the same place."""
        half = Half()
        said, edges = self.talk(half)
        for _ in range(3):
            half.resume(edges[2])
            first = half.say(1)
            self.assertEqual(first, said[edges[2] : edges[3]])
        self.assertEqual(half.say(), said[edges[3] :])

    def test_new_frames_follow(self) -> None:
        """What is said while there is no link, or in the midst of repeating, comes after all the rest."""
        half = Half()
        said, edges = self.talk(half)
        half.link.detach()
        half.session.abort(1, 22)
        half.resume(edges[1])
        first = half.say(1)
        new = half.session.streams[1].send.state
        rest = half.say(1 << 20)
        while more := half.say():
            rest += more
        self.assertEqual((first + rest)[: len(said) - edges[1]], said[edges[1] :])
        follow = parse((first + rest)[len(said) - edges[1] :])
        self.assertEqual([kind for kind, _, _ in follow], [0x17])
        self.assertEqual(new.value, "ended")

    def test_acknowledged_while_repeating(self) -> None:
        """Acks for what was said again are taken, and do not disturb what is still to come."""
        half = Half()
        said, _ = self.talk(half)
        half.resume(0)
        got = half.say(1)
        half.hear(frame(ACK, 0, u64(len(got))))
        while more := half.say(1):
            got += more
            half.hear(frame(ACK, 0, u64(len(got))))
        self.assertEqual(got, said)
        self.assertEqual(half.session.replay.held_bytes, 0)

    def test_acks_of_the_future(self) -> None:
        """An ack below what the peer named when it resumed is an error, as ever."""
        half = Half()
        _, edges = self.talk(half)
        half.resume(edges[3])
        [ended] = half.hear(frame(ACK, 0, u64(edges[2])))
        assert isinstance(ended, LinkEnded)
        self.assertEqual(ended.code, ErrorCode.ACK_ERROR)

    def test_part_of_a_frame_is_dropped(self) -> None:
        """A frame that the old link cut is not counted, and comes whole over the new one."""
        for cut in range(12 + 300):
            half = Half()
            half.hear(opening(1))
            whole = frame(DATA, 1, bytes(i % 251 for i in range(300)))
            self.assertEqual(half.hear(whole[:cut]), [])
            half.link.detach()
            half.resume(0)
            self.assertEqual(decode_resume(half.greeting[2]).rx_next, 16)
            [event] = half.hear(whole)
            self.assertEqual(join(cast(DataReceived, event).buffers), whole[12:])
            self.assertEqual(half.session.rx_next, 16 + 312)

    def test_what_is_had_is_told(self) -> None:
        """RESUME and RESUMED say what was received, as an ack does: none needs to follow."""
        for dialing in (False, True):
            half = Half(dialing=dialing)
            half.hear(opening(2 if dialing else 1))
            half.link.detach()
            half.resume(0)
            self.assertEqual(half.greeting[0], RESUME if dialing else RESUMED)
            self.assertEqual(decode_resume(half.greeting[2]).rx_next, 16)
            self.assertEqual(half.session.rx_acknowledged, 16)
            half.link.handle_timer(1.0)
            self.assertNotIn(ACK, [kind for kind, _, _ in parse(join(half.link.data_to_send(1 << 20, 0.0)))])

    def test_credit_counts_once(self) -> None:
        """Data that is said again takes no credit again, at neither side."""
        half = Half()
        half.hear(opening(1))
        session = half.session
        session.accept(1)
        session.write(1, b"d" * 2048)  # the whole window
        said = half.say()
        while more := half.say():
            said += more
        window = session.streams[1].send.window
        self.assertEqual((window.sent, window.limit), (2048, 2048))
        half.resume(12)
        self.assertEqual(half.say(), said[12:])
        self.assertEqual((window.sent, window.limit), (2048, 2048))
        session.write(1, b"more")
        self.assertEqual(half.say(), b"", "there is no credit")
        half.hear(frame(0x14, 1, u64(2052, 0)))
        self.assertEqual(half.say(), frame(DATA, 1, b"more"))

    def test_full(self) -> None:
        """With the replay buffer full no new data leaves, link or no link; with an ack it does."""
        limits = Limits(max_payload=4096, max_streams=3, window=100_000, replay=4096, resume_window=60.0)
        half = Half(limits=limits)
        half.hear(opening(1))
        half.session.accept(1)
        half.session.write(1, bytes(10_000))
        said = b""
        while more := half.say():
            said += more
        self.assertLessEqual(len(said), 4096)
        self.assertGreater(len(said), 3000)
        half.link.detach()
        half.resume(0)
        again = b""
        while more := half.say():
            again += more
        self.assertEqual(again, said)
        self.assertLessEqual(half.session.replay.held_bytes, 4096)
        half.resume(len(said))
        self.assertEqual(half.session.replay.held_bytes, 0)
        self.assertEqual([kind for kind, _, _ in parse(half.say())][:1], [DATA])

    def test_no_session_of_another_side(self) -> None:
        """A resumed session keeps its ids: the next stream is the next one."""
        half = Half(dialing=True)
        self.assertEqual(half.session.open_stream("vda"), 1)
        half.say()
        half.resume(0)
        self.assertEqual(half.session.open_stream("vdb"), 3)
        self.assertEqual([stream_id for kind, stream_id, _ in parse(half.say()) if kind == OPEN], [1])
        self.assertEqual([stream_id for kind, stream_id, _ in parse(half.say()) if kind == OPEN], [3])
        self.assertEqual(half.hear(opening(2)), [StreamOpened(2, "vda")])


class SeenTests(SynchronousTestCase):
    """Small things that a reader would stumble over."""

    def test_resume_is_not_believed(self) -> None:
        """A RESUME is data: decoding one touches no session and needs none."""
        resume = decode_resume(payload_of())
        self.assertIsInstance(resume, Resume)
        self.assertFalse(resume.is_proven_by(TICKET, Role.DIALER, EXPORTER))
