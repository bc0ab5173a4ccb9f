"""
A session that holds every kind of frame, cut at every byte.

What the programs at both ends see must be what they see without a cut: the same
bytes, each once and in order, and the same ends.

RELAYMUX_THOROUGH=1 cuts at every byte, which takes minutes; otherwise all edges
of frames and a sample of the rest are tried.  A failure names the cuts;
RELAYMUX_CUTS="..." with that text repeats it alone.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

from twisted.internet.task import Clock
from twisted.python.failure import Failure
from twisted.trial.unittest import SynchronousTestCase

from relaymux.errors import StreamReset
from relaymux.net.stream import StreamTransport
from tests.resuming import SMALL, Host, Hosts, Server, Talker, Wire, all_lost, begin, difference, stamped
from tests.wire import (
    ACK,
    CLOSED,
    CREDIT,
    DATA,
    FIN,
    GOAWAY,
    OPEN,
    OPENED,
    PING,
    REFUSED,
    RESET,
    STOP,
    parse,
)

THOROUGH = os.environ.get("RELAYMUX_THOROUGH", "0") not in ("", "0")

#: More than four windows for each bulk stream, and with two of them in each
#: direction more than two replay buffers.
BULK = 4 * SMALL.window + 300

#: Who notices the cut: both ends; the dialling one; the accepting one (the dialling
#: one then finds out by the silence).
TOLD: tuple[tuple[str, ...], ...] = ((), ("client",), ("server",))

#: Seconds that a run may take.  A cut that only one side notices costs 15 of them.
PATIENCE = 400.0


@dataclass(frozen=True)
class Cut:
    """One connection's end: when C{count} bytes have reached C{end}, noticed by C{told}."""

    end: str
    count: int
    told: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.end}:{self.count}:{'+'.join(self.told) or 'both'}"

    def apply(self, wire: Wire) -> None:
        """Arrange for it on C{wire}."""
        wire.told = self.told
        wire.cut_after(self.count, getattr(wire, self.end))


def write_cuts(cuts: Iterable[Cut]) -> str:
    """Cuts as words; one that is repeated has a number of times in front of it."""
    return " ".join(f"{len(list(same))}*{cut}" for cut, same in groupby(cuts))


def parse_cuts(text: str) -> list[Cut]:
    """The inverse of L{write_cuts}."""
    cuts = []
    for word in text.split():
        times, cut = word.split("*")
        end, count, told = cut.split(":")
        cuts += [Cut(end, int(count), () if told == "both" else tuple(told.split("+")))] * int(times)
    return cuts


class Slow(Talker):
    """Takes one piece at a time, and rests after it."""

    def __init__(self, clock: Clock, say: bytes) -> None:
        super().__init__(say, portion=3000)
        self._clock = clock

    def dataReceived(self, data: bytes) -> None:
        super().dataReceived(data)
        self.transport.pauseProducing()
        self._clock.callLater(0.01, self._go_on)

    def _go_on(self) -> None:
        if self.reason is None:
            self.transport.resumeProducing()


