"""
Properties of the fast path: whoever looks cannot tell that it was not Python.

RELAYMUX_EXAMPLES=N has N examples of each tried; see L{tests.test_properties_core}.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
from typing import Any

from cryptography.exceptions import InvalidTag
from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from relaymux.core.events import DataReceived, Event
from relaymux.core.frames import FrameDecoder, Kind
from relaymux.core.handshake import Limits
from relaymux.core.link import LinkState
from relaymux.core.stream import ReceiveState, SendState
from relaymux.net.buffers import BufferPool
from relaymux.net.compiled import native
from relaymux.net.fastpath import lease_of
from relaymux.net.tlsengine import CIPHER_BUFFER_SIZE
from tests.test_fastpath import Records
from tests.test_properties_core import bounded, cuts
from tests.wire import (
    ACK,
    CREDIT,
    DATA,
    FIN,
    GOAWAY,
    OPEN,
    PING,
    PONG,
    RESET,
    STOP,
    Core,
    frame,
    join,
    parse,
    u16,
    u64,
)

#: Windows that are larger than the smallest buffer of a socket, and few frames long.
LIMITS = Limits(max_payload=8192, max_streams=3, window=32768, replay=65536, silence=15.0)

#: Streams 1 and 3 are open; 5 is not.
STREAMS = (1, 3)

#: What a frame is to be, and two numbers for it, each of which means a different thing to each kind.
ACTIONS = st.tuples(
    st.sampled_from(
        ["data"] * 18
        + ["flood"]
        + ["ack"] * 9
        + ["credit"] * 9
        + ["ping", "pong", "fin", "reset", "stop", "open", "goaway", "flags", "kind", "length", "say"]
    ),
    st.sampled_from([1, 3] * 20 + [5, 0]),
    st.sampled_from([0] * 60 + [1, -1, 2**40, -(2**40), 2**63]),
    st.sampled_from([1, 2, 100, 511, 3000, 8191, 8192] * 5 + [0, 8193]),
)


def payload(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


class Side(Core):
    """A core whose streams have local sockets, of which the programs read nothing before the end."""

    def __init__(self, send_buffer: int | None) -> None:
        super().__init__(limits=LIMITS)
        self.shake(max_payload=8192, window=4096, replay=65536)
        self.sockets: dict[int, tuple[socket.socket, socket.socket]] = {}
        self.queues: dict[int, list[memoryview | bytes]] = {}
        for stream_id in STREAMS:
            self.opened_by_peer(stream_id)
            pair = socket.socketpair()
            for end in pair:
                end.setblocking(False)
            if send_buffer:
                pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
            self.sockets[stream_id] = pair
            self.queues[stream_id] = []
        self.seen: list[object] = []
        self.out = b""

    def close(self) -> None:
        for pair in self.sockets.values():
            for end in pair:
                end.close()

    def happened(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, DataReceived) and event.stream_id not in self.sockets:
                self.seen.append((event.stream_id, join(event.buffers)))
            elif isinstance(event, DataReceived):
                self.deliver(event.stream_id, event.buffers)
            else:
                self.seen.append(event)

    def deliver(self, stream_id: int, buffers: list[memoryview]) -> None:
        queue, sock = self.queues[stream_id], self.sockets[stream_id][0]
        queue_before = bool(queue)
        queue.extend(buffers)
        if queue_before:
            return
        try:
            sent = sock.sendmsg(buffers)
        except BlockingIOError:
            return
        self.queues[stream_id] = [memoryview(join(queue))[sent:]] if sent < sum(map(len, queue)) else []
        self.seen += self.session.consumed(stream_id, sent)

    def python(self, data: bytes) -> None:
        """C{data} arrives, and Python reads it."""
        for event in self.link.receive([memoryview(data)], self.now):
            self.happened([event])
        self.out += self.raw()

    def lease(self, data: bytes, pool: Any) -> None:
        """C{data} arrives in a lease."""
        if not self.link.at_rest:
            return self.python(data)
        session = self.session
        lease = lease_of(self.link, session, pool, -1, -1, len(STREAMS))
        members = []
        for stream_id, (near, _) in self.sockets.items():
            stream = session.streams.get(stream_id)
            if stream is None:
                continue
            reads = stream.send.state is SendState.OPEN and not stream.send.queued
            writes = stream.receive.state is ReceiveState.OPEN and not self.queues[stream_id]
            if not (reads or writes):
                continue
            send, window = stream.send, stream.receive.window
            assert lease.add(
                stream_id,
                near.fileno(),
                reads,
                writes,
                False,
                (send.window.sent, send.window.limit, send.delivered),
                (window.received, window.consumed, window.granted, window.size, window.size // 4),
            )
            members.append(stream_id)
        lease.feed([*self.link.suspend(), data])
        self.settle(lease)
        self.out += self.raw()
        return None

    def settle(self, lease: Any) -> bytes:
        """As L{relaymux.net.fastpath.FastPath} does it.  @return: what is left of a write to the link."""
        end, acknowledged, rx_next, told, sent, unsent, left, read_end, streams, write_end, _, _ = (
            lease.settle()
        )
        session = self.session
        assert not read_end and not write_end
        for stream_id, out, limit, delivered, received, consumed, granted, untaken, read, write in streams:
            session.carried_stream(stream_id, out, limit, delivered, received, consumed, granted, self.now)
            assert not read and not write
            self.queues[stream_id] += untaken
        self.seen += self.link.carried(sent, end, acknowledged, rx_next, told, self.now)
        for event in self.link.receive(left, self.now):
            self.happened([event])
        return join(unsent)

    def got(self, stream_id: int) -> bytes:
        """What the program has, and what waits for it."""
        far = self.sockets[stream_id][1]
        data = b""
        while True:
            try:
                more = far.recv(1 << 20)
            except BlockingIOError:
                break
            data += more
        return data + join(self.queues[stream_id])

    def state(self, *, exact: bool) -> list[object]:
        found: list[object] = [self.link.state, self.seen, self.link.suspend()]
        session = self.link.session
        if session is not None:
            replay = session.replay
            found += [session.rx_next, replay.acknowledged, replay.end]
            # CREDITs of one turn are in no particular order.
            found += sorted(join(buffers) for _, buffers in replay._frames)
            for stream in session.streams.values():
                send, window = stream.send, stream.receive.window
                found += [
                    send.state,
                    send.accepted,
                    send.delivered,
                    send.queued,
                    send.window.sent,
                    send.window.limit,
                ]
                found += [stream.receive.state, window.received]
                if exact:
                    found += [window.consumed, window.granted]
        if exact:
            found += sorted(parse(self.out))
        return found


def frames_of(actions: list[tuple[str, int, int, int]], side: Side) -> bytes:
    """What a peer says who knows what was said to it, and lies sometimes."""
    out = b""
    ends = [0] + [end for end, _ in side.session.replay._frames]
    received = dict.fromkeys((0, 1, 3, 5), 0)
    limits = dict.fromkeys((0, 1, 3, 5), 4096)
    place = 0
    for number, (what, stream, lie, size) in enumerate(actions):
        if what == "data":
            out += frame(DATA, stream, payload(size, number))
            received[stream] += size
        elif what == "flood":  # nearly a window, or more
            out += frame(DATA, stream, payload(8000, number)) * (4 + size % 2)
            received[stream] += 8000 * (4 + size % 2)
        elif what == "ack":
            place = min(place + size % 4, len(ends) - 1)
            out += frame(ACK, 0, u64((ends[place] + lie) % 2**64))
        elif what == "credit":
            limits[stream] += size
            out += frame(CREDIT, stream, u64((limits[stream] + lie) % 2**64, (size % 3) * 100))
        elif what == "flags":
            out += frame(DATA, stream, b"x" * size, flags=lie & 1, reserved=lie & 1)
        elif what == "kind":
            out += frame(0x13 + (lie & 64), stream, b"x")
        elif what == "length":
            out += frame((ACK, DATA, CREDIT)[number % 3], stream, b"x" * min(size, 200), length=size)
        elif what == "fin":
            out += frame(FIN, stream, u64((received[stream] + lie) % 2**64))
        elif what == "reset":
            out += frame(RESET, stream, u16(20) + u64((received[stream] + lie) % 2**64))
        elif what == "stop":
            out += frame(STOP, stream, u16(21))
        elif what == "open":
            out += frame(OPEN, 5, b"\x03vda")
        elif what == "goaway":
            out += frame(GOAWAY, 0, u16(37) + b"bye")
        elif what in ("ping", "pong"):
            out += frame(PING if what == "ping" else PONG, 0, u64(number))
    return out


class FastPathTestCase(SynchronousTestCase):
    def setUp(self) -> None:
        if native is None:
            raise SkipTest("nothing is compiled")


class FrameTests(FastPathTestCase):
    """What arrives means the same to C as to Python."""

    def check(
        self,
        actions: list[tuple[str, int, int, int]],
        places: list[int],
        turns: list[bool],
        sizes: list[int],
        send_buffer: int | None,
    ) -> None:
        python, c = Side(send_buffer), Side(send_buffer)
        try:
            for number, size in enumerate(sizes):
                for side in (python, c):
                    side.session.write(STREAMS[number % 2], payload(size, number))
                    side.out += side.raw()
            data = frames_of(actions, python)
            pool: Any = native.BufferPool()  # type: ignore[union-attr]
            for number, piece in enumerate(cuts(data, places)):
                python.python(piece)
                if c.link.state is LinkState.OPEN and turns[number % len(turns)]:
                    c.lease(piece, pool)
                else:
                    c.python(piece)
            self.assertEqual(python.state(exact=send_buffer is None), c.state(exact=send_buffer is None))
            for stream_id in STREAMS:
                self.assertEqual(python.got(stream_id), c.got(stream_id))
        finally:
            python.close()
            c.close()

    ARGS = (
        st.lists(ACTIONS, max_size=25),
        st.lists(st.integers(0, 100_000), max_size=30),
        st.lists(st.booleans(), min_size=1, max_size=6),
        st.lists(st.sampled_from([1, 100, 1000]), max_size=6),
    )

    @bounded(150)
    @given(*ARGS)
    def test_same(self, actions: Any, places: Any, turns: Any, sizes: Any) -> None:
        """With sockets that take everything."""
        self.check(actions, places, turns, sizes, None)

    @bounded(100)
    @given(*ARGS)
    def test_same_with_slow_programs(self, actions: Any, places: Any, turns: Any, sizes: Any) -> None:
        """With sockets that take little: only who has how much of it depends on the turns."""
        total = 0
        kept = []
        for action in actions:
            total += {"data": action[3], "flood": LIMITS.window}.get(action[0], 0)
            if total < LIMITS.window:  # beyond, what is allowed depends on what was taken
                kept.append(action)
        self.check(kept, places, turns, sizes, 1)


class Plain:
    """One side of a link that is not encrypted."""

    def use(self, lease: Any) -> None:
        """To be told to a lease."""

    def protect(self, data: bytes) -> bytes:
        return data

    def reveal(self, data: bytes) -> bytes:
        return data


class Encrypted(Plain):
    """One side of a link that is."""

    def __init__(self, sends: int, receives: int) -> None:
        self._records = Records(sends, receives)
        self._ciphers = BufferPool(CIPHER_BUFFER_SIZE)

    def use(self, lease: Any) -> None:
        lease.encrypt(self._records.sealer, self._records.opener, self._ciphers, InvalidTag)

    def protect(self, data: bytes) -> bytes:
        return self._records.seal(data)

    def reveal(self, data: bytes) -> bytes:
        return self._records.open(data)


class PassedOn(Plain):
    """One side of a link by which pages are passed on."""

    def __init__(self) -> None:
        assert native is not None
        self._pages = native.Pages()

    def use(self, lease: Any) -> None:
        lease.pass_on(self._pages, 1 << 17, 1 << 13, True)


class WaitTests(FastPathTestCase):
    """All of it, with a peer that reads and writes when and as much as it likes."""

    def check(
        self, seed: int, *, small: bool, ours: Plain | None = None, theirs: Plain | None = None
    ) -> None:
        """
        @param ours: our side of the link, not encrypted if it is L{None}.
        @param theirs: the peer's.
        """
        chance = random.Random(seed)
        ours, theirs = ours or Plain(), theirs or Plain()
        side = Side(1 if small else None)
        link, peer = socket.socketpair()
        epoll = select.epoll()
        pool: Any = native.BufferPool()  # type: ignore[union-attr]
        self.addCleanup(epoll.close)
        for end in (link, peer):
            end.setblocking(False)
            self.addCleanup(end.close)
            if small:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self.addCleanup(side.close)
        epoll.register(link, select.EPOLLIN)
        for near, _ in side.sockets.values():
            epoll.register(near, select.EPOLLIN)
        session = side.session
        decoder = FrameDecoder(1 << 20)
        # The peer.
        to_say = bytearray()
        to_send = bytearray()  # the same, as the link has it
        heard = session.replay.end
        acked = heard
        limit = dict.fromkeys(STREAMS, 4096)
        got = {stream_id: bytearray() for stream_id in STREAMS}
        said = {stream_id: bytearray() for stream_id in STREAMS}
        credit = dict.fromkeys(STREAMS, LIMITS.window)
        peer_acked, peer_end = session.rx_next, session.rx_next
        ends: list[int] = []
        # The programs.
        wrote = {stream_id: bytearray() for stream_id in STREAMS}
        read = {stream_id: bytearray() for stream_id in STREAMS}
        waiting = b""  # what the link's socket did not take
        acknowledged: list[int] = []
        block = chance.randbytes(50_000)

        def hear(size: int) -> None:
            nonlocal heard, peer_acked
            try:
                data = peer.recv(size)
            except BlockingIOError:
                return
            for found in decoder.feed(memoryview(theirs.reveal(data))):
                if found.kind == Kind.DATA:
                    got[found.stream_id] += join(found.buffers)
                    self.assertLessEqual(len(got[found.stream_id]), limit[found.stream_id])
                    heard += found.size
                    ends.append(heard)
                elif found.kind == Kind.CREDIT:
                    new, taken = (int.from_bytes(found.payload[i : i + 8], "big") for i in (0, 8))
                    self.assertGreaterEqual(new, credit[found.stream_id])
                    self.assertLessEqual(taken, len(said[found.stream_id]))
                    self.assertEqual(new, max(credit[found.stream_id], taken + LIMITS.window))
                    credit[found.stream_id] = new
                    heard += found.size
                    ends.append(heard)
                elif found.kind == Kind.ACK:
                    offset = int.from_bytes(found.payload, "big")
                    self.assertGreaterEqual(offset, peer_acked)
                    self.assertLessEqual(offset, peer_end)
                    peer_acked = offset
                else:
                    self.fail(f"unexpected {found}")

        def speak() -> None:
            nonlocal peer_end, acked
            for stream_id in STREAMS:
                room = min(credit[stream_id] - len(said[stream_id]), 8192)
                if room and chance.random() < 0.5:
                    start = len(said[stream_id]) % 40_000
                    part = block[start : start + chance.randint(1, room)]
                    said[stream_id].extend(part)
                    to_say.extend(frame(DATA, stream_id, part))
                    peer_end += 12 + len(part)
                if chance.random() < 0.3:
                    limit[stream_id] = len(got[stream_id]) + chance.choice([4096, 20_000, 100_000])
                    limit[stream_id] = max(limit[stream_id], told[stream_id])
                    told[stream_id] = limit[stream_id]
                    to_say.extend(frame(CREDIT, stream_id, u64(limit[stream_id], len(got[stream_id]))))
                    peer_end += 28
            if ends and chance.random() < 0.4:
                acked = chance.choice([end for end in ends if end >= acked] or [acked])
                to_say.extend(frame(ACK, 0, u64(acked)))

        told = dict(limit)

        def programs(*, all_of_it: bool = False) -> None:
            for stream_id, (_, far) in side.sockets.items():
                if chance.random() < 0.6 and not all_of_it and len(wrote[stream_id]) < 300_000:
                    start = len(wrote[stream_id]) % 30_000
                    try:
                        count = far.send(block[start : start + chance.randint(1, 20_000)])
                    except BlockingIOError:
                        count = 0
                    wrote[stream_id] += block[start : start + count]
                if chance.random() < 0.6 or all_of_it:
                    with contextlib.suppress(BlockingIOError):
                        read[stream_id] += far.recv(1 << 20 if all_of_it else chance.randint(1, 30_000))

        def python() -> None:
            """Python's turn: it sends what it can, and has the programs take what waits for them."""
            nonlocal waiting
            for stream_id in STREAMS:
                queue = side.queues[stream_id]
                if queue:
                    side.queues[stream_id] = []
                    side.deliver(stream_id, [memoryview(join(queue))])
            if not waiting:
                waiting = ours.protect(side.raw(1 << 16))
            with contextlib.suppress(BlockingIOError):
                waiting = waiting[link.send(waiting) :] if waiting else b""

        def read_link() -> None:
            try:
                arrived = link.recv(100_000)
            except BlockingIOError:
                return
            for event in side.link.receive([memoryview(ours.reveal(arrived))], 0.0):
                side.happened([event])

        for turn in range(5000):
            ending = turn >= 300
            if (
                ending
                and not to_say
                and not to_send
                and peer_end == session.rx_next
                and read == said
                and got == wrote
            ):
                break
            if not ending:
                speak()
            elif not to_say and not to_send:
                to_say.extend(frame(ACK, 0, u64(heard)))
                for stream_id in STREAMS:
                    told[stream_id] = limit[stream_id] = max(len(got[stream_id]) + 100_000, told[stream_id])
                    to_say.extend(frame(CREDIT, stream_id, u64(limit[stream_id], len(got[stream_id]))))
                    peer_end += 28
            programs(all_of_it=ending)
            to_send += theirs.protect(bytes(to_say))
            to_say.clear()
            try:
                count = (
                    peer.send(to_send[: 1 << 20 if ending else chance.randint(1, 30_000)]) if to_send else 0
                )
            except BlockingIOError:
                count = 0
            del to_send[:count]
            if chance.random() < 0.7 or ending:
                hear(1 << 20 if ending else chance.choice([1, 5, 13, 1000, 100_000]))
            python()
            if waiting or not side.link.at_rest:
                read_link()
                continue
            lease = lease_of(side.link, session, pool, link.fileno(), epoll.fileno(), 2)
            ours.use(lease)
            for stream_id, (near, _) in side.sockets.items():
                send, window = session.streams[stream_id].send, session.streams[stream_id].receive.window
                lease.add(
                    stream_id,
                    near.fileno(),
                    not send.queued,
                    not side.queues[stream_id],
                    False,
                    (send.window.sent, send.window.limit, send.delivered),
                    (window.received, window.consumed, window.granted, window.size, window.size // 4),
                )
            if lease.feed(side.link.suspend()):
                happened = native.wait(epoll.fileno(), 0.002, 0.002, 60.0, [lease])  # type: ignore[union-attr]
                waiting = side.settle(lease)
                if any(descriptor == link.fileno() for descriptor, _ in happened):
                    read_link()
            else:  # the frame that arrives is in too many pieces
                side.settle(lease)
                read_link()
            self.assertIs(side.link.state, LinkState.OPEN)
            self.assertGreaterEqual(session.replay.capacity + 256 * 1024, session.replay.held_bytes)
            acknowledged.append(session.replay.acknowledged)
            self.assertEqual(acknowledged, sorted(acknowledged))
        self.assertEqual(side.seen, [])
        for stream_id in STREAMS:
            self.assertEqual(read[stream_id], said[stream_id], f"stream {stream_id}, towards the program")
            self.assertEqual(got[stream_id], wrote[stream_id], f"stream {stream_id}, towards the peer")
        self.assertEqual(session.rx_next, peer_end)

    @bounded(8)
    @given(st.integers(0, 2**32))
    def test_slow(self, seed: int) -> None:
        """With small buffers everywhere."""
        self.check(seed, small=True)

    @bounded(8)
    @given(st.integers(0, 2**32))
    def test_fast(self, seed: int) -> None:
        """With those of the system."""
        self.check(seed, small=False)

    @bounded(8)
    @given(st.integers(0, 2**32))
    def test_slow_and_encrypted(self, seed: int) -> None:
        """The same over TLS."""
        self.check(seed, small=True, ours=Encrypted(1, 2), theirs=Encrypted(2, 1))

    @bounded(8)
    @given(st.integers(0, 2**32))
    def test_fast_and_encrypted(self, seed: int) -> None:
        """The same over TLS."""
        self.check(seed, small=False, ours=Encrypted(1, 2), theirs=Encrypted(2, 1))

    @bounded(8)
    @given(st.integers(0, 2**32))
    def test_slow_and_passed_on(self, seed: int) -> None:
        """The same without copies."""
        self.check(seed, small=True, ours=PassedOn())

    @bounded(8)
    @given(st.integers(0, 2**32))
    def test_fast_and_passed_on(self, seed: int) -> None:
        """The same without copies."""
        self.check(seed, small=False, ours=PassedOn())
