"""
Which modules are compiled: C{python -m tests.compiled} fails unless all are that can be, in
the directory that this file is in, wherever a program is started that imports them.
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent

_PRINT_FILES = """
import importlib, json, sys

def file_of(name):
    try:
        return importlib.import_module(name).__file__
    except ImportError as error:
        return f"none ({error})"

print(json.dumps([file_of(name) for name in sys.argv[1:]]))
"""


def compiled_modules() -> list[str]:
    """@return: the dotted names of what setup.py compiles."""
    described = runpy.run_path(str(PROJECT / "setup.py"))
    return [described["NATIVE"], *described["COMPILED"]]


def files_command() -> list[str]:
    """@return: arguments for a Python that prints the files of these modules; for L{uncompiled}."""
    return ["-c", _PRINT_FILES, *compiled_modules()]


def uncompiled(printed: str, below: Path) -> list[str]:
    """@return: those of the files that are no compiled modules in C{below}."""
    files: list[str] = json.loads(printed)
    return [file for file in files if not (file.endswith(".so") and Path(file).is_relative_to(below))]


def main() -> None:
    """Look from the project's directory, which comes first on the path there, and from another one."""
    for directory in (PROJECT, Path("/")):
        printed = subprocess.run(
            [sys.executable, *files_command()], cwd=directory, check=True, stdout=subprocess.PIPE, text=True
        )
        if wrong := uncompiled(printed.stdout, PROJECT):
            sys.exit(
                f"what starts in {directory} imports modules that are not compiled in {PROJECT}:"
                f" {', '.join(wrong)}; make a copy with scripts/compiled-copy, and set PYTHONPATH to it"
            )


if __name__ == "__main__":
    main()
