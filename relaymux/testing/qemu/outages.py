"""What the daemons' logs and the kernel tell of the link between two daemons."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from relaymux.testing.qemu.observe import tcp_connections, unix_connections

__all__ = ["LinkWatch", "Outage", "links_up", "outages"]

_UP = re.compile(r"link \S+: up\b")

_CHANGE = re.compile(
    r"link \S+: (?:"
    r"down: .*; (?P<waiting>\d+) streams wait for .*, (?P<held>\d+) bytes from here not acknowledged"
    r"|resumed after (?P<seconds>[\d.]+) s, .*, (?P<again>\d+) bytes sent again, (?P<lost>\d+) lost)"
)


@dataclass
class Outage:
    """
    One time without a link, as one daemon tells it.

    @ivar streams: how many waited.
    @ivar held: bytes that this daemon had sent and that were not acknowledged.
    @ivar seconds: how long it lasted; None as long as it does.
    @ivar again: bytes that this daemon sent again.
    @ivar lost: bytes it calls lost.
    """

    streams: int
    held: int
    seconds: float | None = None
    again: int = 0
    lost: int = 0


def links_up(log: str) -> int:
    """@return: how often a session began."""
    return len(_UP.findall(log))


def outages(log: str) -> list[Outage]:
    """@return: all that C{log} tells of, oldest first."""
    found: list[Outage] = []
    for match in _CHANGE.finditer(log):
        if match["held"] is not None:
            found.append(Outage(int(match["waiting"]), int(match["held"])))
            continue
        if not found or found[-1].seconds is not None:
            # The peer was back before this daemon had noticed that it was away.
            found.append(Outage(0, 0))
        last = found[-1]
        last.seconds, last.again, last.lost = float(match["seconds"]), int(match["again"]), int(match["lost"])
    return found


@dataclass
class LinkWatch:
    """
    Asks the kernel for the connections of two daemons.

    @ivar looks: how often it was asked.
    @ivar dialled: the dialling daemon's connections, in the order in which they were seen.
    @ivar accepted: the other's.
    @ivar most: the most connections that either had at once.
    """

    dialling: int
    listening: int
    looks: int = 0
    most: int = 0
    dialled: dict[str, None] = field(default_factory=dict)
    accepted: dict[str, None] = field(default_factory=dict)

    def look(self) -> None:
        """
        Ask once.

        @raise FileNotFoundError: one of the processes has ended.
        """
        near = [f"{local} to {remote}" for local, remote in tcp_connections(self.dialling)]
        far = [f"{remote} to {local}" for local, remote in tcp_connections(self.listening)]
        # Its services' sockets are QEMU's, so what the listening side accepts is the link.
        # The dialling side's accepted ones are QEMU's, and those it has made have no name.
        far += [f"UNIX socket with inode {inode}" for inode in unix_connections(self.listening)]
        self.dialled |= dict.fromkeys(near)
        self.accepted |= dict.fromkeys(far)
        self.most = max(self.most, len(near), len(far))
        self.looks += 1
