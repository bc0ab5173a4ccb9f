"""
The programs that send, receive, ask and answer, from C sources in this directory.

They are compiled at first use with the machine's C compiler.  Where there is
none, L{benchmarks.traffic} sends and receives bulk in their place, at a
higher cost that the table mentions; what else they do has no replacement.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from benchmarks.processes import ROOT, Unavailable, python_module

__all__ = ["compiler", "program", "traffic"]

_SOURCES = Path(__file__).resolve().parent
_FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread")


def compiler() -> str | None:
    """@return: path of the C compiler, C{$CC} or what is called cc, gcc or clang; None if there is none."""
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return next(filter(None, (shutil.which(name) for name in names if name)), None)


@cache
def program(name: str) -> Path:
    """
    @param name: of a source in this directory, without C{.c}.
    @return: the compiled program, made now if it is not there yet.
    @raise Unavailable: there is no compiler, or it does not work.
    """
    found = compiler()
    if found is None:
        raise Unavailable("a C compiler (Debian: gcc and libc6-dev)")
    sources = [_SOURCES / "common.h", _SOURCES / f"{name}.c"]
    digest = hashlib.sha256(" ".join((found, *_FLAGS)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    made = _cache_directory() / f"{name}-{digest.hexdigest()[:16]}"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        # Under a name of its own first: others may be at it as well.
        with tempfile.TemporaryDirectory(dir=made.parent) as directory:
            fresh = Path(directory, name)
            command = [found, *_FLAGS, "-o", str(fresh), str(sources[-1])]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                said = result.stderr.strip()
                raise Unavailable(
                    f"a C compiler that works (Debian: gcc and libc6-dev); {found} says: {said}"
                )
            fresh.rename(made)
    return made


def traffic(role: str, address: object, *options: object) -> list[str]:
    """
    @param role: C{"source"} or C{"sink"}.
    @param address: path of a UNIX socket, or number of a TCP port of 127.0.0.1.
    @return: the command of one end of a bulk stream: the compiled one where there is a compiler.
    @raise Unavailable: there is one, and it does not work.
    """
    arguments = [role, address, *options]
    if compiler() is None:
        return python_module("benchmarks.traffic", *arguments)
    return [str(program("traffic")), *map(str, arguments)]


def _cache_directory() -> Path:
    if (ROOT / "pyproject.toml").exists():
        return ROOT / ".cache" / "benchmarks"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relaymux" / "benchmarks"
