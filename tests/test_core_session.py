"""A session by its frames: what each call says, what each frame means."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from relaymux.core.events import (
    DataReceived,
    GoawayReceived,
    LinkEnded,
    SendingStopped,
    StreamAccepted,
    StreamClosed,
    StreamFinished,
    StreamOpened,
    StreamRefused,
    StreamReset,
)
from relaymux.core.handshake import Limits
from relaymux.core.replay import HEAD_ROOM
from relaymux.core.schedule import BULK_FRAME, LITTLE, SHARED_FRAME
from relaymux.core.session import Session
from relaymux.errors import ErrorCode, LocalError
from tests.wire import (
    ACK,
    CLOSED,
    CREDIT,
    DATA,
    FIN,
    GOAWAY,
    LIMITS,
    OPEN,
    OPENED,
    REFUSED,
    RESET,
    STOP,
    Core,
    frame,
    opening,
    u16,
    u64,
    unhex,
)


def content(size: int) -> bytes:
    """Bytes that tell their position."""
    return b"".join(i.to_bytes(4, "big") for i in range((size + 3) // 4))[:size]


class LiteralTests(SynchronousTestCase):
    """One stream's life in both directions, byte by byte."""

    def test_outgoing(self) -> None:
        """What the dialling side says when it opens, writes, is answered, and closes."""
        core = Core(dialing=True).shake()
        session = core.session
        self.assertEqual(session.open_stream("vda"), 1)
        session.write(1, b"hi")
        self.assertEqual(
            core.raw(),
            unhex("10 00 0000 00000001 00000004  03 766461   13 00 0000 00000001 00000002  6869"),
        )
        self.assertEqual(core.hear(unhex("11 00 0000 00000001 00000000")), [StreamAccepted(1)])
        # Credit up to 4096, 2 bytes delivered.
        core.hear(unhex("14 00 0000 00000001 00000010  0000000000001000 0000000000000002"))
        self.assertEqual(session.streams[1].send.window.limit, 4096)
        self.assertEqual(session.streams[1].send.delivered, 2)
        session.finish(1)
        self.assertEqual(core.raw(), unhex("15 00 0000 00000001 00000008  0000000000000002"))
        [data] = core.hear(unhex("13 00 0000 00000001 00000003  616263"))
        assert isinstance(data, DataReceived)
        self.assertEqual((data.stream_id, b"".join(data.buffers), data.size), (1, b"abc", 3))
        self.assertEqual(session.consumed(1, 3), [])
        self.assertEqual(
            core.hear(unhex("15 00 0000 00000001 00000008  0000000000000003")), [StreamFinished(1)]
        )
        self.assertEqual(
            core.raw(), unhex("18 00 0000 00000001 0000000a  0000 0000000000000003"), "CLOSED, 3 bytes taken"
        )
        self.assertEqual(
            core.hear(unhex("18 00 0000 00000001 0000000a  0000 0000000000000002")),
            [StreamClosed(1, accepted=2, delivered=2, received=3, consumed=3)],
        )
        self.assertEqual(session.streams, {})

    def test_incoming(self) -> None:
        """What the accepting side says when it is asked, refuses, resets and stops."""
        core = Core().shake()
        session = core.session
        asked = unhex("10 00 0000 00000001 00000004  03 766461")
        self.assertEqual(core.hear(asked), [StreamOpened(1, "vda")])
        session.accept(1)
        self.assertEqual(core.raw(), unhex("11 00 0000 00000001 00000000"))
        session.reset(1, ErrorCode.LOCAL_RESET)
        self.assertEqual(core.raw(), unhex("16 00 0000 00000001 0000000a  0014 0000000000000000"))
        self.assertEqual(session.stop(1, ErrorCode.LOCAL_CLOSED), [])
        self.assertEqual(core.raw(), unhex("17 00 0000 00000001 00000002  0015"))
        self.assertEqual(core.hear(unhex("16 00 0000 00000001 0000000a  0015 0000000000000000")), [])
        self.assertEqual(core.raw(), unhex("18 00 0000 00000001 0000000a  0015 0000000000000000"))
        core.hear(unhex("10 00 0000 00000003 00000004  03 766461"))
        session.refuse(3, ErrorCode.UNKNOWN_SERVICE, "no")
        self.assertEqual(core.raw(), unhex("12 00 0000 00000003 00000004  0010 6e6f"))

    def test_goaway(self) -> None:
        """A farewell names its reason, once."""
        core = Core().shake()
        core.session.goaway(ErrorCode.SHUTTING_DOWN, "x")
        core.session.goaway(ErrorCode.SHUTTING_DOWN, "again")
        self.assertEqual(core.raw(), unhex("19 00 0000 00000000 00000003  0025 78"))
        self.assertEqual(core.hear(unhex("19 00 0000 00000000 00000003  0025 78")), [GoawayReceived(37, "x")])


