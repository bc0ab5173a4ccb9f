"""
QEMU from the distribution's packages, unpacked privately.

apt decides what is needed and checks the signatures, with the machine's own
package sources and a state of its own, so nothing of the system is changed and
root is not needed.  Where the release's QEMU is too old its backports are
asked, from the mirror that the machine is configured for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from relaymux.testing.qemu.tools import SAFE_VERSION, QemuUnavailable

__all__ = [
    "Source",
    "available",
    "choose_suite",
    "fetch",
    "parse_one_line",
    "parse_stanzas",
    "read_sources",
    "select_sources",
]

#: What a release is also called in a list of sources.
_ALIASES = ("stable", "oldstable", "oldoldstable", "testing", "devel")

#: Seconds for one run of apt: 30 MB through a slow mirror.
_APT_SECONDS = 600.0


@dataclass(frozen=True)
class Source:
    """
    One entry of apt's sources.

    @ivar options: other fields (C{Signed-By}, ...), by their deb822 names.
    """

    uris: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    options: tuple[tuple[str, str], ...] = ()

    def stanza(self) -> str:
        """@return: this in deb822 form."""
        fields = [
            ("Types", "deb"),
            ("URIs", self.uris),
            ("Suites", " ".join(self.suites)),
            ("Components", " ".join(self.components)),
            *self.options,
        ]
        return "".join(f"{name}: {value}\n" for name, value in fields) + "\n"


def parse_stanzas(text: str) -> list[Source]:
    """Read a C{*.sources} file; entries that are disabled or only for source code are left out."""
    sources = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        fields: dict[str, str] = {}
        name = ""
        for line in paragraph.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t"):
                fields[name] = f"{fields.get(name, '')}\n{line}"
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().lower()
                fields[name] = value.strip()
        enabled = fields.pop("enabled", "yes").lower() not in ("no", "false", "off", "0")
        types = fields.pop("types", "").split()
        uris, suites = fields.pop("uris", ""), fields.pop("suites", "")
        components = fields.pop("components", "")
        if enabled and "deb" in types and uris and suites:
            options = tuple((key.title(), value) for key, value in fields.items())
            sources.append(Source(uris, tuple(suites.split()), tuple(components.split()), options))
    return sources


def parse_one_line(text: str) -> list[Source]:
    """Read a C{*.list} file."""
    names = {"arch": "Architectures", "signed-by": "Signed-By", "trusted": "Trusted"}
    sources = []
    for line in text.splitlines():
        match = re.match(r"\s*deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+([^\s#]+)([^#]*)", line)
        if match:
            pairs = (option.partition("=") for option in (match[1] or "").split())
            options = tuple((names[key], value.replace(",", " ")) for key, _, value in pairs if key in names)
            sources.append(Source(match[2], (match[3],), tuple(match[4].split()), options))
    return sources


def read_sources(directory: Path = Path("/etc/apt")) -> list[Source]:
    """@return: all entries the machine is configured with."""
    sources = []
    for path in [directory / "sources.list", *sorted((directory / "sources.list.d").glob("*"))]:
        if path.is_file() and path.suffix in (".list", ".sources"):
            parse = parse_one_line if path.suffix == ".list" else parse_stanzas
            sources += parse(path.read_text(encoding="utf-8", errors="replace"))
    return sources


def select_sources(sources: Sequence[Source], codename: str) -> list[Source]:
    """@return: the distribution's own entries, and for each archive of the release its backports."""
    chosen = []
    for source in sources:
        names = (codename, *_ALIASES)
        suites = tuple(suite for suite in source.suites if re.split(r"[-/]", suite)[0] in names)
        if not suites or "main" not in source.components:
            continue
        backports = tuple(f"{suite}-backports" for suite in suites if suite in names)
        extra = tuple(suite for suite in backports if suite not in suites)
        chosen.append(Source(source.uris, suites + extra, source.components, source.options))
    return chosen


def available() -> bool:
    """Whether this machine has apt and its sources."""
    return bool(shutil.which("apt-get") and shutil.which("dpkg-deb") and read_sources())


