"""Tests of how QEMU is found and fetched; none of them needs a network or QEMU."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from relaymux.testing.qemu import install, packages
from relaymux.testing.qemu import tools as tools_module
from relaymux.testing.qemu.packages import (
    Source,
    choose_suite,
    parse_one_line,
    parse_stanzas,
    read_sources,
    select_sources,
)
from relaymux.testing.qemu.tools import QemuTools, QemuUnavailable, load, locate, missing, save
from tests.qemu.support import DirectoryTestCase

STANZAS = """\
# A mirror near us
Types: deb deb-src
URIs: http://mirror.example/debian
# and its parts
Suites: trixie trixie-updates
Components: main contrib
Signed-By: /usr/share/keyrings/archive.gpg

Types: deb
URIs: http://mirror.example/security
Suites: trixie-security
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc=

Enabled: no
Types: deb
URIs: http://mirror.example/off
Suites: trixie
Components: main

Types: deb-src
URIs: http://mirror.example/source
Suites: trixie
Components: main
"""


class SourcesTests(DirectoryTestCase):
    """apt's own files are understood as apt understands them."""

    def test_stanzas(self) -> None:
        """Comments, several types, keys in place; nothing that is disabled or has no binaries."""
        first, second = parse_stanzas(STANZAS)
        self.assertEqual(
            first,
            Source(
                "http://mirror.example/debian",
                ("trixie", "trixie-updates"),
                ("main", "contrib"),
                (("Signed-By", "/usr/share/keyrings/archive.gpg"),),
            ),
        )
        key = "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc="
        self.assertEqual(second.options, (("Signed-By", key),))

    def test_written_again(self) -> None:
        """What is written reads as the same."""
        sources = parse_stanzas(STANZAS)
        self.assertEqual(parse_stanzas("".join(source.stanza() for source in sources)), sources)

    def test_one_line(self) -> None:
        """The older form, with options."""
        text = (
            "# deb http://mirror.example/debian trixie main\n"
            "deb-src http://mirror.example/debian trixie main\n"
            "deb [arch=amd64,i386 signed-by=/k.gpg lang=de] http://mirror.example/debian trixie main # ours\n"
            "deb http://mirror.example/security trixie-security main contrib\n"
        )
        first, second = parse_one_line(text)
        self.assertEqual(first.options, (("Architectures", "amd64 i386"), ("Signed-By", "/k.gpg")))
        self.assertEqual((first.suites, first.components), (("trixie",), ("main",)))
        self.assertEqual((second.suites, second.components), (("trixie-security",), ("main", "contrib")))

    def test_all_files(self) -> None:
        """The main file and the directory beside it; no file of another kind."""
        parts = self.directory / "sources.list.d"
        parts.mkdir()
        (self.directory / "sources.list").write_text("deb http://one.example/ trixie main\n")
        (parts / "b.sources").write_text(
            "Types: deb\nURIs: http://two.example/\nSuites: trixie\nComponents: main\n"
        )
        (parts / "c.sources.off").write_text(STANZAS)
        self.assertEqual(
            [source.uris for source in read_sources(self.directory)],
            ["http://one.example/", "http://two.example/"],
        )

    def test_select(self) -> None:
        """The release's own archives, each with its backports once; nobody else's."""
        chosen = select_sources(
            [
                Source("http://a.example", ("trixie", "trixie-updates"), ("main",)),
                Source("http://b.example", ("trixie-security",), ("main",)),
                Source("http://c.example", ("trixie", "trixie-backports"), ("main",)),
                Source("http://d.example", ("stable",), ("main",)),
                Source("http://e.example", ("trixie",), ("stable",)),
                Source("http://f.example", ("cloud-trixie",), ("main",)),
            ],
            "trixie",
        )
        self.assertEqual(
            [(source.uris[7], source.suites) for source in chosen],
            [
                ("a", ("trixie", "trixie-updates", "trixie-backports")),
                ("b", ("trixie-security",)),
                ("c", ("trixie", "trixie-backports")),
                ("d", ("stable", "stable-backports")),
            ],
        )


def row(version: str, suite: str) -> str:
    """@return: a row of C{apt-cache madison}."""
    return f"qemu-system-x86 | {version} | http://mirror.example/debian {suite}/main amd64 Packages\n"


class ChooseTests(SynchronousTestCase):
    """Backports are used where they are needed, and only there."""

    OLD = row("1:7.2+dfsg-7+deb12u18+b3", "bookworm")
    BACKPORT = row("1:10.0.2+ds-2~bpo12+1", "bookworm-backports")
    NEW = row("1:10.0.2+ds-2", "trixie")
    NEWER = row("1:10.2+ds-1~bpo13+1", "trixie-backports")

    def test_choices(self) -> None:
        """The release if it is new enough, else its backports, else what there is."""
        self.assertEqual(choose_suite(self.BACKPORT + self.OLD), "bookworm-backports")
        self.assertEqual(choose_suite(self.NEWER + self.NEW), "")
        self.assertEqual(choose_suite(self.OLD), "")
        self.assertIsNone(choose_suite(""))