class OpeningTests(SynchronousTestCase):
    """Asking for streams and answering."""

    def test_ids(self) -> None:
        """The dialling side numbers its streams 1, 3, 5, the accepting side 2, 4, 6."""
        for dialing, first in ((True, 1), (False, 2)):
            core = Core(dialing=dialing).shake()
            ids = [core.session.open_stream("a") for _ in range(3)]
            self.assertEqual(ids, [first, first + 2, first + 4])

    def test_all_ids_used(self) -> None:
        """After the last id there is none: they are never used again."""
        for dialing, last in ((True, 2**32 - 1), (False, 2**32 - 2)):
            core = Core(dialing=dialing).shake()
            core.session._next_id = last
            self.assertEqual(core.session.open_stream("a"), last)
            with self.assertRaises(LocalError):
                core.session.open_stream("a")
            self.assertEqual(core.say(), [(OPEN, last, b"\x01a")])

    def test_incoming_ids(self) -> None:
        """Streams of the peer come in their order; ids are never used again."""
        core = Core().shake()
        for stream_id in (1, 3, 5):
            self.assertEqual(core.hear(opening(stream_id)), [StreamOpened(stream_id, "vda")])

    def test_service_names(self) -> None:
        """No path travels: a name has 1 to 64 letters of the allowed ones."""
        session = Core(dialing=True).shake().session
        for name in ("", "a/b", "a b", "ä", "a\n", "x" * 65):
            with self.assertRaises(LocalError):
                session.open_stream(name)
        session.open_stream("A.b_c-9" + "x" * 57)

    def test_extensions_of_open_are_ignored(self) -> None:
        """A later version may say more when it opens a stream."""
        core = Core().shake()
        extensions = unhex("0009 0002 abcd  000a 0000")
        self.assertEqual(core.hear(opening(1, b"vda", extensions)), [StreamOpened(1, "vda")])

    def test_peers_limit(self) -> None:
        """Not more streams are opened than the peer allows; a closed one makes room."""
        core = Core(dialing=True).shake(max_streams=2)
        session = core.session
        session.open_stream("a")
        self.assertTrue(session.can_open)
        session.open_stream("a")
        self.assertFalse(session.can_open)
        with self.assertRaises(LocalError):
            session.open_stream("a")
        core.say()
        core.hear(frame(REFUSED, 1, u16(16)), frame(CLOSED, 1, u16(16) + u64(0)))
        self.assertEqual(session.open_stream("a"), 5)

    def test_answering_twice(self) -> None:
        """A stream is accepted or refused once, and only by the side that was asked."""
        core = Core().shake().opened_by_peer()
        with self.assertRaises(LocalError):
            core.session.accept(1)
        with self.assertRaises(LocalError):
            core.session.refuse(1, 16, "no")
        outgoing = core.session.open_stream("a")
        with self.assertRaises(LocalError):
            core.session.accept(outgoing)
        self.assertEqual(core.say(), [(OPEN, 2, b"\x01a")])

    def test_refused(self) -> None:
        """A refusal ends both directions: what was written meanwhile is not delivered, and counted."""
        core = Core(dialing=True).shake()
        stream_id = core.opened_here(accepted=False)
        core.session.write(stream_id, b"early")
        core.say()
        self.assertEqual(
            core.hear(frame(REFUSED, stream_id, u16(17) + b"no such socket")),
            [StreamRefused(stream_id, 17, "no such socket")],
        )
        self.assertEqual(
            core.say(),
            [(RESET, stream_id, u16(17) + u64(5)), (CLOSED, stream_id, u16(17) + u64(0))],
        )
        self.assertEqual(
            core.hear(frame(CLOSED, stream_id, u16(17) + u64(0))),
            [StreamClosed(stream_id, accepted=5, delivered=0, received=0, consumed=0)],
        )

    def test_refusing(self) -> None:
        """The refusing side waits for the peer to end its direction, and drops what it had sent."""
        core = Core().shake().opened_by_peer(accept=False)
        core.hear(frame(DATA, 1, b"early"))
        self.assertEqual(core.session.refuse(1, 17, "no"), [])
        self.assertEqual(core.say(), [(REFUSED, 1, u16(17) + b"no")])
        self.assertEqual(core.hear(frame(DATA, 1, b"crossed it")), [])
        self.assertEqual(core.hear(frame(RESET, 1, u16(17) + u64(15))), [])
        self.assertEqual(core.say(), [(CLOSED, 1, u16(17) + u64(0))])
        self.assertEqual(core.hear(frame(CLOSED, 1, u16(17) + u64(0))), [StreamClosed(1, 0, 0, 15, 0)])

    def test_refusing_what_has_finished(self) -> None:
        """A refusal of a stream whose opener had half-closed already."""
        core = Core().shake().opened_by_peer(accept=False)
        core.hear(frame(DATA, 1, b"early"), frame(FIN, 1, u64(5)))
        self.assertEqual(core.session.refuse(1, 17, "no"), [])
        self.assertEqual(core.say(), [(REFUSED, 1, u16(17) + b"no"), (CLOSED, 1, u16(17) + u64(0))])
        self.assertEqual(core.hear(frame(CLOSED, 1, u16(17) + u64(0))), [StreamClosed(1, 0, 0, 5, 0)])

    def test_refusing_what_was_written_to(self) -> None:
        """A refusal means that no byte was sent; to refuse later is the caller's mistake."""
        core = Core().shake().opened_by_peer(accept=False)
        core.session.write(1, b"x")
        with self.assertRaises(LocalError):
            core.session.refuse(1, 17, "no")
        core.session.accept(1)
        self.assertEqual(core.say(), [(OPENED, 1, b""), (DATA, 1, b"x")])

    def test_given_up_before_the_answer(self) -> None:
        """Neither answer is sent to an opener that has ended the stream: it may have forgotten it."""
        for answer in (
            lambda session: session.accept(1),
            lambda session: session.refuse(1, 17, "no"),
        ):
            core = Core().shake().opened_by_peer(accept=False)
            core.hear(frame(RESET, 1, u16(22) + u64(0)), frame(STOP, 1, u16(22)))
            answer(core.session)
            self.assertEqual(core.say(), [(CLOSED, 1, u16(22) + u64(0)), (RESET, 1, u16(22) + u64(0))])

    def test_accepted_though_one_direction_is_over(self) -> None:
        """An opener that takes nothing, but sends, still hears that it was accepted."""
        core = Core().shake().opened_by_peer(accept=False)
        core.hear(frame(STOP, 1, u16(21)))
        core.session.accept(1)
        self.assertIn((OPENED, 1, b""), core.say())

    def test_accepted_after_finishing(self) -> None:
        """A side that has nothing to say may half-close before it accepts."""
        core = Core().shake().opened_by_peer(accept=False)
        core.session.finish(1)
        core.say()
        core.session.accept(1)
        self.assertEqual(core.say(), [(OPENED, 1, b"")])

    def test_after_goaway(self) -> None:
        """Having said goaway, a side opens nothing, refuses what comes and goes on with what there is."""
        core = Core().shake().opened_by_peer()
        core.session.goaway(ErrorCode.SHUTTING_DOWN, "bye")
        core.say()
        with self.assertRaises(LocalError):
            core.session.open_stream("a")
        self.assertEqual(core.hear(opening(3)), [])
        [(kind, stream_id, payload)] = core.say()
        self.assertEqual((kind, stream_id, payload[:2]), (REFUSED, 3, u16(37)))
        core.session.write(1, b"on")
        self.assertEqual(core.say(), [(DATA, 1, b"on")])

    def test_deliveries_are_reported_after_goaway(self) -> None:
        """A peer that is going away hears of every byte that was taken, at once."""
        core = Core().shake(replay=1 << 30).opened_by_peer()
        core.hear(opening(3), frame(DATA, 1, b"abcdef"), frame(DATA, 3, b"xyz"), frame(FIN, 3, u64(3)))
        core.session.consumed(1, 4)
        core.session.consumed(3, 1)
        self.assertEqual(core.say(), [])
        core.hear(frame(GOAWAY, 0, u16(37) + b"bye"))
        self.assertEqual(core.say(), [(CREDIT, 1, u64(2052, 4)), (CREDIT, 3, u64(2049, 1))])
        core.session.consumed(1, 1)
        core.session.consumed(3, 1)
        self.assertEqual(core.say(), [(CREDIT, 1, u64(2053, 5)), (CREDIT, 3, u64(2050, 2))])
        core.session.consumed(3, 1)
        self.assertEqual(core.say(), [(CLOSED, 3, u16(0) + u64(3))])

    def test_after_the_peers_goaway(self) -> None:
        """Nothing is opened at a peer that is going away."""
        core = Core(dialing=True).shake()
        core.hear(frame(GOAWAY, 0, u16(37) + b"bye"))
        self.assertFalse(core.session.can_open)
        with self.assertRaises(LocalError):
            core.session.open_stream("a")


