"""Windows and replay buffers that grow with what a line carries, within a budget."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from twisted.trial.unittest import SynchronousTestCase

from relaymux.core import flight, growth
from relaymux.core.budget import (
    KEPT_SHARE,
    LINK_EXTRA,
    STREAM_WRITES,
    Account,
    Budget,
    link_beginning,
    stream_beginning,
)
from relaymux.core.events import DataReceived, HelloReceived, StreamCrowdedOut, StreamOpened, WelcomeReceived
from relaymux.core.frames import Kind
from relaymux.core.growth import FIRST_BYTES, TURN_SECONDS, WIDE_TURN_SECONDS, Growth
from relaymux.core.handshake import Hello, Limits, Welcome
from relaymux.core.link import FIRST_PINGS, Link
from relaymux.core.meter import GROW_WITHIN, TOO_LARGE, Fit, Meter
from relaymux.core.replay import ReplayBuffer
from relaymux.core.session import Session
from relaymux.core.window import ReceiveWindow
from relaymux.errors import ErrorCode, LocalError
from relaymux.net.turns import LONG_TURN
from tests.accounting import assert_accounted
from tests.wire import DATA, INSTANCE, OPEN, REFUSED, frame, hello, join, opening, parse, u16

KIB = 1024
LIMITS = Limits(max_payload=16 * KIB, max_streams=8, window=8 * KIB, replay=16 * KIB, silence=15.0)

#: Seconds of a step of a simulated line.
STEP = 0.001


class End:
    """
    One side of a line.

    @ivar speed: bytes per second that its consumer takes, of all streams.
    """

    def __init__(self, memory: int, hello: Hello | None) -> None:
        self.budget = Budget(memory)
        assert self.budget.begin(link_beginning(LIMITS.replay))
        self.link = Link(local=LIMITS, now=0.0, hello=hello)
        self.session: Session
        self.waiting: deque[list[int]] = deque()
        self.speed = 1e12
        self.allowance = 0.0
        self.taken = 0
        self.pipe: deque[tuple[float, bytes]] = deque()  # what is on its way to the other end
        self.free_at = 0.0

    def hear(self, data: bytes, now: float, other: End) -> None:
        for event in self.link.receive([memoryview(data)], now):
            if isinstance(event, HelloReceived):
                self.link.welcome(Welcome("far", INSTANCE, LIMITS))
            if isinstance(event, (HelloReceived, WelcomeReceived)):
                dialing = isinstance(event, WelcomeReceived)
                account = Account(self.budget)
                self.session = Session(dialing=dialing, local=LIMITS, remote=LIMITS, account=account)
                self.link.attach(self.session, LIMITS, now)
            elif isinstance(event, StreamOpened):
                self.session.accept(event.stream_id)
            elif isinstance(event, DataReceived):
                self.waiting.append([event.stream_id, event.size])

    def consume(self, seconds: float) -> None:
        self.allowance = min(self.allowance + self.speed * seconds, max(self.speed * STEP, KIB))
        while self.waiting and self.allowance >= 1:
            piece = self.waiting[0]
            count = min(piece[1], int(self.allowance))
            self.session.consumed(piece[0], count)
            self.taken += count
            self.allowance -= count
            piece[1] -= count
            if not piece[1]:
                self.waiting.popleft()


class Line:
    """
    Two daemons, and a way between them of a given delay and rate; time is simulated.

    @ivar rate: bytes per second in each direction.
    @ivar beside_talk: whether somebody waits for answers meanwhile.
    """

    def __init__(self, *, memory: int = 1 << 30, delay: float = 0.05, rate: float = 2e6) -> None:
        """@param delay: seconds of each direction."""
        self.delay, self.rate, self.now = delay, rate, 0.0
        self.beside_talk = False
        self.ends = (End(memory, Hello("near", INSTANCE, LIMITS)), End(memory, None))
        self.streams: list[int] = []
        self.run(max(6 * delay, 0.01))

    @property
    def near(self) -> End:
        return self.ends[0]

    @property
    def far(self) -> End:
        return self.ends[1]

    def open(self) -> int:
        """The near end opens a stream and sends over it as much as it can, for ever."""
        stream_id = self.near.session.open_stream("vda")
        self.streams.append(stream_id)
        return stream_id

    def run(self, seconds: float) -> float:
        """@return: bytes per second that the far end's consumer took meanwhile."""
        end, before = self.now + seconds, self.far.taken
        while self.now < end:
            self.now += STEP
            for stream_id in self.streams:
                if not self.near.session.queued(stream_id):
                    self.near.session.write(stream_id, bytes(64 * KIB))
            for side, one in enumerate(self.ends):
                other = self.ends[1 - side]
                one.link.handle_timer(self.now)
                one.consume(STEP)
                self.send(one)
                while one.pipe and one.pipe[0][0] <= self.now:
                    other.hear(one.pipe.popleft()[1], self.now, one)
        return (self.far.taken - before) / seconds

    def send(self, end: End) -> None:
        """What the line takes in one step; the transport holds no more than that."""
        while end.free_at < self.now + STEP:
            said = end.link.data_to_send(int(self.rate * STEP), self.now, beside_talk=self.beside_talk)
            data = join(said)
            if not data:
                return
            end.free_at = max(end.free_at, self.now) + len(data) / self.rate
            end.pipe.append((end.free_at + self.delay, data))

    def window(self, stream_id: int) -> ReceiveWindow:
        return self.far.session.streams[stream_id].receive.window

    def check(self) -> None:
        """Both ends' budgets hold."""
        for end in self.ends:
            assert_accounted(end.budget, [LIMITS.replay], [end.session])