class Deaf(Talker):
    """Takes nothing, and hangs up after a while."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(finish=False)
        self._clock = clock

    def connectionMade(self) -> None:
        super().connectionMade()
        self.transport.pauseProducing()
        self._clock.callLater(0.05, self._hang_up)

    def _hang_up(self) -> None:
        if self.reason is None:
            self.transport.abortConnection()


def soon(clock: Clock, call: Callable[[Talker], object]) -> Callable[[Talker], object]:
    """What is done in the midst of receiving would make bytes count as not taken."""
    return lambda talker: clock.callLater(0.0, call, talker)


def abort(talker: Talker) -> None:
    """End both directions as an error."""
    talker.transport.abortConnection()


def listen_no_more(talker: Talker) -> None:
    """Take no more, but answer."""
    talker.transport.loseReadConnection()
    talker.say(stamped(9, 300))


class Script:
    """
    Streams of every fate, opened by each host to the other, and then a farewell.

    @ivar refusals: what became of the streams that nobody serves.
    """

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        self.talkers: dict[str, Talker] = {}
        self.servers: dict[str, Server] = {}
        self.refusals: list[str] = []
        self.errors: list[str] = []
        self.drained: dict[str, int] = {}
        for number, host in enumerate((hosts.b, hosts.a)):
            self._serve(host, number)
        for number, host in enumerate(hosts.ends):
            self._open(host, 10 * number)

    def _serve(self, host: Host, number: int) -> None:
        clock, label = self.hosts.clock, 100 + 10 * number
        services = {
            "bulk": Server(lambda: Talker(stamped(label, BULK))),
            "slow": Server(lambda: Slow(clock, stamped(label + 1, BULK))),
            "reset": Server(lambda: Talker(finish=False, after=300, then=soon(clock, abort))),
            "stop": Server(lambda: Talker(finish=False, after=300, then=soon(clock, listen_no_more))),
            "deaf": Server(lambda: Deaf(clock)),
            "late": Server(lambda: Talker(stamped(label + 2, 50))),
        }
        for name, server in services.items():
            host.peer.register(name, server)
            self.servers[f"{host.name} {name}"] = server

    def _open(self, host: Host, label: int) -> None:
        clock = self.hosts.clock
        fates = {
            "bulk": Talker(stamped(label, BULK)),
            "slow": Slow(clock, stamped(label + 1, BULK)),
            "nobody": Talker(),
            "reset": Talker(stamped(label + 2, 300), finish=False),
            "stop": Talker(stamped(label + 3, 300), finish=False),
            "deaf": Talker(stamped(label + 4, 500), finish=False),
            "late": Talker(finish=False),
        }
        for name, talker in fates.items():
            result = begin(host.peer, name, talker)
            if name == "nobody":
                result.addErrback(self._refused)
                continue
            self.talkers[f"{host.name} {name}"] = talker
            if name == "late":
                result.addCallback(self._pings_first, talker, label + 5)
            result.addErrback(lambda reason, where: self.errors.append(f"{where}: {reason.value}"), name)

    def _refused(self, reason: Failure) -> None:
        reason.trap(StreamReset)
        self.refusals.append(reason.getErrorMessage())

    def _pings_first(self, stream: StreamTransport, talker: Talker, label: int) -> StreamTransport:
        def say() -> None:
            if talker.reason is None:
                talker.say(stamped(label, 100))

        self.hosts.clock.callLater(6.0, say)
        return stream

    @property
    def _served(self) -> list[Talker]:
        return [talker for server in self.servers.values() for talker in server.talkers]

    def run(self) -> None:
        """Do it all."""
        hosts = self.hosts
        hosts.dial()
        hosts.run(PATIENCE, self._over)
        for host in hosts.ends:
            host.peer.drain(PATIENCE).addCallback(self._drained, host.name)
        hosts.run(PATIENCE, lambda: len(self.drained) == 2)
        hosts.stop_dialing()
        hosts.run(PATIENCE)

    def _drained(self, count: int, name: str) -> None:
        self.drained[name] = count

    def _over(self) -> bool:
        return (
            len(self.refusals) == 2
            and all(server.talkers for server in self.servers.values())
            and all_lost(self.talkers.values())
            and all_lost(self._served)
            # A reset is told at once, its bytes are counted when the other side has answered:
            # with a cut in between the farewell would otherwise be the one to find them missing.
            and not any(
                host.peer._held and host.peer._held.streams.session.streams for host in self.hosts.ends
            )
        )

    def outcome(self) -> dict[str, Any]:
        """@return: everything that may not depend on cuts."""
        found: dict[str, Any] = {name: talker.outcome for name, talker in self.talkers.items()}
        for name, server in self.servers.items():
            found[f"served by {name}"] = [talker.outcome for talker in server.talkers]
        found["refusals"] = self.refusals
        found["errors"] = self.errors
        found["drained"] = self.drained
        for host in self.hosts.ends:
            found[f"{host.name} undelivered"] = host.peer.undelivered
        return found

    def check_ledger(self) -> None:
        """All bytes are accounted for: of each host, written = received at the other + undelivered."""
        for host, other in ((self.hosts.a, self.hosts.b), (self.hosts.b, self.hosts.a)):
            written = sum(talker.written for talker in self._talkers_of(host))
            arrived = sum(len(talker.received) for talker in self._talkers_of(other))
            assert written == arrived + host.peer.undelivered, (
                f"{host.name}: {written} bytes in, {arrived} out, {host.peer.undelivered} undelivered"
            )

    def _talkers_of(self, host: Host) -> Iterable[Talker]:
        for name, talker in self.talkers.items():
            if name.startswith(host.name):
                yield talker
        for name, server in self.servers.items():
            if name.startswith(host.name):
                yield from server.talkers

    def check_leftovers(self) -> None:
        """Nothing is left: no session, no link, no timer."""
        for host in self.hosts.ends:
            assert host.peer._held is None and host.peer._link is None, f"{host.name} keeps a session"
        calls = self.hosts.clock.getDelayedCalls()
        assert not calls, f"timers are left: {calls}"


def describe(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Say in what C{found} differs, with the place of the first wrong byte."""
    lines = []
    for name in expected:
        if found[name] != expected[name]:
            lines.append(f"{name}: {_short(found[name])} instead of {_short(expected[name])}")
            ends = zip(_listed(found[name]), _listed(expected[name]), strict=False)
            lines += [f"  {difference(one[0], two[0])}" for one, two in ends if one[0] != two[0]]
    return "\n".join(lines)


