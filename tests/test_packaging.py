"""
The project as others install it: the wheel, the source distribution and the
editable install, each of which must make C{twistd relaymux} exist.
"""

from __future__ import annotations

import atexit
import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from relaymux import __version__

PROJECT = Path(__file__).parent.parent

#: What git and the tools leave in a checkout, and what running the examples does.
_NOT_SOURCE = shutil.ignore_patterns(
    ".*", "*.egg-info", "__pycache__", "_trial_temp*", "build", "dist", "dropin.cache", "pki", "run", "run-*"
)

#: Seconds; these commands take a few on an idle machine.
_PATIENCE = 300


def run(*command: str | Path, cwd: Path) -> str:
    """@return: what the command writes to standard output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(
        command,
        cwd=cwd,
        env={**environment, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
        check=False,
    )
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

    def install(self, *what: str | Path) -> None:
        command = ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--ignore-installed")
        run(self.python, *command, *what, cwd=self.directory)

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
        names = zipfile.ZipFile(distributions()[1]).namelist()
        self.assertEqual(
            [name for name in names if name.startswith("twisted")], ["twisted/plugins/relaymux_plugin.py"]
        )

    def test_all_packages(self) -> None:
        """Packages are listed by name; none may be forgotten, with or without Python in it."""
        names = zipfile.ZipFile(distributions()[1]).namelist()
        for path in (PROJECT / "relaymux").rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.name != "dropin.cache":
                self.assertIn(str(path.relative_to(PROJECT)), names)

    def test_nothing_else(self) -> None:
        """Neither tests nor examples land in everybody's site-packages."""
        names = zipfile.ZipFile(distributions()[1]).namelist()
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
        """As C{pip install -e .} does it: a path entry, since an import hook hides the plugin from twistd."""
        project = copy_of_project()
        environment = FreshEnvironment()
        environment.install("--editable", project)
        self.assert_works(environment, project)
