"""
Two daemons to which anything may happen, against a model that is a list of bytes.

Hypothesis looks for a sequence of openings, writes, ends, cuts, partial
deliveries, resumptions, restarts, expiries and late bytes of old links after
which something is lost, repeated, swapped, or ends as it must not.
RELAYMUX_EXAMPLES=N has N runs tried instead of the few that every test run can
afford.  A failure prints the steps, and a blob that repeats it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any, cast

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twisted.internet.defer import Deferred
from twisted.logger import LogEvent, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase

from relaymux.core.link import CLOSED_SECONDS
from relaymux.core.replay import HEAD_ROOM
from relaymux.core.stream import SendState
from relaymux.errors import ErrorCode, LocalError, SessionLost, StreamReset
from relaymux.net.holder import ACCEPTOR_GRACE
from relaymux.net.link import LinkProtocol
from relaymux.net.stream import StreamTransport
from relaymux.testing.memory import MemoryConnection
from relaymux.testing.recording import Recorder
from tests.accounting import assert_accounted
from tests.resuming import SMALL, Host, Hosts, Server, Talker, Wire, begin, difference
from tests.wire import RESUME, frame, hello

EXAMPLES = int(os.environ.get("RELAYMUX_EXAMPLES", "0"))

LIMITS = replace(SMALL, max_streams=4, resume_window=20.0)

#: Bytes that each host may hold, if that is counted: enough for all streams that there
#: may be, and some to grow into.
MEMORY = 16 * 1024 * 1024
#: Why a session may end here.  Anything else, above all a protocol error, is a bug.
REASONS = (
    ErrorCode.SESSION_EXPIRED,
    ErrorCode.PEER_RESTARTED,
    ErrorCode.LINK_REPLACED,
    ErrorCode.UNKNOWN_SESSION,
    ErrorCode.HANDSHAKE_TIMEOUT,  # said by a dialler that waited in vain for WELCOME
)

GONE = LIMITS.resume_window + ACCEPTOR_GRACE + 1.0


@dataclass
class Side:
    """
    One end of a stream in the model.

    @ivar said: all that its program was asked to say.
    @ivar finished: whether it has said everything.
    @ivar aborted: whether it ended the stream as an error.
    @ivar stopped: whether it wants to hear no more.
    """

    talker: Talker
    said: bytearray = field(default_factory=bytearray)
    finished: bool = False
    aborted: bool = False
    stopped: bool = False

    @property
    def alive(self) -> bool:
        """Whether its program has a stream."""
        return "made" in self.talker.events and self.talker.reason is None


@dataclass
class Model:
    """
    One stream: C{sides[0]} is host a's end.

    @ivar result: of opening it.
    @ivar excused: something has happened that ends its session.
    @ivar dead: the host whose process with this stream is no more, if any.
    @ivar error: why it could not be opened.
    """

    number: int
    opener: int
    sides: list[Side]
    result: Deferred[StreamTransport] = field(default_factory=Deferred)
    excused: bool = False
    dead: set[int] = field(default_factory=set)
    error: BaseException | None = None

    def renew(self, side: int) -> None:
        """A program that was not there before is connected at C{side}."""
        old = self.sides[side]
        assert not old.talker.received and (old.talker.reason is not None or side in self.dead)
        self.sides[side] = Side(Talker(finish=False))


@dataclass
class Late:
    """What the network still has of a link that was cut."""

    protocol: LinkProtocol
    data: bytes


class Daemons(RuleBasedStateMachine):
    """Two hosts, at most one usable connection, any number of useless ones."""

    @initialize(
        windows=st.tuples(*[st.sampled_from([1024, 3000])] * 2),
        replays=st.tuples(*[st.sampled_from([4096, 9000])] * 2),
        buffers=st.booleans(),
        seed=st.one_of(st.none(), st.integers(0, 1000)),
        capacity=st.sampled_from([300, 2000, 20_000]),
        memory=st.sampled_from([None, MEMORY]),
    )
    def begin(
        self,
        windows: tuple[int, int],
        replays: tuple[int, int],
        buffers: bool,
        seed: int | None,
        capacity: int,
        memory: int | None,
    ) -> None:
        """Two hosts with small limits, connected."""
        one, other = (
            replace(LIMITS, window=window, replay=size) for window, size in zip(windows, replays, strict=True)
        )
        self.hosts = Hosts(
            limits=one,
            other=other,
            buffers=buffers,
            seed=seed,
            capacity=capacity,
            pumped=True,
            memory=memory,
        )
        self.models: list[Model] = []
        self.late: list[Late] = []
        self.written = 0
        self.seen: dict[int, tuple[object, int, int]] = {}
        self.ended: list[tuple[str, int, str]] = []
        self.observer = cast(Any, self.watch)
        globalLogPublisher.addObserver(self.observer)
        self.connect()
        self.settle()

    # What moves

    def host(self, side: int) -> Host:
        return self.hosts.ends[side]

    @property
    def wires(self) -> list[Wire]:
        return self.hosts.wires

    def settle(self) -> None:
        """Let everything that can arrive do so."""
        for _ in range(100_000):
            moved = sum(wire.pump() for wire in self.wires)
            before = len(self.hosts.clock.getDelayedCalls())
            self.hosts.clock.advance(0)
            if not moved and before == len(self.hosts.clock.getDelayedCalls()):
                return
        raise AssertionError("does not come to rest")

    def watch(self, event: LogEvent) -> None:
        """Note why sessions end."""
        if "session over" in event.get("log_format", ""):
            self.ended.append((event["peer"], event["code"], event["text"]))

    def forget_old_wires(self) -> None:
        self.wires[:] = [wire for wire in self.wires if wire.client.connected or wire.server.connected]

    def begun(self) -> bool:
        return hasattr(self, "hosts")

    # Rules about links

    sides = st.integers(0, 1)
    picks = st.integers(0, 7)

    @rule()
    def connect(self) -> None:
        """Host a dials, if it would: it has no link and no attempt under way."""
        if not self.hosts.a.peer.wants_link:
            return
        if self.wires and self.wires[-1].client.connected:
            return
        self.forget_old_wires()
        self.hosts.connect()

    @rule(turns=st.integers(1, 12))
    def deliver(self, turns: int) -> None:
        """Some of what is under way arrives."""
        for _ in range(turns):
            for wire in list(self.wires):
                wire.pump()

    @rule()
    def rest(self) -> None:
        """All of it arrives."""
        self.settle()

    @rule(told=st.sampled_from([("client", "server"), ("client",), ("server",)]), keep=st.booleans())
    def cut(self, told: tuple[str, ...], keep: bool) -> None:
        """The newest connection is lost, with all that is under way; or that is only late."""
        if not self.wires:
            return
        wire = self.wires[-1]
        for end in (wire.client, wire.server):
            protocol = end.protocol
            held = bytes(wire._pipes[end].held)
            if keep and held and isinstance(protocol, LinkProtocol):
                self.late.append(Late(protocol, held))
        wire.cut(*(getattr(wire, name) for name in told))

    @rule(end=st.sampled_from(["client", "server"]))
    def stall(self, end: str) -> None:
        """Nothing arrives at one end of the newest connection any more."""
        if self.wires:
            self.wires[-1].stall(getattr(self.wires[-1], end))

    @rule(pick=picks, count=st.one_of(st.integers(1, 200), st.just(1 << 20)))
    @precondition(lambda self: self.late)
    def late_bytes(self, pick: int, count: int) -> None:
        """Bytes of a link that was cut arrive after all."""
        late = self.late[pick % len(self.late)]
        data, late.data = late.data[:count], late.data[count:]
        if not late.data:
            self.late.remove(late)
        late.protocol.dataReceived(data)

    @rule(seconds=st.sampled_from([0.0, 0.03, 1.0, 5.0, 16.0]))
    def wait(self, seconds: float) -> None:
        """Time passes, and nothing arrives meanwhile."""
        self.excuse(seconds)
        self.hosts.run(seconds)

    @rule()
    def expire(self) -> None:
        """There is no link for longer than sessions are kept."""
        for wire in self.wires:
            wire.cut()
        self.hosts.run(GONE)
        for model in self.models:
            model.excused = True
        for host in self.hosts.ends:
            assert host.peer._held is None, f"{host.name} keeps a session for ever"

    @rule(side=sides, lost=st.booleans())
    @precondition(lambda self: self.models)
    def restart(self, side: int, lost: bool) -> None:
        """One daemon is killed and started again; the other may not notice at once."""
        for wire in self.wires:
            ends = (wire.client, wire.server)
            wire.cut(*(ends if lost else ends[side : side + 1]))
        for model in self.models:
            model.dead.add(side)
            model.excused = True
        host = self.host(side)
        # The old process' timers are no more: neither is anything that they would do.
        for call in self.hosts.clock.getDelayedCalls():
            if self.belongs(call, host):
                call.cancel()
        host.restart()

    @staticmethod
    def belongs(call: Any, host: Host) -> bool:
        owner = getattr(call.func, "__self__", None)
        return owner is host.peer or getattr(owner, "_owner", None) is host.peer

    @rule(kind=st.sampled_from(["forged", "stranger"]), data=st.binary(max_size=92))
    def attack(self, kind: str, data: bytes) -> None:
        """Somebody else comes, with a RESUME of his own or with another name: nothing changes."""
        client = Recorder()
        peer = self.hosts.b.peer
        before = peer._link
        held = peer._held
        wire = MemoryConnection(client, peer.build_link(), identities=self.hosts.identities)
        if kind == "forged":
            wire.client.write(frame(RESUME, 0, b"relaymux\0\1" + data.ljust(92, b"?")))
        elif held is not None:
            wire.client.write(hello(name=b"hv-c"))
        for _ in range(10):
            wire.pump()
        wire.cut()
        assert peer._link is before and peer._held is held

    # Rules about streams

    @rule(side=sides)
    def open(self, side: int) -> None:
        """A program wants a stream, link or no link."""
        if len(self.models) >= 40:
            return
        number = len(self.models)
        talkers = Talker(finish=False), Talker(finish=False)
        model = Model(number, side, [Side(talkers[0]), Side(talkers[1])])
        self.models.append(model)
        service = f"s{number}"

        def accepted() -> Talker:
            if model.sides[1 - side].talker.events:
                # It is opened again, as the opener's side never heard of the first time.
                model.renew(1 - side)
            return model.sides[1 - side].talker

        self.host(1 - side).peer.register(service, Server(accepted))
        model.result = begin(self.host(side).peer, service, talkers[side])
        model.result.addErrback(lambda reason: setattr(model, "error", reason.value))

    def pick(self, side: int, pick: int) -> Model | None:
        """@return: a stream that is alive at C{side}, if there is any."""
        alive = [model for model in self.models if side not in model.dead and model.sides[side].alive]
        return alive[pick % len(alive)] if alive else None

    @rule(side=sides, pick=picks, size=st.sampled_from([1, 10, 500, 1024, 6000]))
    def write(self, side: int, pick: int, size: int) -> None:
        """A program says something."""
        model = self.pick(side, pick)
        if model is None or not self.may_write(model.sides[side]):
            return
        # Each piece of eight bytes tells its place in everything that was ever written.
        data = b"".join((self.written + i).to_bytes(8, "big") for i in range((size + 7) // 8))[:size]
        self.written += len(data)
        model.sides[side].said += data
        model.sides[side].talker.say(data, finish=False)

    @rule(side=sides, pick=picks)
    def finish(self, side: int, pick: int) -> None:
        """A program has said everything."""
        model = self.pick(side, pick)
        if model is not None and self.may_write(model.sides[side]):
            model.sides[side].finished = True
            model.sides[side].talker.say(b"", finish=True)

    @staticmethod
    def may_write(side: Side) -> bool:
        return not side.finished and side.talker.transport.writable

    @rule(side=sides, pick=picks)
    def abort(self, side: int, pick: int) -> None:
        """A program ends its stream as an error."""
        model = self.pick(side, pick)
        if model is not None:
            model.sides[side].aborted = model.sides[side].stopped = True
            model.sides[side].talker.transport.abortConnection()

    @rule(side=sides, pick=picks)
    def stop(self, side: int, pick: int) -> None:
        """A program wants to hear no more."""
        model = self.pick(side, pick)
        if model is not None:
            model.sides[side].stopped = True
            model.sides[side].talker.transport.loseReadConnection()

    @rule(side=sides, pick=picks, pause=st.booleans())
    def pause(self, side: int, pick: int, pause: bool) -> None:
        """A program takes nothing for a while, or goes on."""
        model = self.pick(side, pick)
        if model is not None:
            transport = model.sides[side].talker.transport
            (transport.pauseProducing if pause else transport.resumeProducing)()

    # What is always true

    def excuse(self, seconds: float = 0.0) -> None:
        """
        Streams may fail whose session only one side has, and if one side is
        without a link for as long as sessions are kept within C{seconds}.
        """
        now = self.hosts.clock.seconds()
        held = [host.peer._held for host in self.hosts.ends]
        expiring = any(
            one is not None
            and one.lost_at is not None
            and now + seconds >= one.lost_at + LIMITS.resume_window
            for one in held
        )
        tickets = [one and one._ticket for one in held]
        for model in self.models:
            opener = held[model.opener]
            known = opener is not None and not opener.streams.session.untouched
            if (expiring or tickets[0] != tickets[1]) and (known or self.was_begun(model)):
                model.excused = True

    @staticmethod
    def was_begun(model: Model) -> bool:
        return any(side.talker.events for side in model.sides)

    @invariant()
    def true(self) -> None:
        """What is checked after each step."""
        if self.begun():
            self.excuse()
            self.check_streams()
            self.check_links()
            self.check_both()
            self.check_memory()

    def check_memory(self) -> None:
        """What sessions have promised and hold is drawn, with a link and without."""
        for host in self.hosts.ends:
            if host.budget is not None:
                held = host.peer._held
                sessions = [held.streams.session] if held is not None else []
                assert_accounted(host.budget, [host.limits.replay], sessions)

    def check_streams(self) -> None:
        """Of each direction what arrived is the beginning of what was said; the ends are right."""
        assert all(code in REASONS for _, code, _ in self.ended), self.ended[-1]
        for model in self.models:
            for index, side in enumerate(model.sides):
                self.check_side(model, index, side, model.sides[1 - index])
            if model.error is not None:
                assert isinstance(model.error, (LocalError, StreamReset, SessionLost)), model.error
                assert model.excused or not isinstance(model.error, SessionLost), model.error

    def check_side(self, model: Model, index: int, side: Side, other: Side) -> None:
        talker = side.talker
        where = f"stream s{model.number}, side {index}"
        assert not talker.faults, f"{where}: {talker.faults}"
        received = bytes(talker.received)
        assert other.said.startswith(received), (
            f"{where}: {difference(received, bytes(other.said[: len(received)]))}"
        )
        assert talker.written <= len(side.said)
        if index in model.dead or talker.reason is None:
            if "read lost" in talker.events:
                assert other.finished and received == other.said, f"{where}: an end before the end"
            return
        ending = talker.outcome[2]
        if ending == "SessionLost":
            assert model.excused, f"{where}: {talker.reason.getErrorMessage()}"
        elif ending == "ConnectionDone":
            assert side.stopped or (received == other.said and other.finished), f"{where}: clean end"
            assert len(other.talker.received) == talker.written or other.stopped, f"{where}: clean end"
        elif ending == "ConnectionAborted":
            assert side.aborted, where
        else:
            assert "StreamReset" in ending, f"{where}: {ending}"
            assert other.aborted or other.stopped or model.excused, f"{where}: reset by nobody"

    def check_links(self) -> None:
        """At most one link has the session, and no other knows it."""
        for side, host in enumerate(self.hosts.ends):
            link, held = host.peer._link, host.peer._held
            assert link is None or held is not None
            for wire in self.wires:
                protocol = (wire.client, wire.server)[side].protocol
                if isinstance(protocol, LinkProtocol) and protocol is not link:
                    assert protocol.link.session is None or protocol._owner is not host.peer
            if held is None:
                continue
            session = held.streams.session
            if link is not None:
                assert link.link.session is session
                assert held.timer is None and held.lost_at is None
            else:
                assert held.timer is not None and held.timer.active()
            replay = session.replay
            kept = sum(len(buffer) for buffers in replay.unacknowledged() for buffer in buffers)
            assert kept == replay.held_bytes == replay.end - replay.acknowledged
            assert replay.held_bytes <= replay.capacity + HEAD_ROOM
            assert session.rx_acknowledged <= session.rx_next
            known = self.seen.get(side)
            if known is not None and known[0] is session:
                assert known[1] <= session.rx_next and known[2] <= held.generation
            self.seen[side] = (session, session.rx_next, held.generation)

    def check_both(self) -> None:
        """Two halves of one session agree, as far as either can know."""
        a, b = self.hosts.a.peer._held, self.hosts.b.peer._held
        if a is None or b is None or a._ticket != b._ticket:
            return
        assert a.generation >= b.generation
        for mine, theirs in ((a, b), (b, a)):
            session, other = mine.streams.session, theirs.streams.session
            assert session.replay.acknowledged <= other.rx_next <= session.replay.end
            assert session.replay.can_continue_at(other.rx_next)
            for stream_id, stream in session.streams.items():
                send, window = stream.send, stream.receive.window
                assert 0 <= send.delivered <= send.window.sent <= send.window.limit
                if send.state in (SendState.OPEN, SendState.FINISHING):
                    assert send.queued == send.accepted - send.window.sent
                assert window.consumed <= window.received <= window.granted
                assert window.granted <= window.consumed + window.size
                if stream_id in other.streams:
                    far = other.streams[stream_id].receive.window
                    assert far.received <= send.window.sent and send.window.limit <= far.granted
                    assert send.delivered <= far.consumed

    # The end

    def teardown(self) -> None:
        """Whatever happened: with a link, and everybody listening, everything comes to its end."""
        if not self.begun():
            return
        globalLogPublisher.removeObserver(self.observer)
        for wire in self.wires:
            wire.cut()
        self.settle()
        for _ in range(5):
            self.connect()
            self.settle()
            if all(host.peer.is_up for host in self.hosts.ends):
                break
        assert all(host.peer.is_up for host in self.hosts.ends), "no link can be had any more"
        for _ in range(3):
            for model in self.models:
                self.end(model)
            self.settle()
            self.hosts.clock.advance(CLOSED_SECONDS)
            self.settle()
        self.check_streams()
        for model in self.models:
            for index, side in enumerate(model.sides):
                if index not in model.dead and side.talker.events:
                    assert side.talker.reason is not None, f"s{model.number} has not ended at side {index}"
                    other = model.sides[1 - index]
                    if not model.excused and not side.stopped and other.finished and not other.aborted:
                        missing = difference(bytes(side.talker.received), bytes(other.said))
                        assert not missing, f"s{model.number} to side {index}: {missing}"
        self.hosts.run(1.0)
        self.settle()
        for host in self.hosts.ends:
            session = host.session
            assert session.settled, f"{host.name} is left with {session.streams or session.replay.held_bytes}"
        self.wires[-1].cut()
        self.hosts.run(GONE)
        calls: Any = self.hosts.clock.getDelayedCalls()
        # Only openings that nobody could answer may still be waited for.
        assert not [call for call in calls if call.func.__name__ != "_too_late"], calls

    def end(self, model: Model) -> None:
        """Have both sides of a stream listen, and finish."""
        for index, side in enumerate(model.sides):
            if index in model.dead or not side.alive:
                continue
            side.talker.transport.resumeProducing()
            if not side.alive:
                continue
            if self.may_write(side):
                side.finished = True
                side.talker.say(b"", finish=True)


class DaemonsTests(SynchronousTestCase):
    """Two daemons that anything may happen to."""

    def test_anything(self) -> None:
        """They agree with the model in every step, and everything comes to an end."""
        run_state_machine_as_test(
            Daemons,
            settings=settings(
                max_examples=EXAMPLES or 60,
                stateful_step_count=200 if EXAMPLES else 50,
                deadline=None,
                print_blob=True,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            ),
        )
        self.assertEqual(self.flushLoggedErrors(), [])
