"""The fault proxy without faults: accepts, dials, forwards, counts, and tells what happens."""

from __future__ import annotations

import random
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory, Protocol
from twisted.python.failure import Failure

from relaymux.net.addresses import describe
from relaymux.testing.fault_connection import Connection
from relaymux.testing.fault_flow import Ending, Flow
from relaymux.testing.fault_lane import Lane, Side
from relaymux.testing.fault_listener import Listener, dial, parse_address
from relaymux.testing.fault_timers import Timers

__all__ = ["FaultEvent", "Traffic"]

#: Connections open at a time, old ones that wait to be released included; the
#: next is reset.  Each may hold C{BUFFER_BYTES} in both directions.
MAX_CONNECTIONS: Final = 256

#: Events kept; the oldest go first.
MAX_EVENTS: Final = 10_000


@dataclass(frozen=True)
class FaultEvent:
    """
    Something that the proxy did or saw.

    @ivar seconds: since the proxy was made.
    @ivar kind: of the proxy: C{listening}, C{refusing}, C{fault} (something
        was set), C{trouble}; of a connection: C{accepted}, C{connected},
        C{unreachable}, C{cut}, C{buried}, C{released}, C{ended}.
    @ivar connection: the number of the connection, 0 for the proxy as a whole.
    @ivar text: the rest, for people.
    """

    seconds: float
    kind: str
    connection: int
    text: str

    def __str__(self) -> str:
        which = f" #{self.connection}" if self.connection else ""
        return f"{self.seconds:9.3f}{which} {self.kind}: {self.text}"


