"""Peers that share the memory of a daemon, and what people hear of it."""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from relaymux.core.budget import Budget, link_beginning, stream_beginning
from relaymux.errors import ErrorCode, LocalError, StreamReset
from relaymux.net.holder import ACCEPTOR_GRACE
from relaymux.net.peer import Identity, Peer
from relaymux.net.stream import StreamTransport
from tests.accounting import assert_accounted
from tests.resumecase import WINDOW, Logged, PeerTests
from tests.resuming import SMALL, Hosts, Talker, begin, stamped

LINK, STREAM = link_beginning(SMALL.replay), stream_beginning(SMALL.window)


class MemoryOfPeersTests(PeerTests):
    """Hosts that may hold what two streams begin with."""

    def hosts(self, *, opener: bool) -> Hosts:
        """@param opener: whether host a's memory is counted, too."""
        hosts = Hosts(memory=LINK + 2 * STREAM)
        if not opener:
            hosts.a.memory = None
            hosts.a.restart()
        for host in hosts.ends:
            self.serve(host)
        return hosts.up()

    def test_refused_by_the_peer(self) -> None:
        """The log of the daemon that has no memory says what to do, once; the other's program hears why."""
        hosts = self.hosts(opener=False)
        ends = [self.open(hosts) for _ in range(2)]
        with Logged() as logged:
            for _ in range(3):
                error = self.failureResultOf(self.ask(hosts), StreamReset).value
                self.assertEqual(error.code, ErrorCode.TOO_MANY_STREAMS)
                self.assertIn("no memory left for another stream", str(error))
        [line] = logged.having("refused a stream")
        self.assertEqual(
            line,
            "link the other: refused a stream to vda: the memory of this daemon is used up; "
            "set a larger memory in [relay], or smaller windows",
        )
        near, far = ends[0]
        near.say(stamped(1, 20_000), finish=False)
        hosts.run(0.0)
        self.assert_same(far.received, stamped(1, 20_000))

    def test_no_memory_here(self) -> None:
        """Whoever asks for a stream is told what to do; the peer hears nothing of it."""
        hosts = self.hosts(opener=True)
        for _ in range(2):
            self.open(hosts)
        error = self.failureResultOf(self.ask(hosts), LocalError).value
        self.assertIn("no memory left for another stream: set a larger memory in [relay]", str(error))
        self.assertEqual(len(hosts.b.session.streams), 2)

    def ask(self, hosts: Hosts) -> Deferred[StreamTransport]:
        """@return: what comes of the wish for a stream."""
        result = begin(hosts.a.peer, "vda", Talker())
        hosts.run(0.0)
        return result

    def test_room_again(self) -> None:
        """When streams have ended, others can be."""
        hosts = self.hosts(opener=True)
        for _ in range(5):
            ends = [self.open(hosts) for _ in range(2)]
            for near, far in ends:
                near.say(stamped(2, 9000))
                far.say(stamped(3, 9000))
            hosts.run(1.0)
            for near, far in ends:
                self.assert_same(near.received, stamped(3, 9000))
                self.assert_same(far.received, stamped(2, 9000))
        for host in hosts.ends:
            assert host.budget is not None
            self.assertEqual(host.budget.drawn, LINK)

    def test_parked_and_expired(self) -> None:
        """A session without a link keeps what it has drawn; when its time is over all of it comes back."""
        hosts = self.hosts(opener=True)
        near, _ = self.open(hosts, Talker(stamped(4, 50_000), finish=False))
        hosts.wire.cut()
        hosts.run(WINDOW - 1)
        for host in hosts.ends:
            assert host.budget is not None
            assert_accounted(host.budget, [SMALL.replay], [host.session])
            self.assertGreaterEqual(host.budget.drawn, LINK + STREAM)
        hosts.run(ACCEPTOR_GRACE + 2)
        self.assert_failed(near, ErrorCode.SESSION_EXPIRED)
        self.assertEqual([host.budget and host.budget.drawn for host in hosts.ends], [LINK, LINK])

    def test_one_budget_for_all(self) -> None:
        """A link is not made for which there is no memory; those that are share what there is."""
        budget = Budget(2 * LINK + STREAM)
        identity = Identity("hv-a", bytes(16))
        for name in ("b", "c"):
            Peer(Clock(), name, identity, SMALL, dialing=False, budget=budget)
        with self.assertRaisesRegex(LocalError, "no memory left for link d"):
            Peer(Clock(), "d", identity, SMALL, dialing=False, budget=budget)
        self.assertEqual(budget.drawn, 2 * LINK)
