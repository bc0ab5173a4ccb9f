"""
The wire format a second time, by hand: what tests say to a core and read from it.

Nothing of C{relaymux.core.frames} or C{relaymux.core.handshake} is used for that,
so that a change of the format cannot go by unnoticed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from relaymux.core.events import Event, HelloReceived, StreamOpened, WelcomeReceived
from relaymux.core.handshake import Hello, Limits, Welcome
from relaymux.core.link import Link
from relaymux.core.session import Session

HELLO, WELCOME, RESUME, RESUMED, REJECT, ACK, PING, PONG, BYE = range(0x01, 0x0A)
OPEN, OPENED, REFUSED, DATA, CREDIT, FIN, RESET, STOP, CLOSED, GOAWAY = range(0x10, 0x1A)

#: Of the core under test.  Small, so that every limit is near.
LIMITS = Limits(max_payload=4096, max_streams=3, window=2048, replay=16384, silence=15.0)

INSTANCE = bytes(range(16))

#: What a line of a frame says: kind, stream id, payload.
Said = tuple[int, int, bytes]


def unhex(text: str) -> bytes:
    """Bytes from hexadecimal digits with any white space."""
    return bytes.fromhex("".join(text.split()))


def frame(
    kind: int,
    stream_id: int = 0,
    payload: bytes = b"",
    *,
    flags: int = 0,
    reserved: int = 0,
    length: int | None = None,
) -> bytes:
    """One frame.  C{length} for one whose header does not say the truth."""
    size = len(payload) if length is None else length
    return struct.pack("!BBHII", kind, flags, reserved, stream_id, size) + payload


def hello_terms(
    name: bytes = b"far",
    *,
    max_payload: int = 4096,
    max_streams: int = 3,
    window: int = 2048,
    replay: int = 16384,
    resume_ms: int = 0,
    silence_ms: int = 15000,
    instance: bytes = INSTANCE,
    extensions: bytes = b"",
) -> bytes:
    """What HELLO and WELCOME have in common."""
    fixed = struct.pack("!HIIQQII", 0, max_payload, max_streams, window, replay, resume_ms, silence_ms)
    return fixed + instance + bytes([len(name)]) + name + extensions


def hello(version: int = 1, **terms: object) -> bytes:
    """A HELLO frame."""
    return frame(HELLO, 0, b"relaymux" + struct.pack("!H", version) + hello_terms(**terms))  # type: ignore[arg-type]


def welcome(version: int = 1, **terms: object) -> bytes:
    """A WELCOME frame."""
    head = b"relaymux" + struct.pack("!H", version) + bytes(16) + bytes(32)
    return frame(WELCOME, 0, head + hello_terms(**terms))  # type: ignore[arg-type]


def opening(stream_id: int, service: bytes = b"vda", extensions: bytes = b"") -> bytes:
    """An OPEN frame."""
    return frame(OPEN, stream_id, bytes([len(service)]) + service + extensions)


def u16(number: int) -> bytes:
    return struct.pack("!H", number)


def u64(*numbers: int) -> bytes:
    return struct.pack(f"!{len(numbers)}Q", *numbers)


def parse(data: bytes) -> list[Said]:
    """Take whole frames apart; nothing may be left over."""
    said = []
    while data:
        kind, flags, reserved, stream_id, length = struct.unpack_from("!BBHII", data)
        assert not flags and not reserved
        assert len(data) >= 12 + length, "ends inside a frame"
        said.append((kind, stream_id, data[12 : 12 + length]))
        data = data[12 + length :]
    return said


class Core:
    """
    A link of the core with its session, which tests talk to in bytes.

    It takes every peer, and accepts no stream by itself.

    @ivar events: all so far, but those of the handshake.
    """

    def __init__(self, *, dialing: bool = False, limits: Limits = LIMITS) -> None:
        self.limits = limits
        self.dialing = dialing
        self.now = 0.0
        self.events: list[Event] = []
        mine = Hello("near", INSTANCE, limits) if dialing else None
        self.link = Link(local=limits, now=self.now, hello=mine)

    @property
    def session(self) -> Session:
        assert self.link.session is not None
        return self.link.session

    def hear(self, *data: bytes) -> list[Event]:
        """@return: what these bytes meant, each of C{data} being a read of its own."""
        heard: list[Event] = []
        for piece in data:
            for event in self.link.receive([memoryview(piece)] if piece else [], self.now):
                if isinstance(event, HelloReceived):
                    self.link.welcome(Welcome("near", INSTANCE, self.limits))
                    self._attach(event.hello.limits)
                elif isinstance(event, WelcomeReceived):
                    self._attach(event.welcome.limits)
                else:
                    heard.append(event)
        self.events += heard
        return heard

    def _attach(self, remote: Limits) -> None:
        session = Session(dialing=self.dialing, local=self.limits, remote=remote)
        self.link.attach(session, remote, self.now)

    def raw(self, limit: int = 1 << 30, *, beside_talk: bool = False) -> bytes:
        """@return: the bytes it wants to send now."""
        return join(self.link.data_to_send(limit, self.now, beside_talk=beside_talk))

    def say(self, limit: int = 1 << 30, *, beside_talk: bool = False) -> list[Said]:
        """@return: the frames it wants to send now."""
        return parse(self.raw(limit, beside_talk=beside_talk))

    def shake(self, **terms: object) -> Core:
        """Get through the handshake.  @return: itself."""
        self.hear(welcome(**terms) if self.dialing else hello(**terms))  # type: ignore[arg-type]
        self.say()
        return self

    def opened_by_peer(self, stream_id: int = 1, *, accept: bool = True) -> Core:
        """Have the peer open a stream, which is accepted.  @return: itself."""
        assert self.hear(opening(stream_id)) == [StreamOpened(stream_id, "vda")]
        if accept:
            self.session.accept(stream_id)
            assert self.say() == [(OPENED, stream_id, b"")]
        return self

    def opened_here(self, *, accepted: bool = True) -> int:
        """Open a stream.  @return: its id."""
        stream_id = self.session.open_stream("vda")
        self.say()
        if accepted:
            self.hear(frame(OPENED, stream_id))
        return stream_id


def join(buffers: Iterable[bytes | memoryview]) -> bytes:
    return b"".join(buffers)