class DataTests(SynchronousTestCase):
    """Bytes, credit, and whose turn it is."""

    def test_credit_is_obeyed(self) -> None:
        """Not a byte more than the window leaves, and the rest when credit comes."""
        core = Core(dialing=True).shake(window=2048)
        stream_id = core.opened_here()
        data = content(5000)
        core.session.write(stream_id, data)
        self.assertEqual(core.say(), [(DATA, stream_id, data[:2048])])
        self.assertEqual(core.say(), [])
        core.hear(frame(CREDIT, stream_id, u64(2049, 1)))
        self.assertEqual(core.say(), [(DATA, stream_id, data[2048:2049])])
        core.hear(frame(CREDIT, stream_id, u64(9000, 2049)))
        self.assertEqual(core.say(), [(DATA, stream_id, data[2049:])])

    def test_credit_is_given_for_what_was_consumed(self) -> None:
        """Credit is worth a frame from a quarter of the window on, and the newest value is said."""
        core = Core().shake(replay=1 << 30).opened_by_peer()
        core.hear(frame(DATA, 1, content(2048)))
        self.assertEqual(core.say(), [])
        core.session.consumed(1, 511)
        self.assertEqual(core.say(), [])
        core.session.consumed(1, 1)
        core.session.consumed(1, 100)
        self.assertEqual(core.say(), [(CREDIT, 1, u64(2048 + 612, 612))])
        self.assertEqual(core.say(), [])

    def test_frames_are_bounded_by_the_peer(self) -> None:
        """No frame is longer than the peer accepts."""
        core = Core(dialing=True).shake(max_payload=1024, window=3000)
        stream_id = core.opened_here()
        core.session.write(stream_id, content(3000))
        self.assertEqual([len(payload) for _, _, payload in core.say()], [1024, 1024, 952])

    def test_frame_sizes(self) -> None:
        """A stream alone sends long frames; several get short ones, in turn."""
        large = Limits(max_payload=1 << 20, window=1 << 20, replay=1 << 24)
        core = Core(dialing=True, limits=large).shake(max_payload=1 << 20, window=1 << 20, max_streams=9)
        one, other = core.opened_here(), core.opened_here()
        core.session.write(one, content(BULK_FRAME + 1000))
        said = [(stream_id, len(payload)) for _, stream_id, payload in core.say()]
        self.assertEqual(said, [(one, BULK_FRAME), (one, 1000)])
        core.session.write(one, content(200_000))
        core.session.write(other, content(LITTLE + 1))
        said = [(stream_id, len(payload)) for _, stream_id, payload in core.say()]
        self.assertEqual(said[:2], [(one, SHARED_FRAME), (other, LITTLE + 1)])
        self.assertEqual(sum(size for stream_id, size in said if stream_id == one), 200_000)

    def test_little_goes_first(self) -> None:
        """A message is not kept waiting by disks, however much they have; nor a large one's beginning."""
        large = Limits(max_payload=1 << 20, window=1 << 20, replay=1 << 24)
        core = Core(dialing=True, limits=large).shake(max_payload=1 << 20, window=1 << 20, max_streams=9)
        disks = [core.opened_here() for _ in range(4)]
        control = core.opened_here()
        for disk in disks:
            core.session.write(disk, content(500_000))
        self.assertEqual([stream_id for _, stream_id, _ in core.say(limit=1)], disks[:1])
        core.session.write(control, b"keepalive")
        core.session.write(control, b"another")
        said = core.say(limit=SHARED_FRAME + 16)
        self.assertEqual(said[0], (DATA, control, b"keepaliveanother"))
        self.assertEqual([stream_id for _, stream_id, _ in said[1:]], disks[1:2])
        core.session.write(control, content(100))
        core.session.write(control, content(3 * LITTLE))
        said = core.say(limit=6 * SHARED_FRAME)
        self.assertEqual((said[0][1], len(said[0][2])), (control, LITTLE))
        order = [stream_id for _, stream_id, _ in said[1:]]
        self.assertEqual(order[:4], [*disks[2:], *disks[:2]])
        self.assertEqual(
            order.index(control), 4, "the rest of a long message takes its turn among the others"
        )

    def test_little_after_credit(self) -> None:
        """A stream that waited for credit with little in its queue goes first, too."""
        core = Core(dialing=True).shake(max_payload=1024, window=1024, max_streams=9)
        control, disk = core.opened_here(), core.opened_here()
        core.session.write(control, content(1029))
        core.say()
        core.hear(frame(CREDIT, disk, u64(1 << 20, 0)))
        core.session.write(disk, content(100_000))
        core.hear(frame(CREDIT, control, u64(2048, 1024)))
        self.assertEqual([stream_id for _, stream_id, _ in core.say(limit=1)], [control])

    def test_limit_of_all(self) -> None:
        """What is given out at once, which the next urgent frame waits for, exceeds the limit by little."""
        large = Limits(max_payload=1 << 20, window=1 << 23, replay=1 << 24)
        core = Core(dialing=True, limits=large).shake(max_payload=1 << 20, window=1 << 23, max_streams=9)
        disk = core.opened_here()
        for size in (BULK_FRAME - 1, 300_000, 5_000_000):
            core.session.write(disk, content(size))
            while said := core.say(limit=BULK_FRAME):
                self.assertLessEqual(sum(len(payload) for _, _, payload in said), BULK_FRAME + SHARED_FRAME)

    def test_limit(self) -> None:
        """A link that wants little at once gets little, and the rest in the next call."""
        core = Core(dialing=True).shake(max_payload=1024)
        stream_id = core.opened_here()
        data = content(2048)
        core.session.write(stream_id, data)
        self.assertEqual(core.say(limit=1), [(DATA, stream_id, data[:1024])])
        self.assertEqual(core.say(limit=1), [(DATA, stream_id, data[1024:])])
        self.assertEqual(core.say(limit=1), [])

    def test_drained(self) -> None:
        """A stream whose queue ran empty is told of, once."""
        core = Core(dialing=True).shake()
        one = core.opened_here()
        core.session.write(one, b"abc")
        self.assertEqual(core.session.take_drained(), [])
        core.say()
        self.assertEqual(core.session.take_drained(), [one])
        self.assertEqual(core.session.take_drained(), [])
        core.session.write(one, content(3000))
        core.say()
        self.assertEqual(core.session.take_drained(), [], "the rest of it waits for credit")
        core.hear(frame(CREDIT, one, u64(5000, 0)))
        core.say()
        self.assertEqual(core.session.take_drained(), [one])

    def test_full_replay_buffer(self) -> None:
        """With too much unacknowledged no data leaves, whatever the credit; an ack lets it go on."""
        limits = Limits(max_payload=4096, max_streams=3, window=1 << 20, replay=16384)
        core = Core(dialing=True, limits=limits).shake(max_payload=1024, window=1 << 20, max_streams=9)
        one = core.opened_here()
        data = content(40_000)
        core.session.write(one, data)
        sent = b"".join(payload for _, _, payload in core.say())
        self.assertGreater(len(sent), 12_000)
        held = core.session.replay.held_bytes
        self.assertLessEqual(held, 16384)
        self.assertEqual(core.say(), [])
        core.session.finish(one)
        self.assertEqual(core.session.stop(one, 21), [])
        self.assertEqual(core.say(), [(STOP, one, u16(21))], "control frames do not wait")
        while len(sent) < len(data):
            core.hear(frame(ACK, 0, u64(core.session.replay.end)))
            sent += b"".join(payload for kind, _, payload in core.say() if kind == DATA)
        self.assertEqual(sent, data)

    def test_writing_after_the_end(self) -> None:
        """The caller's mistakes are named and change nothing."""
        core = Core(dialing=True).shake()
        one = core.opened_here()
        session = core.session
        for call in (
            lambda: session.write(99, b"x"),
            lambda: session.finish(99),
            lambda: session.reset(99, 1),
            lambda: session.stop(99, 1),
        ):
            with self.assertRaises(LocalError):
                call()
        session.finish(one)
        with self.assertRaises(LocalError):
            session.write(one, b"x")
        with self.assertRaises(LocalError):
            session.finish(one)
        self.assertEqual(core.say(), [(FIN, one, u64(0))])


