"""All that can be measured: by name, with the links that each can have."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from benchmarks import peers, relays
from benchmarks.processes import BenchmarkError, Unavailable
from benchmarks.relays import PROOF_BYTES, Relays
from benchmarks.results import OURS, Result

__all__ = [
    "CONTENDERS",
    "DEFAULT_TOOLS",
    "LINKS",
    "NO_RELAY",
    "Contender",
    "Plan",
    "Start",
    "Turn",
    "started",
    "take_round",
    "take_turns",
    "take_turns_anew",
    "turns",
]

LINKS = ("tcp", "unix", "tls")

NO_RELAY = "no relay"

#: What new processes of tools that have proved themselves carry before they are measured.
WARM_UP_BYTES = 8 * 1024 * 1024

Start = Callable[..., AbstractContextManager[Relays]]


@dataclass(frozen=True)
class Contender:
    """
    @ivar links: those that it can have; C{"-"} for none.
    @ivar start: as L{relays.relaymux}: from a directory, a link and a number of streams.
    """

    links: tuple[str, ...]
    start: Start


CONTENDERS: Mapping[str, Contender] = {
    NO_RELAY: Contender(("-",), relays.direct),
    "socat": Contender(("tcp",), peers.socat),
    "haproxy": Contender(("tcp", "unix", "tls"), peers.haproxy),
    "stunnel": Contender(("tls",), peers.stunnel),
    "ssh": Contender(("tls",), peers.ssh),
    "twisted-forward": Contender(("tcp", "tls"), partial(relays.plain_twisted, forward=True)),
    "twisted-mux": Contender(("tcp", "tls"), relays.plain_twisted),
    OURS: Contender(("tcp", "unix", "tls"), relays.relaymux),
}

#: The yardsticks of an earlier time are there for those who ask for them.
DEFAULT_TOOLS = tuple(name for name in CONTENDERS if not name.startswith("twisted"))


@dataclass
class Plan:
    """
    How to measure.

    @ivar directory: empty; the rows make directories in it.  Other users can
        pass through it, and not look into what is there.
    @ivar tools: names from L{CONTENDERS}, in the order in which they take turns.
    @ivar rounds: how often each has its turn.
    @ivar seconds: how long each run sends.
    @ivar step: told what is done next.
    @ivar notes: what could not be measured, and why.
    """

    directory: Path
    tools: Sequence[str]
    links: Sequence[str]
    rounds: int
    seconds: float
    step: Callable[[str], None] = lambda text: None
    notes: list[str] = field(default_factory=list)

    def contenders(self) -> list[tuple[str, str]]:
        """@return: links and names of all that are to be measured, those of a link side by side."""
        return [
            (link, tool)
            for link in ("-", *self.links)
            for tool in self.tools
            if link in CONTENDERS[tool].links
        ]

    def note(self, text: str) -> None:
        """Remember for the end of the table what is missing in it; once."""
        if text not in self.notes:
            self.notes.append(text)


@contextmanager
def started(
    plan: Plan,
    streams: int,
    options: Mapping[str, Mapping[str, object]] | None = None,
    proof_bytes: int = PROOF_BYTES,
) -> Iterator[dict[tuple[str, str], Relays]]:
    """
    Run all contenders, and prove that each carries content unharmed.

    @param options: by the contender's name, further arguments of its C{start}.
    @param proof_bytes: what each of them carries first.
    @return: by link and name, in the order in which they take turns; without those that are not installed.
    @raise BenchmarkError: relaymux does not start, or harms content.
    """
    with ExitStack() as stack:
        found = {}
        for link, tool in plan.contenders():
            plan.step(f"{tool} over {link}: content")
            place = plan.directory / f"{tool}-{link}".replace(" ", "")
            place.mkdir(mode=0o700)
            stack.callback(shutil.rmtree, place, ignore_errors=True)
            own = (options or {}).get(tool, {})
            try:
                relay = stack.enter_context(CONTENDERS[tool].start(place, link, streams, **own))
                relay = replace(relay, idle=relay.memory().proportional)
                relay.prove(proof_bytes)
            except Unavailable as missing:
                plan.note(f"{tool}: not measured, since this machine has no {missing}")
            except BenchmarkError as error:
                if tool == OURS:
                    raise
                plan.note(f"{tool} over {link}: not measured: {error}")
            else:
                found[link, tool] = relay
        yield found


@dataclass(frozen=True)
class Turn:
    """
    One run of a round.

    @ivar case: what the result is for, and so on.
    @ivar measure: does it; may raise L{BenchmarkError}.
    """

    case: str
    link: str
    tool: str
    measure: Callable[[], Mapping[str, float]]


def turns(
    found: Mapping[tuple[str, str], Relays], cases: Mapping[str, Callable[[Relays], Mapping[str, float]]]
) -> list[Turn]:
    """@return: for each case one contender after the other, so that those compared stand side by side."""
    return [
        Turn(case, link, tool, partial(measure, relays))
        for case, measure in cases.items()
        for (link, tool), relays in found.items()
    ]


def take_turns(plan: Plan, row: str, order: Sequence[Turn]) -> list[Result]:
    """
    Measure, round after round.

    @param order: of each round.
    @raise BenchmarkError: relaymux fails; what happens to others becomes a note.
    """
    return [result for number in range(plan.rounds) for result in take_round(plan, row, number, order)]


def take_turns_anew(
    plan: Plan,
    row: str,
    streams: int,
    cases: Mapping[str, Callable[[Relays], Mapping[str, float]]],
) -> list[Result]:
    """
    As L{take_turns}, of all contenders, in each round with processes of its own.

    What memory a process happens to get can make it dearer than others of its kind for as
    long as it lives.  So that is one of several rounds, and not all of them.

    @raise BenchmarkError: relaymux does not start, harms content or fails.
    """
    results = []
    for number in range(plan.rounds):
        proof_bytes = PROOF_BYTES if number == 0 else WARM_UP_BYTES
        with started(plan, streams, proof_bytes=proof_bytes) as found:
            results += take_round(plan, row, number, turns(found, cases))
    return results


def take_round(plan: Plan, row: str, number: int, order: Sequence[Turn]) -> list[Result]:
    """
    Measure one round.

    @param number: the round's, from 0.
    @raise BenchmarkError: as of L{take_turns}.
    """
    results = []
    for turn in order:
        where = f"{turn.tool} over {turn.link}, {turn.case}"
        plan.step(f"{row}, round {number + 1} of {plan.rounds}: {where}")
        try:
            values = turn.measure()
        except BenchmarkError as error:
            if turn.tool == OURS:
                raise
            plan.note(f"{row}, {where}: a run failed: {error}")
        else:
            results.append(Result(row, turn.case, turn.link, turn.tool, number, values))
    return results
