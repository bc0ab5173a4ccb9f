"""
A proxy between two daemons that does to a link what networks do.

It stands between who dials and the I{target}, over TCP or UNIX sockets.  What
goes to the target goes I{up}, what comes back comes I{down}.  The faults are
methods of L{FaultProxy}; the same ones in words are in
L{relaymux.testing.fault_script}, for a command line or a control socket.

What is random follows from the seed, and what happens by offset from the bytes
alone; only what happens by time depends on the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, Literal

from relaymux.errors import LocalError
from relaymux.testing.fault_connection import Connection
from relaymux.testing.fault_flow import Ending, Flow
from relaymux.testing.fault_lane import BUFFER_BYTES, Damage, Side
from relaymux.testing.fault_traffic import FaultEvent, Traffic

__all__ = ["BUFFER_BYTES", "Damage", "Ending", "FaultEvent", "FaultProxy", "Side", "Sides"]

Sides = Literal["up", "down", "both"]

_SIDES: Final[dict[Sides, tuple[Side, ...]]] = {"up": ("up",), "down": ("down",), "both": ("up", "down")}


class FaultProxy(Traffic):
    """
    Forwards every connection to the target until told otherwise.

    All durations are in seconds, all sizes and offsets in bytes.  An operation
    takes effect at once on what is open, if not said otherwise.
    """

    def __init__(self, reactor: Any, listen: str, target: str, **options: Any) -> None:
        """As L{Traffic}'s."""
        super().__init__(reactor, listen, target, **options)
        #: How C{cut_after} and C{cut_each} cut, and for how long they refuse.
        self._after_by: dict[Side, tuple[Ending, float]] = {}
        self._each_by: dict[Side, tuple[Ending, float]] = {}

    # What connections are cut by

    def cut(self, ending: Ending = Ending.RST, refuse: float = 0) -> int:
        """
        Cut every connection that is not buried, dropping what is on its way.

        @param ending: how both sides see it; a UNIX socket knows no RST and
            sees an end in any case.
        @param refuse: for so long refuse new ones.
        @return: how many were cut.
        """
        if refuse:
            self.refuse(refuse)
        live = self._live()
        for connection in live:
            self._cut(connection, ending)
        return len(live)

    def cut_after(self, offset: int, side: Side, ending: Ending = Ending.RST, refuse: float = 0) -> None:
        """
        Cut every connection once, when this many bytes more have gone to C{side}.

        The bytes may be of several connections; with none open it is the next
        one.  Replaces an earlier one of the same side.
        """
        lane = self.lanes[side]
        self._after_by[side] = (ending, refuse)
        lane.stop_offset = lane.position + offset
        self._apply(f"cut ({ending.value}) after {offset} bytes more {side}")

    def cut_each(
        self, low: int, high: int, side: Side, ending: Ending = Ending.RST, refuse: float = 0
    ) -> None:
        """
        Cut each connection made from now on after C{low} to C{high} bytes to C{side}, until C{clear}.
        """
        self.lanes[side].cut_each = (low, high)
        self._each_by[side] = (ending, refuse)
        self._tell("fault", f"cut ({ending.value}) each new connection after {low} to {high} bytes {side}")

    def refuse(self, seconds: float | None = None, *, reset: bool = False) -> None:
        """
        Take no new connections.

        @param seconds: for how long; L{None} until C{clear}, 0 ends it.
        @param reset: accept and reset them at once, instead of not listening.
        """
        self._timers.stop("refuse")
        if seconds == 0:
            self._accept_again()
            return
        self._resetting = reset
        if reset:
            self._listener.open()
        else:
            self._listener.close()
        how = "resetting" if reset else "not listening for"
        self._tell("refusing", f"{how} new connections{_for(seconds)}")
        if seconds is not None:
            self._timers.start("refuse", seconds, self._accept_again)

    def _accept_again(self) -> None:
        self._resetting = False
        self._listener.open()
        self._tell("listening", f"on {self.address} again")

    def hold(self, size: int, seconds: float = 1.0, side: Side = "up") -> int:
        """
        Make a late old link of every connection that is not buried.

        What goes to C{side} is kept back from now on.  When there are C{size}
        bytes, or C{seconds} have passed, the socket they come from is reset:
        its daemon takes the connection for lost.  The other socket stays open,
        what comes from it is dropped, and C{release} delivers the held bytes.

        @param size: at most L{BUFFER_BYTES}.
        @return: how many connections.
        """
        if not 0 <= size <= BUFFER_BYTES:
            raise LocalError(f"{size} bytes cannot be held, only 0 to {BUFFER_BYTES}")
        live = self._live()
        for connection in live:
            connection.hold(size, seconds, side)
        self._tell("fault", f"hold up to {size} bytes {side} of {len(live)} connections")
        return len(live)

    def release(self) -> int:
        """
        Deliver what C{hold} keeps, and then end its connections; ones whose
        source is not reset yet go on as if nothing had been.

        @return: how many bytes.
        """
        total = 0
        for connection in list(self._connections.values()):
            if connection.is_holding:
                size = connection.release()
                self._tell("released", f"{size} held bytes", connection.number)
                total += size
        return total

    # What connections suffer

    def blackhole(self, seconds: float | None = None, sides: Sides = "both") -> None:
        """
        Neither read nor deliver anything; with both sides silent a new
        connection is accepted, but the target is not connected to before the end.

        @param seconds: for how long; L{None} until C{clear}, 0 ends it.
        """
        for side in _SIDES[sides]:
            self.lanes[side].silent = seconds != 0
            if seconds:
                self._timers.start(f"blackhole {side}", seconds, partial(self.blackhole, 0, side))
            else:
                self._timers.stop(f"blackhole {side}")
        self._apply(f"blackhole {sides} ended" if seconds == 0 else f"blackhole {sides}{_for(seconds)}")

    def delay(self, seconds: float, jitter: float = 0, sides: Sides = "both") -> None:
        """
        Deliver everything so much later, and up to C{jitter} more, in order.
        At most L{BUFFER_BYTES} of each connection and side wait.
        """
        for side in _SIDES[sides]:
            self.lanes[side].delay, self.lanes[side].jitter = seconds, jitter
        self._apply(f"delay {sides} {seconds:g} s, jitter {jitter:g} s")

    def rate(self, bytes_per_second: int, sides: Sides = "both") -> None:
        """Carry so much of all connections together; 0 ends it."""
        for side in _SIDES[sides]:
            self.lanes[side].rate, self.lanes[side].free_at = bytes_per_second, 0.0
        self._apply(f"rate {sides} {bytes_per_second} bytes per second")

    def segments(self, low: int, high: int, sides: Sides = "both") -> None:
        """Send single pieces of C{low} to C{high} bytes, one in a turn of the reactor; 0, 0 ends it."""
        for side in _SIDES[sides]:
            self.lanes[side].segments = (low, high) if high else None
        self._apply(f"segments {sides} {low} to {high} bytes")

    def damage(self, offset: int, side: Side, damage: Damage = "flip") -> None:
        """
        Damage the byte that goes to C{side} after C{offset} more have gone.

        @raise LocalError: it is to be damaged already, or too many are.
        """
        self.lanes[side].damage(offset, damage)
        self._tell("fault", f"{damage} the byte after {offset} more {side}")

    def corrupt(self, probability: float, sides: Sides = "both") -> None:
        """Flip a bit in a byte with this probability, 0 to 1."""
        for side in _SIDES[sides]:
            self.lanes[side].corrupt(probability)
        self._tell("fault", f"flip a bit {sides} in a byte with probability {probability:g}")

    def clear(self) -> None:
        """End every fault and everything planned.  What is held or buried stays so."""
        self._timers.stop_all()
        for lane in self.lanes.values():
            lane.clear()
        self._resetting = False
        self._listener.open()
        self._apply("all cleared")

    # When

    def at(self, seconds: float, operation: Callable[[], object]) -> None:
        """
        Call C{operation} so much later, unless C{clear} comes first.

        @raise LocalError: too much is planned.
        """
        self._timers.at(seconds, operation)

    def every(self, low: float, high: float, operation: Callable[[], object]) -> None:
        """As C{at}, again and again, each time C{low} to C{high} seconds later."""
        self._timers.every(low, high, operation)

    def stop_reached(self, connection: Connection, flow: Flow) -> None:
        lane = flow.lane
        if lane.stop_offset is not None and lane.position >= lane.stop_offset:
            lane.stop_offset = None
            self.cut(*self._after_by[lane.side])
        else:
            flow.cut_at = None
            ending, refuse = self._each_by[lane.side]
            if refuse:
                self.refuse(refuse)
            if connection.is_live:
                self._cut(connection, ending)
        connection.check()


def _for(seconds: float | None) -> str:
    return " until cleared" if seconds is None else f" for {seconds:g} s"
