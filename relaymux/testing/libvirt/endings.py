"""What a relay's log tells of the end of each connection of a machine."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from relaymux.testing.qemu.rehearsal import Check

__all__ = ["End", "connection_ends", "one_line_each"]

_CONNECTION = r"vm (?P<vm>\S+) (?P<part>control|ram|nbd): connection (?P<number>\d+)"

# Which stream it has is said once: when it is open, or at its end if it was over by then.
_BEGUN = re.compile(rf"{_CONNECTION} .*, stream \d+ of link ")

_AMOUNT = r"(?:[\d.]+ [KMGT]iB \()?\d+ bytes\)?"

_ENDED = re.compile(
    rf"{_CONNECTION}(?: \(disk \S+\))? (?P<whose>closed by .*?|ended as an error: .*?), {_AMOUNT} sent, "
    rf"{_AMOUNT} received, .*?; (?P<left>relaymux has delivered all it had|[^;]*\d+ bytes [^;]*); /"
)


@dataclass(frozen=True)
class End:
    """
    @ivar part: C{"control"}, C{"ram"} or C{"nbd"}.
    @ivar number: counts the connections of that socket.
    @ivar whose: whose decision it was.
    @ivar left: what was not delivered.
    """

    part: str
    number: str
    whose: str
    left: str


def connection_ends(log: str, vm: str) -> tuple[list[tuple[str, str]], list[End]]:
    """@return: part and number of each connection of C{vm} that began, and the ends that C{log} tells of."""
    begun = [(match["part"], match["number"]) for match in _BEGUN.finditer(log) if match["vm"] == vm]
    ends = [
        End(match["part"], match["number"], match["whose"], match["left"])
        for match in _ENDED.finditer(log)
        if match["vm"] == vm
    ]
    return begun, ends


def one_line_each(host: str, log: str, vm: str, decisions: Mapping[str, str]) -> Check:
    """
    Each connection that began has one line that tells what ended, whose decision that was, and
    what was not delivered.

    @param log: of the relay of C{host}, that of one migration.
    @param decisions: for a part, what the lines must say of whose decision it was.
    """
    begun, ends = connection_ends(log, vm)
    told = Counter((end.part, end.number) for end in ends)
    good = bool(begun) and told == Counter(begun)
    good &= all(part in {end.part for end in ends} for part in decisions)
    good &= all(decisions.get(end.part, "") in end.whose for end in ends)
    return Check(f"the log of {host} has one line for each end, and whose decision it was", good, _said(ends))


def _said(ends: Sequence[End]) -> str:
    return (
        "; ".join(f"{end.part} {end.number}: {end.whose} ({end.left})" for end in ends) or "nothing was told"
    )
