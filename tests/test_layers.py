"""What may import what: the arrows of docs/architecture.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from tests.compiled import compiled_modules

PROJECT = Path(__file__).parent.parent

#: Everything is told to the core by calls, bytes and a number for the time; it does no input and
#: output, reads no clock and logs nothing.
FORBIDDEN_IN_CORE = {
    "asyncio",
    "datetime",
    "logging",
    "select",
    "selectors",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "threading",
    "time",
    "twisted",
    "zope",
}

#: What each layer may import of relaymux.
ALLOWED = {
    "core": {"core", "errors"},
    "net": {"core", "errors", "interfaces", "net"},
    "plugins": {"transports"},
    "transports": {"errors", "interfaces", "net", "plugins", "transports"},
}

#: Modules that are started by a person, or by twistd for one.
ENTRY_POINTS = {"__main__.py", "cli.py", "tap.py"}


def sources(layer: str = "") -> list[Path]:
    return sorted((PROJECT / "relaymux" / layer).rglob("*.py"))


def dotted_name(source: Path) -> str:
    parts = source.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: Path) -> Iterator[str]:
    """@return: the dotted names that C{source} imports, anywhere in it; C{from x import y} is C{x.y}."""
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"{source}:{node.lineno}: imports are absolute in this project")
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def run_python(script: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False
    )
    return result.stdout + result.stderr


class CoreTests(SynchronousTestCase):
    """relaymux.core does no input and output."""

    def test_discovered(self) -> None:
        """The other tests here look at something."""
        self.assertIn("relaymux.core.frames", [dotted_name(source) for source in sources("core")])

    def test_imports_in_the_sources(self) -> None:
        """No module of the core names a forbidden one, not even inside a function."""
        for source in sources("core"):
            for name in imported(source):
                self.assertNotIn(name.partition(".")[0], FORBIDDEN_IN_CORE, str(source))

    def test_imports_when_run(self) -> None:
        """Importing a module of the core brings neither Twisted nor logging along, by whatever way."""
        for source in sources("core"):
            name = dotted_name(source)
            output = run_python(
                f"import sys; before = set(sys.modules); import {name}; "
                "print(*sorted({'twisted', 'zope', 'logging', 'asyncio'} & (set(sys.modules) - before)))"
            )
            self.assertEqual(output, "\n", name)


class LayerTests(SynchronousTestCase):
    """Upper layers know lower ones and not the other way round."""

    def test_arrows(self) -> None:
        """Each layer imports what it may of relaymux."""
        for layer, allowed in ALLOWED.items():
            for source in sources(layer):
                for name in imported(source):
                    package, _, rest = name.partition(".")
                    if package == "relaymux":
                        self.assertIn(rest.partition(".")[0], allowed, f"{source} imports {name}")

    def test_reactor(self) -> None:
        """
        The reactor is handed in; only what a person starts takes the one there is, and the test
        cases of the test kit, when they run.
        """
        for source in sources():
            if source.name not in ENTRY_POINTS and "testing" not in source.parts:
                for name in imported(source):
                    self.assertNotEqual(name, "twisted.internet.reactor", str(source))

    def test_importing_installs_no_reactor(self) -> None:
        """No module, entry points included, makes the choice of a reactor by being imported."""
        names = [dotted_name(source) for source in sources() if source.name != "__main__.py"]
        output = run_python(
            "import importlib, sys\n"
            f"for name in {names!r}:\n"
            "    importlib.import_module(name)\n"
            "    if 'twisted.internet.reactor' in sys.modules:\n"
            "        sys.exit(name + ' installs a reactor')\n"
        )
        self.assertEqual(output, "")

    def test_bases_of_what_is_compiled(self) -> None:
        """
        No class of a module that is compiled inherits from one that is not: mypyc, which does not
        look at that one, would leave the base out, and what is compiled would crash.
        """
        modules = compiled_modules()[1:]
        known = {*modules, "builtins", "enum", "typing"}
        output = run_python(
            "import importlib\n"
            f"for module in {modules!r}:\n"
            "    for kind in vars(importlib.import_module(module)).values():\n"
            "        if isinstance(kind, type) and kind.__module__ == module:\n"
            f"            wrong = [base for base in kind.__bases__ if base.__module__ not in {known!r}]\n"
            "            if wrong:\n"
            "                print(module, kind, wrong)\n"
        )
        self.assertEqual(output, "")

    def test_plugin_is_light(self) -> None:
        """Every twistd of the machine may load the plugin, which must not bring relaymux along."""
        output = run_python(
            "import sys; import twisted.plugins.relaymux_plugin\n"
            "print(*sorted(name for name in sys.modules if name.startswith('relaymux')))"
        )
        self.assertEqual(output, "\n")
