"""
What a peer must not say, one case each: the code that the link ends with, here and on the wire.

Each case is a whole conversation with a fresh core: valid bytes that lead to the
state, then the illegal ones.  Whatever they are, C{receive} raises nothing; the
last event says the code, the last frame sent says it to the peer, and nothing
is heard any more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from twisted.trial.unittest import SynchronousTestCase

from relaymux.core.events import LinkEnded
from relaymux.errors import ErrorCode
from tests.wire import (
    ACK,
    BYE,
    CLOSED,
    CREDIT,
    DATA,
    FIN,
    GOAWAY,
    HELLO,
    OPEN,
    OPENED,
    PING,
    PONG,
    REFUSED,
    REJECT,
    RESET,
    RESUME,
    RESUMED,
    STOP,
    WELCOME,
    Core,
    frame,
    hello,
    hello_terms,
    opening,
    u16,
    u64,
    welcome,
)

PROTOCOL = ErrorCode.PROTOCOL_ERROR
TOO_LARGE = ErrorCode.FRAME_TOO_LARGE
FLOW = ErrorCode.FLOW_CONTROL_ERROR
STATE = ErrorCode.STREAM_STATE_ERROR
UNKNOWN = ErrorCode.UNKNOWN_STREAM
ACKS = ErrorCode.ACK_ERROR
FLOOD = ErrorCode.FLOOD
VERSION = ErrorCode.VERSION_UNSUPPORTED


def accepting() -> Core:
    """Nothing heard yet; the peer dialled."""
    return Core()


def dialling() -> Core:
    """HELLO said, nothing heard yet."""
    core = Core(dialing=True)
    core.say()
    return core


def open_link() -> Core:
    """The handshake is done; the peer dialled, and announced the same limits as ours."""
    return Core().shake()


def asked() -> Core:
    """The peer has opened stream 1 and has no answer."""
    return open_link().opened_by_peer(accept=False)


def incoming() -> Core:
    """The peer has opened stream 1, which was accepted."""
    return open_link().opened_by_peer()


def asking() -> Core:
    """We have opened stream 2 and have no answer."""
    core = open_link()
    core.opened_here(accepted=False)
    return core


def outgoing() -> Core:
    """We have opened stream 2, which was accepted."""
    core = open_link()
    core.opened_here()
    return core


def wrote() -> Core:
    """We have sent 5 bytes on stream 2, acknowledged before."""
    core = outgoing()
    core.hear(frame(ACK, 0, u64(core.session.replay.end)))
    core.session.write(2, b"abcde")
    core.say()
    return core


def finished() -> Core:
    """We have sent 5 bytes and FIN on stream 2."""
    core = wrote()
    core.session.finish(2)
    core.say()
    return core


def closed() -> Core:
    """Our direction of stream 2 is over, with 5 bytes; the peer's is not."""
    core = finished()
    core.hear(frame(CLOSED, 2, u16(0) + u64(5)))
    return core


def gone() -> Core:
    """Stream 2 is over and forgotten."""
    core = closed()
    core.hear(frame(FIN, 2, u64(0)))
    core.say()
    assert 2 not in core.session.streams
    return core


def stopped() -> Core:
    """We have told the peer to stop on stream 1, of which 3 bytes came before."""
    core = incoming()
    core.hear(frame(DATA, 1, b"abc"))
    core.session.stop(1, 21)
    core.say()
    return core


def refused() -> Core:
    """We have refused stream 1 of the peer."""
    core = asked()
    core.session.refuse(1, 17, "no")
    core.say()
    return core


def going_away() -> Core:
    """We have said goaway."""
    core = open_link()
    core.session.goaway(37, "bye")
    core.say()
    return core


@dataclass(frozen=True)
class Case:
    """
    @ivar begin: makes the core.
    @ivar data: what it hears then, read by read; all but the last are legal.
    @ivar code: what comes of it.
    @ivar words: what people are told of it.
    """

    begin: Callable[[], Core]
    data: tuple[bytes, ...]
    code: ErrorCode
    words: tuple[str, ...] = field(default=())


