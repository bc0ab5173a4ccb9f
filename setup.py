"""
The build is described in pyproject.toml; this file adds what is compiled where that is possible: the core and
the way of the bytes through C{relaymux.net}, by mypyc, and C{relaymux.net._native}, which is written in C.
relaymux works the same without, for more CPU per byte.

C{RELAYMUX_COMPILE=auto}, the default, compiles where a C compiler and Python's headers work, and says so
where they do not; C{0} never compiles, C{1} fails where it cannot.

Editable installs are never compiled: beside a module that somebody changes, its compiled form of before would
win.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext

#: What is busy with every byte or every connection.  No class here inherits from one that is not compiled
#: (tests/test_layers.py).  core's events, handshake and resume are not among them: their dataclasses do not
#: survive mypyc.
COMPILED = (
    "relaymux.core.budget",
    "relaymux.core.flight",
    "relaymux.core.frames",
    "relaymux.core.growth",
    "relaymux.core.link",
    "relaymux.core.meter",
    "relaymux.core.nbd",
    "relaymux.core.outbox",
    "relaymux.core.replay",
    "relaymux.core.schedule",
    "relaymux.core.session",
    "relaymux.core.speaking",
    "relaymux.core.stream",
    "relaymux.core.window",
    "relaymux.net.addresses",
    "relaymux.net.bridge",
    "relaymux.net.connections",
    "relaymux.net.descriptor",
    "relaymux.net.ending",
    "relaymux.net.endings",
    "relaymux.net.families",
    "relaymux.net.fastpath",
    "relaymux.net.holder",
    "relaymux.net.inbox",
    "relaymux.net.keeper",
    "relaymux.net.link",
    "relaymux.net.listen",
    "relaymux.net.local",
    "relaymux.net.opening",
    "relaymux.net.peer",
    "relaymux.net.producing",
    "relaymux.net.receiving",
    "relaymux.net.sending",
    "relaymux.net.sockets",
    "relaymux.net.stream",
    "relaymux.net.streams",
    "relaymux.net.tlsengine",
    "relaymux.net.tlsreading",
    "relaymux.net.tlsrecords",
    "relaymux.net.tlssockets",
    "relaymux.net.tlswriting",
    "relaymux.net.turns",
)

#: The extension that is written in C, and what of.
NATIVE = "relaymux.net._native"
NATIVE_SOURCES = (
    "_native.c",
    "_pieces.c",
    "_records.c",
    "_sealing.c",
    "_opening.c",
    "_fastpath.c",
    "_fastpath_lease.c",
    "_fastpath_send.c",
    "_fastpath_receive.c",
    "_fastpath_pages.c",
    "_fastpath_pipes.c",
)
NATIVE_HEADERS = ("_native.h", "_records.h", "_fastpath.h")

#: Has mypyc in it.  pyproject.toml does not ask for it, since RELAYMUX_COMPILE=0 has to do without.
MYPY = "mypy>=2.4"

#: The commands that compile when one of them is what setup.py was started for.  The others must not, although
#: they look at extensions, too: editable_wheel, and those that only ask for metadata.
_COMPILING = {"bdist_wheel", "build", "build_ext", "install"}

_WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]


class CannotCompile(Exception):
    """What is missing or wrong, and what to do, for a person."""


def _reason(error: BaseException) -> str:
    """@return: what C{error} says, of a command that failed only its name, not all of its options."""
    return re.sub(r"Command '\['([^']+)'.*\]' ", r"\1 ", str(error)).rstrip(".")


class BuildExtensions(build_ext):
    """Builds all extensions anew, or raises L{CannotCompile}."""

    def run(self) -> None:
        # One that is no longer made would be packed with the others.
        for left in Path(self.build_lib).rglob("*.so"):
            left.unlink()
        try:
            super().run()
        except (Exception, SystemExit) as error:
            raise CannotCompile(f"the build fails ({_reason(error)}); see what it says above") from error


def _compile(source: str) -> None:
    """Compile and link C{source} as the extensions will be, and throw the result away."""
    with tempfile.TemporaryDirectory(prefix="relaymux-") as directory:
        file = Path(directory, "probe.c")
        file.write_text(source, encoding="ascii")
        command = build_ext(Distribution({"ext_modules": [Extension("probe", [str(file)])]}))
        command.build_lib = command.build_temp = directory
        command.ensure_finalized()
        command.run()


def check_compiler() -> None:
    """
    @raise CannotCompile: if C for this Python cannot be compiled here.
    """
    for missing, source in (
        ("no C compiler works", "#include <stdlib.h>\nint probe(void) { return abs(1); }\n"),
        ("Python's headers do not work", "#include <Python.h>\nvoid probe(void) { PyErr_Clear(); }\n"),
    ):
        try:
            _compile(source)
        except (Exception, SystemExit) as error:
            raise CannotCompile(
                f"{missing} ({_reason(error)}); install compiler and headers (apt install gcc python3-dev)"
            ) from error


def _extensions() -> list[Extension]:
    """
    @raise CannotCompile: if mypyc is not there, or finds fault with what it compiles.
    """
    try:
        from mypyc.build import mypycify
    except Exception as error:
        raise CannotCompile(f"mypyc is missing ({error}); install mypy beside setuptools") from error
    # The project's own configuration wants a plugin that the core does without, as do builds.
    options = [
        "--config-file=",
        f"--cache-dir={os.devnull}",
        "--follow-imports=skip",
        "--ignore-missing-imports",
        "--no-site-packages",
    ]
    files = [name.replace(".", "/") + ".py" for name in COMPILED]
    try:
        # Names the library that all these modules share, so that it is within the package.
        group = "relaymux.compiled"
        modules = mypycify([*options, *files], opt_level="2", target_dir="build/mypyc", group_name=group)
    except (Exception, SystemExit) as error:
        raise CannotCompile(f"mypyc fails ({_reason(error)}); see what it says above") from error
    for extension in modules:
        # A warning about generated code, from a compiler that mypyc does not know yet, is no reason to fail.
        extension.extra_compile_args = [flag for flag in extension.extra_compile_args if flag != "-Werror"]
    native = Extension(
        NATIVE,
        [f"relaymux/net/{name}" for name in NATIVE_SOURCES],
        depends=[f"relaymux/net/{name}" for name in NATIVE_HEADERS],
        extra_compile_args=["-O2", "-fvisibility=hidden", *_WARNINGS],
    )
    # The quicker one to fail first.
    return [native, *modules]


def main() -> None:
    wanted = os.environ.get("RELAYMUX_COMPILE") or "auto"
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"error: RELAYMUX_COMPILE={wanted}: please set it to auto, 0 or 1, or not at all")
    if wanted != "0" and _COMPILING.intersection(sys.argv):
        try:
            check_compiler()
            setup(ext_modules=_extensions(), cmdclass={"build_ext": BuildExtensions})
            return
        except CannotCompile as why:
            if wanted == "1":
                sys.exit(f"error: relaymux cannot be compiled, which RELAYMUX_COMPILE=1 demands: {why}")
            print(
                "warning: relaymux is built without its compiled parts.  It works all the same, and costs"
                f" more CPU per byte.\n  Why: {why}.\n  Build it again when that is mended;"
                " RELAYMUX_COMPILE=0 leaves them out without this warning.",
                file=sys.stderr,
            )
    # All of it in Python, whatever came of the above: compiled modules do not work by halves.
    setup(setup_requires=_wanted_to_build(wanted))


def _wanted_to_build(wanted: str) -> list[str]:
    """@return: what pip has to provide for the build that it asks about, which it does with C{egg_info}."""
    if wanted == "0" or "egg_info" not in sys.argv:
        return []
    try:
        check_compiler()
    except CannotCompile:
        return []
    return [MYPY]


if __name__ == "__main__":
    main()