class EndTests(SynchronousTestCase):
    """Half-close, reset, stop."""

    def test_fin_follows_the_data(self) -> None:
        """FIN waits for the last byte, and for its credit."""
        core = Core(dialing=True).shake(window=1024)
        one = core.opened_here()
        core.session.write(one, content(1030))
        core.session.finish(one)
        self.assertEqual([kind for kind, _, _ in core.say()], [DATA])
        core.hear(frame(CREDIT, one, u64(3000, 1024)))
        self.assertEqual(core.say(), [(DATA, one, content(1030)[1024:]), (FIN, one, u64(1030))])

    def test_reset_overtakes_the_queue(self) -> None:
        """A reset leaves at once and says how much was sent before it."""
        core = Core(dialing=True).shake(window=1024)
        one = core.opened_here()
        core.session.write(one, content(1030))
        core.say()
        core.session.reset(one, 20)
        self.assertEqual(core.say(), [(RESET, one, u16(20) + u64(1024))])
        core.hear(frame(CREDIT, one, u64(5000, 1024)))
        self.assertEqual(core.say(), [])

    def test_forgotten_while_it_waited(self) -> None:
        """A stream that ends while it waits for its turn is gone from the queue, too."""
        core = Core(dialing=True).shake()
        one, other = core.opened_here(), core.opened_here()
        for stream_id in (one, other):
            core.session.write(stream_id, b"abc")
        core.session.reset(one, 20)
        # The peer cannot know of the reset yet, and says all the same that it is done.
        core.hear(frame(CLOSED, one, u16(20) + u64(0)), frame(FIN, one, u64(0)))
        self.assertNotIn(one, core.session.streams)
        self.assertIn((DATA, other, b"abc"), core.say())

    def test_reset_received(self) -> None:
        """A reset voids what was not consumed; its CLOSED says what was."""
        core = Core().shake().opened_by_peer()
        core.hear(frame(DATA, 1, b"abcdef"))
        core.session.consumed(1, 2)
        self.assertEqual(core.hear(frame(RESET, 1, u16(20) + u64(6))), [StreamReset(1, 20)])
        self.assertEqual(core.say(), [(CLOSED, 1, u16(20) + u64(2))])
        self.assertEqual(core.session.consumed(1, 4), [])
        self.assertEqual(core.say(), [])

    def test_stop_received(self) -> None:
        """Asked to stop, a side resets and tells how much is lost."""
        core = Core(dialing=True).shake(window=1024)
        one = core.opened_here()
        core.session.write(one, content(1030))
        core.say()
        core.hear(frame(CREDIT, one, u64(1024, 1000)))
        self.assertEqual(core.hear(frame(STOP, one, u16(21))), [SendingStopped(one, 21, undelivered=30)])
        self.assertEqual(core.say(), [(RESET, one, u16(21) + u64(1024))])
        self.assertEqual(core.hear(frame(STOP, one, u16(21))), [], "a second one says nothing new")

    def test_stop_crosses_fin(self) -> None:
        """A side that had finished when it is asked to stop has nothing to reset."""
        core = Core(dialing=True).shake()
        one = core.opened_here()
        core.session.write(one, b"abc")
        core.session.finish(one)
        core.say()
        self.assertEqual(core.hear(frame(STOP, one, u16(21))), [])
        self.assertEqual(core.say(), [])

    def test_no_credit_after_closed(self) -> None:
        """Credit that became due is not said any more when the direction ends in the same turn."""
        core = Core().shake(replay=1 << 30).opened_by_peer()
        core.hear(frame(DATA, 1, content(2048)))
        core.session.consumed(1, 1024)
        core.hear(frame(RESET, 1, u16(20) + u64(2048)))
        self.assertEqual(core.say(), [(CLOSED, 1, u16(20) + u64(1024))])

    def test_fin_before_the_consumer_is_done(self) -> None:
        """A finished direction is closed when its last byte was taken, not before."""
        core = Core().shake().opened_by_peer()
        core.hear(frame(DATA, 1, b"abc"), frame(FIN, 1, u64(3)))
        core.session.consumed(1, 2)
        self.assertEqual(core.say(), [])
        core.session.consumed(1, 1)
        self.assertEqual(core.say(), [(CLOSED, 1, u16(0) + u64(3))])

    def test_stop_after_fin(self) -> None:
        """A consumer that gives up on the rest of a finished direction says how much it took."""
        core = Core().shake().opened_by_peer()
        core.hear(frame(DATA, 1, b"abc"), frame(FIN, 1, u64(3)))
        core.session.consumed(1, 2)
        self.assertEqual(core.session.stop(1, 21), [])
        self.assertEqual(core.say(), [(CLOSED, 1, u16(21) + u64(2))])

    def test_abort(self) -> None:
        """An abort ends both directions, whatever state they are in."""
        core = Core().shake().opened_by_peer()
        self.assertEqual(core.session.abort(1, 22), [])
        self.assertEqual(core.say(), [(RESET, 1, u16(22) + u64(0)), (STOP, 1, u16(22))])
        self.assertEqual(core.session.abort(1, 22), [])
        self.assertEqual(core.say(), [])
        core.hear(frame(RESET, 1, u16(22) + u64(0)))
        core.say()
        self.assertEqual(core.session.abort(1, 22), [])
        self.assertEqual(core.hear(frame(CLOSED, 1, u16(22) + u64(0))), [StreamClosed(1, 0, 0, 0, 0)])
        with self.assertRaises(LocalError):
            core.session.abort(1, 22)

    def test_forgotten(self) -> None:
        """A stream that is over takes no place any more."""
        core = Core().shake()
        for stream_id in range(1, 40, 2):
            core.opened_by_peer(stream_id)
            core.session.abort(stream_id, 22)
            core.hear(frame(RESET, stream_id, u16(22) + u64(0)), frame(CLOSED, stream_id, u16(22) + u64(0)))
            core.say()
            self.assertEqual(core.session.streams, {})

    def test_settled(self) -> None:
        """A session is settled when nothing is open, to be said, or unacknowledged."""
        core = Core(dialing=True).shake()
        session = core.session
        self.assertTrue(session.settled)
        session.open_stream("a")
        self.assertFalse(session.settled)
        core.say()
        core.hear(frame(REFUSED, 1, u16(16)), frame(CLOSED, 1, u16(16) + u64(0)))
        self.assertFalse(session.settled)
        core.say()
        self.assertFalse(session.settled)
        core.hear(frame(ACK, 0, u64(session.replay.end)))
        self.assertTrue(session.settled)

    def test_undelivered(self) -> None:
        """It can be asked what the peer's consumers have not taken."""
        core = Core(dialing=True).shake(window=1024)
        one, other = core.opened_here(), core.opened_here()
        core.session.write(one, content(2000))
        core.session.write(other, b"abc")
        core.say()
        core.hear(frame(CREDIT, one, u64(1524, 500)))
        self.assertEqual(core.session.undelivered_bytes, 1503)


