"""
docs/protocol.md, held against the code: its tables, its state machines, and the session that it shows.

When the core changes what it sends, C{python -m tests.test_protocol_document} prints
the session of section 15 as it is now; comments are to be written anew.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from relaymux.core import frames, handshake
from relaymux.core.events import (
    DataReceived,
    Event,
    HelloReceived,
    LinkEnded,
    ResumeReceived,
    StreamClosed,
    StreamOpened,
    WelcomeReceived,
)
from relaymux.core.frames import FIRST_SEQUENCED, HEADER, HEADER_BYTES, Frame, FrameDecoder, Kind, encode
from relaymux.core.handshake import Hello, Limits, Welcome
from relaymux.core.link import OFFSET, Link, LinkState
from relaymux.core.resume import Role, Ticket, encode_resume
from relaymux.core.session import Session
from relaymux.core.stream import ReceiveHalf, ReceiveState, SendState
from relaymux.errors import ErrorCode, LocalError, RemoteProtocolError

DOCUMENT = Path(__file__).parent.parent / "docs" / "protocol.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")

Row = dict[str, str]


def rows_of(text: str) -> Iterator[list[Row]]:
    """@return: the tables of C{text}, each as its rows by the names of the columns."""
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        header, _, *body = [
            [cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()
        ]
        for line in body:
            assert len(line) == len(header), f"ragged table: {line}"
        yield [dict(zip(header, line, strict=True)) for line in body]


def table(*columns: str) -> list[Row]:
    """@return: the rows of all tables that have C{columns}."""
    found = [row for rows in rows_of(TEXT) for row in rows if set(columns) <= set(rows[0])]
    assert found, f"no table with the columns {columns}"
    return found


def section(number: str) -> str:
    """@return: the text of section C{number}, those below it included."""
    level = number.count(".") + 2
    pattern = rf"^#{{{level}}} {re.escape(number)}\.? .*?(?=^#{{2,{level}}} |\Z)"
    match = re.search(pattern, TEXT, re.MULTILINE | re.DOTALL)
    assert match is not None, f"no section {number}"
    return match[0]


def layout(frame: str) -> list[Row]:
    """@return: the fields of a frame's payload."""
    match = re.search(rf"^Payload of {frame}:\n\n((?:\|.*\|\n)+)", TEXT, re.MULTILINE)
    assert match is not None, f"no layout of {frame}"
    return next(rows_of(match[1]))


_TYPES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}


def fixed_part(fields: list[Row]) -> str:
    """@return: the C{struct} format of a layout up to the first field of any length."""
    parts = []
    for field in fields:
        size = re.fullmatch(r"bytes\[(\d+)\]", field["Type"])
        if size is None and field["Type"] not in _TYPES:
            break
        parts.append(f"{size[1]}s" if size else _TYPES[field["Type"]])
    return "".join(parts)


def joined(*layouts: struct.Struct) -> str:
    return "".join(layout.format.removeprefix("!") for layout in layouts)


def number(text: str) -> float:
    """C{"4 MiB"}, C{"0x10"}, C{"2^32 - 1"}, C{"0.025 s"}"""
    power = re.fullmatch(r"2\^(\d+) - 1", text)
    if power is not None:
        return (1 << int(power[1])) - 1
    value, _, unit = text.partition(" ")
    factor = {"": 1, "bytes": 1, "s": 1, "KiB": 1024, "MiB": 1024 * 1024}[unit]
    return (int(value, 0) if "." not in value else float(value)) * factor