def case(begin: Callable[[], Core], *data: bytes, code: ErrorCode = PROTOCOL, words: str = "") -> Case:
    return Case(begin, data, code, tuple(words.split()))


DATA_3 = frame(DATA, 1, b"abc")
FULL = bytes(2048)

CASES = {
    # No frames at all.
    "zeros": case(accepting, bytes(64), words="kind 0x00"),
    "ones": case(accepting, b"\xff" * 64, words="kind 0xff"),
    "text": case(accepting, b"GET / HTTP/1.1\r\nHost: hv-b\r\n\r\n", words="kind 0x47"),
    "ssh": case(accepting, b"SSH-2.0-OpenSSH_9.2p1\r\n", words="kind"),
    "tls": case(accepting, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\x12", words="RESET flags 0x03"),
    "garbage on an open link": case(open_link, b"\xde\xad\xbe\xef" * 8, words="kind 0xde"),
    "garbage as an answer": case(dialling, b"\xde\xad\xbe\xef" * 8),
    # Headers.
    "unknown kind": case(open_link, frame(0x1A), words="kind 0x1a"),
    "unknown link kind": case(open_link, frame(0x0A)),
    "kind 0": case(open_link, frame(0)),
    "flags": case(incoming, frame(DATA, 1, b"x", flags=1), words="flags DATA"),
    "reserved": case(incoming, frame(FIN, 1, u64(0), reserved=0x8000), words="reserved"),
    "long control frame": case(open_link, frame(OPEN, 1, length=4097), code=TOO_LARGE, words="4097 4096"),
    "longest length": case(open_link, frame(OPEN, 1, length=2**32 - 1), code=TOO_LARGE),
    "long data": case(incoming, frame(DATA, 1, length=4097), code=TOO_LARGE, words="DATA 4096"),
    "longest data": case(incoming, frame(DATA, 1, length=2**32 - 1), code=TOO_LARGE),
    "long before the handshake": case(accepting, frame(HELLO, length=4097), code=TOO_LARGE),
    # The handshake.
    "other version": case(accepting, hello(2), code=VERSION, words="version 2 1"),
    "version 0": case(accepting, hello(0), code=VERSION, words="version 0"),
    "other version answers": case(dialling, welcome(9), code=VERSION, words="version 9"),
    "wrong magic": case(accepting, frame(HELLO, 0, b"relaymuX" + u16(1) + hello_terms()), words="relaymux"),
    "empty hello": case(accepting, frame(HELLO)),
    "truncated hello": case(accepting, frame(HELLO, 0, b"relaymux\x00\x01" + hello_terms()[:-1])),
    "newline in the name": case(accepting, hello(name=b"a\nb"), words="malformed HELLO"),
    "empty name": case(accepting, hello(name=b"")),
    "long name": case(accepting, hello(name=b"a" * 65)),
    "name that is no ascii": case(accepting, hello(name=b"\xff\xfe")),
    "tiny window": case(accepting, hello(window=1), words="window 1"),
    "tiny payload": case(accepting, hello(max_payload=0), words="max_payload"),
    "absurd window": case(accepting, hello(window=2**63), words="window"),
    "tiny replay": case(accepting, hello(replay=0), words="replay"),
    "no patience": case(accepting, hello(silence_ms=0), words="silence"),
    "broken extension": case(accepting, hello(extensions=b"\x00\x01\x00\x09")),
    "extension twice": case(accepting, hello(extensions=b"\x00\x01\x00\x00" * 2)),
    "truncated welcome": case(dialling, frame(WELCOME, 0, b"relaymux\x00\x01" + bytes(47))),
    "newline in the welcome": case(dialling, welcome(name=b"a\nb")),
    "hello with a stream id": case(accepting, frame(HELLO, 1, hello()[12:]), words="HELLO stream"),
    "hello as an answer": case(dialling, hello(), words="HELLO"),
    "welcome to an acceptor": case(accepting, welcome(), words="WELCOME"),
    "hello twice": case(open_link, hello(), words="HELLO open"),
    "hello twice at once": case(accepting, hello() + hello()),
    "welcome twice": case(dialling, welcome(), welcome(), words="WELCOME open"),
    "resume on an open link": case(open_link, frame(RESUME, 0, bytes(64))),
    "resumed on an open link": case(open_link, frame(RESUMED)),
    "resumed before the handshake": case(dialling, frame(RESUMED)),
    "short reject": case(dialling, frame(REJECT, 0, b"\x00"), words="malformed REJECT"),
    "ping before the handshake": case(accepting, frame(PING, 0, u64(1)), words="PING"),
    "bye before the handshake": case(accepting, frame(BYE, 0, u16(0))),
    "ack before the handshake": case(dialling, frame(ACK, 0, u64(0))),
    "open before hello": case(accepting, opening(1), words="OPEN"),
    "open before welcome": case(dialling, opening(2), words="OPEN"),
    "data before welcome": case(dialling, frame(DATA, 1, b"abc")),
    "goaway before hello": case(accepting, frame(GOAWAY, 0, u16(0))),
    # Frames of the link.
    "ping with a stream id": case(open_link, frame(PING, 1, u64(1)), words="PING stream"),
    "ack with a stream id": case(open_link, frame(ACK, 3, u64(0))),
    "short ping": case(open_link, frame(PING, 0, bytes(7)), words="malformed PING"),
    "long ping": case(open_link, frame(PING, 0, bytes(9))),
    "short pong": case(open_link, frame(PONG, 0, bytes(7)), words="malformed PONG"),
    "short ack": case(open_link, frame(ACK, 0, bytes(4)), words="malformed ACK"),
    "short bye": case(open_link, frame(BYE, 0, b"\x00"), words="malformed BYE"),
    # Acks.
    "ack of what was not sent": case(wrote, frame(ACK, 0, u64(10_000)), code=ACKS, words="10000"),
    "ack of nothing sent": case(open_link, frame(ACK, 0, u64(1)), code=ACKS),
    "ack goes backwards": case(wrote, frame(ACK, 0, u64(0)), code=ACKS),
    "ack inside a frame": case(wrote, frame(ACK, 0, u64(17)), code=ACKS, words="inside"),
    "absurd ack": case(open_link, frame(ACK, 0, u64(2**64 - 1)), code=ACKS),
    # Opening.
    "open with our parity": case(open_link, opening(2), words="2 expected 1"),
    "open jumps": case(open_link, opening(3), words="3 expected 1"),
    "open 0": case(open_link, opening(0)),
    "id used again": case(incoming, opening(1), words="expected 3"),
    "id of a forgotten stream": case(gone, opening(2)),
    "highest id": case(open_link, opening(2**32 - 1)),
    "too many streams": case(
        open_link, opening(1), opening(3), opening(5), opening(7), code=FLOOD, words="3"
    ),
    "empty open": case(open_link, frame(OPEN, 1), words="malformed OPEN"),
    "open without a name": case(open_link, opening(1, b"")),
    "open with a path": case(open_link, opening(1, b"../../run/libvirt/libvirt-sock")),
    "open with a newline": case(open_link, opening(1, b"vda\nfake log line")),
    "open with a long name": case(open_link, opening(1, b"v" * 65)),
    "open with a nul": case(open_link, opening(1, b"vda\x00")),
    "open shorter than its name": case(open_link, frame(OPEN, 1, b"\x09vda")),
    "open with a broken extension": case(open_link, opening(1, b"vda", b"\x01")),
    # Answers.
    "opened for our own answer": case(asked, frame(OPENED, 1), code=STATE, words="OPENED"),
    "opened twice": case(outgoing, frame(OPENED, 2), code=STATE, words="OPENED"),
    "refused after opened": case(outgoing, frame(REFUSED, 2, u16(17)), code=STATE, words="REFUSED"),
    "opened after refused": case(asking, frame(REFUSED, 2, u16(17)), frame(OPENED, 2), code=STATE),
    "refused twice": case(asking, frame(REFUSED, 2, u16(17)), frame(REFUSED, 2, u16(17)), code=STATE),
    "opened with a payload": case(asking, frame(OPENED, 2, b"x"), words="malformed OPENED"),
    "refused without a code": case(asking, frame(REFUSED, 2, b"\x00"), words="malformed REFUSED"),
    "refused after data": case(asking, frame(DATA, 2, b"x"), frame(REFUSED, 2, u16(17)), code=STATE),
    "refused after fin": case(asking, frame(FIN, 2, u64(0)), frame(REFUSED, 2, u16(17)), code=STATE),
    "refused our refusal": case(refused, frame(REFUSED, 1, u16(17)), code=STATE),
    # Streams that are not there.
    "data for no stream": case(open_link, DATA_3, code=UNKNOWN, words="DATA stream 1"),
    "data for stream 0": case(open_link, frame(DATA, 0, b"x"), code=UNKNOWN),
    "credit for no stream": case(open_link, frame(CREDIT, 1, u64(9999, 0)), code=UNKNOWN),
    "fin for no stream": case(open_link, frame(FIN, 1, u64(0)), code=UNKNOWN),
    "reset for no stream": case(open_link, frame(RESET, 1, u16(1) + u64(0)), code=UNKNOWN),
    "stop for no stream": case(open_link, frame(STOP, 1, u16(1)), code=UNKNOWN),
    "closed for no stream": case(open_link, frame(CLOSED, 1, u16(0) + u64(0)), code=UNKNOWN),
    "opened for no stream": case(open_link, frame(OPENED, 2), code=UNKNOWN),
    "refused for no stream": case(open_link, frame(REFUSED, 2, u16(17)), code=UNKNOWN),
    "data for a forgotten stream": case(gone, frame(DATA, 2, b"x"), code=UNKNOWN),
    "closed for a forgotten stream": case(gone, frame(CLOSED, 2, u16(0) + u64(5)), code=UNKNOWN),
    "opened for a forgotten stream": case(gone, frame(OPENED, 2), code=UNKNOWN),
    # Credit.
    "one byte too many": case(
        incoming, frame(DATA, 1, FULL), frame(DATA, 1, b"x"), code=FLOW, words="2049 2048"
    ),
    "too many in the first frame": case(asked, frame(DATA, 1, bytes(2049)), code=FLOW),
    "too many after stop": case(stopped, frame(DATA, 1, bytes(2046)), code=FLOW),
    "too many after refused": case(refused, frame(DATA, 1, bytes(2049)), code=FLOW),
    "credit goes backwards": case(wrote, frame(CREDIT, 2, u64(2047, 0)), code=FLOW, words="2048 2047"),
    "absurd credit": case(wrote, frame(CREDIT, 2, u64(2**63, 0)), code=FLOW),
    "highest credit": case(wrote, frame(CREDIT, 2, u64(2**64 - 1, 0)), code=FLOW),
    "delivered what was not sent": case(wrote, frame(CREDIT, 2, u64(4096, 6)), code=STATE, words="6 5"),
    "delivered goes backwards": case(
        wrote, frame(CREDIT, 2, u64(4096, 4)), frame(CREDIT, 2, u64(4096, 3)), code=STATE
    ),
    "credit after closed": case(closed, frame(CREDIT, 2, u64(4096, 5)), code=STATE),
    "short credit": case(wrote, frame(CREDIT, 2, u64(4096)), words="malformed CREDIT"),
    "long credit": case(wrote, frame(CREDIT, 2, u64(4096, 0, 0))),
    # The end of the peer's direction.
    "empty data": case(incoming, frame(DATA, 1), words="malformed DATA"),
    "data after fin": case(incoming, DATA_3, frame(FIN, 1, u64(3)), frame(DATA, 1, b"x"), code=STATE),
    "data after reset": case(incoming, frame(RESET, 1, u16(1) + u64(0)), DATA_3, code=STATE),
    "second fin": case(incoming, DATA_3, frame(FIN, 1, u64(3)), frame(FIN, 1, u64(3)), code=STATE),
    "fin after reset": case(incoming, frame(RESET, 1, u16(1) + u64(0)), frame(FIN, 1, u64(0)), code=STATE),
    "reset after fin": case(incoming, frame(FIN, 1, u64(0)), frame(RESET, 1, u16(1) + u64(0)), code=STATE),
    "reset after fin, not consumed": case(
        incoming, DATA_3, frame(FIN, 1, u64(3)), frame(RESET, 1, u16(1) + u64(3)), code=STATE
    ),
    "second reset": case(
        incoming, frame(RESET, 1, u16(1) + u64(0)), frame(RESET, 1, u16(1) + u64(0)), code=STATE
    ),
    "fin too early": case(incoming, DATA_3, frame(FIN, 1, u64(2)), code=STATE, words="2 3"),
    "fin too late": case(incoming, DATA_3, frame(FIN, 1, u64(4)), code=STATE),
    "reset at another place": case(incoming, DATA_3, frame(RESET, 1, u16(1) + u64(4)), code=STATE),
    "wrong end after stop": case(stopped, frame(RESET, 1, u16(1) + u64(2)), code=STATE),
    "data after the end after stop": case(stopped, frame(RESET, 1, u16(1) + u64(3)), DATA_3, code=STATE),
    "short fin": case(incoming, frame(FIN, 1, bytes(7)), words="malformed FIN"),
    "short reset": case(incoming, frame(RESET, 1, u64(0)), words="malformed RESET"),
    # The end of ours.
    "closed too early": case(wrote, frame(CLOSED, 2, u16(0) + u64(5)), code=STATE, words="CLOSED"),
    "closed twice": case(closed, frame(CLOSED, 2, u16(0) + u64(5)), code=STATE),
    "closed with too much": case(finished, frame(CLOSED, 2, u16(0) + u64(6)), code=STATE),
    "closed with less than before": case(
        wrote,
        frame(CREDIT, 2, u64(2048, 5)),
        frame(STOP, 2, u16(1)),
        frame(CLOSED, 2, u16(1) + u64(4)),
        code=STATE,
    ),
    "stop after closed": case(closed, frame(STOP, 2, u16(1)), code=STATE, words="STOP_SENDING"),
    "short stop": case(wrote, frame(STOP, 2, b"\x01"), words="malformed STOP_SENDING"),
    "short closed": case(finished, frame(CLOSED, 2, u64(5)), words="malformed CLOSED"),
    # Farewell.
    "goaway with a stream id": case(open_link, frame(GOAWAY, 1, u16(37)), words="malformed GOAWAY"),
    "goaway without a code": case(open_link, frame(GOAWAY, 0, b"\x25")),
    "open after goaway, wrong id": case(going_away, opening(3)),
}


class BadInputTests(SynchronousTestCase):
    """Every case of the table."""

    def check(self, name: str, wanted: Case) -> None:
        core = wanted.begin()
        for legal in wanted.data[:-1]:
            core.hear(legal)
            self.assertFalse(core.link.ended, f"{name}: ended too early")
        was_open = core.link.session is not None
        core.raw()
        events = core.hear(wanted.data[-1])
        ends = [event for event in events if isinstance(event, LinkEnded)]
        self.assertEqual(len(ends), 1, f"{name}: {events}")
        [end] = ends
        self.assertIs(events[-1], end, name)
        self.assertEqual(ErrorCode(end.code), wanted.code, f"{name}: {end.text}")
        self.assertFalse(end.by_peer, name)
        for word in wanted.words:
            self.assertIn(word, end.text, name)
        self.assertTrue(end.text.isprintable(), name)
        kind, stream_id, payload = core.say()[-1]
        # HELLO opens the link when it is in front of the fault in one read.
        self.assertIn(kind, (BYE,) if was_open or end.session_over else (REJECT,), name)
        self.assertEqual((stream_id, payload[:2]), (0, u16(wanted.code)), name)
        self.assertIn(end.text[:100].encode(), payload, name)
        self.assertEqual(core.hear(hello(), opening(1), b"\xff" * 100), [], name)
        self.assertEqual(core.say(), [], name)
        self.assertEqual(core.link.next_timer(), float("inf"), name)

    def test_cases(self) -> None:
        """Each ends the link with its code, on both sides of the wire."""
        self.assertGreater(len(CASES), 100)
        for name, wanted in CASES.items():
            self.check(name, wanted)

    def test_cases_byte_by_byte(self) -> None:
        """The same whatever the reads are: here each is a single byte."""
        for name, wanted in CASES.items():
            core = wanted.begin()
            core.say()
            for piece in wanted.data:
                for position in range(len(piece)):
                    core.hear(piece[position : position + 1])
                    if core.link.ended:
                        break
            ends = [event for event in core.events if isinstance(event, LinkEnded)]
            self.assertEqual([end.code for end in ends], [wanted.code], name)

    def test_truncated(self) -> None:
        """A frame that is cut off is waited for: how long is a matter of time, not of protocol."""
        for whole in (opening(1), frame(DATA, 1, b"x" * 100), frame(PING, 0, u64(1))):
            for end in range(len(whole)):
                core = open_link()
                core.hear(whole[:end])
                self.assertFalse(core.link.ended)
                self.assertEqual(core.say(), [])


class HarmlessTests(SynchronousTestCase):
    """What looks wrong and is allowed, since frames cross on the wire."""

    def unharmed(self, core: Core, *data: bytes) -> None:
        core.hear(*data)
        self.assertFalse(core.link.ended, core.events[-1:])

    def test_repeated(self) -> None:
        """Saying a value again is allowed."""
        self.unharmed(wrote(), frame(CREDIT, 2, u64(2048, 0)), frame(CREDIT, 2, u64(2048, 0)))
        core = wrote()
        ack = frame(ACK, 0, u64(core.session.replay.acknowledged))
        self.unharmed(core, ack, ack)
        self.unharmed(open_link(), frame(GOAWAY, 0, u16(37)), frame(GOAWAY, 0, u16(37)))

    def test_credit_for_a_direction_that_has_ended(self) -> None:
        """Credit may cross our FIN or RESET."""
        self.unharmed(finished(), frame(CREDIT, 2, u64(9000, 5)))

    def test_stop_for_a_direction_that_has_ended(self) -> None:
        """STOP_SENDING may cross our FIN, and come twice."""
        self.unharmed(finished(), frame(STOP, 2, u16(1)), frame(STOP, 2, u16(1)))

    def test_data_that_crosses(self) -> None:
        """Data may cross our STOP_SENDING, refusal and reset."""
        self.unharmed(stopped(), frame(DATA, 1, bytes(2045)), frame(FIN, 1, u64(2048)))
        self.unharmed(refused(), frame(DATA, 1, bytes(2048)), frame(FIN, 1, u64(2048)))

    def test_data_before_the_answer(self) -> None:
        """A server may speak before it says that it accepts, and an opener before it hears."""
        self.unharmed(asking(), frame(DATA, 2, b"abc"), frame(OPENED, 2))
        self.unharmed(asked(), frame(DATA, 1, bytes(2048)))

    def test_open_crosses_goaway(self) -> None:
        """A stream that was opened before goaway was heard is refused, not punished."""
        self.unharmed(going_away(), opening(1))

    def test_unknown_codes(self) -> None:
        """Error codes of a later version are passed on."""
        self.unharmed(incoming(), frame(RESET, 1, u16(65535) + u64(0)))
        self.unharmed(asking(), frame(REFUSED, 2, u16(40_000) + b"\xff\xfe\n\x1b[2J"))

    def test_answers_to_what_was_given_up(self) -> None:
        """OPENED and REFUSED may cross the opener's abort."""
        for answer in (frame(OPENED, 2), frame(REFUSED, 2, u16(17))):
            core = asking()
            core.session.abort(2, 18)
            core.say()
            self.unharmed(core, answer)
