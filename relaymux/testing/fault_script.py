"""
The fault proxy's operations as words, for scripts, command lines and the control socket.

A script is statements with C{;} or line ends between them; C{#} begins a
comment.  A statement is a command, or C{at SECONDS COMMAND}, or C{every
SECONDS COMMAND}.  All of a script is understood before any of it is done.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar, cast

from relaymux.errors import ConfigurationError
from relaymux.service.config_values import format_size, seconds_between, size_between, suggestion
from relaymux.testing.faults import BUFFER_BYTES, Damage, Ending, FaultProxy, Side, Sides

__all__ = ["COMMANDS", "Operation", "parse_script"]

#: Something to do to a proxy; what it returns, if anything, is told who asked.
Operation = Callable[[FaultProxy], object]

_T = TypeVar("_T")

_MAX_SECONDS: Final = 86_400.0

#: Offsets and rates; more than any test moves.
_MAX_BYTES: Final = 2**49

_parse_seconds = seconds_between(0, _MAX_SECONDS)
_parse_size = size_between(0, _MAX_BYTES)


def parse_script(text: str) -> list[Operation]:
    """
    @return: what to do at the start, in order; the later ones plan themselves.
    @raise ConfigurationError: C{text} is no script; names the statement.
    """
    operations = []
    for line in text.splitlines():
        for statement in line.partition("#")[0].split(";"):
            if statement.strip():
                try:
                    operations.append(_Words(statement).operation())
                except ConfigurationError as error:
                    raise error.within(key=" ".join(statement.split())) from None
    return operations


class _Words:
    """A statement, taken apart from its beginning."""

    def __init__(self, statement: str) -> None:
        self._words = statement.split()

    def operation(self) -> Operation:
        """Understand all of it."""
        when = self.choose("at", "every")
        low = high = 0.0
        if when == "at":
            low = self.seconds()
        elif when:
            low, high = self.range(_parse_seconds)
            if high < 0.001:
                raise ConfigurationError("an interval must be at least 0.001 seconds")
        command = self._next("a command", "cut or blackhole")
        parse = _PARSERS.get(command)
        if parse is None:
            raise ConfigurationError(
                f"there is no such command{suggestion(command, _PARSERS)}",
                found=command,
                expected=f"one of {', '.join(_PARSERS)}",
            )
        operation = parse(self)
        if self._words:
            raise ConfigurationError(
                "there is something behind the command",
                found=" ".join(self._words),
                expected=COMMANDS[command],
            )
        if when == "at":
            return lambda proxy: proxy.at(low, partial(operation, proxy))
        if when:
            return lambda proxy: proxy.every(low, high, partial(operation, proxy))
        return operation

    def choose(self, *words: str) -> str:
        """@return: the next word, taken, if it is one of C{words}; else nothing."""
        return self._words.pop(0) if self._words and self._words[0] in words else ""

    def has_number(self) -> bool:
        """@return: whether a number comes next."""
        return bool(self._words) and self._words[0][0] in "0123456789.-"

    def seconds(self) -> float:
        return self._value(_parse_seconds, "seconds", "0.5")

    def size(self) -> int:
        return self._value(_parse_size, "a number of bytes", "64K")

    def probability(self) -> float:
        return self._value(_parse_probability, "a probability", "1e-6")

    def range(self, parse: Callable[[str], _T]) -> tuple[_T, _T]:
        """@return: both ends of C{A..B}, or twice the same."""
        text = self._next("a number, or two with .. between them", "1..3")
        low_text, dots, high_text = text.partition("..")
        low = parse(low_text)
        high = parse(high_text) if dots else low
        if low > high:  # type: ignore[operator]
            raise ConfigurationError("a range begins with its lower end", found=text)
        return low, high

    def side(self, default: str = "") -> Side:
        """One side; required without a default."""
        side = self.choose("up", "down") or default
        if not side:
            raise ConfigurationError(
                "it is not said which way",
                found=self._words[0] if self._words else None,
                expected="up (to the target) or down (back)",
            )
        return cast(Side, side)

    def sides(self) -> Sides:
        """One side or both; both by default."""
        return cast(Sides, self.choose("up", "down", "both") or "both")

    def _value(self, parse: Callable[[str], _T], what: str, example: str) -> _T:
        return parse(self._next(what, example))

    def _next(self, what: str, example: str) -> str:
        if not self._words:
            raise ConfigurationError("something is missing at the end", expected=f"{what}, such as {example}")
        return self._words.pop(0)


def _parse_probability(text: str) -> float:
    try:
        probability = float(text)
    except ValueError:
        probability = -1.0
    if not 0 <= probability <= 1:
        raise ConfigurationError("this is not a probability", found=text, expected="a number from 0 to 1")
    return probability


def _cut(words: _Words) -> Operation:
    ending = Ending(words.choose("rst", "fin") or "rst")
    when = words.choose("after", "each")
    if when == "after":
        offset = words.size()
    elif when:
        low, high = words.range(_parse_size)
    if when:
        side = words.side()
    refuse = words.seconds() if words.choose("refuse") else 0.0
    if when == "after":
        return lambda proxy: proxy.cut_after(offset, side, ending, refuse)
    if when:
        return lambda proxy: proxy.cut_each(low, high, side, ending, refuse)
    return lambda proxy: proxy.cut(ending, refuse)


def _refuse(words: _Words) -> Operation:
    seconds = words.seconds() if words.has_number() else None
    reset = bool(words.choose("reset"))
    return lambda proxy: proxy.refuse(seconds, reset=reset)


def _blackhole(words: _Words) -> Operation:
    seconds = words.seconds() if words.has_number() else None
    sides = words.sides()
    return lambda proxy: proxy.blackhole(seconds, sides)


def _delay(words: _Words) -> Operation:
    seconds = words.seconds()
    jitter = words.seconds() if words.has_number() else 0.0
    sides = words.sides()
    return lambda proxy: proxy.delay(seconds, jitter, sides)


def _rate(words: _Words) -> Operation:
    rate = words.size()
    sides = words.sides()
    return lambda proxy: proxy.rate(rate, sides)


def _segments(words: _Words) -> Operation:
    low, high = words.range(_parse_size)
    if high and not low:
        raise ConfigurationError("a segment has at least one byte", expected="1 or more; 0 alone for none")
    sides = words.sides()
    return lambda proxy: proxy.segments(low, high, sides)


def _damage(damage: Damage, words: _Words) -> Operation:
    offset = words.size()
    side = words.side()
    return lambda proxy: proxy.damage(offset, side, damage)


def _corrupt(words: _Words) -> Operation:
    probability = words.probability()
    sides = words.sides()
    return lambda proxy: proxy.corrupt(probability, sides)


def _hold(words: _Words) -> Operation:
    size = words.size()
    if size > BUFFER_BYTES:
        raise ConfigurationError(
            "so much cannot be held", found=format_size(size), expected=f"at most {format_size(BUFFER_BYTES)}"
        )
    seconds = words.seconds() if words.choose("within") else 1.0
    side = words.side("up")
    return lambda proxy: proxy.hold(size, seconds, side)


def _status(proxy: FaultProxy) -> str:
    return " ".join(f"{name}={count}" for name, count in proxy.status().items())


_PARSERS: Final[dict[str, Callable[[_Words], Operation]]] = {
    "cut": _cut,
    "refuse": _refuse,
    "blackhole": _blackhole,
    "delay": _delay,
    "rate": _rate,
    "segments": _segments,
    "flip": partial(_damage, "flip"),
    "insert": partial(_damage, "insert"),
    "remove": partial(_damage, "remove"),
    "corrupt": _corrupt,
    "hold": _hold,
    "release": lambda words: FaultProxy.release,
    "clear": lambda words: FaultProxy.clear,
    "status": lambda words: _status,
}

#: How each command is written.
COMMANDS: Final = {
    "cut": "cut [rst|fin] [after BYTES up|down | each BYTES[..BYTES] up|down] [refuse SECONDS]",
    "refuse": "refuse [SECONDS] [reset]",
    "blackhole": "blackhole [SECONDS] [up|down]",
    "delay": "delay SECONDS [JITTER] [up|down]",
    "rate": "rate BYTES-PER-SECOND [up|down]",
    "segments": "segments BYTES[..BYTES] [up|down]",
    "flip": "flip OFFSET up|down",
    "insert": "insert OFFSET up|down",
    "remove": "remove OFFSET up|down",
    "corrupt": "corrupt PROBABILITY [up|down]",
    "hold": "hold BYTES [within SECONDS] [up|down]",
    "release": "release",
    "clear": "clear",
    "status": "status",
}
