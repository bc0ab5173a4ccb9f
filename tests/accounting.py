"""What a budget says, held against what its sessions have promised and hold."""

from __future__ import annotations

from collections.abc import Iterable

from relaymux.core.budget import Budget, link_beginning
from relaymux.core.replay import HEAD_ROOM
from relaymux.core.session import Session
from relaymux.core.stream import ReceiveState

__all__ = ["assert_accounted"]


def assert_accounted(budget: Budget, replays: Iterable[int], sessions: Iterable[Session]) -> None:
    """
    Everything is drawn that C{sessions} may have to hold, to the byte, and never more than there is.

    @param replays: the replay buffers that the links of this budget begin with.
    """
    drawn = sum(map(link_beginning, replays))
    for session in sessions:
        assert session.growth is not None
        replay, account = session.replay, session.growth.account
        parts = [stream.drawn + stream.receive.window.drawn for stream in session.streams.values()]
        assert account.drawn == sum(parts) + replay.capacity - replay.least
        assert replay.held_bytes <= replay.capacity + HEAD_ROOM
        for stream in session.streams.values():
            window = stream.receive.window
            if stream.receive.state is ReceiveState.OPEN:
                assert window.drawn >= window.granted - window.consumed >= window.received - window.consumed
                assert window.least <= window.size <= window.drawn
            elif stream.receive.state is ReceiveState.FINISHED:
                assert window.drawn >= window.received - window.consumed
            else:
                assert window.drawn == 0
        drawn += account.drawn
    assert drawn == budget.drawn <= budget.total, f"{drawn:,} of {budget.drawn:,} of {budget.total:,}"
