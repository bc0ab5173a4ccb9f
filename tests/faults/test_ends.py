"""What ends a session: time, a restart, a goodbye.  All are told, and nobody takes it for a clean end."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from functools import partial

from tests.faults.pair import (
    BEGUN,
    DOWN,
    MIB,
    OVER,
    SMALL,
    SMALL_FLOW,
    STOPPED,
    UP,
    Daemon,
    FaultTestCase,
    Pair,
    thorough,
)
from tests.faults.traffic import PATIENCE, wait_until
from tests.faults.wire import Wire

#: Bytes of each flow of traffic that is not to come to its end.
ENDLESS = 4096 * MIB

#: Seconds that a failure may take beyond the deadline, on a machine that is busy.
SLACK = 8.0


class EndTestCase(FaultTestCase):
    """Traffic that does not end by itself."""

    def begin(self, pair: Pair) -> None:
        """Begin it, and wait until four windows and two replay buffers have gone each way."""
        pair.wire.do("rate", 20_000_000)
        pair.traffic.open(4, ENDLESS, ENDLESS)
        pair.traffic.wait_received(4 * MIB)

    def begin_anew(self, pair: Pair) -> None:
        """The failed connections are done with; new ones work, and all ends well."""
        pair.wire.do("clear")
        pair.traffic.hang_up()
        pair.traffic.conversations.clear()
        pair.traffic.open(2, SMALL_FLOW, SMALL_FLOW)
        pair.traffic.assert_complete()
        pair.traffic.hang_up()

    def last_end(self, pair: Pair) -> float:
        """@return: when the last receiver was told."""
        pair.traffic.join()
        return max(flow.ended_at for flow in pair.traffic.flows)


class KilledProcessTests(EndTestCase):
    """A daemon that is killed and started again."""

    def killed(self, daemon_of: Callable[[Pair], Daemon]) -> None:
        with self.pair(*SMALL) as pair:
            daemon = daemon_of(pair)
            other = next(one for one in pair.daemons if one is not daemon)
            self.begin(pair)
            daemon.kill()
            other.wait_for(DOWN)
            # The other side cannot know yet whether the process is gone, so its sockets stay.
            local = [c.near if other is pair.a else c.far for c in pair.traffic.conversations]
            self.assertTrue(all(end.fileno() >= 0 for end in local))
            kept = [flow for flow in pair.traffic.flows if flow._target in local]
            self.assertFalse(any(flow.end for flow in kept))
            before = other.count(UP)
            daemon.start()
            daemon.wait_for("relaymux hv-. started", 2)
            contacted = time.monotonic()
            seconds = self.last_end(pair) - contacted
            self.say(f"{daemon.name} killed: streams failed {seconds:.2f} s after its restart")
            self.assertLess(seconds, 2 + SLACK)
            for flow in pair.traffic.flows:
                flow.assert_failed()
            other.wait_for("UNKNOWN_SESSION" if other is pair.a else "was restarted")
            other.wait_for(UP, before + 1)
            self.begin_anew(pair)

    def test_acceptor_killed(self) -> None:
        """The dialling side asks to resume, and is told that there is nothing to resume."""
        self.killed(lambda pair: pair.b)

    def test_dialler_killed(self) -> None:
        """The accepting side sees another instance of the same daemon."""
        self.killed(lambda pair: pair.a)


class TimeTests(EndTestCase):
    """Outages that last too long."""

    @thorough
    def test_longer_than_the_window(self) -> None:
        """All streams fail on both sides; the log has the bytes, and the ledger no gap."""
        with self.pair(*SMALL, "resume-window = 3") as pair:
            self.begin(pair)
            pair.wire.do("refuse")
            pair.wire.do("cut")
            for daemon in pair.daemons:
                daemon.wait_for(OVER)
                self.assertEqual(daemon.count(r"session over: no connection for \d s; 4 streams ended"), 1)
            self.assert_failed(pair)
            self.begin_anew(pair)

    def test_no_window(self) -> None:
        """With C{resume-window = 0} streams end with their link, at once."""
        with self.pair(*SMALL, "resume-window = 0") as pair:
            self.begin(pair)
            pair.wire.do("cut")
            cut = time.monotonic()
            self.assertLess(self.last_end(pair) - cut, 1 + SLACK)
            self.assert_failed(pair)
            self.begin_anew(pair)
            self.assertEqual(pair.a.count("resumed after"), 0)


class ShutdownTests(EndTestCase):
    """SIGTERM while bytes cannot be delivered."""

    def shut_down(self, daemon_of: Callable[[Pair], Daemon]) -> None:
        with self.pair(*SMALL) as pair:
            daemon = daemon_of(pair)
            self.begin(pair)
            pair.wire.do("refuse")
            pair.wire.do("cut")
            daemon.wait_for(DOWN)
            daemon.signal(signal.SIGTERM)
            self.assertEqual(daemon.ended(), 75)
            [(undelivered, status)] = daemon.numbers(STOPPED)
            [(streams, lost, stuck)] = daemon.numbers(OVER)
            self.assertEqual((status, streams), (75, 4))
            self.assertGreater(lost, 0)
            self.assertEqual(undelivered, lost + stuck)

    def test_dialler_in_an_outage(self) -> None:
        """Exit status 75, and how many bytes."""
        self.shut_down(lambda pair: pair.a)

    @thorough
    def test_acceptor_in_an_outage(self) -> None:
        """The same on the other side."""
        self.shut_down(lambda pair: pair.b)

    @thorough
    def test_outage_that_ends_meanwhile(self) -> None:
        """The streams come to their end while the daemon drains: nothing is lost, status 0."""
        with self.pair(*SMALL) as pair:
            pair.wire.do("rate", 8_000_000)
            pair.traffic.open(4, SMALL_FLOW, SMALL_FLOW)
            pair.traffic.wait_received(pair.traffic.size * 3 // 4)
            pair.wire.do("refuse", 1)
            pair.wire.do("cut")
            pair.a.wait_for(DOWN)
            pair.a.signal(signal.SIGTERM)
            pair.traffic.assert_complete()
            pair.traffic.hang_up()
            self.assertEqual(pair.a.ended(), 0)
            self.assertEqual(pair.a.numbers(STOPPED), [(0, 0)])


class CertificateTests(EndTestCase):
    """A peer that comes back as somebody else."""

    SAID = r"no connection to .*; trying every 30 s until somebody has changed that"

    def replaced(self, daemon_of: Callable[[Pair], Daemon]) -> None:
        with self.pair(*SMALL, "resume-window = 4") as pair:
            daemon = daemon_of(pair)
            self.begin(pair)
            daemon.kill()
            files = [(pair.pki / f"{daemon.name}.example{end}", end) for end in (".pem", ".key")]
            for file, end in files:
                file.rename(f"{file}.kept")
                shutil.copy(pair.pki / f"other.example{end}", file)
            daemon.start()
            pair.a.wait_for(self.SAID)
            accepted = pair.wire.status()["accepted"]
            time.sleep(5)
            self.assertEqual(pair.wire.status()["accepted"], accepted, "dialled again so soon")
            self.assertEqual(pair.a.count(self.SAID), 1)
            pair.traffic.join()
            for flow in pair.traffic.flows:
                flow.assert_failed()
            daemon.kill()
            for file, _ in files:
                shutil.move(f"{file}.kept", file)
            ups = pair.b.count(UP)
            daemon.start()
            pair.b.wait_for(UP, ups + 1)
            self.begin_anew(pair)

    @thorough
    def test_acceptor_with_another_name(self) -> None:
        """Said once, and then tried slowly; the streams fail when their time is over."""
        self.replaced(lambda pair: pair.b)

    @thorough
    def test_dialler_with_another_name(self) -> None:
        """The one who is refused says so once, too."""
        self.replaced(lambda pair: pair.a)


class WaitingTests(EndTestCase):
    """Programs that connect while there is no link."""

    def connect_in_an_outage(self, pair: Pair, count: int) -> None:
        """Their connections wait, and arrive in order with what was sent."""
        local = []
        for number in range(count):
            end = pair.traffic.connect()
            end.send(bytes((number,)) * 1000)
            local.append(end)
        pair.wire.do("refuse", 0)
        for number in range(count):
            far = pair.traffic.accept()
            received = b""
            while len(received) < 1000:
                received += far.recv(1000)
            self.assertEqual(received, bytes((number,)) * 1000)
            far.close()
        for end in local:
            self.assertEqual(end.recv(1), b"")
            end.close()

    def test_wait_for_the_link(self) -> None:
        """With a session that waits for its next link, and without one."""
        with self.pair(*SMALL) as pair:
            pair.wire.do("refuse")
            pair.wire.do("cut")
            pair.a.wait_for(DOWN)
            self.connect_in_an_outage(pair, 8)
            pair.a.kill()
            pair.wire.do("refuse")
            pair.a.start()
            pair.a.wait_for("relaymux hv-a started", 2)
            self.connect_in_an_outage(pair, 8)

    def test_too_late(self) -> None:
        """After the open timeout they are closed, and nobody at the other end hears of them."""
        with self.pair(*SMALL, section=["open-timeout = 2"]) as pair:
            pair.wire.do("refuse")
            pair.wire.do("cut")
            pair.a.wait_for(DOWN)
            late = [pair.traffic.connect() for _ in range(3)]
            began = time.monotonic()
            for end in late:
                self.assertEqual(end.recv(1), b"")
                end.close()
            self.assertLess(time.monotonic() - began, 2 + SLACK)
            self.assertEqual(pair.a.count(r"connection \d failed: .*not up within 2 s"), 3)
            pair.wire.do("refuse", 0)
            self.begin_anew(pair)
            wait_until(
                lambda: pair.b.count(r"connection \d+ closed") == 2, "both ends are told", PATIENCE, pair.logs
            )
            self.assertEqual(pair.b.count(BEGUN), 2, pair.b.tail())


class PathTests(EndTestCase):
    """Several addresses of one peer."""

    def has_carried(self, wire: Wire, count: int) -> bool:
        return wire.status()["up_delivered"] > count

    @thorough
    def test_other_path(self) -> None:
        """When the first path dies the second carries on, and the first again when that dies."""
        with self.pair(*SMALL, paths=2) as pair:
            first, second = sorted(pair.wires, key=lambda wire: -wire.status()["open"])
            for wire in pair.wires:
                wire.do("rate", 8_000_000)
            pair.traffic.open(4, 2 * SMALL_FLOW, 2 * SMALL_FLOW)
            for number, (dying, other) in enumerate(((first, second), (second, first)), 1):
                pair.traffic.wait_received(pair.traffic.size * number // 4)
                dying.do("refuse")
                before = other.status()["up_delivered"]
                dying.do("cut")
                pair.wait_resumed(number)
                wait_until(partial(self.has_carried, other, before + 100_000), "the other path carries")
                dying.do("refuse", 0)
            self.assert_balanced(pair)
