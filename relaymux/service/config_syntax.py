"""
The file's outer form: INI text into sections of key and value, and the taking
of values out of a section, with every mistake collected instead of raised.
"""

from __future__ import annotations

import configparser
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

from relaymux.errors import ConfigurationError
from relaymux.service.config_sections import Role
from relaymux.service.config_values import suggestion

__all__ = ["Section", "parse_ini", "read_text"]

T = TypeVar("T")

_EXPECTED_LINE = "[SECTION], KEY = VALUE, or a comment that begins with # or ;"


def read_text(file: Path | str) -> str:
    """
    @return: the text of C{file}.
    @raise ConfigurationError: it cannot be read, or is not UTF-8.
    """
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"the file cannot be read: {error.strerror}",
            file=str(file),
            expected="a configuration file that this user may read",
        ) from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigurationError(
            f"line {line} is not UTF-8 text: it has the byte 0x{content[error.start]:02x}",
            file=str(file),
            expected="text in UTF-8; comments too",
        ) from None


def parse_ini(text: str, file: str, problems: list[ConfigurationError]) -> list[Section]:
    """
    @param file: the file's name for messages.
    @param problems: mistakes are added here.  One in the form of a line ends
        the reading, since nobody knows what the lines after it would mean.
    @return: the sections in the file's order, their headers with single spaces.
    """
    parser = configparser.ConfigParser(
        delimiters=("=",),
        inline_comment_prefixes=("#", ";"),
        empty_lines_in_values=False,
        interpolation=None,
        # Nothing is inherited: a name that no header can have turns [DEFAULT] off.
        default_section="]",
    )
    # Keys are lower case as documented; otherwise configparser would bend them.
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    try:
        parser.read_string(text)
    except configparser.Error as error:
        problems += [problem.within(file=file) for problem in _explain(error, text.split("\n"))]
        return []
    sections: dict[str, Section] = {}
    for written in parser.sections():
        section = Section(file, " ".join(written.split()), parser[written], problems)
        if section.header in sections:
            section.wrong(_section_twice("the section comes twice"))
        else:
            sections[section.header] = section
    return list(sections.values())


def _section_twice(problem: str) -> ConfigurationError:
    return ConfigurationError(problem, expected="one section of a kind and name; join the two or rename one")


def _explain(error: configparser.Error, lines: list[str]) -> list[ConfigurationError]:
    """@return: what configparser found, in words for the operator."""
    if isinstance(error, configparser.DuplicateSectionError):
        first = next(n for n, line in enumerate(lines, 1) if line.strip().startswith(f"[{error.section}]"))
        problem = f"the section comes twice, in line {first} and in line {error.lineno}"
        return [_section_twice(problem).within(section=error.section)]
    if isinstance(error, configparser.DuplicateOptionError):
        return [
            ConfigurationError(
                f"the key comes a second time in line {error.lineno}",
                section=error.section,
                key=error.option,
                expected="every key once in a section",
            )
        ]
    if isinstance(error, configparser.MissingSectionHeaderError):
        return [
            ConfigurationError(
                f"line {error.lineno} stands before the first section",
                found=lines[error.lineno - 1].strip(),
                expected="a section such as [relay] above it",
            )
        ]
    assert isinstance(error, configparser.ParsingError)
    return [
        ConfigurationError(
            f"line {number} is neither a section nor a key with its value",
            found=lines[number - 1].strip(),
            expected=_EXPECTED_LINE,
        )
        for number, _ in error.errors
    ]


class Section:
    """
    One section as written.  What is wrong in it goes into the common list of
    problems and a stand-in is returned, so that reading can go on.
    """

    def __init__(
        self, file: str, header: str, values: Mapping[str, str], problems: list[ConfigurationError]
    ) -> None:
        """@param header: without brackets: the kind, and after one space the name if there is one."""
        self.header = header
        self.kind, _, self.name = header.partition(" ")
        self.values = values
        self._file = file
        self._problems = problems

    def wrong(self, error: ConfigurationError, key: str = "") -> None:
        """Add C{error} to the problems, naming this section."""
        self._problems.append(error.within(file=self._file, section=self.header, key=key))

    def get(self, key: str, parse: Callable[[str], T], default: T) -> T:
        """@return: the value of C{key}, or C{default} if it is not there or wrong."""
        if key not in self.values:
            return default
        first, *more = self.values[key].split("\n")
        try:
            if more:
                raise ConfigurationError(
                    "an indented line below it goes on with the value",
                    found=more[0],
                    expected="every key at the beginning of its own line, all of them equally indented",
                )
            if not first:
                raise ConfigurationError(
                    "the key has no value", expected="one; without the line the default holds"
                )
            return parse(first)
        except ConfigurationError as error:
            self.wrong(error, key)
            return default

    def require(self, key: str, parse: Callable[[str], T], stand_in: T, expected: str) -> T:
        """@return: the value of C{key}, which must be there."""
        if key not in self.values:
            self.wrong(ConfigurationError("the key is missing", expected=expected), key)
        return self.get(key, parse, stand_in)

    def refuse_unknown(self, known: Collection[str], where: str) -> None:
        """Every key but those in C{known} is an error."""
        for key in self.values:
            if key not in known:
                problem = f"there is no such key in {where}{suggestion(key, known)}"
                self.wrong(ConfigurationError(problem, expected="one of " + ", ".join(known)), key)

    def role(self) -> Role:
        """@return: which one of C{connect} and C{listen} the section has."""
        connects, listens = "connect" in self.values, "listen" in self.values
        if connects == listens:
            found = "both connect and listen" if connects else "neither connect nor listen"
            problem = f"the section has {found}"
            self.wrong(ConfigurationError(problem, expected="exactly one of the two"))
        return "listen" if listens else "connect"