class Traffic:
    """
    Forwards every connection to the target.

    @ivar seed: what everything random follows from.
    @ivar lanes: the state and the counters of both directions.
    @ivar events: the last L{MAX_EVENTS}.
    @ivar accepted: connections so far.
    @ivar refused: of them, how many were reset at once.
    @ivar cuts: of them, how many were cut later.
    """

    def __init__(
        self,
        reactor: Any,
        listen: str,
        target: str,
        *,
        seed: int | None = None,
        receive_buffer: int | None = None,
        on_event: Callable[[FaultEvent], object] = lambda event: None,
    ) -> None:
        """
        @param listen: C{host:port} (port 0 for any free one) or the path of a
            UNIX socket to make.
        @param target: where to connect to, C{host:port} or a path.
        @param seed: by default another one each time.
        @param receive_buffer: C{SO_RCVBUF} of the proxy's sockets in bytes,
            which with a rate bounds what the kernel takes beyond it.
        @param on_event: called with each event, from within what caused it;
            may call the proxy's methods.
        @raise ConfigurationError: an address is none.
        """
        self.seed = secrets.randbits(32) if seed is None else seed
        self.lanes: dict[Side, Lane] = {"up": Lane("up", self.seed), "down": Lane("down", self.seed)}
        self.events: deque[FaultEvent] = deque(maxlen=MAX_EVENTS)
        self.accepted = self.refused = self.cuts = 0
        #: Whether new connections are to be reset.
        self._resetting = False
        self._reactor = reactor
        self._started = reactor.seconds()
        self._receive_buffer = receive_buffer
        self._on_event = on_event
        self._connections: dict[int, Connection] = {}
        self._timers = Timers(reactor, random.Random(f"{self.seed} every"), partial(self._tell, "trouble"))
        self._target_name = target
        self._target = parse_address(target, listening=False)
        factory = Factory()
        factory.noisy = False
        factory.buildProtocol = self._accept  # type: ignore[method-assign,assignment]
        self._listener = Listener(reactor, listen, factory, partial(self._tell, "trouble"))
        self._stopping: Deferred[None] | None = None

    def start(self) -> None:
        """
        Listen.

        @raise TransportError: that is impossible.
        """
        self._listener.start()
        self._tell("listening", f"on {self.address} for {self._target_name}, seed {self.seed}")

    @property
    def address(self) -> str:
        """Where to connect to, as it was given, with the real port once started."""
        return self._listener.name

    def stop(self) -> Deferred[None]:
        """Reset every connection and stop.  @return: fires when nothing is open any more."""
        done: Deferred[None] = Deferred()
        self._stopping = done
        self._timers.stop_all()
        closed = self._listener.stop()
        for connection in list(self._connections.values()):
            connection.cut(Ending.RST)
        self._check_stopped()
        return done.addCallback(lambda _: closed)

    def _check_stopped(self) -> None:
        if self._stopping is not None and not self._connections:
            stopping, self._stopping = self._stopping, None
            stopping.callback(None)

    def status(self) -> dict[str, int]:
        """
        What there is and was.

        For each side C{received} is the sum of C{delivered}, C{dropped} and
        C{queued} (see L{Lane}), but for what is on its way to the kernel.
        """
        connections = self._connections.values()
        counts = {
            "accepted": self.accepted,
            "open": len(connections),
            "buried": sum(connection.buried for connection in connections),
            "cuts": self.cuts,
            "refused": self.refused,
        }
        for side, lane in self.lanes.items():
            counts[f"{side}_received"] = lane.received
            counts[f"{side}_delivered"] = lane.delivered
            counts[f"{side}_dropped"] = lane.dropped
            counts[f"{side}_queued"] = sum(connection.flows[side].queued for connection in connections)
            counts[f"{side}_damaged"] = lane.damaged
        return counts

    def _tell(self, kind: str, text: str, connection: int = 0) -> None:
        event = FaultEvent(self._reactor.seconds() - self._started, kind, connection, text)
        self.events.append(event)
        self._on_event(event)

    def _apply(self, text: str) -> None:
        """The lanes were changed as C{text} says."""
        self._tell("fault", text)
        for connection in list(self._connections.values()):
            connection.check()

    def _accept(self, address: IAddress) -> Protocol:
        self.accepted += 1
        number = self.accepted
        connection = Connection(number, self, self.lanes, self._reactor, self._receive_buffer)
        full = len(self._connections) >= MAX_CONNECTIONS
        self._connections[number] = connection
        self._tell("accepted", f"from {describe(address)}", number)
        if full or self._resetting or self._stopping:
            self.refused += 1
            why = f"{MAX_CONNECTIONS} connections are open" if full else "new connections are refused"
            self._tell("cut", f"RST at once, as {why}", number)
            connection.cut(Ending.RST)
        return connection.near

    def _live(self) -> list[Connection]:
        """@return: those that are neither cut nor buried."""
        return [connection for connection in self._connections.values() if connection.is_live]

    def _cut(self, connection: Connection, ending: Ending) -> None:
        self.cuts += 1
        queued = sum(flow.queued for flow in connection.flows.values())
        self._tell(
            "cut", f"{ending.name} after {_carried(connection)}; {queued} bytes dropped", connection.number
        )
        connection.cut(ending)

    # What a connection tells its owner

    def dial(self, connection: Connection) -> Deferred[Any]:
        """Connect C{connection.far} to the target."""
        return dial(self._reactor, self._target, connection.far)

    def connected(self, connection: Connection) -> None:
        """The target took the connection."""
        self._tell("connected", f"to {self._target_name}", connection.number)

    def unreachable(self, connection: Connection, failure: Failure) -> None:
        """The target did not; who connected is about to be reset."""
        self._tell("unreachable", f"{self._target_name}: {failure.getErrorMessage()}", connection.number)

    def stop_reached(self, connection: Connection, flow: Flow) -> None:
        """As many bytes of C{flow} have left as were to before a cut; the rest of the proxy knows which."""
        raise NotImplementedError

    def buried(self, connection: Connection, held: int) -> None:
        """C{connection} becomes a late old link."""
        self.cuts += 1
        self._tell("buried", f"after {_carried(connection)}; {held} bytes held", connection.number)

    def ended(self, connection: Connection) -> None:
        """Both sockets are closed."""
        del self._connections[connection.number]
        self._tell("ended", f"after {_carried(connection)}", connection.number)
        self._check_stopped()


def _carried(connection: Connection) -> str:
    return ", ".join(f"{flow.carried} bytes {side}" for side, flow in connection.flows.items())
