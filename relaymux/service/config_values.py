"""
How single values of the configuration file are written.

Each C{parse_} function takes the text after the C{=} and gives the value or
raises L{ConfigurationError} with what was found and what was expected; the
caller, who knows them, adds file, section and key.
"""

from __future__ import annotations

import difflib
import grp
import math
import os
import pwd
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from relaymux.core.handshake import NAME
from relaymux.errors import ConfigurationError
from relaymux.net.disks import MAX_PATH_BYTES

__all__ = [
    "GIB",
    "KIB",
    "MIB",
    "count_between",
    "format_size",
    "parse_addresses",
    "parse_directory",
    "parse_group",
    "parse_mode",
    "parse_name",
    "parse_owner",
    "parse_socket_path",
    "seconds_between",
    "size_between",
    "suggestion",
]

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_UNITS = {"": 1, "K": KIB, "M": MIB, "G": GIB}

#: The largest id; one more is C{(uid_t) -1}, which chown takes for "leave it".
_MAX_ID = 2**32 - 2


def suggestion(word: str, known: Iterable[str]) -> str:
    """@return: C{"; did you mean 'window'?"} when one of C{known} is close to C{word}, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def parse_name(text: str) -> str:
    """A daemon's, link's or service's name."""
    if not NAME.fullmatch(text):
        raise ConfigurationError(
            "this is not a name", found=text, expected="1 to 64 of the characters A-Z a-z 0-9 . _ -"
        )
    return text


def format_size(size: int) -> str:
    """@return: C{size} bytes as the file would write them, e.g. C{"4M"}."""
    for unit in ("G", "M", "K"):
        if size and size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)


def size_between(low: int, high: int) -> Callable[[str], int]:
    """@return: the parser of a number of bytes within C{low} to C{high}, both allowed."""
    expected = f"a size from {format_size(low)} to {format_size(high)}, in bytes or with K, M or G behind it"

    def parse_size(text: str) -> int:
        match = re.fullmatch(r"([0-9]{1,15})\s*([KMG]?)", text, re.IGNORECASE)
        if match is None:
            raise ConfigurationError("this is not a size", found=text, expected=expected)
        size = int(match[1]) * _UNITS[match[2].upper()]
        if not low <= size <= high:
            raise ConfigurationError(
                f"the size is too {'small' if size < low else 'large'}", found=text, expected=expected
            )
        return size

    return parse_size


def seconds_between(low: float, high: float) -> Callable[[str], float]:
    """@return: the parser of a duration within C{low} to C{high} seconds, both allowed."""
    expected = f"seconds, a number from {low:g} to {high:g}"

    def parse_seconds(text: str) -> float:
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
        if math.isnan(seconds):
            raise ConfigurationError("this is not a duration", found=text, expected=expected)
        if not low <= seconds <= high:
            raise ConfigurationError(
                f"the duration is too {'short' if seconds < low else 'long'}", found=text, expected=expected
            )
        return seconds

    return parse_seconds


def count_between(low: int, high: int) -> Callable[[str], int]:
    """@return: the parser of a whole number within C{low} to C{high}, both allowed."""

    def parse_count(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,15}", text) or not low <= int(text) <= high:
            raise ConfigurationError(
                "this is not a usable number",
                found=text,
                expected=f"a whole number from {low} to {high}",
            )
        return int(text)

    return parse_count


def parse_mode(text: str) -> int:
    """A socket's permissions in octal."""
    if not re.fullmatch(r"0?[0-7]{3}", text):
        raise ConfigurationError(
            "this is not a file mode", found=text, expected="three octal digits such as 0600 or 0660"
        )
    return int(text, 8)


def parse_owner(text: str) -> int:
    """@return: the user id of a user name or number."""
    return _parse_id(text, "user", lambda name: pwd.getpwnam(name).pw_uid)


def parse_group(text: str) -> int:
    """@return: the group id of a group name or number."""
    return _parse_id(text, "group", lambda name: grp.getgrnam(name).gr_gid)


def _parse_id(text: str, what: str, look_up: Callable[[str], int]) -> int:
    if re.fullmatch(r"[0-9]{1,10}", text) and int(text) <= _MAX_ID:
        return int(text)
    try:
        return look_up(text)
    except (KeyError, ValueError):
        raise ConfigurationError(
            f"this machine has no such {what}", found=text, expected=f"the name of a {what}, or its number"
        ) from None


def parse_addresses(text: str) -> tuple[str, ...]:
    """One or more addresses with commas between them; what an address is, is the transport's business."""
    addresses = tuple(part.strip() for part in text.split(","))
    if not all(addresses):
        raise ConfigurationError(
            "an address is missing",
            found=text,
            expected="one address, or several with one comma between each",
        )
    for address in addresses:
        if addresses.count(address) > 1:
            raise ConfigurationError(
                "the same address comes twice", found=address, expected="every address once"
            )
    return addresses


def parse_directory(text: str, directory: Path) -> Path:
    """
    @param directory: what C{text} is relative to.
    @return: an absolute path without C{..}, so that two ways to write one path compare equal.
    """
    if "\0" in text or text.startswith("~"):
        raise ConfigurationError(
            "this is not a usable path",
            found=text,
            expected="an absolute path, or one relative to the directory of this file; ~ is not replaced",
        )
    return Path(os.path.normpath(directory / text))


def parse_socket_path(text: str, directory: Path) -> Path:
    """As L{parse_directory}, for a path that must fit into a UNIX socket's address."""
    if text.startswith("@"):
        raise ConfigurationError(
            "an abstract socket has no permissions, every user of the machine may connect to it",
            found=text,
            expected="the path of a socket file",
        )
    if text.endswith(("/", "~")):
        raise ConfigurationError(
            "a socket's name cannot end like this; with ~ end the names of sockets that are being made",
            found=text,
            expected="the path of a socket file",
        )
    path = parse_directory(text, directory)
    length = len(os.fsencode(path))
    if length > MAX_PATH_BYTES:
        raise ConfigurationError(
            f"the path has {length} bytes and a UNIX socket's path has room for {MAX_PATH_BYTES}",
            found=str(path),
            expected="a shorter path; keep sockets in a directory such as /run/relaymux",
        )
    return path
