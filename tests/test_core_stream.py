"""Both halves of a stream, in every state, and what bounds them: windows, replay buffer, turns."""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller
from typing import Any

from twisted.trial.unittest import SynchronousTestCase

from relaymux.core.replay import FRAME_COST, HEAD_ROOM, ReplayBuffer
from relaymux.core.schedule import BULK_FRAME, LITTLE, LITTLE_TURNS, SHARED_FRAME, TurnQueue
from relaymux.core.stream import ReceiveHalf, ReceiveState, SendHalf, SendState, Stream
from relaymux.core.window import MAX_OFFSET, ReceiveWindow, SendWindow
from relaymux.errors import ErrorCode, LocalError, RemoteProtocolError
from tests.wire import join

#: What an input that is not allowed raises: the caller's mistake, or the peer's.
LOCAL = "LocalError"
REMOTE = "STREAM_STATE_ERROR"


def outcome(half: Any, call: Callable[[Any], object]) -> object:
    """@return: the state after C{call} of C{half}, or the name of its error."""
    before = half.state
    try:
        call(half)
    except LocalError:
        assert half.state is before, "a caller's mistake changed the state"
        return LOCAL
    except RemoteProtocolError as error:
        assert error.stream_id == 3
        return ErrorCode(error.code).name
    return half.state


class SendHalfTests(SynchronousTestCase):
    """Our direction of a stream."""

    def half(self, state: SendState, credit: int = 10) -> SendHalf:
        """One with 4 bytes sent, in C{state}; FINISHING has 2 bytes left that wait for credit."""
        half = SendHalf(3, credit)
        half.write(b"abcd")
        half.take(100)
        if state is SendState.FINISHING:
            half.write(b"ef")
            half.finish()
        elif state is not SendState.OPEN:
            half.reset()
        if state is SendState.CLOSED:
            half.receive_closed(4)
        assert half.state is state
        return half

    def test_every_state_and_input(self) -> None:
        """Each input leads to a state of the table, or is a named error."""
        open_, finishing, ended, closed = SendState
        inputs: dict[str, Callable[[SendHalf], object]] = {
            "write": lambda half: half.write(b"x"),
            "finish": lambda half: half.finish(),
            "reset": lambda half: half.reset(),
            "credit": lambda half: half.receive_credit(20, 4),
            "closed": lambda half: half.receive_closed(4),
        }
        expected: dict[str, list[object]] = {
            "write": [open_, LOCAL, LOCAL, LOCAL],
            "finish": [finishing, LOCAL, LOCAL, LOCAL],
            "reset": [ended, ended, LOCAL, LOCAL],
            "credit": [open_, finishing, ended, REMOTE],
            "closed": [REMOTE, REMOTE, closed, REMOTE],
        }
        for name, call in inputs.items():
            for state, result in zip(list(SendState), expected[name], strict=True):
                self.assertEqual(outcome(self.half(state), call), result, (name, state))

    def test_take_splits_without_copying(self) -> None:
        """Bytes leave in the order of writing, in views of what was written."""
        half = SendHalf(3, 100)
        first, second = b"abcdefgh", memoryview(b"ijkl")
        half.write(first)
        half.write(second)
        taken, size = half.take(5)
        self.assertEqual((taken, size), ([b"abcde"], 5))
        assert isinstance(taken[0], memoryview)
        self.assertTrue(taken[0].obj is first)
        taken, size = half.take(100)
        self.assertEqual((taken, size), ([b"fgh", b"ijkl"], 7))
        self.assertTrue(taken[1] is second)
        self.assertEqual(half.take(100), ([], 0))
        self.assertEqual((half.accepted, half.queued, half.window.sent), (12, 0, 12))

    def test_credit_bounds_what_is_taken(self) -> None:
        """Not one byte more than the peer allows."""
        half = SendHalf(3, 5)
        half.write(b"abcdefgh")
        self.assertEqual(half.take(100), ([b"abcde"], 5))
        self.assertFalse(half.ready)
        self.assertEqual(half.take(100), ([], 0))
        half.receive_credit(6, 5)
        self.assertTrue(half.ready)
        self.assertEqual(half.take(100), ([b"f"], 1))

    def test_empty_writes(self) -> None:
        """Writing nothing is allowed and nothing."""
        half = SendHalf(3, 5)
        half.write(b"")
        self.assertFalse(half.ready)
        self.assertEqual(half.take(100), ([], 0))

    def test_finish_waits_for_the_queue(self) -> None:
        """The FIN is due when there is nothing left in front of it, and needs no credit."""
        half = SendHalf(3, 2)
        half.write(b"abc")
        half.finish()
        self.assertTrue(half.ready)
        half.take(100)
        self.assertFalse(half.ready)
        half.receive_credit(3, 0)
        half.take(100)
        self.assertTrue(half.ready)

    def test_reset_drops_the_queue(self) -> None:
        """What was not sent will not be."""
        half = SendHalf(3, 2)
        half.write(b"abc")
        half.take(100)
        half.reset()
        self.assertEqual((half.queued, half.accepted, half.window.sent), (0, 3, 2))
        self.assertFalse(half.ready)
        half.receive_credit(100, 2)
        self.assertFalse(half.ready)

    def test_delivered(self) -> None:
        """The peer reports what its consumer took: never more than was sent, never less than before."""
        half = self.half(SendState.OPEN)
        half.receive_credit(10, 3)
        self.assertEqual(half.delivered, 3)
        self.assertEqual(outcome(half, lambda half: half.receive_credit(10, 2)), REMOTE)
        self.assertEqual(outcome(half, lambda half: half.receive_credit(10, 5)), REMOTE)
        half.receive_credit(10, 4)
        half.reset()
        self.assertEqual(outcome(half, lambda half: half.receive_closed(3)), REMOTE)
        self.assertEqual(outcome(half, lambda half: half.receive_closed(5)), REMOTE)
        self.assertEqual(outcome(half, lambda half: half.receive_closed(4)), SendState.CLOSED)


