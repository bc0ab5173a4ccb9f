"""What was measured, and how relaymux compares: ratios within a round, medians of the rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["OURS", "PLAIN", "Metric", "Result", "Target", "Verdict", "judge", "ratios"]

OURS = "relaymux"

#: The tools that a user would pick instead.
PEERS = ("ssh", "stunnel", "haproxy", "socat")

#: Links that do not encrypt.
PLAIN = ("tcp", "unix")


@dataclass(frozen=True)
class Metric:
    """
    One column of numbers.

    @ivar name: its key in L{Result.values}.
    @ivar title: its heading, with the unit.
    @ivar scale: what a value is multiplied with to be shown in that unit.
    @ivar digits: how many to show after the point.
    """

    name: str
    title: str
    scale: float = 1.0
    digits: int = 2


@dataclass(frozen=True)
class Result:
    """
    One run.

    @ivar row: what is measured, as chosen with C{--row}.
    @ivar case: in which circumstances.
    @ivar link: C{"tls"}, C{"tcp"} or C{"unix"}; C{"-"} where there is none.
    @ivar tool: what relayed.
    @ivar round: from 0; runs of a round stood side by side.
    """

    row: str
    case: str
    link: str
    tool: str
    round: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Target:
    """
    What relaymux has to reach, as the ratio of one of its values to another's.

    @ivar case: of relaymux's results.
    @ivar links: of both.
    @ivar metric: of both.
    @ivar at_most: the ratio may be no higher; else L{at_least} holds.
    @ivar at_least: the ratio may be no lower.
    @ivar against: the tool to compare with; None is the best of all peers.
    @ivar yardstick: the case to compare with; None is the same one.
    @ivar absolute: C{at_most} or C{at_least} is for relaymux's value itself, not for a ratio.
    """

    row: str
    case: str
    links: tuple[str, ...]
    metric: str
    at_most: float | None = None
    at_least: float | None = None
    against: str | None = None
    yardstick: str | None = None
    absolute: bool = False

    @property
    def limit(self) -> float:
        """The one of the two that is set."""
        limit = self.at_most if self.at_most is not None else self.at_least
        assert limit is not None, "a target without a limit"
        return limit

    def is_met(self, value: float) -> bool:
        """Whether a ratio, or an absolute value, is good enough."""
        return value <= self.limit if self.at_most is not None else value >= self.limit


@dataclass(frozen=True)
class Verdict:
    """
    @ivar link: one of the target's.
    @ivar rival: what was compared with.
    @ivar ratios: in each round; absolute values for an absolute target.
    """

    target: Target
    link: str
    rival: str
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median of the rounds."""
        return median(self.ratios)

    @property
    def met(self) -> bool:
        """Whether the target is reached."""
        return self.target.is_met(self.ratio)


def judge(results: Sequence[Result], targets: Sequence[Target]) -> list[Verdict]:
    """
    @return: for each target and link that there are results for, how relaymux did beside the best of its
        rivals: the one beside which it looks worst.  That is one tool for all rounds: the better one of each
        round would be as good as no tool is, since each has its good and bad moments.
    """
    verdicts = []
    for target in targets:
        for link in target.links:
            compared = ratios(results, target, link)
            if compared:
                worst = max if target.at_most is not None else min
                rival = worst(compared, key=lambda tool: median(compared[tool]))
                verdicts.append(Verdict(target, link, rival, tuple(compared[rival])))
    return verdicts


def ratios(results: Sequence[Result], target: Target, link: str) -> dict[str, list[float]]:
    """
    @return: for each tool that is compared with, relaymux's value divided by its one, in each round that has
        both.
    """
    found: dict[str, list[float]] = {}
    same = [r for r in results if (r.row, r.link) == (target.row, link) and target.metric in r.values]
    for ours in (r for r in same if (r.tool, r.case) == (OURS, target.case)):
        value = ours.values[target.metric]
        if target.absolute:
            found.setdefault(OURS, []).append(value)
            continue
        for other in _rivals(results, target, link):
            if other.round == ours.round and target.metric in other.values:
                yardstick = other.values[target.metric]
                found.setdefault(other.tool, []).append(value / yardstick if yardstick else float("inf"))
    return found


def _rivals(results: Sequence[Result], target: Target, link: str) -> list[Result]:
    case = target.yardstick or target.case
    tools = PEERS if target.against is None else (target.against,)
    found = [r for r in results if (r.row, r.case) == (target.row, case) and r.tool in tools]
    same = [result for result in found if result.link == link]
    # A tool that is named, and has no such link, is compared as it is: ssh always encrypts.
    return same if same or target.against is None else found
