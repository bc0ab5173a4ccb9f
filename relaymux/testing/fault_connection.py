"""A connection through the fault proxy, from the socket that was accepted to the one of the target."""

from __future__ import annotations

from typing import Any, Final
from typing import Protocol as Structure

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from relaymux.testing.fault_flow import End, Ending, Flow
from relaymux.testing.fault_lane import Lane, Side

__all__ = ["Connection", "Owner"]

#: Seconds that both sides have to close after a FIN that came from the proxy.
_FIN_SECONDS: Final = 5.0


class Owner(Structure):
    """What a connection belongs to, and tells what happens."""

    def dial(self, connection: Connection) -> Deferred[Any]:
        """Connect C{connection.far} to the target."""

    def connected(self, connection: Connection) -> None:
        """That was done."""

    def unreachable(self, connection: Connection, failure: Failure) -> None:
        """Or it failed."""

    def stop_reached(self, connection: Connection, flow: Flow) -> None:
        """As many bytes of C{flow} have left as were to before a cut."""

    def buried(self, connection: Connection, held: int) -> None:
        """The source of C{held} bytes is about to be reset."""

    def ended(self, connection: Connection) -> None:
        """Both sockets are closed; called once."""


class Connection:
    """
    A connection that was accepted, and the one to the target that belongs to it.

    @ivar number: which one it is, from 1.
    @ivar near: the socket of who connected.
    @ivar far: the target's.
    @ivar flows: by the name of their side.
    @ivar buried: one side was told that the connection is lost while the other still has it.
    """

    def __init__(
        self, number: int, owner: Owner, lanes: dict[Side, Lane], clock: Any, receive_buffer: int | None
    ) -> None:
        self.number = number
        self.buried = False
        self.near = End(self, receive_buffer)
        self.far = End(self, receive_buffer)
        self.flows: dict[Side, Flow] = {
            "up": Flow(clock, lanes["up"], self.near, self.far, self._flow_stopped),
            "down": Flow(clock, lanes["down"], self.far, self.near, self._flow_stopped),
        }
        self.near.outgoing = self.far.incoming = self.flows["up"]
        self.far.outgoing = self.near.incoming = self.flows["down"]
        self._owner = owner
        self._clock = clock
        self._held: Flow | None = None
        self._timer: Any = None
        self._dialled = False
        self._ending: Ending | None = None
        self._dial: Deferred[Any] | None = None
        self._over = False

    def check(self) -> None:
        """Do what can be done now; called whenever something has changed."""
        if self._ending is not None:
            for end in (self.near, self.far):
                end.end(self._ending)
        elif self.near.open and not self._dialled and not self._is_silent():
            self._dialled = True
            for flow in self.flows.values():
                flow.cut_at = flow.lane.pick_cut()
            self._dial = self._owner.dial(self)
            self._dial.addCallbacks(self._connected, self._unreachable)
        for flow in self.flows.values():
            flow.check()

    def _is_silent(self) -> bool:
        return all(flow.lane.silent for flow in self.flows.values())

    def _connected(self, _: object) -> None:
        self._dial = None
        self._owner.connected(self)

    def _unreachable(self, failure: Failure) -> None:
        self._dial = None
        if self._ending is None:
            self._owner.unreachable(self, failure)
        self.near.end(Ending.RST)
        self.end_closed()

    def _flow_stopped(self, flow: Flow) -> None:
        if flow.hold_bytes is not None:
            self.bury()
        else:
            self._owner.stop_reached(self, flow)

    def end_reset(self, end: End) -> None:
        """C{end} was lost without having ended both ways: let the other side know, unless it is not to."""
        if not self.buried or self._held is not end.outgoing:
            end.outgoing.end(Ending.RST)

    def end_closed(self) -> None:
        """One of the sockets, or the attempt to make one, is no more."""
        if not (self.near.open or self.far.open or self._dial or self._over):
            self._over = True
            self._stop_timer()
            for flow in self.flows.values():
                flow.discard()
            self._owner.ended(self)

    @property
    def is_live(self) -> bool:
        """Whether, as far as the proxy is concerned, the connection is one."""
        return self._ending is None and not self.buried

    def cut(self, ending: Ending) -> None:
        """End both sides, and drop what is on its way between them."""
        self._stop_timer()
        self._ending = ending
        for flow in self.flows.values():
            flow.discard()
        self.check()
        if self._dial is not None and not self.far.open:
            self._dial.cancel()
        if ending is Ending.FIN and not self._over:
            self._timer = self._clock.callLater(_FIN_SECONDS, self._fin_overdue)

    def _fin_overdue(self) -> None:
        self._timer = None
        self.cut(Ending.RST)

    def hold(self, size: int, seconds: float, side: Side) -> None:
        """
        Keep what C{side} carries from now on, and then reset the socket it comes from.

        @param size: when so many bytes are there,
        @param seconds: or so much time has passed.
        """
        self._stop_timer()
        self._held = self.flows[side]
        self._held.hold_bytes = size
        self._timer = self._clock.callLater(seconds, self._hold_overdue)
        self._held.check()
        if self._held.is_full_hold():
            self.bury()

    def _hold_overdue(self) -> None:
        self._timer = None
        self.bury()

    @property
    def is_holding(self) -> bool:
        """Whether there are bytes, or may be, for C{release}."""
        return self._held is not None and self._held.hold_bytes is not None

    def bury(self) -> None:
        """Reset the socket that the held bytes come from; the other stays."""
        if self._held is not None and not self.buried:
            self.buried = True
            self._stop_timer()
            self._owner.buried(self, self._held.queued)
            self._held.source.end(Ending.RST)

    def release(self) -> int:
        """
        Deliver the held bytes; then, if their source was reset, the end of input.

        @return: how many bytes.
        """
        if self._held is None or self._held.hold_bytes is None:
            return 0
        self._stop_timer()
        size = self._held.queued
        self._held.hold_bytes = None
        if self.buried:
            self._held.end(Ending.FIN)
        self._held.check()
        return size

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