class LineTests(SynchronousTestCase):
    """Sizes follow bandwidth x round trip, of the line or of a consumer, no further than needed."""

    def setUp(self) -> None:
        # In proportion to these small sizes.
        self.patch(growth, "HASTE", LIMITS.window)
        self.patch(growth, "FIRST_BYTES", 3 * LIMITS.window)

    def test_fills_a_long_line(self) -> None:
        """One stream gets all that the line carries, with two to four times bandwidth x round trip."""
        line = Line()
        stream_id = line.open()
        line.run(3)
        self.assertGreater(line.run(4), 0.97 * line.rate)
        product = line.rate * (2 * line.delay + TURN_SECONDS)
        self.assertLess(product, line.window(stream_id).size)
        # A PING meets at most what the line carries in a step in front of it.
        self.assertLessEqual(line.window(stream_id).size, 4.5 * product)
        self.assertLess(product, line.near.session.replay.capacity + 2 * LIMITS.max_payload)
        line.check()

    def test_fills_a_long_line_beside_talk(self) -> None:
        """While somebody waits for answers, a line that is as fast as a daemon carries as much."""
        self.patch(flight, "FASTEST", int(Line().rate))
        self.patch(flight, "FLIGHT_BYTES", 2 * LIMITS.max_payload)
        line = Line()
        line.open()
        line.run(3)
        line.beside_talk = True
        self.assertGreater(line.run(4), 0.97 * line.rate)
        line.check()

    def test_grows_with_every_round_trip(self) -> None:
        """A line is full after few of them: four times as much with each, as long as that is little."""
        self.patch(growth, "HASTE", 1 << 20)
        line = Line()
        line.open()
        line.run(0.5)
        self.assertGreater(line.run(0.5), 0.9 * line.rate)

    def test_several_streams(self) -> None:
        """They share the line, and their windows together are no larger than one's would be."""
        line = Line()
        streams = [line.open() for _ in range(5)]
        line.run(3)
        self.assertGreater(line.run(3), 0.97 * line.rate)
        product = line.rate * (2 * line.delay + TURN_SECONDS)
        self.assertLessEqual(sum(line.window(stream_id).size for stream_id in streams), 5 * product)
        line.check()

    def test_budget_bounds(self) -> None:
        """With little memory a stream is slower, and that is all."""
        least = link_beginning(LIMITS.replay) + stream_beginning(LIMITS.window)
        line = Line(memory=(least + 60 * KIB) * KEPT_SHARE // (KEPT_SHARE - 1))
        line.open()
        line.run(2)
        rate = line.run(3)
        self.assertLess(rate, 0.6 * line.rate)
        self.assertGreater(rate, 2 * LIMITS.window / (2 * line.delay))
        line.check()

    def test_no_memory_to_grow(self) -> None:
        """With none, what was promised at the beginning goes on working."""
        least = link_beginning(LIMITS.replay) + stream_beginning(LIMITS.window)
        line = Line(memory=least)
        stream_id = line.open()
        rate = line.run(3)
        self.assertGreater(rate, 0.7 * LIMITS.window / (2 * line.delay))
        self.assertEqual(line.window(stream_id).size, LIMITS.window)
        self.assertEqual(line.near.session.replay.capacity, LIMITS.replay)
        line.check()

    def test_stalled_consumer(self) -> None:
        """Who takes nothing is promised nothing more."""
        line = Line()
        line.far.speed = 0
        stream_id = line.open()
        line.run(3)
        self.assertEqual(line.window(stream_id).size, LIMITS.window)
        self.assertEqual(line.window(stream_id).received, LIMITS.window)

    def test_slow_consumer(self) -> None:
        """What waits for a slow consumer is in proportion to what it takes in a round trip."""
        line = Line()
        line.far.speed = line.rate / 10
        stream_id = line.open()
        line.run(3)
        self.assertGreater(line.run(3), 0.95 * line.far.speed)
        product = line.far.speed * (2 * line.delay + TURN_SECONDS)
        self.assertLessEqual(line.window(stream_id).size, 4.5 * product)

    def test_short_line(self) -> None:
        """Where there is no delay, windows are enough for what two daemons take to turn round."""
        line = Line(delay=0.0, rate=20e6)
        line.open()
        line.run(0.3)
        self.assertGreater(line.run(0.3), 0.9 * line.rate)

    def test_idle_replay(self) -> None:
        """A link that became quiet gives back what its replay buffer had grown by, and it grows again."""
        line = Line()
        line.open()
        line.run(3)
        self.assertGreater(line.near.session.replay.capacity, 4 * LIMITS.replay)
        streams, line.streams = line.streams, []
        line.run(11)
        self.assertEqual(line.near.session.replay.capacity, LIMITS.replay)
        line.check()
        line.streams = streams
        line.run(2)
        self.assertGreater(line.run(2), 0.97 * line.rate)

    def test_shrinks_for_others(self) -> None:
        """A stream that became slow gives back what others may need, and takes no credit back."""
        need = 2e6 * 0.102 * 3
        line = Line(memory=int(need * KEPT_SHARE / (KEPT_SHARE - 1) + (1 << 20) + LINK_EXTRA))
        stream_id = line.open()
        line.run(3)
        grown = line.window(stream_id).size
        self.assertGreater(grown, 20 * LIMITS.window)
        line.far.speed = 50_000.0
        for _ in range(40):
            before = line.window(stream_id).granted
            line.run(0.5)
            self.assertGreaterEqual(line.window(stream_id).granted, before)
            line.check()
        self.assertLessEqual(line.window(stream_id).drawn, grown // 2)
        self.assertFalse(line.far.budget.scarce)


class GrowthTests(SynchronousTestCase):
    """What the simulated line does not show."""

    def test_meter(self) -> None:
        """Small is what passes within its time, large what would be enough many times over."""
        judged = []
        for passed, seconds in ((750, 1.4), (750, 1.6), (749, 1.4), (93, 1.6), (0, 100.0), (750, 0.0)):
            meter = Meter()
            self.assertEqual(meter.judge(100, 1000, 5.0, 1.0), Fit.RIGHT)
            judged.append(meter.judge(100 + passed, 1000, 5.0 + seconds, 1.0))
        fits = [Fit.SMALL, Fit.RIGHT, Fit.RIGHT, Fit.LARGE, Fit.LARGE, Fit.SMALL]
        self.assertEqual(judged, fits)
        self.assertEqual((GROW_WITHIN, TOO_LARGE), (2, 8))

    def test_meter_restarts(self) -> None:
        """What was measured before another link is forgotten."""
        meter = Meter()
        meter.judge(0, 1000, 0.0, 1.0)
        meter.restart()
        self.assertEqual(meter.judge(5000, 1000, 60.0, 1.0), Fit.RIGHT)
        self.assertEqual(meter.judge(5800, 1000, 60.5, 1.0), Fit.SMALL)

    def test_shortest_round_trip(self) -> None:
        """A PING that waited behind data says nothing; the shortest counts, until there is another link."""
        sizes = Growth(Account(Budget(1000)))
        for seconds in (0.5, 0.1, 7.0):
            sizes.heard_round_trip(seconds)
        self.assertEqual(sizes.round_trip, 0.1)
        sizes.restart([])
        self.assertIsNone(sizes.round_trip)
        sizes.heard_round_trip(3.0)
        self.assertEqual(sizes.round_trip, 3.0)

    def fit(self, sizes: Growth, window: ReceiveWindow, rate: float, seconds: float = 1.0) -> int:
        """Have C{rate} bytes a second pass C{window}, as far as it allows.  @return: its size then."""
        now, end = 0.0, seconds
        while now < end:
            step = max(1, window.size // 4)
            window.receive(step, 1)
            window.consume(step)
            now += step / rate
            sizes.fit_window(window, now)
            window.grant()
        return window.size

    def test_no_larger_than_it_has_to_be(self) -> None:
        """
        On a line that takes no time one stream's window grows once, even if little passes, and
        further only if it is too small for what passes in the daemons' turns.
        """
        for rate, least, most in ((1e6, 1, 1), (3e8, 4, 4), (1.5e9, 4, 4), (6e9, 16, 16)):
            sizes = Growth(Account(Budget(10**9)))
            sizes.heard_round_trip(0.0001)
            size = self.fit(sizes, ReceiveWindow(256 * KIB), rate)
            self.assertTrue(least <= size / (256 * KIB) <= most, (rate, size))
            self.assertEqual(sizes.grown, size - 256 * KIB)

    def test_larger_where_pages_are_passed_on(self) -> None:
        """Where nobody touches what is on its way, there may be more of it, for as long as that is so."""
        sizes = Growth(Account(Budget(10**9)))
        sizes.heard_round_trip(0.0001)
        sizes.turn = WIDE_TURN_SECONDS
        window = ReceiveWindow(256 * KIB)
        self.assertEqual(self.fit(sizes, window, 1e9), 4 << 20)
        sizes.restart([])  # over a new link nobody knows
        self.assertEqual(sizes.turn, TURN_SECONDS)
        sizes.heard_round_trip(0.0001)
        self.assertEqual(self.fit(sizes, ReceiveWindow(256 * KIB), 3e8), 256 * KIB)

    def test_first_growth_is_for_few(self) -> None:
        """What is allowed for waiting daemons is for a session, however many streams it has."""
        sizes = Growth(Account(Budget(10**9)))
        sizes.heard_round_trip(0.0001)
        windows = [ReceiveWindow(256 * KIB) for _ in range(8)]
        for window in windows:
            self.fit(sizes, window, 3e8)
        self.assertEqual(sizes.grown, FIRST_BYTES)
        self.assertEqual(sum(window.size for window in windows), 8 * 256 * KIB + FIRST_BYTES)
        sizes.end_window(windows[0])
        sizes.end_window(windows[0])
        self.assertEqual(sizes.grown, 0)
        self.assertEqual(self.fit(sizes, windows[1], 3e8), 1024 * KIB)

    def test_grown_on_the_fast_path(self) -> None:
        """A window that is too small for what the fast path carries is larger from then on, not later."""
        session = Session(dialing=True, local=LIMITS, remote=LIMITS, account=Account(Budget(10**9)))
        assert session.growth is not None
        session.growth.heard_round_trip(0.1)
        stream_id = session.open_stream("vda")
        session.data_to_send(1 << 20, 0.0)
        granted = LIMITS.window
        for now in (1.0, 1.05):  # the first look only begins to measure
            session.data_to_send(1 << 20, now)
            granted += LIMITS.window
            session.carried_stream(stream_id, 0, LIMITS.window, 0, LIMITS.window, LIMITS.window, granted, now)
        said = parse(join(session.data_to_send(1 << 20, 1.05)))
        [limit] = [int.from_bytes(payload[:8], "big") for kind, _, payload in said if kind == Kind.CREDIT]
        self.assertGreaterEqual(limit, 2 * LIMITS.window + 2 * LIMITS.window)

    def test_asks_for_the_round_trip(self) -> None:
        """Each new link begins with a PING, before anything could be in front of it."""
        line = Line()
        for end in line.ends:
            self.assertTrue(0 <= end.link.round_trip - 2 * line.delay <= 5 * STEP, end.link.round_trip)

    def test_asks_more_than_once(self) -> None:
        """One of two daemons may be busy when a link is new: the shortest of the first round trips counts."""
        session = Session(dialing=True, local=LIMITS, remote=LIMITS, account=Account(Budget(10**9)))
        link = Link(local=LIMITS, now=1.0, resume=b"")
        link.data_to_send(0, 1.0)
        link.attach(session, LIMITS, 1.0)
        now, asked = 1.0, 0
        for seconds in (0.016, 0.0002, 0.0003, 0.02, 0.01):
            said = parse(join(link.data_to_send(0, now)))
            now += seconds
            for kind, _, number in said:
                self.assertEqual(kind, Kind.PING)
                asked += 1
                list(link.receive([memoryview(frame(Kind.PONG, 0, number))], now))
        self.assertEqual(asked, FIRST_PINGS)
        assert session.growth is not None and session.growth.round_trip is not None
        self.assertAlmostEqual(session.growth.round_trip, 0.0002)
        self.assertTrue(link.at_rest)

    def test_allowance_is_one_turn(self) -> None:
        """What a stream may have written and not sent is what is gathered of a local socket at once."""
        self.assertEqual(STREAM_WRITES, LONG_TURN)

    def test_parked(self) -> None:
        """Without a link a session keeps what it has and draws nothing; the new link measures anew."""
        line = Line()
        line.open()
        line.run(1)
        session = line.near.session
        drawn = [end.budget.drawn for end in line.ends]
        for end in line.ends:
            end.link.detach()
            end.session.park()
        session.write(1, bytes(STREAM_WRITES))
        self.assertEqual([end.budget.drawn for end in line.ends], drawn)
        for end, other in (line.ends, line.ends[::-1]):
            end.pipe.clear()
            end.free_at = 0.0
            end.link = Link(local=LIMITS, now=line.now + 60, resume=b"")
            end.link.data_to_send(0, line.now)
            end.session.resume(other.session.rx_next)
            end.link.attach(end.session, LIMITS, line.now + 60)
        line.now += 60
        line.run(1)
        self.assertGreater(line.run(2), 0.97 * line.rate)
        line.check()

    def test_peer_that_acknowledges_nothing(self) -> None:
        """For it a replay buffer does not grow, and then by one step for each quarter of it."""
        sizes, replay = Growth(Account(Budget(1 << 20))), ReplayBuffer(1000)
        for _ in range(10):
            replay.append([bytes(100)], 100)
        grown = []
        for offset in (0, 200, 300, 400, 900, 1000):
            replay.acknowledge(offset)
            grown.append(sizes.widen_replay(replay))
        self.assertEqual(grown, [False, False, True, False, False, False])
        self.assertEqual(replay.capacity, 4000)

    def test_compact(self) -> None:
        """Small frames do not keep the large buffers alive that they are parts of, and stay what they are."""
        replay = ReplayBuffer(1 << 20)
        pieces = [memoryview(bytearray(i.to_bytes(1, "big") * 4096))[:100] for i in range(20)]
        for piece in pieces:
            replay.append([b"head", piece], 104)
        expected = [b"head" + bytes(piece) for piece in pieces]
        replay.compact()
        held = list(replay.unacknowledged())
        self.assertEqual(held, [(data,) for data in expected])
        self.assertTrue(all(isinstance(buffer, bytes) for buffers in held for buffer in buffers))
        replay.acknowledge(104)
        self.assertEqual(len(list(replay.unacknowledged())), 19)

    def test_compact_leaves_large_frames(self) -> None:
        """Frames that pin little beside themselves are not copied."""
        replay = ReplayBuffer(1 << 20)
        buffers: list[bytes | memoryview] = [b"head", memoryview(bytes(4096))[:2000]]
        replay.append(buffers, 2004)
        replay.compact()
        self.assertIs(next(iter(replay.unacknowledged())), buffers)


class CrowdingTests(SynchronousTestCase):
    """More streams than there is memory for."""

    def setUp(self) -> None:
        beginning = link_beginning(LIMITS.replay) + 2 * stream_beginning(LIMITS.window)
        self.budget = Budget(beginning)
        self.assertTrue(self.budget.begin(link_beginning(LIMITS.replay)))
        self.link = Link(local=LIMITS, now=0.0)
        for event in self.link.receive([memoryview(hello())], 0.0):
            assert isinstance(event, HelloReceived)
            self.link.welcome(Welcome("near", INSTANCE, LIMITS))
            remote = replace(LIMITS, max_streams=100)
            self.session = Session(dialing=False, local=LIMITS, remote=remote, account=Account(self.budget))
            self.link.attach(self.session, event.hello.limits, 0.0)
        self.said()

    def said(self) -> list[tuple[int, int, bytes]]:
        return [said for said in parse(join(self.link.data_to_send(1 << 20, 0.0))) if said[0] >= 0x10]

    def hear(self, data: bytes) -> list[object]:
        return list(self.link.receive([memoryview(data)], 0.0))

    def test_peer(self) -> None:
        """A stream too many is refused; what came with it is dropped, and the others go on."""
        self.hear(opening(1) + opening(3))
        events = self.hear(opening(5) + frame(DATA, 5, bytes(LIMITS.window)) + frame(DATA, 1, b"on"))
        self.assertEqual(events[0], StreamCrowdedOut(5, "vda"))
        [data] = events[1:]
        assert isinstance(data, DataReceived)
        self.assertEqual((data.stream_id, data.size), (1, 2))
        text = b"there is no memory left for another stream"
        self.assertIn((REFUSED, 5, u16(ErrorCode.TOO_MANY_STREAMS) + text), self.said())
        assert_accounted(self.budget, [LIMITS.replay], [self.session])

    def test_here(self) -> None:
        """A stream that nobody was told of yet is not begun, and its id not used."""
        self.session.open_stream("vda")
        self.session.open_stream("vda")
        self.assertRaisesRegex(LocalError, "no memory left", self.session.open_stream, "vda")
        self.assertEqual([(kind, number) for kind, number, _ in self.said()], [(OPEN, 2), (OPEN, 4)])

    def test_room_again(self) -> None:
        """When a stream has ended there is memory for another one."""
        self.hear(opening(1) + opening(3))
        self.session.refuse(1, ErrorCode.CONNECT_FAILED, "no")
        self.hear(frame(Kind.RESET, 1, u16(17) + bytes(8)) + frame(Kind.CLOSED, 1, u16(17) + bytes(8)))
        self.assertEqual(self.hear(opening(5)), [StreamOpened(5, "vda")])
        assert_accounted(self.budget, [LIMITS.replay], [self.session])
