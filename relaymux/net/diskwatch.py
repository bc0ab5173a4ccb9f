"""
Finds out which disk a connection carries, from the NBD handshake that passes by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from relaymux.core.nbd import Export, Handshake, State
from relaymux.net.bridge import Bridge

__all__ = ["DiskWatcher"]


class DiskWatcher:
    """Watches a bridge until its handshake is over, or is none; then it takes itself away."""

    def __init__(self, bridge: Bridge, found: Callable[[Export], None], *, client_is_local: bool) -> None:
        """
        @param found: called at most once.
        @param client_is_local: whether the local program is the NBD client; else it is the server.
        """
        self._bridge = bridge
        self._found = found
        self._handshake = handshake = Handshake()
        ways = (handshake.from_client, handshake.from_server)
        self._from_local, self._from_stream = ways if client_is_local else ways[::-1]
        bridge.watcher = self

    def passed_from_local(self, buffers: Sequence[memoryview]) -> None:
        """See L{Watcher}."""
        self._from_local(buffers)
        self._decided()

    def passed_from_stream(self, buffers: Sequence[memoryview]) -> None:
        """See L{Watcher}."""
        self._from_stream(buffers)
        self._decided()

    def _decided(self) -> None:
        if self._handshake.state is State.UNDECIDED:
            return
        self._bridge.watcher = None
        if self._handshake.export is not None:
            self._found(self._handshake.export)