def fetch(
    packages: Sequence[str],
    cache: Path,
    report: Callable[[str], None],
    *,
    backports: bool = True,
    present: bool = False,
) -> Path:
    """
    Download packages, and of what they need all that the system does not have, and unpack them.

    @param cache: the directory to work in; its C{tree} is replaced.
    @param present: whether to download those C{packages} too that the system has.
    @param backports: whether to prefer the release's backports where its own QEMU
        is too old for a busy guest.
    @return: the tree.
    @raise QemuUnavailable: it is not possible; the message has apt's own words.
    """
    codename = _release()
    sources = select_sources(read_sources(), codename)
    if not sources:
        raise QemuUnavailable(f"no package source of the release {codename!r} is configured in /etc/apt")
    state = cache / "apt"
    shutil.rmtree(state, ignore_errors=True)
    for name in ("lists/partial", "cache/archives/partial", "sources"):
        (state / name).mkdir(parents=True)
    (state / "sources" / "relaymux.sources").write_text(
        "".join(source.stanza() for source in sources), encoding="utf-8"
    )
    (state / "apt.conf").write_text(
        'Dir::Etc::sourcelist "/dev/null";\n'
        f'Dir::Etc::sourceparts "{state}/sources";\n'
        f'Dir::State::lists "{state}/lists";\n'
        f'Dir::Cache "{state}/cache";\n'
        'Acquire::Languages "none";\n'
        'APT::Install-Recommends "false";\n'
        # Nothing of the system is changed, so its locks and hooks are left alone.
        'Debug::NoLocking "true";\n'
        "#clear APT::Update::Pre-Invoke;\n"
        "#clear APT::Update::Post-Invoke;\n"
        "#clear APT::Update::Post-Invoke-Success;\n",
        encoding="utf-8",
    )
    report("reading the distribution's package lists")
    # A suite that does not exist (not every release has backports) fails the
    # run but not the other suites; what counts is what can be had afterwards.
    updated = _apt(state, "apt-get", "update", check=False)
    suite = choose_suite(_apt(state, "apt-cache", "madison", "qemu-system-x86").stdout)
    if suite is None:
        raise QemuUnavailable(f"the package sources have no qemu-system-x86:\n{_tail(updated)}")
    target = ["-t", suite] if suite and backports else []
    report(f"downloading {', '.join(packages)}" + (f" from {suite}" if target else ""))
    again = ["--reinstall"] if present else []
    _apt(state, "apt-get", "-y", "--download-only", *again, *target, "install", *packages)
    archives = sorted((state / "cache" / "archives").glob("*.deb"))
    report(f"unpacking {len(archives)} packages into {cache / 'tree'}")
    fresh, tree = cache / "tree.new", cache / "tree"
    shutil.rmtree(fresh, ignore_errors=True)
    for archive in archives:
        subprocess.run(["dpkg-deb", "-x", str(archive), str(fresh)], check=True, timeout=_APT_SECONDS)
    shutil.rmtree(tree, ignore_errors=True)
    fresh.rename(tree)
    shutil.rmtree(state)
    return tree


def choose_suite(madison: str) -> str | None:
    """
    @param madison: C{apt-cache madison}'s table of versions and where they are.
    @return: the backports suite to prefer; C{""} for none; None if there is no version at all.
    """
    versions: list[tuple[tuple[int, ...], str]] = []
    for line in madison.splitlines():
        _, number, place = (field.strip() for field in line.split("|"))
        upstream = re.sub(r"^\d+:", "", number)
        suite = place.split()[1].partition("/")[0]
        versions.append((tuple(map(int, re.findall(r"\d+", upstream)[:2])), suite))
    suites = [suite for version, suite in versions if version >= SAFE_VERSION]
    if all(suite.endswith("-backports") for suite in suites) and suites:
        return suites[0]
    return "" if versions else None


def _release() -> str:
    for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines():
        if line.startswith("VERSION_CODENAME="):
            return line.partition("=")[2].strip().strip("\"'")
    return "testing"


def _apt(state: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [command[0], "-q", "-c", str(state / "apt.conf"), *command[1:]],
        env=dict(os.environ, LC_ALL="C", DEBIAN_FRONTEND="noninteractive"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_APT_SECONDS,
        check=False,
    )
    if check and result.returncode:
        raise QemuUnavailable(f"{' '.join(command)} failed:\n{_tail(result)}")
    return result


def _tail(result: subprocess.CompletedProcess[str]) -> str:
    return "\n".join(result.stdout.strip().splitlines()[-8:])