def _listed(outcome: object) -> list[tuple[bytes, object, object]]:
    outcomes = outcome if isinstance(outcome, list) else [outcome]
    return [one for one in outcomes if isinstance(one, tuple)]


def _short(outcome: object) -> str:
    if isinstance(outcome, list):
        return str([_short(one) for one in outcome])
    if isinstance(outcome, tuple):
        return f"({len(outcome[0])} bytes, {', '.join(map(str, outcome[1:]))})"
    return str(outcome)


class CutTests(SynchronousTestCase):
    """The script, cut in all ways."""

    def play(self, cuts: Sequence[Cut], *, buffers: bool = True, seed: int | None = None) -> Script:
        hosts = Hosts(buffers=buffers, seed=seed)
        hosts.plan = [cut.apply for cut in cuts]
        script = Script(hosts)
        script.run()
        return script

    def uncut(self) -> tuple[Script, dict[str, bytes]]:
        """@return: a run without cuts, and what was said to each end in it."""
        heard: dict[str, bytes] = {}

        def listen(wire: Wire) -> None:
            for end in (wire.client, wire.server):
                name, original = end.getHost().name, end._deliver
                heard[name] = b""

                def deliver(data: bytes, name: str = name, original: Any = original) -> None:
                    heard[name] += data
                    original(data)

                end._deliver = deliver  # type: ignore[method-assign]

        hosts = Hosts()
        hosts.plan = [listen]
        script = Script(hosts)
        script.run()
        self.assertEqual(len(hosts.wires), 1)
        return script, heard

    def survives(self, expected: dict[str, Any], cuts: Sequence[Cut], **how: Any) -> Script:
        """The outcome is C{expected} in spite of C{cuts}."""
        where = f'repeat with RELAYMUX_CUTS="{write_cuts(cuts)}" ({how})'
        try:
            script = self.play(cuts, **how)
            self.assertEqual("", describe(script.outcome(), expected))
            script.check_ledger()
            script.check_leftovers()
        except Exception as error:
            raise AssertionError(f"{error}\n{where}") from error
        return script

    def all_survive(self, all_cuts: Iterable[Sequence[Cut]]) -> None:
        expected = self.uncut()[0].outcome()
        given = os.environ.get("RELAYMUX_CUTS")
        for number, cuts in enumerate([parse_cuts(given)] if given else all_cuts):
            self.survives(expected, cuts, buffers=number % 2 == 0)

    def places(self) -> dict[str, list[int]]:
        """@return: for each end, the numbers of bytes after which to cut."""
        heard, places = self.uncut()[1], {}
        for end, data in heard.items():
            if THOROUGH:
                places[end] = list(range(len(data) + 1))
                continue
            edges = {0, *accumulate(12 + len(payload) for _, _, payload in parse(data))}
            near = {edge + delta for edge in edges for delta in (-1, 0, 1, 12)}
            near |= set(random.sample(range(len(data)), 150))
            places[end] = sorted(near & set(range(len(data) + 1)))
        return places

    # The tests

    def test_script(self) -> None:
        """Without a cut: all kinds of frames go both ways, and more bytes than fit into any buffer."""
        script, heard = self.uncut()
        for data in heard.values():
            frames = parse(data)
            kinds = {kind for kind, _, _ in frames}
            self.assertLessEqual(
                {OPEN, OPENED, REFUSED, DATA, CREDIT, FIN, RESET, STOP, CLOSED, GOAWAY, ACK, PING}, kinds
            )
            sent = sum(len(payload) for kind, _, payload in frames if kind == DATA)
            self.assertGreater(sent, 2 * SMALL.replay)
        self.assertGreater(BULK, 4 * SMALL.window)
        outcome = script.outcome()
        for one, other, label in (("hv-a", "hv-b", 0), ("hv-b", "hv-a", 10)):
            ends = ["lost", "made", "read lost", "write lost"]
            for service, place in (("bulk", 0), ("slow", 1)):
                [served] = outcome[f"served by {other} {service}"]
                self.assertEqual(served, (stamped(label + place, BULK), ends, "ConnectionDone"))
                answer = stamped(100 + label + place, BULK)
                self.assertEqual(outcome[f"{one} {service}"], (answer, ends, "ConnectionDone"))
            self.assertEqual(outcome[f"{one} reset"], (b"", ["lost", "made"], "StreamReset 22"))
            self.assertEqual(
                outcome[f"{one} stop"],
                (stamped(9, 300), ["lost", "made", "read lost", "write lost"], "ConnectionDone"),
            )
            self.assertEqual(outcome[f"{one} deaf"], (b"", ["lost", "made"], "StreamReset 22"))
            self.assertEqual(outcome[f"{one} undelivered"], 500)
        self.assertEqual(outcome["errors"], [])
        self.assertEqual(outcome["drained"], {"hv-a": 0, "hv-b": 0})
        script.check_ledger()
        script.check_leftovers()

    def test_every_place(self) -> None:
        """One cut, anywhere, in either direction."""
        self.all_survive([Cut(end, count)] for end, counts in self.places().items() for count in counts)

    def test_half_open(self) -> None:
        """One cut that only one side notices: the other has an old link when the new one comes."""
        self.all_survive(
            [Cut(end, count, told)]
            for end, counts in self.places().items()
            for told in TOLD[1:]
            for count in random.sample(counts, len(counts) // 4 if THOROUGH else 60)
        )

    def test_pairs(self) -> None:
        """Two cuts, the second somewhere in the next link."""
        sizes = {end: len(data) for end, data in self.uncut()[1].items()}

        def cut(most: int) -> Cut:
            end = random.choice(list(sizes))
            return Cut(end, random.randrange(min(most, sizes[end])), random.choice(TOLD))

        self.all_survive([cut(1 << 30), cut(1 << 30)] for _ in range(20_000 if THOROUGH else 250))

    def test_cut_while_resuming(self) -> None:
        """The second link breaks inside RESUME or RESUMED, or right behind."""
        handshake = 12 + 102
        first = {end: places[len(places) // 2] for end, places in self.places().items()}
        self.all_survive(
            [Cut(end, count), Cut(again, inside, told)]
            for end, count in first.items()
            for again in ("client", "server")
            for told in TOLD
            for inside in range(0, handshake + 40, 1 if THOROUGH else 13)
        )

    def test_cut_ten_times_while_resuming(self) -> None:
        """Ten links in a row break before they are of any use."""
        expected = self.uncut()[0].outcome()
        for end, inside in (
            ("server", 113),
            ("server", 114),
            ("client", 0),
            ("client", 113),
            ("client", 114),
        ):
            script = self.survives(expected, [Cut("client", 3000)] + [Cut(end, inside)] * 10)
            self.assertGreaterEqual(len(script.hosts.wires), 12)

    def test_cut_again_and_again(self) -> None:
        """A link that never lasts for more than a few hundred bytes gets everything across all the same."""
        expected = self.uncut()[0].outcome()
        for size in (1300, 1500, 2100):
            for end in ("client", "server"):
                script = self.survives(expected, [Cut(end, size)] * 200)
                self.assertGreater(len(script.hosts.wires), 10)

    def test_pieces(self) -> None:
        """The same with everything arriving in pieces of all sizes."""
        expected = self.uncut()[0].outcome()
        for _ in range(500 if THOROUGH else 25):
            seed = random.randrange(2**32)
            cuts = [
                Cut(random.choice(["client", "server"]), random.randrange(9000), random.choice(TOLD))
                for _ in range(3)
            ]
            self.survives(expected, cuts, seed=seed)
