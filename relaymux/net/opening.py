"""
Streams that are wanted before there is a link to open them on.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from relaymux.errors import LocalError, RelaymuxError
from relaymux.net.streams import OpenRequest, SessionStreams

__all__ = ["MAX_WAITING", "WaitingRoom"]

#: Local connections that wait for a link, per peer.  Each holds one descriptor
#: and is closed after its open timeout; more than this is refused at once.
MAX_WAITING: Final = 1024


class WaitingRoom:
    """Requests in the order in which they came; at most L{MAX_WAITING}."""

    def __init__(self, link_name: str) -> None:
        self._link_name = link_name
        self._requests: deque[OpenRequest] = deque()

    def add(self, request: OpenRequest) -> None:
        """Let C{request} wait, or fail it."""
        if len(self._requests) >= MAX_WAITING:
            request.fail(LocalError(f"{MAX_WAITING} connections wait for link {self._link_name} already"))
        else:
            self._requests.append(request)

    def put_back(self, requests: list[OpenRequest]) -> None:
        """Let C{requests}, oldest first, wait again: in front; at most C{max_streams} beyond the bound."""
        self._requests.extendleft(reversed(requests))

    def remove(self, request: OpenRequest) -> None:
        """C{request}, which waits, is not wanted any more."""
        self._requests.remove(request)

    def open_all(self, streams: SessionStreams) -> None:
        """There is a session."""
        while self._requests:
            streams.open(self._requests.popleft())

    def fail_all(self, error: RelaymuxError) -> None:
        """There will be none."""
        while self._requests:
            self._requests.popleft().fail(error)
