"""Many sessions that share the budget of one daemon, whatever they, their peers and consumers do."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, note
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from twisted.trial.unittest import SynchronousTestCase

from relaymux.core.budget import KEPT_SHARE, Account, Budget, link_beginning, stream_beginning
from relaymux.core.events import (
    DataReceived,
    Event,
    HelloReceived,
    LinkEnded,
    StreamCrowdedOut,
    StreamOpened,
    WelcomeReceived,
)
from relaymux.core.handshake import Hello, Limits, Welcome
from relaymux.core.link import Link
from relaymux.core.session import Session
from relaymux.core.stream import ReceiveState, SendState
from relaymux.errors import ErrorCode, LocalError
from tests.accounting import assert_accounted
from tests.test_properties_core import bounded
from tests.wire import INSTANCE, join

LIMITS = Limits(max_payload=4096, max_streams=8, window=8192, replay=4096, silence=10_000)

#: Sessions at a time.
LINKS = 4

#: What one write brings at most; a stream's queue is bounded by its producer, which pauses.
WRITE = 64 * 1024


class End:
    """One side of one session: takes every stream, keeps what arrives until it is consumed."""

    def __init__(self, account: Account | None, now: float, *, dialing: bool) -> None:
        self._account = account
        self._dialing = dialing
        self.waiting: Counter[int] = Counter()
        self.crowded_out = 0
        self.written: dict[int, int] = {}
        self.taken: dict[int, int] = {}
        self.link = Link(local=LIMITS, now=now, hello=Hello("near", INSTANCE, LIMITS) if dialing else None)
        self.kept: Session | None = None

    @property
    def session(self) -> Session:
        assert self.kept is not None
        return self.kept

    def hear(self, data: bytes, now: float) -> None:
        for event in self.link.receive([memoryview(data)], now):
            self.happened(event, now)

    def happened(self, event: Event, now: float) -> None:
        assert not isinstance(event, LinkEnded), event
        if isinstance(event, HelloReceived):
            self.link.welcome(Welcome("far", INSTANCE, LIMITS))
        if isinstance(event, (HelloReceived, WelcomeReceived)):
            self.kept = Session(dialing=self._dialing, local=LIMITS, remote=LIMITS, account=self._account)
            self.link.attach(self.session, LIMITS, now)
        elif isinstance(event, StreamOpened):
            self.session.accept(event.stream_id)
        elif isinstance(event, StreamCrowdedOut):
            self.crowded_out += 1
        elif isinstance(event, DataReceived):
            start = self.taken.get(event.stream_id, 0) + self.waiting[event.stream_id]
            data = join(event.buffers)
            assert data == content(event.stream_id, start, len(data)), "not what was written"
            self.waiting[event.stream_id] += len(data)

    def consume(self, stream_id: int) -> None:
        count = self.waiting.pop(stream_id, 0)
        self.taken[stream_id] = self.taken.get(stream_id, 0) + count
        self.session.consumed(stream_id, count)


#: No two places of it are alike.
PATTERN = random.Random(1).randbytes(1_000_003)


def content(stream_id: int, start: int, size: int) -> bytes:
    """@return: C{size} bytes at offset C{start} of what the other end writes to a stream."""
    start = (start + 4099 * stream_id) % len(PATTERN)
    return (PATTERN[start : start + size] + PATTERN)[:size]


class Connection:
    """A session of the daemon (C{ends[0]}) with another one, which counts nothing."""

    def __init__(self, budget: Budget, now: float) -> None:
        self.ends = (End(Account(budget), now, dialing=True), End(None, now, dialing=False))
        for side in (0, 1, 0):
            self.move(side, now, 1 << 20)

    def move(self, side: int, now: float, limit: int) -> bool:
        """What C{side} has to say arrives.  @return: whether there was anything."""
        data = join(self.ends[side].link.data_to_send(limit, now))
        if data:
            self.ends[1 - side].hear(data, now)
        return bool(data)

    def cut(self) -> None:
        """The link is lost."""
        for end in self.ends:
            end.link.detach()
            end.session.park()

    @property
    def parked(self) -> bool:
        return self.ends[0].link.ended

    def resume(self, now: float) -> None:
        """There is another link."""
        for end, other in (self.ends, self.ends[::-1]):
            end.link = Link(local=LIMITS, now=now, resume=b"")
            end.link.data_to_send(0, now)
            end.session.resume(other.session.rx_next)
            end.link.attach(end.session, LIMITS, now)


class Sharing(RuleBasedStateMachine):
    """A daemon with several sessions at a time."""

    @initialize(streams=st.integers(0, 6), more=st.sampled_from([0, 5000, 100_000, 4 << 20]))
    def begin(self, streams: int, more: int) -> None:
        """A budget with room for all links, so many streams, and something to grow into."""
        least = LINKS * link_beginning(LIMITS.replay) + streams * stream_beginning(LIMITS.window)
        self.budget = Budget((least + more) * KEPT_SHARE // (KEPT_SHARE - 1))
        self.now = 0.0
        self.connections: list[Connection] = []
        for _ in range(LINKS):
            assert self.budget.begin(link_beginning(LIMITS.replay))
        self.connect()

    picks = st.integers(0, 20)
    sides = st.integers(0, 1)

    @rule()
    def connect(self) -> None:
        """Another session begins."""
        if len(self.connections) < LINKS:
            self.connections.append(Connection(self.budget, self.now))

    @rule(pick=picks)
    def end_session(self, pick: int) -> None:
        """A session is over, and gives everything back; what is said to it afterwards draws nothing."""
        if pick % 3 or not self.connections:
            return
        gone = self.connections.pop(pick % len(self.connections)).ends[0].session
        gone.close()
        before = self.budget.drawn
        for stream_id in list(gone.streams):
            gone.abort(stream_id, ErrorCode.ABORTED)
        assert self.budget.drawn == before

    @rule(pick=picks, side=sides)
    def open(self, pick: int, side: int) -> None:
        """A stream is opened, or there is no memory for it."""
        if not self.connections:
            return
        session = self.connections[pick % len(self.connections)].ends[side].session
        if not session.can_open:
            return
        had = self.budget.total - self.budget.drawn
        try:
            session.open_stream("s")
        except LocalError:
            assert side == 0 and had < stream_beginning(LIMITS.window)

    @rule(pick=picks, side=sides, stream=picks, rounds=st.integers(1, 30), taking=st.booleans())
    def bulk(self, pick: int, side: int, stream: int, rounds: int, taking: bool) -> None:
        """One stream writes as much as it can, in round trips of no time; its consumer takes it or not."""
        if not self.connections:
            return
        connection = self.connections[pick % len(self.connections)]
        near, far = connection.ends[side], connection.ends[1 - side]
        streams = sorted(near.session.streams)
        if not streams or connection.parked:
            return
        stream_id = streams[stream % len(streams)]
        for _ in range(rounds):
            half = near.session.streams.get(stream_id)
            if half is None or half.send.state is not SendState.OPEN:
                break
            if not half.send.queued:
                near.session.write(stream_id, content(stream_id, half.send.accepted, WRITE))
            connection.move(side, self.now, 1 << 20)
            if taking:
                far.consume(stream_id)
            connection.move(1 - side, self.now, 1 << 20)
            self.memory()

    @rule(pick=picks, side=sides)
    def take(self, pick: int, side: int) -> None:
        """All consumers of one end take what has arrived."""
        if self.connections:
            end = self.connections[pick % len(self.connections)].ends[side]
            for stream_id in list(end.waiting):
                end.consume(stream_id)

    @rule(pick=picks, side=sides, limit=st.sampled_from([1, 5000, 1 << 20]))
    def move(self, pick: int, side: int, limit: int) -> None:
        """Frames arrive."""
        if self.connections:
            self.connections[pick % len(self.connections)].move(side, self.now, limit)

    @rule(pick=picks, side=sides, stream=picks, how=st.sampled_from(["finish", "reset", "stop", "abort"]))
    def end_stream(self, pick: int, side: int, stream: int, how: str) -> None:
        """A stream, or half of it, ends."""
        if not self.connections:
            return
        session = self.connections[pick % len(self.connections)].ends[side].session
        streams = sorted(session.streams)
        if not streams:
            return
        stream_id = streams[stream % len(streams)]
        send, receive = session.streams[stream_id].send, session.streams[stream_id].receive
        if how == "finish" and send.state is SendState.OPEN:
            session.finish(stream_id)
        elif how == "reset" and send.state is SendState.OPEN:
            session.reset(stream_id, ErrorCode.LOCAL_RESET)
        elif how == "stop" and receive.state in (ReceiveState.OPEN, ReceiveState.FINISHED):
            session.stop(stream_id, ErrorCode.LOCAL_CLOSED)
        elif how == "abort":
            session.abort(stream_id, ErrorCode.ABORTED)

    @rule(pick=picks, back=st.booleans())
    def link(self, pick: int, back: bool) -> None:
        """A link is lost, or there is a new one."""
        if not self.connections:
            return
        connection = self.connections[pick % len(self.connections)]
        if connection.parked and back:
            connection.resume(self.now)
        elif not connection.parked and not back:
            connection.cut()

    @rule(seconds=st.sampled_from([0.0001, 0.003, 0.1, 10.0, 4000.0]))
    def wait(self, seconds: float) -> None:
        """Time passes; the longest is longer than the interval of PING."""
        self.now += seconds
        for connection in self.connections:
            for end in connection.ends:
                if not end.link.ended:
                    assert end.link.handle_timer(self.now) == []
            for side in (0, 1):
                connection.move(side, self.now, 0)

    @invariant()
    def memory(self) -> None:
        """The budget holds, and says what is."""
        if hasattr(self, "budget"):
            sessions = [connection.ends[0].session for connection in self.connections]
            assert_accounted(self.budget, [LIMITS.replay] * LINKS, sessions)

    def teardown(self) -> None:
        """In the end links alone have drawn."""
        if hasattr(self, "budget"):
            for connection in self.connections:
                connection.ends[0].session.close()
            assert self.budget.drawn == LINKS * link_beginning(LIMITS.replay)


class SharingTests(SynchronousTestCase):
    """One budget and many who draw from it."""

    def test_sessions(self) -> None:
        """What sessions promise and hold is drawn, to the byte, and never more than there is."""
        run_state_machine_as_test(Sharing, settings=bounded(150, stateful_step_count=80))

    @bounded(100)
    @given(total=st.integers(0, 10_000), seed=st.integers(0, 2**32))
    def test_accounts(self, total: int, seed: int) -> None:
        """Growth leaves a part for beginnings and half of the rest; all comes back."""
        chance = random.Random(seed)
        note(f"{seed=}")
        budget = Budget(total)
        accounts = [Account(budget) for _ in range(4)]
        for _ in range(100):
            account, amount = chance.choice(accounts), chance.randrange(total + 2)
            before = budget.drawn
            if chance.random() < 0.4:
                fits = amount <= total - before
                self.assertEqual(account.begin(amount), fits)
                self.assertEqual(budget.drawn, before + fits * amount)
            elif chance.random() < 0.6:
                grown = account.grow(amount)
                self.assertEqual(budget.drawn, before + grown)
                self.assertLessEqual(grown, amount)
                if grown:
                    self.assertLessEqual(2 * grown, total - total // KEPT_SHARE - before)
            else:
                account.give_back(min(account.drawn, amount))
            self.assertEqual(budget.drawn, sum(account.drawn for account in accounts))
            self.assertLessEqual(budget.drawn, total)
        for account in accounts:
            account.close()
            self.assertEqual((account.drawn, account.grow(1), account.begin(1)), (0, 0, False))
        self.assertEqual(budget.drawn, 0)
