"""Two sessions and a model of them, which Hypothesis tries to tell apart."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twisted.trial.unittest import SynchronousTestCase

from relaymux.core import flight
from relaymux.core.budget import Account, Budget, link_beginning, stream_beginning
from relaymux.core.events import (
    DataReceived,
    Event,
    GoawayReceived,
    HelloReceived,
    LinkEnded,
    ResumedReceived,
    ResumeReceived,
    SendingStopped,
    StreamAccepted,
    StreamClosed,
    StreamCrowdedOut,
    StreamFinished,
    StreamOpened,
    StreamRefused,
    StreamReset,
    WelcomeReceived,
)
from relaymux.core.handshake import Hello, Limits, Welcome
from relaymux.core.link import Link
from relaymux.core.replay import HEAD_ROOM
from relaymux.core.session import Session
from relaymux.core.stream import ReceiveState, SendState
from relaymux.errors import ErrorCode, LocalError
from tests.accounting import assert_accounted
from tests.test_properties_core import bounded
from tests.wire import INSTANCE, join

#: Codes of a refusal that a session makes by itself, before anybody hears of the stream.
BY_ITSELF = (ErrorCode.SHUTTING_DOWN, ErrorCode.TOO_MANY_STREAMS)


@dataclass
class Direction:
    """
    What the model knows of one direction of a stream.

    @ivar written: all bytes that the producer wrote.
    @ivar received: the bytes that the consumer was given.
    @ivar consumed: how many of them it took.
    @ivar end: how the sending side ended it: C{""}, C{"fin"}, C{"reset"}.
    @ivar stopped: whether the consumer wants no more.
    @ivar told: the end the consumer was told of.
    """

    written: bytearray = field(default_factory=bytearray)
    received: bytearray = field(default_factory=bytearray)
    consumed: int = 0
    end: str = ""
    stopped: bool = False
    told: str = ""


@dataclass
class Model:
    """One stream: C{directions[i]} is what side i sends."""

    opener: int
    directions: tuple[Direction, Direction] = field(default_factory=lambda: (Direction(), Direction()))
    answer: str = ""
    heard: str = ""
    closed: list[int] = field(default_factory=list)


class Sessions(RuleBasedStateMachine):
    """Two sessions over connections that deliver any pieces and are cut anywhere, against lists of bytes."""

    @initialize(
        windows=st.tuples(*[st.sampled_from([1024, 1500, 5000])] * 2),
        replays=st.tuples(*[st.sampled_from([4096, 6000, 50_000])] * 2),
        payload=st.sampled_from([1024, 3000]),
        memory=st.one_of(st.none(), st.tuples(st.integers(0, 7), st.sampled_from([0, 3000, 1 << 20]))),
    )
    def begin(
        self,
        windows: tuple[int, int],
        replays: tuple[int, int],
        payload: int,
        memory: tuple[int, int] | None,
    ) -> None:
        """Two ends with small limits, connected; they share a budget for so many streams and bytes more."""
        limits = [
            Limits(max_payload=payload, max_streams=3, window=window, replay=size, silence=10_000)
            for window, size in zip(windows, replays, strict=True)
        ]
        self.budget: Budget | None = None
        if memory is not None:
            beginnings = [link_beginning(size) for size in replays]
            self.budget = Budget(sum(beginnings) + memory[0] * stream_beginning(max(windows)) + memory[1])
            assert all(map(self.budget.begin, beginnings))
        self.now = 0.0
        self.pipes = (bytearray(), bytearray())  # pipes[i]: from side i to the other
        self.streams: dict[int, Model] = {}
        self.said = 0
        self.goaway = [False, False]
        self.seen = [0, 0]
        self.links = (
            Link(local=limits[0], now=0.0, hello=Hello("near", INSTANCE, limits[0])),
            Link(local=limits[1], now=0.0),
        )
        self.limits = limits
        for side in (0, 1, 0):
            self.flush(side, 1 << 20)
            self.arrive(1 - side, 1 << 20)

    # What moves.

    def account(self) -> Account | None:
        return Account(self.budget) if self.budget is not None else None

    def session(self, side: int) -> Session:
        session = self.links[side].session
        assert session is not None
        return session

    def flush(self, side: int, limit: int, beside_talk: bool = False) -> None:
        said = self.links[side].data_to_send(limit, self.now, beside_talk=beside_talk)
        self.pipes[side].extend(join(said))
        if self.links[side].session is not None:
            self.session(side).take_drained()

    def arrive(self, side: int, count: int) -> bool:
        """Up to C{count} bytes reach C{side}.  @return: whether there were any."""
        pipe = self.pipes[1 - side]
        data = bytes(pipe[:count])
        del pipe[:count]
        if data:
            for event in self.links[side].receive([memoryview(data)], self.now):
                self.happened(side, event)
        return bool(data)

    def happened(self, side: int, event: Event) -> None:
        """Compare what a side is told with what the other one did."""
        link = self.links[side]
        if isinstance(event, HelloReceived):
            link.welcome(Welcome("far", INSTANCE, self.limits[side]))
            link.attach(
                Session(
                    dialing=False,
                    local=self.limits[side],
                    remote=event.hello.limits,
                    account=self.account(),
                ),
                event.hello.limits,
                self.now,
            )
            return
        if isinstance(event, WelcomeReceived):
            link.attach(
                Session(
                    dialing=True,
                    local=self.limits[side],
                    remote=event.welcome.limits,
                    account=self.account(),
                ),
                event.welcome.limits,
                self.now,
            )
            return
        assert not isinstance(event, (LinkEnded, ResumeReceived, ResumedReceived)), event
        if isinstance(event, GoawayReceived):
            assert self.goaway[1 - side]
            return
        stream = self.streams[event.stream_id]
        sent, theirs = stream.directions[side], stream.directions[1 - side]
        assert side not in stream.closed, "an event after the last one"
        if isinstance(event, StreamOpened):
            assert stream.opener == 1 - side and not stream.heard
            assert event.service == f"s{event.stream_id}"
            stream.heard = "asked"
        elif isinstance(event, StreamCrowdedOut):
            assert stream.opener == 1 - side and not stream.heard
            assert event.service == f"s{event.stream_id}"
        elif isinstance(event, StreamAccepted):
            assert stream.opener == side and stream.answer == "accepted"
        elif isinstance(event, StreamRefused):
            if event.code in BY_ITSELF:
                crossed = event.code == ErrorCode.SHUTTING_DOWN
                assert self.goaway[1 - side] if crossed else self.budget is not None
                assert not stream.heard and not stream.answer
                stream.answer, theirs.end, sent.stopped = "refused", "reset", True
            assert stream.opener == side and stream.answer == "refused"
            assert event.code in BY_ITSELF or (event.code, event.text) == (17, "no")
            theirs.told = "reset"
            sent.end = sent.end if sent.end == "fin" and self.fin_said(side, event.stream_id) else "reset"
        elif isinstance(event, DataReceived):
            assert not theirs.told and not theirs.stopped
            assert event.size == sum(map(len, event.buffers)) > 0
            theirs.received += join(event.buffers)
            assert theirs.written.startswith(theirs.received), "not what was written"
        elif isinstance(event, StreamFinished):
            assert not theirs.told and not theirs.stopped and theirs.end == "fin"
            assert theirs.received == theirs.written, "an end before the end"
            theirs.told = "fin"
        elif isinstance(event, StreamReset):
            assert not theirs.told and not theirs.stopped and theirs.end == "reset"
            theirs.told = "reset"
        elif isinstance(event, SendingStopped):
            assert theirs is not sent and sent.stopped
            sent.end = "reset"
            assert event.undelivered >= len(sent.written) - sent.consumed
        elif isinstance(event, StreamClosed):
            assert event.accepted == len(sent.written)
            assert event.delivered == sent.consumed, "not what the consumer took"
            assert event.consumed == theirs.consumed
            assert event.received >= len(theirs.received)
            stream.closed.append(side)
        else:
            raise AssertionError(event)

    def fin_said(self, side: int, stream_id: int) -> bool:
        """Whether the FIN of a side left before it was refused."""
        stream = self.session(side).streams.get(stream_id)
        return stream is None or stream.send.window.sent == len(
            self.streams[stream_id].directions[side].written
        )

    # Rules.  C{pick} chooses among what is possible.

    def known(self, side: int, pick: int) -> int | None:
        """@return: a stream that the session of C{side} has, and was told of, if there is any."""
        streams = [
            stream_id
            for stream_id in self.session(side).streams
            if self.streams[stream_id].opener == side or self.streams[stream_id].heard
        ]
        return streams[pick % len(streams)] if streams else None

    sides = st.integers(0, 1)
    picks = st.integers(0, 5)

    @rule(side=sides)
    def open(self, side: int) -> None:
        """Open a stream, if the peer allows one more."""
        session = self.session(side)
        if not session.can_open:
            return
        # The id is known before: odd ones for the side that dialled.
        stream_id = 1 - side + 2 * sum(s.opener == side for s in self.streams.values()) + 2 * side
        beginning = stream_beginning(self.limits[side].window)
        if self.budget is not None and self.budget.total - self.budget.drawn < beginning:
            SynchronousTestCase().assertRaises(LocalError, session.open_stream, f"s{stream_id}")
            return
        assert session.open_stream(f"s{stream_id}") == stream_id
        self.streams[stream_id] = Model(side)

    @rule(side=sides, pick=picks, refuse=st.booleans())
    def answer(self, side: int, pick: int, refuse: bool) -> None:
        """Accept or refuse a stream of the peer."""
        session = self.session(side)
        waiting = [
            stream_id
            for stream_id in session.streams
            if self.streams[stream_id].heard
            and self.streams[stream_id].opener != side
            and not self.streams[stream_id].answer
        ]
        if not waiting:
            return
        stream_id = waiting[pick % len(waiting)]
        stream = self.streams[stream_id]
        sent, theirs = stream.directions[side], stream.directions[1 - side]
        if not refuse or sent.written:
            stream.answer = "accepted"
            session.accept(stream_id)
            return
        if sent.end:
            stream.answer = "aborted"
        else:
            stream.answer = "refused"
        sent.end = sent.end or "reset"
        if session.streams[stream_id].send.state is SendState.FINISHING:
            sent.end = "reset"
        if not theirs.told or (theirs.told == "fin" and theirs.consumed < len(theirs.received)):
            theirs.stopped = True
        self.tell(side, session.refuse(stream_id, 17, "no"))

    @rule(side=sides, pick=picks, size=st.sampled_from([0, 1, 10, 500, 1024, 4000]))
    def write(self, side: int, pick: int, size: int) -> None:
        """Write to a stream that was not ended."""
        stream_id = self.known(side, pick)
        if stream_id is None or self.session(side).streams[stream_id].send.state is not SendState.OPEN:
            return
        # Each byte tells its place in everything that was ever written.
        data = b"".join((self.said + i).to_bytes(4, "big") for i in range((size + 3) // 4))[:size]
        self.said += len(data)
        self.streams[stream_id].directions[side].written += data
        self.session(side).write(stream_id, data)

    @rule(side=sides, pick=picks)
    def finish(self, side: int, pick: int) -> None:
        """Half-close a stream."""
        stream_id = self.known(side, pick)
        if stream_id is None or self.session(side).streams[stream_id].send.state is not SendState.OPEN:
            return
        self.streams[stream_id].directions[side].end = "fin"
        self.session(side).finish(stream_id)

    @rule(side=sides, pick=picks)
    def reset(self, side: int, pick: int) -> None:
        """Reset a direction that has not ended."""
        stream_id = self.known(side, pick)
        if stream_id is None:
            return
        if self.session(side).streams[stream_id].send.state not in (SendState.OPEN, SendState.FINISHING):
            return
        self.streams[stream_id].directions[side].end = "reset"
        self.session(side).reset(stream_id, 20)

    @rule(side=sides, pick=picks)
    def stop(self, side: int, pick: int) -> None:
        """Take no more of a direction that has not ended."""
        stream_id = self.known(side, pick)
        if stream_id is None:
            return
        state = self.session(side).streams[stream_id].receive.state
        if state not in (ReceiveState.OPEN, ReceiveState.FINISHED):
            return
        self.streams[stream_id].directions[1 - side].stopped = True
        self.tell(side, self.session(side).stop(stream_id, 21))

    @rule(side=sides, pick=picks)
    def abort(self, side: int, pick: int) -> None:
        """End whatever has not ended."""
        stream_id = self.known(side, pick)
        if stream_id is None:
            return
        stream = self.session(side).streams[stream_id]
        if stream.send.state in (SendState.OPEN, SendState.FINISHING):
            self.streams[stream_id].directions[side].end = "reset"
        if stream.receive.state in (ReceiveState.OPEN, ReceiveState.FINISHED):
            self.streams[stream_id].directions[1 - side].stopped = True
        self.tell(side, self.session(side).abort(stream_id, 22))

    @rule(side=sides, pick=picks, share=st.sampled_from([0.1, 0.5, 1.0, 1.0]))
    def consume(self, side: int, pick: int, share: float) -> None:
        """Take some of what has arrived."""
        stream_id = self.known(side, pick)
        if stream_id is None:
            return
        theirs = self.streams[stream_id].directions[1 - side]
        left = len(theirs.received) - theirs.consumed
        if not left or theirs.stopped or theirs.told == "reset":
            return
        count = max(1, int(left * share))
        theirs.consumed += count
        self.tell(side, self.session(side).consumed(stream_id, count))

    @rule(side=sides)
    @precondition(lambda self: len(self.streams) > 5)
    def go_away(self, side: int) -> None:
        """Announce that no new streams are taken."""
        self.goaway[side] = True
        self.session(side).goaway(37, "bye")

    @rule(side=sides, limit=st.sampled_from([1, 100, 2000, 1 << 20]), talk=st.booleans())
    def say(self, side: int, limit: int, talk: bool) -> None:
        """Hand frames to the transport, while somebody waits for answers or nobody does."""
        self.flush(side, limit, talk)

    @rule(side=sides, count=st.one_of(st.integers(1, 30), st.integers(1, 5000), st.just(1 << 20)))
    def deliver(self, side: int, count: int) -> None:
        """Some of the bytes under way arrive."""
        self.arrive(side, count)

    @rule()
    def cut(self) -> None:
        """The connection is lost with what is under way; the sessions go on over another one."""
        sessions = [self.session(side) for side in (0, 1)]
        old = self.links
        self.links = (self.resuming(0), self.resuming(1))
        for side, (session, link) in enumerate(zip(sessions, self.links, strict=True)):
            self.pipes[side].clear()
            old[side].detach()
            offset = sessions[1 - side].rx_next
            assert session.replay.can_continue_at(offset)
            assert session.resume(offset) == session.replay.end - offset
            link.attach(session, self.limits[1 - side], self.now)

    def resuming(self, side: int) -> Link:
        """A link whose handshake is all but done."""
        link = Link(local=self.limits[side], now=self.now, resume=b"")
        link.data_to_send(0, self.now)
        return link

    @rule(seconds=st.sampled_from([0.01, 0.03, 1.0]))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.now += seconds
        for link in self.links:
            assert link.handle_timer(self.now) == []

    def tell(self, side: int, events: list[Event]) -> None:
        for event in events:
            self.happened(side, event)

    # What is always true.

    @invariant()
    def offsets(self) -> None:
        """The numbering of both sides fits, and what is kept is bounded."""
        if not hasattr(self, "links"):
            return
        for side in (0, 1):
            session, other = self.session(side), self.session(1 - side)
            replay = session.replay
            assert replay.acknowledged <= other.rx_acknowledged <= other.rx_next <= replay.end
            assert self.seen[side] <= session.rx_next
            self.seen[side] = session.rx_next
            kept = sum(len(buffer) for buffers in replay.unacknowledged() for buffer in buffers)
            assert kept == replay.held_bytes == replay.end - replay.acknowledged
            assert replay.held_bytes <= replay.capacity + HEAD_ROOM
            assert len(session._control) <= 8 * 6 + 1
            assert not session._credit_due.keys() - session.streams.keys()
            turns = session._turns
            assert {*turns._turns, *turns._little} == turns._waiting <= session.streams.keys()
            assert len(turns._turns) + len(turns._little) == len(turns)

    @invariant()
    def credit(self) -> None:
        """Nobody sends or takes more than allowed, and nobody knows more than happened."""
        if not hasattr(self, "links"):
            return
        for side in (0, 1):
            mine, other = self.session(side).streams, self.session(1 - side).streams
            for stream_id, stream in mine.items():
                assert stream.stream_id == stream_id and stream.outgoing == (stream_id % 2 != side)
                assert not stream.closed
                send, window = stream.send, stream.receive.window
                assert 0 <= send.delivered <= send.window.sent <= send.window.limit
                assert send.accepted == len(self.streams[stream_id].directions[side].written)
                if send.state in (SendState.OPEN, SendState.FINISHING):
                    assert send.queued == send.accepted - send.window.sent
                else:
                    assert send.queued == 0
                assert window.consumed <= window.received <= window.granted
                promised = max(window.size, window.drawn) if self.budget is not None else window.size
                ended = stream.receive.state in (ReceiveState.DISCARDING, ReceiveState.CLOSED)
                assert ended or window.granted <= window.consumed + promised
                assert window.consumed == self.streams[stream_id].directions[1 - side].consumed
                if stream_id in other:
                    far = other[stream_id].receive.window
                    assert far.received <= send.window.sent and send.window.limit <= far.granted
                    assert send.delivered <= far.consumed
            for stream_id, model in self.streams.items():
                assert (side in model.closed) <= (stream_id not in mine)

    @invariant()
    def memory(self) -> None:
        """What is promised and held is drawn from the budget, and never more than there is."""
        if hasattr(self, "links") and self.budget is not None:
            replays = [limits.replay for limits in self.limits]
            assert_accounted(self.budget, replays, [self.session(side) for side in (0, 1)])

    def teardown(self) -> None:
        """Whatever happened: when everybody takes and says what is left, everything comes to an end."""
        if not hasattr(self, "links"):
            return
        for _ in range(200):
            busy = False
            for side in (0, 1):
                busy |= self.finish_all(side)
                self.flush(side, 1 << 20, beside_talk=True)
                busy |= self.arrive(1 - side, 1 << 20)
            self.wait(0.03)
            if not busy and not self.session(0).streams and not self.session(1).streams:
                break
        for side in (0, 1):
            session = self.session(side)
            assert session.settled, f"side {side} is left with {session.streams or session.replay.held_bytes}"
        if self.budget is not None:
            for side in (0, 1):
                self.session(side).rest()
            assert self.budget.drawn == sum(link_beginning(limits.replay) for limits in self.limits)
        for stream_id, model in self.streams.items():
            assert sorted(model.closed) == [0, 1], f"stream {stream_id} has not ended"
            for direction in model.directions:
                if direction.end == "fin" and not direction.stopped:
                    assert direction.told == "fin" and direction.received == direction.written
                    assert direction.consumed == len(direction.written)
                assert direction.stopped or direction.told == direction.end

    def finish_all(self, side: int) -> bool:
        """End what is open, take what is there.  @return: whether there was anything."""
        session, busy = self.session(side), False
        for stream_id, stream in list(session.streams.items()):
            model = self.streams[stream_id]
            if model.opener != side and not model.heard:
                continue
            if model.opener != side and not model.answer:
                model.answer = "accepted"
                session.accept(stream_id)
            if stream.send.state is SendState.OPEN:
                busy, model.directions[side].end = True, "fin"
                session.finish(stream_id)
            theirs = model.directions[1 - side]
            left = len(theirs.received) - theirs.consumed
            if left and not theirs.stopped and theirs.told != "reset":
                busy, theirs.consumed = True, len(theirs.received)
                self.tell(side, session.consumed(stream_id, left))
        return busy


class SessionsTests(SynchronousTestCase):
    """Two sessions that anything may happen to."""

    def test_two_sessions(self) -> None:
        """They agree with the model in every step, and everything comes to an end."""
        self.patch(flight, "FLIGHT_BYTES", 300)
        self.patch(flight, "FASTEST", 0)
        run_state_machine_as_test(Sessions, settings=bounded(80, stateful_step_count=60))