class TableTests(SynchronousTestCase):
    """What the document lists is what the code has."""

    def test_kinds(self) -> None:
        """Each kind, its number and its class; and nothing else."""
        rows = table("Kind", "Code", "Class")
        self.assertEqual({row["Kind"]: int(row["Code"], 16) for row in rows}, {k.name: int(k) for k in Kind})
        for row in rows:
            is_sequenced = int(row["Code"], 16) >= FIRST_SEQUENCED
            self.assertEqual(row["Class"], "sequenced" if is_sequenced else "link", row["Kind"])

    def test_kinds_point_to_their_sections(self) -> None:
        """The section named for a kind speaks of it."""
        for row in table("Kind", "Code", "Class"):
            self.assertIn(row["Kind"], section(row["Section"]))

    def test_error_codes(self) -> None:
        """Each error code and its number; and nothing else."""
        rows = table("Name", "Number", "Scope")
        self.assertEqual(
            {row["Name"]: int(row["Number"]) for row in rows}, {c.name: int(c) for c in ErrorCode}
        )

    def test_error_codes_are_real(self) -> None:
        """Whatever the text writes as an error code is one."""
        words = set(re.findall(r"\b[A-Z]+_[A-Z_]+[A-Z]\b", re.sub(r"`[^`]*`", "", TEXT)))
        known = {code.name for code in ErrorCode} | {kind.name for kind in Kind}
        self.assertEqual(words - known, set())

    def test_limits(self) -> None:
        """Each limit has the value of the constant that is named beside it."""
        for row in table("Limit", "Value", "In the code"):
            module, _, attributes = row["In the code"].strip("`").removeprefix("core.").partition(".")
            value = import_module(f"relaymux.core.{module}")
            for attribute in attributes.split("."):
                value = getattr(value, attribute)
            self.assertEqual(value, number(row["Value"]), row["In the code"])

    def test_header(self) -> None:
        """The header's fields and their places."""
        fields = next(rows for rows in rows_of(section("3")) if "Offset" in rows[0])
        self.assertEqual(fixed_part(fields), joined(HEADER))

    def test_layouts(self) -> None:
        """The fixed part of each payload has the fields that the code packs."""
        prefix, fixed, ids = handshake._PREFIX, handshake._FIXED, handshake._IDS
        for frame, expected in {
            "HELLO": joined(prefix, fixed) + "B",
            "WELCOME": joined(prefix, ids, fixed) + "B",
            "REJECT": joined(handshake._REJECT),
            "BYE": joined(handshake._CODE),
            "GOAWAY": joined(handshake._CODE),
            "REFUSED": joined(handshake._CODE),
            "ACK": joined(OFFSET),
            "OPEN": "B",
            "CREDIT": joined(frames.CREDIT),
            "FIN": joined(frames.FIN),
            "RESET": joined(frames.RESET),
            "STOP_SENDING": joined(frames.STOP),
            "CLOSED": joined(frames.CLOSED),
        }.items():
            self.assertEqual(fixed_part(layout(frame)), expected, frame)

    def test_extension(self) -> None:
        """The head of an extension has the fields that the code packs."""
        self.assertEqual(fixed_part(next(rows_of(section("7.3")))), joined(handshake._EXTENSION))

    def test_offsets(self) -> None:
        """In every layout each offset is the sum of the sizes before it."""
        for rows in rows_of(TEXT):
            if "Offset" in rows[0]:
                for index, row in enumerate(rows):
                    if row["Offset"]:
                        size = struct.calcsize("!" + fixed_part(rows[:index]))
                        self.assertEqual(int(row["Offset"]), size, f"{row} in {rows[0]}")

    def test_links_within_the_document(self) -> None:
        """The table of contents names the sections that there are."""
        listed = re.findall(r"^(\d+)\. \[([^\]]+)\]\(#([^)]+)\)$", TEXT, re.MULTILINE)
        headings = re.findall(r"^## (\d+)\. (.+)$", TEXT, re.MULTILINE)
        self.assertEqual([(n, title) for n, title, _ in listed], headings)
        for n, title, anchor in listed:
            self.assertEqual(anchor, f"{n}-" + re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-"))

    def test_sections_that_are_referred_to(self) -> None:
        """Sections that the text, or a docstring of the core, refers to are there."""
        sources = DOCUMENT.parent.parent.glob("relaymux/**/*.py")
        texts = [TEXT, *(source.read_text(encoding="utf-8") for source in sources)]
        for text in texts:
            for group in re.findall(r"(?:[Ss]ections?|protocol\.md) (\d[\d., ]*)", text):
                for one in re.findall(r"\d+(?:\.\d+)*", group):
                    self.assertTrue(section(one))


class LinkTableTests(SynchronousTestCase):
    """Which frame may come on which link."""

    WAYS = ("acceptor before HELLO", "dialer before WELCOME", "open link")

    def ended_with(self, link: Link, frame: bytes) -> LinkEnded | None:
        """@return: the end of C{link} that C{frame} causes, if it does."""
        events = list(link.receive([memoryview(frame)], 0.0))
        return next((event for event in events if isinstance(event, LinkEnded)), None)

    def link(self, way: str) -> Link:
        if way == "acceptor before HELLO":
            return Link(local=Limits(), now=0.0)
        link = Link(local=Limits(), now=0.0, hello=DIALER)
        if way == "open link":
            link.attach(Session(dialing=True, local=Limits(), remote=Limits()), Limits(), 0.0)
        return link

    def test_all(self) -> None:
        """Every kind of frame, well formed, on a link in every state, ends as the table says."""
        payloads = {
            "HELLO": DIALER.encode(),
            "WELCOME": ACCEPTOR.encode(),
            "RESUME": dumps()[2][0][1][HEADER_BYTES:],
            "RESUMED": bytes(102),
            "REJECT": handshake.encode_reject(ErrorCode.BUSY, "no"),
            "BYE": handshake.encode_coded_text(ErrorCode.ABORTED, "over"),
            **{name: OFFSET.pack(0) for name in ("ACK", "PING", "PONG")},
        }
        by_peer = {"REJECT": ErrorCode.BUSY, "BYE": ErrorCode.ABORTED}
        rows = table("Kind", *self.WAYS)
        self.assertEqual({row["Kind"] for row in rows}, {*payloads, "sequenced"})
        for row in rows:
            for way in self.WAYS:
                is_sequenced = row["Kind"] == "sequenced"
                kind = Kind.GOAWAY if is_sequenced else Kind[row["Kind"]]
                frame = encode(kind, 0, bytes(2) if is_sequenced else payloads[row["Kind"]])
                end = self.ended_with(self.link(way), frame)
                case = f"{row['Kind']}, {way}: {end}"
                expected = row[way].partition(",")[0]
                if expected == "accepted":
                    self.assertIsNone(end, case)
                elif expected == "ends the link":
                    assert end is not None, case
                    self.assertEqual((end.by_peer, end.code), (True, by_peer[row["Kind"]]), case)
                elif expected == "PROTOCOL_ERROR":
                    assert end is not None, case
                    self.assertEqual((end.by_peer, end.code), (False, ErrorCode.PROTOCOL_ERROR), case)
                else:
                    self.assertEqual(expected, "section 10", case)
                    assert end is not None, case
                    self.assertEqual((end.by_peer, end.code), (False, ErrorCode.UNKNOWN_SESSION), case)


def frame(kind: Kind, payload: bytes = b"") -> Frame:
    (decoded,) = FrameDecoder(1024 * 1024).feed(memoryview(encode(kind, 1, payload)))
    return decoded


def edges(state_machine: str) -> set[tuple[str, str, str]]:
    """@return: state, input and next state, from the diagram with that title."""
    match = re.search(rf'state "{state_machine}" as . \{{(.*?)\}}', TEXT, re.DOTALL)
    assert match is not None, state_machine
    return {(before, cause, after) for before, after, cause in re.findall(r"(\w+) --> (\w+): (.*)", match[1])}


class StateMachineTests(SynchronousTestCase):
    """The tables of section 4, every state and every input, are what the halves do."""

    def outcome(self, act: Callable[[], object], state: Callable[[], str]) -> str:
        """@return: as in a cell of the table."""
        try:
            act()
        except LocalError:
            return "refused"
        except RemoteProtocolError as error:
            return ErrorCode(error.code).name
        return state()

    def check(self, column: str, act: Callable[[str, str], str], machine: str) -> None:
        """Compare a table, and the diagram above it, with what C{act} does."""
        changes = set()
        for row in table(column):
            before = row[column]
            for cause, expected in row.items():
                if cause != column:
                    self.assertEqual(act(before, cause), expected, f"{column}: {before}, {cause}")
                    if expected not in {before, "refused"} | set(ErrorCode.__members__):
                        changes.add((before, cause, expected))
        if machine == "receiving half":
            changes.add(("ENDED", "send CLOSED", "CLOSED"))
        self.assertEqual(edges(machine), changes)

    def test_sending_half(self) -> None:
        """The sending half of a session's stream."""
        states = [row["Sending half"] for row in table("Sending half")]
        self.assertEqual(states, [state.name for state in SendState])
        self.check("Sending half", self.send_half, "sending half")

    def send_half(self, state: str, cause: str) -> str:
        talk = Session(dialing=True, local=Limits(), remote=Limits(window=4))
        talk.open_stream("x")
        half = talk.streams[1].send
        if state == "FINISHING":
            talk.write(1, b"more than the credit")
        if state in ("FINISHING", "ENDED", "CLOSED"):
            talk.finish(1)
        talk.data_to_send(1000, 0.0)
        if state == "CLOSED":
            talk.receive_frame(frame(Kind.CLOSED, frames.CLOSED.pack(0, 0)))
        self.assertEqual(half.state.name, state)
        sent = half.window.sent
        enough = frame(Kind.CREDIT, frames.CREDIT.pack(100, sent))

        def all_sent() -> None:
            if state == "FINISHING":
                talk.receive_frame(enough)
            talk.data_to_send(1000, 0.0)

        acts: dict[str, Callable[[], object]] = {
            "finish": lambda: talk.finish(1),
            "reset": lambda: talk.reset(1, 0),
            "all sent": all_sent,
            "receive CREDIT": lambda: talk.receive_frame(enough),
            "receive STOP_SENDING": lambda: talk.receive_frame(frame(Kind.STOP_SENDING, bytes(2))),
            "receive CLOSED": lambda: talk.receive_frame(frame(Kind.CLOSED, frames.CLOSED.pack(0, sent))),
        }
        # A finish with nothing to be sent before it is over with the next frame, which is not the input here.
        return self.outcome(acts[cause], lambda: half.state.name)

    def test_receiving_half(self) -> None:
        """The receiving half, by itself."""
        states = [row["Receiving half"] for row in table("Receiving half")]
        self.assertEqual(states, [state.name for state in ReceiveState])
        self.check("Receiving half", self.receive_half, "receiving half")

    def receive_half(self, state: str, cause: str) -> str:
        half = ReceiveHalf(1, 100)
        if state != "ENDED":
            half.receive_data(5)
        if state == "FINISHED":
            half.receive_end(5, clean=True)
        elif state == "DISCARDING":
            half.stop()
        elif state == "ENDED":
            half.receive_end(0, clean=True)
        elif state == "CLOSED":
            half.state = ReceiveState.CLOSED
        self.assertEqual(half.state.name, state)

        def fin(left: int) -> None:
            if half.state is ReceiveState.OPEN:
                half.consume(5 - left)
            half.receive_end(half.window.received, clean=True)

        acts: dict[str, Callable[[], object]] = {
            "receive DATA": lambda: half.receive_data(1),
            "receive FIN, bytes left": lambda: fin(5),
            "receive FIN, none left": lambda: fin(0),
            "receive RESET": lambda: half.receive_end(half.window.received, clean=False),
            "stop": half.stop,
            "all consumed": lambda: half.consume(half.window.received - half.window.consumed),
        }
        return self.outcome(acts[cause], lambda: half.state.name)

    def test_closed_follows_at_once(self) -> None:
        """In a session a receiving half never rests in ENDED: CLOSED is said with what ended it."""
        for kind, payload in ((Kind.FIN, bytes(8)), (Kind.RESET, bytes(10))):
            talk = Session(dialing=True, local=Limits(), remote=Limits())
            talk.open_stream("x")
            talk.data_to_send(0, 0.0)
            talk.receive_frame(frame(kind, payload))
            self.assertIs(talk.streams[1].receive.state, ReceiveState.CLOSED)
            self.assertEqual(sent_kinds(talk), [Kind.CLOSED])


def sent_kinds(talk: Session) -> list[Kind]:
    data = b"".join(talk.data_to_send(1000, 0.0))
    return [Kind(one.kind) for one in FrameDecoder(1024 * 1024).feed(memoryview(data))]


# The example of section 15.

DIALER = Hello("hv-a", bytes(range(16)), Limits())
ACCEPTOR = Welcome(
    "hv-b",
    bytes(range(0x10, 0x20)),
    replace(Limits(), window=1024),
    session_id=bytes(range(0x20, 0x30)),
    resume_key=bytes(range(0x40, 0x60)),
)


Acts = list[Callable[[], object]]
Turn = tuple[str, Acts]


class Example:
    """The two ends of the example, and what each does in its turn."""

    def __init__(self) -> None:
        self.now = 0.0
        self.links = {
            "dialer": Link(local=DIALER.limits, now=0.0, hello=DIALER),
            "acceptor": Link(local=ACCEPTOR.limits, now=0.0),
        }
        self.sessions: dict[str, Session] = {}
        self.events: dict[str, list[Event]] = {"dialer": [], "acceptor": []}

    def turns(self) -> Iterator[Turn]:
        """@return: who speaks, and what is to be done before."""
        dialer, acceptor = "dialer", "acceptor"

        def a() -> Session:
            return self.sessions[dialer]

        def b() -> Session:
            return self.sessions[acceptor]

        yield dialer, []
        yield acceptor, []
        yield dialer, [lambda: a().open_stream("vda"), lambda: a().write(1, b"a" * 400)]
        yield (
            acceptor,
            [lambda: b().accept(1), lambda: b().consumed(1, 400), lambda: b().write(1, b"hello")],
        )
        yield dialer, [lambda: a().consumed(1, 5), lambda: a().finish(1), lambda: self.wait(0.025)]
        yield acceptor, [lambda: b().finish(1)]
        yield dialer, [lambda: a().open_stream("vdb")]
        yield acceptor, [lambda: b().refuse(3, ErrorCode.UNKNOWN_SERVICE, "no vdb here")]
        yield dialer, []
        yield acceptor, [lambda: b().open_stream("log"), lambda: b().write(2, b"line\n")]
        yield (
            dialer,
            [lambda: a().accept(2), lambda: a().finish(2), lambda: a().stop(2, ErrorCode.LOCAL_CLOSED)],
        )
        yield acceptor, []
        yield dialer, [lambda: self.wait(5.0)]
        yield acceptor, []
        yield dialer, [lambda: a().goaway(ErrorCode.SHUTTING_DOWN, "hv-a stops")]
        yield acceptor, [lambda: self.wait(0.025)]
        text = "everything was delivered"
        yield dialer, [lambda: self.links[dialer].goodbye(ErrorCode.SHUTTING_DOWN, text)]

    def wait(self, seconds: float) -> None:
        self.now += seconds
        for link in self.links.values():
            link.handle_timer(self.now)

    def say(self, side: str, acts: Acts) -> bytes:
        """@return: what C{side} sends in its turn."""
        for act in acts:
            act()
        return b"".join(self.links[side].data_to_send(1024 * 1024, self.now))

    def hear(self, side: str, data: bytes, step: int = 1 << 20) -> None:
        """Give C{data}, which the other side sent, to C{side} in pieces of C{step} bytes."""
        link = self.links[side]
        for start in range(0, len(data), step):
            for event in link.receive([memoryview(data[start : start + step])], self.now):
                self.events[side].append(event)
                if isinstance(event, HelloReceived):
                    link.welcome(ACCEPTOR)
                    self.attach(side, event.hello)
                elif isinstance(event, WelcomeReceived):
                    self.attach(side, event.welcome)

    def attach(self, side: str, remote: Hello) -> None:
        local = DIALER if side == "dialer" else ACCEPTOR
        talk = Session(dialing=side == "dialer", local=local.limits, remote=remote.limits)
        self.links[side].attach(talk, remote.limits, self.now)
        self.sessions[side] = talk


def parse_dump(text: str) -> list[tuple[str, bytes]]:
    """@return: who said what, from a block of the document."""
    blocks: list[tuple[str, bytearray]] = []
    for line in text.splitlines():
        code = line.split("#")[0].split(";")[0].strip()
        if code.endswith(":"):
            blocks.append((code[:-1], bytearray()))
        elif code:
            for token in code.split():
                digits, _, times = token.partition("*")
                blocks[-1][1].extend(bytes.fromhex(digits) * int(times or 1))
    return [(who, bytes(data)) for who, data in blocks]


def dumps() -> list[list[tuple[str, bytes]]]:
    """@return: the dumps of section 15, in their order."""
    return [parse_dump(block) for block in re.findall(r"```hexdump\n(.*?)```", section("15"), re.DOTALL)]


class ExampleTests(SynchronousTestCase):
    """The session that the document shows is what two cores say."""

    def test_what_is_sent(self) -> None:
        """Two ends that do what the example says send its bytes, turn by turn."""
        example = Example()
        blocks = dumps()[0]
        turns = list(example.turns())
        self.assertEqual([who for who, _ in blocks], [who for who, _ in turns])
        for index, ((side, acts), (_, expected)) in enumerate(zip(turns, blocks, strict=True)):
            said = example.say(side, acts)
            self.assertEqual(said.hex(" "), expected.hex(" "), f"block {index + 1}, {side}")
            example.hear("acceptor" if side == "dialer" else "dialer", said)
        ends = [e for e in example.events["acceptor"] if isinstance(e, LinkEnded)]
        self.assertEqual([(e.code, e.by_peer, e.session_over) for e in ends], [(37, True, True)])

    def test_what_is_heard(self) -> None:
        """The document's bytes, one at a time, lead to the same events as all at once."""
        seen = []
        for step in (1, 1 << 20):
            example = Example()
            for (side, acts), (_, block) in zip(example.turns(), dumps()[0], strict=True):
                example.say(side, acts)
                example.hear("acceptor" if side == "dialer" else "dialer", block, step)
            seen.append({side: [self.comparable(e) for e in example.events[side]] for side in example.events})
        self.assertEqual(seen[0], seen[1])
        self.assertIn("StreamOpened(stream_id=1, service='vda')", seen[0]["acceptor"])
        self.assertIn("StreamOpened(stream_id=2, service='log')", seen[0]["dialer"])

    def comparable(self, event: Event) -> str:
        if isinstance(event, DataReceived):
            return f"{event.stream_id}: {b''.join(event.buffers)!r}"
        return repr(event)

    def test_nothing_is_left_over(self) -> None:
        """Before BYE both ends are settled, and every stream was closed at both ends."""
        example = Example()
        opened: set[int] = set()
        for side, acts in list(example.turns())[:-1]:
            example.hear("acceptor" if side == "dialer" else "dialer", example.say(side, acts))
        for side in ("dialer", "acceptor"):
            closed = {e.stream_id for e in example.events[side] if isinstance(e, StreamClosed)}
            opened |= {e.stream_id for e in example.events[side] if isinstance(e, StreamOpened)}
            self.assertEqual(closed, {1, 2, 3}, side)
        self.assertEqual(opened, {1, 2, 3})
        self.assertTrue(example.sessions["dialer"].settled)

    def test_shows_every_frame(self) -> None:
        """The example has a frame of every kind that this version sends in a session without errors."""
        shown = set()
        for side in ("dialer", "acceptor"):
            data = b"".join(block for who, block in dumps()[0] if who == side)
            shown |= {Kind(one.kind) for one in FrameDecoder(1024 * 1024).feed(memoryview(data))}
        self.assertEqual(set(Kind) - shown, {Kind.RESUME, Kind.RESUMED, Kind.REJECT})

    def test_another_version(self) -> None:
        """A HELLO of another version is answered with REJECT and our own version."""
        (_, hello), (_, expected) = dumps()[1]
        acceptor = Link(local=Limits(), now=0.0)
        (end,) = acceptor.receive([memoryview(hello)], 0.0)
        assert isinstance(end, LinkEnded)
        self.assertEqual(end.code, ErrorCode.VERSION_UNSUPPORTED)
        self.assertEqual(b"".join(acceptor.data_to_send(1000, 0.0)).hex(" "), expected.hex(" "))
        dialer = Link(local=Limits(), now=0.0, hello=DIALER)
        (end,) = dialer.receive([memoryview(expected)], 0.0)
        assert isinstance(end, LinkEnded)
        self.assertEqual((end.code, end.by_peer), (ErrorCode.VERSION_UNSUPPORTED, True))
        self.assertIn("version 2", end.text)
        self.assertIn("version 1", end.text)

    def test_resume(self) -> None:
        """The RESUME that is shown has its fields in their places and the right proof, and is rejected."""
        (_, data), (_, answer) = dumps()[2]
        payload = data[HEADER_BYTES:]
        fields = struct.unpack("!" + fixed_part(layout("RESUME and RESUMED")), payload)
        magic, version, session_id, generation, dialer, acceptor, rx_next, proof = fields
        self.assertEqual((magic, version), (handshake.MAGIC, handshake.VERSION))
        self.assertEqual((session_id, generation, rx_next), (ACCEPTOR.session_id, 1, 500))
        self.assertEqual((dialer, acceptor), (DIALER.instance, ACCEPTOR.instance))
        said = b"relaymux resume 1" + b"\x01" + payload[:70] + struct.pack("!H", 0)
        self.assertEqual(proof, hmac.new(ACCEPTOR.resume_key, said, hashlib.sha256).digest())
        self.assertIn(proof.hex(), section("15.2"))
        ticket = Ticket(ACCEPTOR.session_id, ACCEPTOR.resume_key, DIALER.instance, ACCEPTOR.instance)
        self.assertEqual(encode_resume(ticket, Role.DIALER, 1, 500, b"").hex(" "), payload.hex(" "))
        link = Link(local=Limits(), now=0.0)
        (event,) = link.receive([memoryview(data)], 0.0)
        assert isinstance(event, ResumeReceived)
        self.assertTrue(event.resume.is_proven_by(ticket, Role.DIALER, b""))
        link.reject(ErrorCode.UNKNOWN_SESSION, "there is no such session here; begin a new one")
        self.assertEqual(b"".join(link.data_to_send(1000, 0.0)).hex(" "), answer.hex(" "))
        self.assertIs(link.state, LinkState.ENDED)


class DocumentationTests(SynchronousTestCase):
    """The other documents of the design speak of what there is."""

    def test_names(self) -> None:
        """Each file, module, class and method that they name exists."""
        root = DOCUMENT.parent.parent
        documents = [
            DOCUMENT.parent / "architecture.md",
            *sorted((DOCUMENT.parent / "decisions").glob("*.md")),
        ]
        self.assertTrue(len(documents) > 1)
        for document in documents:
            text = document.read_text(encoding="utf-8")
            for name in re.findall(r"`((?:core|net|service|transports)(?:\.\w+)+)(?:\(\))?`", text):
                self.assertTrue(resolves(name), f"{document.name}: {name}")
            for path in re.findall(r"`((?:relaymux|docs|tests|etc|benchmarks)/[\w./-]*)`", text):
                self.assertTrue((root / path).exists(), f"{document.name}: {path}")
            for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
                if "://" not in target:
                    self.assertTrue((document.parent / target).exists(), f"{document.name}: {target}")


def resolves(name: str) -> bool:
    """@return: whether C{name} is a module of relaymux or something in one, instance variables included."""
    parts = name.split(".")
    root = DOCUMENT.parent.parent / "relaymux"
    for depth in range(len(parts), 0, -1):
        place = root.joinpath(*parts[:depth])
        if place.with_suffix(".py").is_file() or (place / "__init__.py").is_file():
            value: object = import_module(".".join(["relaymux", *parts[:depth]]))
            rest = parts[depth:]
            break
    else:
        return False
    for index, attribute in enumerate(rest):
        if not hasattr(value, attribute):
            source = place.with_suffix(".py").read_text(encoding="utf-8")
            return index == len(rest) - 1 and re.search(rf"\b{attribute}\b", source) is not None
        value = getattr(value, attribute)
    return True


def print_example() -> None:
    """Print the example's blocks, a line for each frame."""
    example = Example()
    for side, acts in example.turns():
        said = example.say(side, acts)
        example.hear("acceptor" if side == "dialer" else "dialer", said)
        print(f"{side}:")
        for one in FrameDecoder(1024 * 1024).feed(memoryview(said)):
            data, said = said[: one.size], said[one.size :]
            print(f"    {data[:12].hex(' ')} ; {Kind(one.kind).name}\n    {data[12:].hex()}")


if __name__ == "__main__":
    print_example()
