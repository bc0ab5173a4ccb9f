"""
The project as others install it: the wheel, the source distribution and the
editable install, each of which must make C{twistd relaymux} exist; compiled
where it can be, and all of it in Python elsewhere.
"""

from __future__ import annotations

import atexit
import functools
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from relaymux import __version__
from tests.compiled import files_command, uncompiled

PROJECT = Path(__file__).parent.parent

#: What git and the tools leave in a checkout, and what running the examples does.
_NOT_SOURCE = shutil.ignore_patterns(
    *(".*", "*.egg-info", "*.so", "__pycache__", "_trial_temp*", "build", "dist", "dropin.cache"),
    *("pki", "run", "run-*"),
)

#: Seconds; these commands take a few on an idle machine.
_PATIENCE = 300


def attempt(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """
    Run C{command} with these environment variables, and nothing compiled unless they want it: that takes half
    a minute.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1", "COLUMNS": "80"}
    return subprocess.run(
        command,
        cwd=cwd,
        env={**environment, "RELAYMUX_COMPILE": "0", **variables},
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
        check=False,
    )


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """@return: what the command writes to standard output."""
    result = attempt(*command, cwd=cwd, **variables)
    if result.returncode:
        raise AssertionError(f"{command} failed ({result.returncode}):\n{result.stdout}\n{result.stderr}")
    return result.stdout


def scratch() -> Path:
    """@return: a directory that lasts as long as this process."""
    directory = Path(tempfile.mkdtemp(prefix="rmx"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def copy_of_project() -> Path:
    """Building leaves things in the directory it is done in."""
    return Path(shutil.copytree(PROJECT, scratch() / "relaymux", ignore=_NOT_SOURCE))


@functools.cache
def distributions() -> tuple[Path, Path]:
    """@return: the source distribution, and the wheel that is built from it."""
    output = scratch()
    command = ("-m", "build", "--no-isolation", "--outdir", output)
    run(sys.executable, *command, cwd=copy_of_project())
    (source,) = output.glob("*.tar.gz")
    (wheel,) = output.glob("*.whl")
    return source, wheel


def wheel_names() -> list[str]:
    """@return: the files in the wheel that has nothing compiled."""
    return zipfile.ZipFile(distributions()[1]).namelist()


class FreshEnvironment:
    """
    A virtualenv that has what the tests' own one has, except relaymux: without
    a network, and without reading that one's C{.pth} files.
    """

    def __init__(self) -> None:
        self.directory = scratch()
        venv.create(self.directory, symlinks=True)
        self.python = self.directory / "bin/python"
        (site_packages,) = self.directory.glob("lib/python*/site-packages")
        shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (site_packages / "shared.pth").write_text("\n".join(sorted(shared)))

    def install(self, *what: str | Path, **variables: str) -> None:
        command = ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--ignore-installed")
        run(self.python, *command, *what, cwd=self.directory, **variables)

    def twistd_help(self) -> str:
        return run(
            self.python, "-c", "from twisted.scripts.twistd import run; run()", "--help", cwd=self.directory
        )

    def version(self) -> str:
        return run(self.directory / "bin/relaymux", "--version", cwd=self.directory)

    def location(self) -> Path:
        script = "import relaymux; print(relaymux.__file__)"
        return Path(run(self.python, "-c", script, cwd=self.directory).strip())


class DistributionTests(SynchronousTestCase):
    """What is in the files that are published."""

    def test_only_our_plugin_under_twisted(self) -> None:
        """Anything else there would overwrite Twisted's own files, and take them along when uninstalled."""
        names = wheel_names()
        self.assertEqual(
            [name for name in names if name.startswith("twisted")], ["twisted/plugins/relaymux_plugin.py"]
        )

    def test_all_packages(self) -> None:
        """
        Packages are listed by name; none may be forgotten, with or without Python in it.  Only C is of no use
        to who installs a wheel.
        """
        names = wheel_names()
        for path in (PROJECT / "relaymux").rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.name != "dropin.cache":
                check = self.assertNotIn if path.suffix in (".c", ".h") else self.assertIn
                check(str(path.relative_to(PROJECT)), names)

    def test_nothing_else(self) -> None:
        """Neither tests nor examples land in everybody's site-packages."""
        names = wheel_names()
        tops = {name.partition("/")[0] for name in names}
        self.assertEqual(tops, {"relaymux", "twisted", f"relaymux-{__version__}.dist-info"})

    def test_source_distribution(self) -> None:
        """It has what a packager builds, tests and ships, and nothing private that lay around."""
        with tarfile.open(distributions()[0]) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        for name in (
            "CHANGELOG.md",
            "LICENSE",
            "Makefile",
            "README.md",
            "docs/configuration.md",
            "etc/relay.ini",
            "etc/relaymux.service",
            "relaymux/net/_native.c",
            "relaymux/net/_native.h",
            "relaymux/net/_records.h",
            "relaymux/net/_sealing.c",
            "scripts/bootstrap",
            "tests/test_packaging.py",
            "twisted/plugins/relaymux_plugin.py",
        ):
            self.assertIn(name, names)
        for name in names:
            self.assertIsNone(re.search(r"\.key$|\.pem$|dropin\.cache|\.pyc$|^etc/(run|pki)", name), name)

    def test_no_package_of_twisted_here(self) -> None:
        """With an __init__.py the checkout would hide Twisted, or its plugins, from whoever runs in it."""
        self.assertEqual([path.name for path in (PROJECT / "twisted").rglob("*.py")], ["relaymux_plugin.py"])


class InstallTests(SynchronousTestCase):
    """Installed in either way, the commands are there."""

    def assert_works(self, environment: FreshEnvironment, below: Path) -> None:
        self.assertTrue(environment.location().is_relative_to(below), environment.location())
        self.assertRegex(environment.twistd_help(), r"(?m)^ +relaymux +Every stream of a live migration")
        self.assertEqual(environment.version(), f"relaymux {__version__}\n")

    def test_nothing_without_installing(self) -> None:
        """The other tests prove something: the environment they begin with has no relaymux."""
        environment = FreshEnvironment()
        self.assertNotIn("relaymux", environment.twistd_help())

    def test_wheel(self) -> None:
        """As C{pip install relaymux} does it."""
        environment = FreshEnvironment()
        environment.install(distributions()[1])
        self.assert_works(environment, environment.directory)

    def test_editable(self) -> None:
        """
        As C{pip install -e .} does it: a path entry, since an import hook hides the plugin from twistd, and
        nothing compiled, which would hide changes.
        """
        project = copy_of_project()
        environment = FreshEnvironment()
        environment.install("--editable", project, RELAYMUX_COMPILE="")
        self.assert_works(environment, project)
        self.assertEqual([*project.rglob("*.so"), *environment.directory.rglob("*.so")], [])


class CompilingTests(SynchronousTestCase):
    """What C{RELAYMUX_COMPILE} and the compiler make of it."""

    def build(self, project: Path, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[Path]]:
        """@return: what was said, and the wheel, if there is one."""
        output = scratch()
        command = ("-m", "build", "--no-isolation", "--wheel", "--outdir", output)
        return attempt(sys.executable, *command, cwd=project, **variables), list(output.iterdir())

    def assert_pure(self, wheels: list[Path]) -> None:
        self.assertEqual([wheel.name for wheel in wheels], [f"relaymux-{__version__}-py3-none-any.whl"])
        names = zipfile.ZipFile(wheels[0]).namelist()
        self.assertEqual([name for name in names if name.endswith(".so")], [])
        self.assertEqual(sorted(names), sorted(wheel_names()))

    def assert_pure_with_a_warning(self, project: Path, why: str, **variables: str) -> None:
        result, wheels = self.build(project, RELAYMUX_COMPILE="", **variables)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        warnings = re.findall(r"warning: relaymux is built without its.*\n  Why: .*", result.stderr)
        self.assertEqual(len(warnings), 1, result.stderr)
        self.assertIn(why, warnings[0])
        self.assert_pure(wheels)

    def needs_a_compiler(self) -> None:
        described = runpy.run_path(str(PROJECT / "setup.py"))
        try:
            described["check_compiler"]()
        except described["CannotCompile"] as why:
            raise SkipTest(f"nothing can be compiled here: {why}") from why

    def test_unwanted(self) -> None:
        self.assert_pure([distributions()[1]])

    def test_no_compiler(self) -> None:
        """By default that is no error."""
        self.assert_pure_with_a_warning(copy_of_project(), "no C compiler works", CC="/bin/false")

    def test_core_unfit(self) -> None:
        """What mypyc does not take is installed as it is."""
        self.needs_a_compiler()
        project = copy_of_project()
        with (project / "relaymux/core/window.py").open("a", encoding="utf-8") as module:
            module.write("\n_number: int = 'none'\n")
        self.assert_pure_with_a_warning(project, "mypyc fails")

    def test_compiler_fails(self) -> None:
        """Nor is anything compiled when the compiler, which works for a trial, fails later."""
        self.needs_a_compiler()
        project = copy_of_project()
        (project / "relaymux/net/_native.c").write_text("#error none\n", encoding="ascii")
        self.assert_pure_with_a_warning(project, "the build fails")

    def test_demanded_without_compiler(self) -> None:
        result, wheels = self.build(copy_of_project(), RELAYMUX_COMPILE="1", CC="/bin/false")
        self.assertNotEqual(result.returncode, 0)
        self.assertEqual(wheels, [])
        self.assertRegex(result.stderr, "RELAYMUX_COMPILE=1 demands: no C compiler works .*/bin/false")

    def test_misspelt(self) -> None:
        result, wheels = self.build(copy_of_project(), RELAYMUX_COMPILE="yes")
        self.assertNotEqual(result.returncode, 0)
        self.assertEqual(wheels, [])
        self.assertIn("RELAYMUX_COMPILE=yes: please set it to auto, 0 or 1", result.stderr)

    def test_compiled(self) -> None:
        """All that is meant to be compiled is, and beside it lie the same files as without."""
        self.needs_a_compiler()
        project = copy_of_project()
        result, wheels = self.build(project, RELAYMUX_COMPILE="1")
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        names = zipfile.ZipFile(wheels[0]).namelist()
        self.assertEqual(sorted(name for name in names if not name.endswith(".so")), sorted(wheel_names()))
        # The library that the core's modules share, too, is where it can be nobody else's.
        compiled = [name for name in names if name.endswith(".so")]
        self.assertEqual([name for name in compiled if not name.startswith("relaymux/")], [])

        environment = FreshEnvironment()
        environment.install(wheels[0])
        printed = run(environment.python, *files_command(), cwd=environment.directory)
        self.assertEqual(uncompiled(printed, environment.directory), [])
        self.assertEqual(environment.version(), f"relaymux {__version__}\n")
        # Generated C and the like stay where builds put what they need.
        made = {path.name for path in project.iterdir()} - {path.name for path in PROJECT.iterdir()}
        self.assertLessEqual(made, {"build", "relaymux.egg-info"})
        self.assertEqual(list((project / "relaymux").rglob("*.so")), [])