class ToolsTests(DirectoryTestCase):
    """Finding the programs, and remembering them."""

    def setUp(self) -> None:
        super().setUp()
        self.programs = self.directory / "bin"
        self.programs.mkdir()
        self.patch(os, "environ", dict(os.environ, PATH=str(self.programs)))

    def program(self, name: str, version: str = "10.0.2") -> str:
        """Make a program that says its version."""
        path = self.programs / name
        path.write_text(f"#!/bin/sh\necho {name} version {version}\n")
        path.chmod(0o755)
        return str(path)

    def tools(self, version: tuple[int, ...] = (10, 0, 2)) -> QemuTools:
        """All programs, as found since this machine started."""
        names = ("qemu-system-x86_64", "qemu-img", "qemu-nbd", "nbdcopy")
        system, img, nbd, nbdcopy = (self.program(name) for name in names)
        return QemuTools(system, version, "tcg", img, nbd, nbdcopy, boot=tools_module.boot_id())

    def test_missing(self) -> None:
        """What is not there is named by its package, each package once."""
        self.assertEqual(missing(locate()), ["qemu-system-x86", "qemu-utils", "libnbd-bin"])
        self.program("qemu-img")
        self.program("nbdcopy")
        self.assertEqual(missing(locate()), ["qemu-system-x86", "qemu-utils"])

    def test_private_tree(self) -> None:
        """The system's own programs come first; its QEMU can be passed over."""
        tree = self.directory / "tree"
        (tree / "usr/bin").mkdir(parents=True)
        for name in ("qemu-system-x86_64", "qemu-img"):
            (tree / "usr/bin" / name).write_text("")
            (tree / "usr/bin" / name).chmod(0o755)
            self.program(name)
        self.assertEqual(Path(locate(tree)["system"]).parent, self.programs)
        other = locate(tree, system=False)
        self.assertEqual(Path(other["system"]).parent, tree / "usr/bin")
        self.assertEqual(Path(other["img"]).parent, self.programs)

    def test_remembered(self) -> None:
        """What was found is found again."""
        tools = self.tools()
        save(tools, self.directory)
        self.assertEqual(load(self.directory), tools)

    def test_remembered_in_vain(self) -> None:
        """Nothing is believed that is damaged, from before a restart, gone or another version."""
        self.assertIsNone(load(self.directory))
        (self.directory / "tools.json").write_text('{"system": "/usr/bin/qemu"')
        self.assertIsNone(load(self.directory))
        tools = self.tools((7, 2))
        save(tools, self.directory)
        self.assertIsNone(load(self.directory))
        tools = self.tools()
        save(tools, self.directory)
        self.patch(tools_module, "boot_id", lambda: "another")
        self.assertIsNone(load(self.directory))
        self.patch(tools_module, "boot_id", lambda: tools.boot)
        self.assertEqual(load(self.directory), tools)
        Path(tools.nbdcopy).unlink()
        self.assertIsNone(load(self.directory))

    def test_nothing_to_get_it_with(self) -> None:
        """Without QEMU and without apt a person is told what to install."""
        self.patch(packages, "available", lambda: False)
        self.program("nbdcopy")
        error = self.assertRaises(QemuUnavailable, install.ensure_tools, self.directory)
        self.assertIn("please install qemu-system-x86, qemu-utils (", str(error))
        self.assertIn("no apt here", str(error))

    def test_not_installed(self) -> None:
        """Who does not want to fetch is told how to."""
        error = self.assertRaises(QemuUnavailable, install.installed_tools, self.directory)
        self.assertIn("python -m relaymux.testing.qemu.install", str(error))

    def test_fetching_fails(self) -> None:
        """What apt says reaches the person."""

        def fetch(*_: object) -> Path:
            raise QemuUnavailable("apt-get update failed:\nE: no network")

        self.patch(packages, "available", lambda: True)
        self.patch(packages, "fetch", fetch)
        said: list[str] = []
        error = self.assertRaises(QemuUnavailable, install.ensure_tools, self.directory, said.append)
        self.assertIn("E: no network", str(error))
        self.assertIn("please install qemu-system-x86", str(error))
        self.assertEqual(said, ["QEMU is not complete here; getting qemu-system-x86, qemu-utils, libnbd-bin"])

    def test_broken(self) -> None:
        """A QEMU of the system that does not run is reported and replaced."""
        self.tools()
        Path(self.program("qemu-img")).write_text("#!/bin/sh\necho no libfoo >&2; exit 127\n")
        self.patch(packages, "available", lambda: False)
        said: list[str] = []
        self.assertRaises(QemuUnavailable, install.ensure_tools, self.directory, said.append)
        self.assertIn("qemu-img does not run: no libfoo", said[0])

    def test_only_what_is_missing(self) -> None:
        """A QEMU of the system that is new enough is kept; an old one is not."""
        wanted: list[list[str]] = []

        def fetch(names: list[str], *_: object) -> Path:
            wanted.append(names)
            raise QemuUnavailable("that is all")

        self.patch(packages, "available", lambda: True)
        self.patch(packages, "fetch", fetch)
        for version in ("10.0.2", "7.2.22"):
            self.program("qemu-system-x86_64", version)
            self.assertRaises(QemuUnavailable, install.ensure_tools, self.directory, lambda text: None)
        self.assertEqual(wanted[0], ["qemu-utils", "libnbd-bin"])
        self.assertEqual(wanted[1], ["qemu-system-x86", "qemu-utils", "libnbd-bin"])

    def test_old_one_will_do(self) -> None:
        """If nothing newer can be had, an old QEMU is used and known to be one."""
        old = self.tools((7, 2, 22))
        self.patch(install, "_find", lambda cache, report: old)
        self.patch(packages, "available", lambda: False)
        said: list[str] = []
        self.assertEqual(install.ensure_tools(self.directory, said.append), old)
        self.assertFalse(old.safe)
        self.assertIn("a calmer guest", said[0])

    def test_several_at_once(self) -> None:
        """Of several processes that want QEMU one fetches it."""
        fetched: list[int] = []
        tools = self.tools()

        def fetch(*_: object) -> QemuTools:
            fetched.append(1)
            return tools

        self.patch(install, "_find", lambda cache, report: None)
        self.patch(install, "_fetch", fetch)
        found: list[QemuTools] = []
        threads = [
            threading.Thread(target=lambda: found.append(install.ensure_tools(self.directory)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.assertEqual((found, fetched), ([tools] * 4, [1]))
