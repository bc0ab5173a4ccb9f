"""
How much bulk is on its way while somebody waits for answers.
"""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from relaymux.core.events import DataReceived
from relaymux.core.flight import FASTEST, FLIGHT_BYTES, MOST_UNANSWERED, UNBOUNDED, Flight
from relaymux.core.handshake import Limits
from relaymux.core.schedule import LITTLE
from tests.wire import ACK, DATA, PING, PONG, Core, Said, frame

FRAME = 64 * 1024


def u64(number: int) -> bytes:
    return number.to_bytes(8, "big")


class FlightTests(SynchronousTestCase):
    """What PING and PONG tell."""

    def setUp(self) -> None:
        self.flight = Flight()

    def test_unknown_line(self) -> None:
        """Before the first answer nothing is known, and nothing is held back."""
        self.flight.ping(0, 1.0)
        self.assertEqual(self.flight.bulk_until, UNBOUNDED)
        self.assertFalse(self.flight.probe_due(1 << 40))

    def test_short_line(self) -> None:
        """A PING among the data says with its answer that the data has arrived."""
        self.flight.pong(self.flight.ping(0, 1.0), 1.0)
        self.assertEqual(self.flight.bulk_until, FLIGHT_BYTES)
        self.assertFalse(self.flight.probe_due(FLIGHT_BYTES // 2 - 1))
        self.assertTrue(self.flight.probe_due(FLIGHT_BYTES // 2))
        number = self.flight.ping(200_000, 2.0)
        self.assertFalse(self.flight.probe_due(200_000))
        self.assertEqual(self.flight.bulk_until, FLIGHT_BYTES)
        self.assertTrue(self.flight.pong(number, 2.5))
        self.assertEqual(self.flight.bulk_until, 200_000 + FLIGHT_BYTES)
        self.assertEqual(self.flight.round_trip, 0.5)

    def test_long_line(self) -> None:
        """What fills the line may be on its way besides; the shortest round trip says how long it is."""
        for number, seconds in enumerate((0.5, 0.125, 3.0), 1):
            self.flight.ping(0, 10.0)
            self.assertTrue(self.flight.pong(number, 10.0 + seconds))
        self.assertEqual(self.flight.bulk_until, FLIGHT_BYTES + FASTEST // 8)

    def test_answers_to_the_latest(self) -> None:
        """An answer is one to all PINGs before; to those nothing is heard any more."""
        for offset in (100, 200, 300):
            self.flight.ping(offset, 1.0)
        self.assertTrue(self.flight.pong(2, 1.0))
        self.assertEqual(self.flight.bulk_until, 200 + FLIGHT_BYTES)
        for stranger in (0, 1, 2, 4):
            self.assertFalse(self.flight.pong(stranger, 9.0))
        self.assertTrue(self.flight.pong(3, 1.0))
        self.assertEqual(self.flight.bulk_until, 300 + FLIGHT_BYTES)

    def test_acks_count(self) -> None:
        """What was acknowledged has arrived, and an older answer takes nothing back."""
        self.flight.ping(100, 1.0)
        self.flight.arrived(5000)
        self.assertTrue(self.flight.pong(1, 1.0))
        self.assertEqual(self.flight.bulk_until, 5000 + FLIGHT_BYTES)

    def test_peer_that_answers_none(self) -> None:
        """What is remembered for answers is bounded."""
        for number in range(1000):
            self.flight.ping(number, 1.0)
        self.assertFalse(self.flight.pong(1000 - MOST_UNANSWERED, 2.0))
        self.assertTrue(self.flight.pong(1001 - MOST_UNANSWERED, 2.0))


class BesideTalkTests(SynchronousTestCase):
    """A link with one stream full, while somebody talks on another."""

    def setUp(self) -> None:
        self.core = Core(limits=Limits(max_payload=1 << 20, window=1 << 24, replay=1 << 25))
        self.core.shake(window=1 << 24, replay=1 << 25, max_payload=1 << 20)
        for stream_id in (1, 3):
            self.core.opened_by_peer(stream_id)
        self.core.say()
        self.written = bytearray()

    def measured(self) -> None:
        """The round trip is known: next to nothing."""
        self.core.link.handle_timer(5.0)
        self.assertEqual(self.core.say()[-1], (PING, 0, u64(1)))
        self.core.hear(frame(PONG, 0, u64(1)))

    def fill(self, count: int) -> None:
        """Bulk writes C{count} frames' worth, each with content of its own."""
        for number in range(count):
            piece = bytes([number % 251]) * FRAME
            self.written += piece
            self.core.session.write(1, piece)

    def say(self) -> list[Said]:
        return self.core.say(beside_talk=True)

    def count(self, said: list[Said]) -> int:
        """@return: bytes of DATA."""
        return sum(len(payload) for kind, _, payload in said if kind == DATA)

    def test_bulk_waits(self) -> None:
        """No more is sent than may be on its way, with PINGs in between; little passes by."""
        self.measured()
        self.fill(64)
        said = self.say()
        self.assertTrue(FLIGHT_BYTES - 100 <= self.count(said) <= FLIGHT_BYTES + 2 * FRAME, self.count(said))
        self.assertEqual(said[-1][:2], (PING, 0))
        self.assertEqual(self.say(), [])
        self.core.session.write(3, bytes(LITTLE))
        self.assertEqual(self.say(), [(DATA, 3, bytes(LITTLE))])

    def test_goes_on_with_each_answer(self) -> None:
        """All of sixteen times what may be on its way arrives, in order, and never more is on its way."""
        self.measured()
        self.fill(16 * FLIGHT_BYTES // FRAME)
        received = bytearray()
        for _ in range(1000):
            said = self.say()
            if not said:
                break
            data = b"".join(payload for kind, _, payload in said if kind == DATA)
            self.assertLessEqual(len(data), FLIGHT_BYTES + 2 * FRAME)
            received += data
            for kind, _, payload in said:
                if kind == PING:
                    self.core.hear(frame(PONG, 0, payload))
        self.assertEqual(received, self.written)

    def test_goes_on_with_acks(self) -> None:
        """A peer that answers no PING holds nothing up by that."""
        self.measured()
        self.fill(32)
        self.say()
        self.core.hear(frame(ACK, 0, u64(self.core.session.replay.end)))
        self.assertGreaterEqual(self.count(self.say()), FLIGHT_BYTES - 100)

    def test_goes_on_when_nobody_talks(self) -> None:
        """What was held back leaves as it would have."""
        self.measured()
        self.fill(32)
        sent = self.count(self.say())
        said = self.core.say()
        self.assertEqual(sent + self.count(said), len(self.written))
        self.assertNotIn(PING, [kind for kind, _, _ in said])

    def test_much_was_on_its_way_already(self) -> None:
        """When somebody begins to talk, a PING leaves behind what was sent before, and bulk waits."""
        self.measured()
        self.fill(64)
        self.assertEqual(self.count(self.core.say()), len(self.written))
        self.fill(1)
        self.assertEqual(self.say(), [(PING, 0, u64(2))])
        self.assertEqual(self.say(), [])
        self.core.hear(frame(PONG, 0, u64(2)))
        self.assertEqual(self.count(self.say()), FRAME)

    def test_answer_carries_an_ack(self) -> None:
        """Whoever is woken by a PONG learns at the same time what was received."""
        self.core.hear(frame(DATA, 1, bytes(300_000)))
        self.assertIsInstance(self.core.events[-1], DataReceived)
        self.assertEqual(self.core.say(), [])
        self.core.hear(frame(PING, 0, u64(7)))
        offset = self.core.session.rx_next
        self.assertEqual(self.core.say(), [(ACK, 0, u64(offset)), (PONG, 0, u64(7))])