class ReceiveHalfTests(SynchronousTestCase):
    """The peer's direction of a stream."""

    def half(self, state: ReceiveState) -> ReceiveHalf:
        """One with 4 bytes received, 3 of them consumed, in C{state}."""
        half = ReceiveHalf(3, 10)
        half.receive_data(4)
        half.consume(3)
        if state is ReceiveState.FINISHED:
            half.receive_end(4, clean=True)
        elif state is ReceiveState.DISCARDING:
            half.stop()
        elif state is not ReceiveState.OPEN:
            half.receive_end(4, clean=False)
            half.state = state
        assert half.state is state
        return half

    def test_every_state_and_input(self) -> None:
        """Each input leads to a state of the table, or is a named error."""
        open_, finished, discarding, ended, closed = ReceiveState
        inputs: dict[str, Callable[[ReceiveHalf], object]] = {
            "data": lambda half: half.receive_data(6),
            "fin": lambda half: half.receive_end(4, clean=True),
            "reset": lambda half: half.receive_end(4, clean=False),
            "stop": lambda half: half.stop(),
            "consume the last": lambda half: half.consume(1),
            "consume too much": lambda half: half.consume(2),
            "consume a negative number": lambda half: half.consume(-1),
        }
        expected: dict[str, list[object]] = {
            "data": [open_, REMOTE, discarding, REMOTE, REMOTE],
            "fin": [finished, REMOTE, ended, REMOTE, REMOTE],
            "reset": [ended, REMOTE, ended, REMOTE, REMOTE],
            "stop": [discarding, ended, LOCAL, LOCAL, LOCAL],
            "consume the last": [open_, ended, discarding, ended, closed],
            "consume too much": [LOCAL] * 5,
            "consume a negative number": [LOCAL] * 5,
        }
        for name, call in inputs.items():
            for state, result in zip(list(ReceiveState), expected[name], strict=True):
                self.assertEqual(outcome(self.half(state), call), result, (name, state))

    def test_who_wants_to_know(self) -> None:
        """After stop() data and ends are counted and told to nobody."""
        for state, wanted in ((ReceiveState.OPEN, True), (ReceiveState.DISCARDING, False)):
            self.assertIs(self.half(state).receive_data(1), wanted)
            self.assertIs(self.half(state).receive_end(4, clean=True), wanted)
            self.assertIs(self.half(state).receive_end(4, clean=False), wanted)

    def test_stop_is_told_only_while_it_helps(self) -> None:
        """A peer that has finished need not be asked to stop."""
        self.assertTrue(self.half(ReceiveState.OPEN).stop())
        self.assertFalse(self.half(ReceiveState.FINISHED).stop())

    def test_empty_rest(self) -> None:
        """A FIN after which nothing is left to consume ends the direction at once."""
        half = self.half(ReceiveState.OPEN)
        half.consume(1)
        half.receive_end(4, clean=True)
        self.assertIs(half.state, ReceiveState.ENDED)

    def test_final_offset(self) -> None:
        """An end at any other place than where the data ended is wrong."""
        for state in (ReceiveState.OPEN, ReceiveState.DISCARDING):
            for clean in (True, False):
                for offset in (0, 3, 5, 2**64 - 1):
                    call = methodcaller("receive_end", offset, clean=clean)
                    self.assertEqual(outcome(self.half(state), call), REMOTE)

    def test_credit_is_due_only_while_it_helps(self) -> None:
        """The peer needs no more credit once it has finished."""
        half = ReceiveHalf(3, 8)
        half.receive_data(8)
        self.assertTrue(half.consume(2))
        half.receive_end(8, clean=True)
        self.assertFalse(half.consume(2))