class BoundTests(SynchronousTestCase):
    """What a peer can make us keep."""

    def flood(self, core: Core, *, reading: bool) -> int:
        """Open and reset streams until the peer is cut off.  @return: how many."""
        for number in range(100_000):
            stream_id = 2 * number + 1
            core.hear(
                opening(stream_id)
                + frame(RESET, stream_id, u16(22) + u64(0))
                + frame(STOP, stream_id, u16(22))
                + frame(CLOSED, stream_id, u16(22) + u64(0))
            )
            if core.link.session is None:
                [end] = [event for event in core.events if isinstance(event, LinkEnded)]
                self.assertEqual(end.code, ErrorCode.FLOOD)
                return number
            if reading:
                core.raw()
                self.assertLess(core.session.replay.held_bytes, LIMITS.replay + HEAD_ROOM + 100)
        self.fail("the peer may go on for ever")

    def test_peer_that_does_not_acknowledge(self) -> None:
        """A peer that takes all answers and acknowledges none is cut off when they are too many."""
        self.assertLess(self.flood(Core().shake(), reading=True), 10_000)

    def test_peer_that_does_not_read(self) -> None:
        """A peer that opens and resets streams without reading what is answered is cut off."""
        core = Core().shake()
        self.assertEqual(self.flood(core, reading=False), LIMITS.max_streams)

    def test_peer_that_counts_as_we_do(self) -> None:
        """A stream that the peer has forgotten makes room, though frames of others wait to be sent."""
        core = Core().shake()
        for stream_id in (1, 3, 5):
            core.opened_by_peer(stream_id)
        core.session.abort(1, 22)
        core.say()
        core.hear(frame(RESET, 1, u16(22) + u64(0)))
        core.say()
        core.session.reset(3, 22)
        core.hear(frame(CLOSED, 1, u16(22) + u64(0)), opening(7))
        self.assertFalse(core.link.ended)
        core.hear(opening(9))
        self.assertTrue(core.link.ended)

    def test_honest_peer(self) -> None:
        """A peer that reads and acknowledges may open and reset streams for ever."""
        core = Core().shake()
        for number in range(1000):
            stream_id = 2 * number + 1
            core.hear(
                opening(stream_id)
                + frame(RESET, stream_id, u16(22) + u64(0))
                + frame(STOP, stream_id, u16(22))
            )
            core.say()
            core.hear(frame(CLOSED, stream_id, u16(22) + u64(0)), frame(ACK, 0, u64(core.session.replay.end)))


class SequenceTests(SynchronousTestCase):
    """The numbering of what is said."""

    def test_offsets(self) -> None:
        """Both sides count the bytes of sequenced frames, headers included, and nothing else."""
        core = Core().shake()
        core.opened_by_peer()
        heard = len(opening(1))
        self.assertEqual(core.session.rx_next, heard)
        core.hear(frame(DATA, 1, b"abc"), frame(ACK, 0, u64(12)))
        self.assertEqual(core.session.rx_next, heard + 15)
        core.session.write(1, b"defg")
        core.say()
        self.assertEqual(core.session.replay.end, 12 + 16)
        self.assertEqual(core.session.replay.held_bytes, 16)

    def test_ack_bytes(self) -> None:
        """An ack is due after a share of the peer's replay buffer, at most 512 KiB."""
        for replay, due in ((16384, 2048), (8 << 20, 1 << 19), (1 << 30, 1 << 19)):
            session = Session(dialing=True, local=LIMITS, remote=Limits(replay=replay))
            session.rx_next = due - 1
            self.assertFalse(session.ack_due)
            session.rx_next = due
            self.assertTrue(session.ack_due)
