"""
Properties of the core that Hypothesis looks for a counterexample to.

RELAYMUX_EXAMPLES=N has N examples of each tried instead of the few that every
run can afford.  A failure prints the example, and a blob that repeats it.
"""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from relaymux.core.events import (
    DataReceived,
    Event,
    LinkEnded,
)
from tests.wire import Core, frame, hello, join, opening, u16, u64, welcome

EXAMPLES = int(os.environ.get("RELAYMUX_EXAMPLES", "0"))


def bounded(examples: int, **more: Any) -> settings:
    """Settings for a run in seconds."""
    return settings(
        max_examples=EXAMPLES or examples,
        deadline=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        **more,
    )


KINDS = st.sampled_from([*range(0x00, 0x0B), *range(0x10, 0x1B), 0x7F, 0xFF])


NUMBERS = st.one_of(st.integers(0, 5000), st.sampled_from([2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]))


PAYLOADS = st.one_of(
    st.binary(max_size=60),
    st.builds(u64, NUMBERS),
    st.builds(u64, NUMBERS, NUMBERS),
    st.builds(lambda code, offset: u16(code) + u64(offset), st.integers(0, 65535), NUMBERS),
    st.builds(lambda code, text: u16(code) + text, st.integers(0, 65535), st.binary(max_size=20)),
    st.integers(0, 3000).map(bytes),
)


FRAMES = st.one_of(
    st.builds(frame, KINDS, st.integers(0, 7), PAYLOADS),
    st.builds(opening, st.integers(0, 9), st.binary(max_size=70)),
    st.builds(
        lambda kind, length, flags: frame(kind, 1, flags=flags, length=length),
        KINDS,
        NUMBERS.filter(lambda n: n < 2**32),
        st.integers(0, 255),
    ),
)


def whole_session() -> list[bytes]:
    """What an honest peer says in a session with all kinds of frames, read by read."""
    return [
        hello(),
        opening(1) + frame(0x13, 1, bytes(range(200)) * 5),
        frame(0x13, 1, b"x" * 1000) + frame(0x07, 0, u64(1)),
        opening(3) + frame(0x15, 1, u64(2000)) + frame(0x14, 3, u64(4096, 0)),
        frame(0x13, 3, b"abc") + frame(0x16, 3, u16(20) + u64(3)),
        opening(5) + frame(0x17, 5, u16(21)) + frame(0x06, 0, u64(0)) + frame(0x08, 0, u64(1)),
        frame(0x19, 0, u16(37) + b"bye") + frame(0x09, 0, u16(37) + b"bye"),
    ]


def plain(events: list[Event]) -> list[object]:
    """Events in a form that does not depend on how payloads were cut."""
    return [
        (event.stream_id, event.size, join(event.buffers)) if isinstance(event, DataReceived) else event
        for event in events
    ]


def cuts(data: bytes, places: list[int]) -> list[bytes]:
    """C{data} cut at each of C{places} (as far as there are such)."""
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in pairwise(edges)]


class BytesTests(SynchronousTestCase):
    """A core that is fed anything at all."""

    def same(self, data: bytes, places: list[int], *, dialing: bool = False) -> None:
        whole, cut = Core(dialing=dialing), Core(dialing=dialing)
        whole.hear(data)
        cut.hear(*cuts(data, places))
        self.assertEqual(plain(whole.events), plain(cut.events))
        self.assertEqual(whole.link.state, cut.link.state)
        self.assertEqual(whole.raw(), cut.raw())

    @bounded(60)
    @given(st.lists(st.integers(0, 10_000), max_size=30))
    def test_every_split_of_a_session(self, places: list[int]) -> None:
        """A session means the same however its bytes arrive."""
        self.same(b"".join(whole_session()), places)

    def test_every_split_in_two(self) -> None:
        """The same for each single cut."""
        data = b"".join(whole_session())
        for place in range(0, len(data), 1 if EXAMPLES else 7):
            self.same(data, [place])

    @bounded(100)
    @given(st.booleans(), st.lists(FRAMES, max_size=8), st.lists(st.integers(0, 10_000), max_size=8))
    def test_every_split_of_nonsense(self, dialing: bool, frames: list[bytes], places: list[int]) -> None:
        """Nonsense is the same nonsense however it arrives."""
        self.same((welcome() if dialing else hello()) + b"".join(frames), places, dialing=dialing)

    def survives(self, core: Core, data: bytes) -> None:
        """Nothing is raised; the end is told once, last, and to the peer."""
        events = core.hear(data)
        ends = [event for event in events if isinstance(event, LinkEnded)]
        self.assertLessEqual(len(ends), 1)
        said = core.say()
        if ends:
            self.assertIs(events[-1], ends[0])
            self.assertTrue(ends[0].text.isprintable() or not ends[0].text)
            if not ends[0].by_peer:
                self.assertEqual(said[-1][2][:2], u16(ends[0].code))
        self.assertEqual(core.link.ended, bool(ends))
        core.link.handle_timer(1000.0)
        core.say()

    @bounded(100)
    @given(st.booleans(), st.booleans(), st.binary(max_size=200))
    def test_garbage(self, dialing: bool, opened: bool, data: bytes) -> None:
        """Bytes that mean nothing never raise."""
        core = Core(dialing=dialing)
        self.survives(core.shake() if opened else core, data)

    @bounded(200)
    @given(st.booleans(), st.lists(FRAMES, max_size=12))
    def test_nonsense(self, dialing: bool, frames: list[bytes]) -> None:
        """Frames that make no sense together never raise."""
        core = Core(dialing=dialing).shake()
        for _ in range(2):
            core.session.write(core.opened_here(accepted=False), b"abc")
        core.say()
        self.survives(core, b"".join(frames))

    @bounded(200)
    @given(st.integers(0, 10_000), st.integers(1, 255), st.integers(0, 10_000))
    def test_mutations(self, place: int, change: int, cut: int) -> None:
        """One wrong byte, and then a part left out, of an honest session never raise."""
        data = bytearray(b"".join(whole_session()))
        data[place % len(data)] ^= change
        self.survives(Core(), bytes(data))
        cut %= len(data)
        self.survives(Core(), bytes(data[:cut] + data[cut + place % 50 :]))