class StreamTests(SynchronousTestCase):
    """The halves together."""

    def test_closed(self) -> None:
        """A stream is over when both halves are."""
        for send in SendState:
            for receive in ReceiveState:
                stream = Stream(1, "vda", outgoing=True, credit=1, window=1)
                stream.send.state, stream.receive.state = send, receive
                both = send is SendState.CLOSED and receive is ReceiveState.CLOSED
                self.assertEqual(stream.closed, both)


class WindowTests(SynchronousTestCase):
    """Credit as absolute offsets."""

    def test_send_window(self) -> None:
        """Saying the same limit again is harmless, a lower one or an absurd one an error."""
        window = SendWindow(100)
        window.sent = 60
        self.assertEqual(window.room, 40)
        window.raise_limit(100, 3)
        window.raise_limit(MAX_OFFSET, 3)
        self.assertEqual(window.room, MAX_OFFSET - 60)
        for limit in (MAX_OFFSET - 1, MAX_OFFSET + 1, 0, 2**64 - 1):
            with self.assertRaises(RemoteProtocolError) as caught:
                window.raise_limit(limit, 3)
            self.assertEqual(caught.exception.code, ErrorCode.FLOW_CONTROL_ERROR)
            self.assertEqual(window.limit, MAX_OFFSET)

    def test_receive_window(self) -> None:
        """The peer may send exactly what was granted, and gets more when bytes were consumed."""
        window = ReceiveWindow(100)
        window.receive(99, 3)
        with self.assertRaises(RemoteProtocolError) as caught:
            window.receive(2, 3)
        self.assertEqual(caught.exception.code, ErrorCode.FLOW_CONTROL_ERROR)
        self.assertEqual(window.received, 99)
        window.receive(1, 3)
        self.assertFalse(window.consume(24))
        self.assertTrue(window.consume(1))
        self.assertEqual(window.grant(), 125)
        self.assertFalse(window.consume(0))
        with self.assertRaises(RemoteProtocolError):
            window.receive(26, 3)
        window.receive(25, 3)

    def test_arrival_grants_nothing(self) -> None:
        """Credit comes from consuming alone, or nothing would stop a sender whose reader stalls."""
        window = ReceiveWindow(100)
        window.receive(100, 3)
        self.assertEqual(window.grant(), 100)

    def test_tiny_windows(self) -> None:
        """A window too small to be quartered still gets credit for every byte."""
        window = ReceiveWindow(3)
        window.receive(3, 3)
        self.assertTrue(window.consume(1))
        self.assertEqual(window.grant(), 4)


