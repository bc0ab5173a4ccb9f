"""What the tests of peers that lose their links have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from twisted.logger import ILogObserver, globalLogPublisher
from twisted.trial.unittest import SynchronousTestCase
from zope.interface import implementer

from relaymux.core.handshake import Limits
from relaymux.core.resume import Role, encode_resume
from relaymux.errors import SessionLost
from relaymux.testing.memory import MemoryConnection
from relaymux.testing.recording import Recorder
from tests.resuming import SMALL, Host, Hosts, Server, Talker, begin, difference, stamped
from tests.wire import RESUME, frame, parse

WINDOW = SMALL.resume_window
SILENCE = SMALL.silence


def changed(limits: Limits, **fields: Any) -> Limits:
    """C{limits} but for some."""
    return Limits(**{**vars(limits), **fields})


@implementer(ILogObserver)
class Logged:
    """The log lines while it is in use, as people see them."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __enter__(self) -> Logged:
        globalLogPublisher.addObserver(self)
        return self

    def __exit__(self, *_: object) -> None:
        globalLogPublisher.removeObserver(self)

    def __call__(self, event: Any) -> None:
        if event.get("log_format"):
            self.lines.append(event["log_format"].format(**event))

    def having(self, text: str) -> list[str]:
        """@return: lines with C{text} in them."""
        return [line for line in self.lines if text in line]


class Raw(Recorder):
    """Somebody who dials and says what a test wants."""

    def frames(self) -> list[tuple[int, int, bytes]]:
        """@return: what was answered."""
        return parse(bytes(self.received))


class PeerTests(SynchronousTestCase):
    """What the tests here have in common."""

    def pair(self, **how: Any) -> Hosts:
        """Two hosts that are connected, with the service C{vda} at either."""
        hosts = Hosts(**how)
        for host in hosts.ends:
            self.serve(host)
        return hosts.up()

    def serve(self, host: Host, make: Callable[[], Talker] | None = None, service: str = "vda") -> Server:
        server = Server(make or (lambda: Talker(finish=False)))
        host.peer.register(service, server)
        setattr(self, f"served_by_{host.name[-1]}", server)
        return server

    served_by_a: Server
    served_by_b: Server

    def open(self, hosts: Hosts, talker: Talker | None = None, *, end: str = "a") -> tuple[Talker, Talker]:
        """Open a stream from C{end}.  @return: both ends of it."""
        near = talker or Talker(finish=False)
        host, server = (hosts.a, self.served_by_b) if end == "a" else (hosts.b, self.served_by_a)
        begin(host.peer, "vda", near)
        hosts.run(0.0)
        return near, server.talkers[-1]

    def raw(self, hosts: Hosts, data: bytes, *, identity: str = "dns:hv-a.example") -> Raw:
        """Dial host b with nothing but C{data} to say."""
        client = Raw()
        wire = MemoryConnection(
            client, hosts.b.peer.build_link(), clock=hosts.clock, identities=(identity, "dns:hv-b.example")
        )
        wire.client.write(data)
        hosts.run(0.0)
        self.last = wire
        return client

    def resume_frame(self, host: Host, generation: int, rx_next: int | None = None) -> bytes:
        """What host a would say, if its session were that of C{host}."""
        ticket, offset = host.held._ticket, host.session.replay.acknowledged if rx_next is None else rx_next
        return frame(RESUME, 0, encode_resume(ticket, Role.DIALER, generation, offset, b""))

    def assert_failed(self, talker: Talker, code: int) -> None:
        """The end was an error, and nothing looked like a clean one."""
        assert talker.reason is not None, talker.events
        error = talker.reason.value
        assert isinstance(error, SessionLost), error
        self.assertEqual(error.code, code)
        self.assertEqual(talker.events, ["made", "lost"])

    def assert_untouched(self, *talkers: Talker) -> None:
        """Nothing has happened but that the stream was made."""
        for talker in talkers:
            self.assertEqual(talker.events, ["made"])

    def assert_same(self, found: bytes | bytearray, expected: bytes) -> None:
        self.assertEqual(difference(bytes(found), expected), "")

    def assert_works(self, hosts: Hosts) -> None:
        """A new stream carries bytes both ways, more than a window of them."""
        data = stamped(7, 5000)
        near, far = self.open(hosts, Talker(data, finish=False))
        far.say(data, finish=False)
        hosts.run(0.0)
        self.assert_same(near.received, data)
        self.assert_same(far.received, data)

    def assert_no_timers(self, hosts: Hosts) -> None:
        self.assertEqual(hosts.clock.getDelayedCalls(), [])