class ReplayBufferTests(SynchronousTestCase):
    """What the peer has not acknowledged."""

    def buffer(self) -> ReplayBuffer:
        """One that holds frames of 10, 20 and 30 bytes and has room for 40 more."""
        replay = ReplayBuffer(100 + 3 * FRAME_COST)
        for size in (10, 20, 30):
            replay.append((bytes(size - 1), b"x"), size)
        return replay

    def test_bounds(self) -> None:
        """
        It knows what it holds and what room is left, also when control frames
        exceed it; the objects of each frame take room, too.
        """
        replay = self.buffer()
        self.assertEqual((replay.held_bytes, replay.room, replay.end), (60, 40, 60))
        replay.append((bytes(50),), 50)
        self.assertEqual((replay.held_bytes, replay.room, replay.end), (110, 0, 110))

    def test_many_small_frames(self) -> None:
        """Each frame counts with the memory that it costs beside its bytes."""
        replay = ReplayBuffer(100 * FRAME_COST)
        frames = 0
        while replay.room:
            replay.append((b"x",), 1)
            frames += 1
        self.assertLess(frames, 101)

    def test_full(self) -> None:
        """Control frames have room of their own, which has an end, too."""
        replay = ReplayBuffer(100)
        replay.append((bytes(100 + HEAD_ROOM - 1),), 100 + HEAD_ROOM - 1)
        self.assertFalse(replay.full)
        replay.append((b"x",), 1)
        self.assertTrue(replay.full)

    def test_acknowledge(self) -> None:
        """Acks are cumulative; one heard before is no news."""
        replay = self.buffer()
        self.assertFalse(replay.acknowledge(0))
        self.assertTrue(replay.acknowledge(30))
        self.assertFalse(replay.acknowledge(30))
        self.assertEqual((replay.held_bytes, replay.acknowledged), (30, 30))
        self.assertEqual([join(frame) for frame in replay.unacknowledged()], [bytes(29) + b"x"])
        self.assertTrue(replay.acknowledge(60))
        self.assertEqual((replay.held_bytes, replay.room), (0, replay.capacity))
        self.assertEqual(list(replay.unacknowledged()), [])

    def test_wrong_acks(self) -> None:
        """What was never sent, what was acknowledged before, and half a frame are errors."""
        for before, offset in ((0, 61), (30, 10), (30, 0), (0, 5), (10, 29), (0, 2**64 - 1)):
            replay = self.buffer()
            replay.acknowledge(before)
            with self.assertRaises(RemoteProtocolError) as caught:
                replay.acknowledge(offset)
            self.assertEqual(caught.exception.code, ErrorCode.ACK_ERROR)

    def test_references(self) -> None:
        """It keeps the very buffers that were sent, not copies."""
        data = b"payload"
        replay = ReplayBuffer(100)
        replay.append([b"header", data], 13)
        [frame] = replay.unacknowledged()
        self.assertTrue(frame[1] is data)


class TurnQueueTests(SynchronousTestCase):
    """Whose turn it is."""

    def test_order(self) -> None:
        """First come, first served; waiting twice is no advantage."""
        for queued in (1, LITTLE + 1):
            turns = TurnQueue()
            for stream_id in (5, 1, 3, 1, 5):
                turns.add(stream_id, queued)
            self.assertEqual(len(turns), 3)
            self.assertEqual([turns.take() for _ in range(3)], [5, 1, 3])
            with self.assertRaises(IndexError):
                turns.take()

    def test_turns_go_round(self) -> None:
        """Streams that always have more to send alternate."""
        turns = TurnQueue()
        turns.add(1, LITTLE + 1)
        turns.add(3, LITTLE + 1)
        order = []
        for _ in range(6):
            order.append(turns.take())
            turns.again(order[-1])
        self.assertEqual(order, [1, 3, 1, 3, 1, 3])

    def test_little_first(self) -> None:
        """Who has little goes before who has much, and only with its first turn."""
        turns = TurnQueue()
        for stream_id, queued in ((1, LITTLE + 1), (3, LITTLE), (5, 1 << 20), (7, 0)):
            turns.add(stream_id, queued)
        self.assertEqual(turns.take(), 3)
        self.assertEqual(turns.frame_limit(), LITTLE)
        turns.again(3)
        self.assertEqual([turns.take() for _ in range(4)], [7, 1, 5, 3])

    def test_little_is_not_all(self) -> None:
        """However often somebody comes with little, the others have their turns."""
        turns = TurnQueue()
        turns.add(1, LITTLE + 1)
        turns.add(5, LITTLE + 1)
        order = []
        for _ in range(3 * LITTLE_TURNS):
            turns.add(3, 1)
            order.append(turns.take())
            if order[-1] != 3:
                turns.again(order[-1])
        self.assertEqual([stream_id for stream_id in order if stream_id != 3], [1, 5])
        self.assertEqual(order.index(1), LITTLE_TURNS)

    def test_discard(self) -> None:
        """A stream that is over loses its place, and may come again."""
        for queued in (1, LITTLE + 1):
            turns = TurnQueue()
            turns.add(1, queued)
            turns.add(3, queued)
            turns.discard(1)
            turns.discard(7)
            self.assertEqual(len(turns), 1)
            self.assertEqual(turns.take(), 3)
            turns.add(1, queued)
            self.assertEqual(turns.take(), 1)

    def test_frame_limit(self) -> None:
        """Frames are long while a stream is alone, short while others wait."""
        turns = TurnQueue()
        turns.add(1, LITTLE + 1)
        turns.take()
        self.assertEqual(turns.frame_limit(), BULK_FRAME)
        for queued in (1, LITTLE + 1):
            turns.add(1, LITTLE + 1)
            turns.take()
            turns.add(3, queued)
            self.assertEqual(turns.frame_limit(), SHARED_FRAME)
            turns.take()
