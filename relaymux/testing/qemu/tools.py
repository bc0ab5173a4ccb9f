"""Which QEMU programs to use, what they can do, and where that is remembered."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from relaymux.testing.qemu.guest import GuestSettings, boot_sector

__all__ = [
    "SAFE_VERSION",
    "QemuTools",
    "QemuUnavailable",
    "boot_id",
    "cache_directory",
    "load",
    "locate",
    "missing",
    "probe",
    "runs_guest",
    "save",
    "version_of",
]

#: The first release whose migration without KVM is right for a busy guest:
#: before it, pages dirtied through TCG could be missed.
SAFE_VERSION = (9, 0)

#: Seconds a guest has for its first ticks.  It takes one without KVM on an idle
#: machine; a KVM that emulates each instruction does not get there in a minute.
_PROBE_SECONDS = 10.0

_PROBE_TICKS = 50

#: Where each program comes from on Debian and its relatives.
_PACKAGES = {"system": "qemu-system-x86", "img": "qemu-utils", "nbd": "qemu-utils", "nbdcopy": "libnbd-bin"}


class QemuUnavailable(Exception):
    """There is no QEMU to use; the message says what to install."""


@dataclass(frozen=True)
class QemuTools:
    """
    The programs, and how to run them.

    @ivar system: path of qemu-system-x86_64.
    @ivar version: its version, major and minor and so on.
    @ivar accel: C{"kvm"} or C{"tcg"}; C{"kvm"} only where it has run our guest.
    @ivar firmware: directories with its firmware; empty when it finds its own.
    @ivar libraries: directories with shared libraries that are not the system's.
    @ivar boot: which boot of which machine this was found in.
    """

    system: str
    version: tuple[int, ...]
    accel: str
    img: str
    nbd: str
    nbdcopy: str
    firmware: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    boot: str = ""

    @property
    def safe(self) -> bool:
        """Whether a guest may dirty its memory quickly and still be migrated right."""
        return self.accel == "kvm" or self.version >= SAFE_VERSION

    @property
    def description(self) -> str:
        """C{"QEMU 10.0.2 with TCG"}."""
        return f"QEMU {'.'.join(map(str, self.version))} with {self.accel.upper()}"

    def environment(self) -> dict[str, str]:
        """@return: the environment to run any of the programs in."""
        environment = dict(os.environ)
        paths = [*self.libraries, *filter(None, [environment.get("LD_LIBRARY_PATH")])]
        if paths:
            environment["LD_LIBRARY_PATH"] = ":".join(paths)
        return environment

    def machine_arguments(self, memory: int) -> list[str]:
        """
        @param memory: in MiB.
        @return: the command line of a bare machine, its program first.
        """
        arguments = [self.system, "-no-user-config", "-nodefaults", "-display", "none"]
        for directory in self.firmware:
            arguments += ["-L", directory]
        return [*arguments, "-machine", "pc", "-accel", self.accel, "-m", str(memory)]


def cache_directory() -> Path:
    """
    Where private packages and the last finding are kept.

    @return: RELAYMUX_QEMU_CACHE if set, else C{.cache/qemu} in the checkout,
        else in the user's cache directory.
    """
    if chosen := os.environ.get("RELAYMUX_QEMU_CACHE"):
        return Path(chosen).absolute()
    checkout = Path(__file__).resolve().parents[3]
    if (checkout / "pyproject.toml").exists():
        return checkout / ".cache" / "qemu"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relaymux" / "qemu"


def locate(tree: Path | None = None, *, system: bool = True) -> dict[str, str]:
    """
    Find the programs.

    @param tree: privately unpacked packages; None to search PATH alone.
    @param system: whether to take qemu-system-x86_64 from PATH when it is there.
    @return: the paths of those found, by their fields in L{QemuTools}.
    """
    found: dict[str, str] = {}
    names = {"system": "qemu-system-x86_64", "img": "qemu-img", "nbd": "qemu-nbd", "nbdcopy": "nbdcopy"}
    for field, name in names.items():
        path = shutil.which(name) if system or field != "system" else None
        if path is None and tree is not None:
            path = shutil.which(name, path=str(tree / "usr" / "bin"))
        if path is not None:
            found[field] = path
    return found


def probe(programs: dict[str, str], tree: Path | None = None) -> QemuTools:
    """
    Run the programs and find out what they can do.

    @param programs: all four, as from L{locate}.
    @raise QemuUnavailable: one of them does not run, or no guest runs.
    """
    libraries: list[str] = []
    firmware: list[str] = []
    if tree is not None:
        libraries = sorted({str(path.parent) for path in tree.glob("**/lib/**/*.so.*")})
        if Path(programs["system"]).is_relative_to(tree):
            firmware = [str(tree / "usr/share/qemu"), str(tree / "usr/share/seabios")]
    tools = QemuTools(
        **programs,
        version=(),
        accel="tcg",
        firmware=tuple(firmware),
        libraries=tuple(libraries),
        boot=boot_id(),
    )
    for program in (tools.img, tools.nbd, tools.nbdcopy):
        version_of(program, tools.environment())
    fields = asdict(tools) | {"version": version_of(tools.system, tools.environment())}
    tools = QemuTools(**fields)
    # With a QEMU that does not need KVM every machine does the same.
    if not tools.safe and Path("/dev/kvm").exists():
        with_kvm = QemuTools(**(fields | {"accel": "kvm"}))
        if runs_guest(with_kvm):
            return with_kvm
    if not runs_guest(tools):
        raise QemuUnavailable(f"{tools.system} does not run a guest within {_PROBE_SECONDS:.0f} seconds")
    return tools


def runs_guest(tools: QemuTools) -> bool:
    """
    Boot the guest as it is migrated, for its first ticks.

    F{/dev/kvm} that can be opened proves nothing: on nested hosts it may run
    no guest at all, or one that is a hundred times slower than without it.
    """
    guest = GuestSettings()
    sector = boot_sector(guest)
    with tempfile.TemporaryDirectory(prefix="rmx-probe-") as directory:
        image = Path(directory, "boot.img")
        image.write_bytes(sector.ljust(1 << 20, b"\0"))
        drive = f"file={image},format=raw,if=virtio"
        process = subprocess.Popen(
            [*tools.machine_arguments(guest.memory), "-serial", "stdio", "-drive", drive],
            env=tools.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        limit = threading.Timer(_PROBE_SECONDS, process.kill)
        limit.start()
        try:
            assert process.stdout is not None
            ticks = 0
            for line in process.stdout:
                ticks += line.endswith(b" ok\r\n")
                if ticks >= _PROBE_TICKS:
                    return True
            return False
        finally:
            limit.cancel()
            process.kill()
            process.communicate()


def save(tools: QemuTools, cache: Path) -> None:
    """Remember C{tools} in C{cache}."""
    partial = cache / "tools.json.new"
    partial.write_text(json.dumps(asdict(tools), indent=1) + "\n", encoding="utf-8")
    partial.replace(cache / "tools.json")


def load(cache: Path) -> QemuTools | None:
    """
    @return: what was remembered, if it was found since this machine started
        and all of it still runs; else None.
    """
    try:
        fields = json.loads((cache / "tools.json").read_text(encoding="utf-8"))
        lists = {name: tuple(fields[name]) for name in ("version", "firmware", "libraries")}
        tools = QemuTools(**(fields | lists))
        if tools.boot != boot_id():
            return None
        for program in (tools.img, tools.nbd, tools.nbdcopy):
            version_of(program, tools.environment())
        if version_of(tools.system, tools.environment()) != tools.version:
            return None
    except (OSError, ValueError, TypeError, KeyError, QemuUnavailable):
        return None
    return tools


def missing(programs: Iterable[str]) -> list[str]:
    """@return: the packages, as Debian names them, of what L{locate} did not find."""
    found = set(programs)
    return list(dict.fromkeys(name for field, name in _PACKAGES.items() if field not in found))


def version_of(program: str, environment: dict[str, str] | None = None) -> tuple[int, ...]:
    """
    @param environment: to run it in; None is this process's own.
    @return: what C{program --version} says.
    @raise QemuUnavailable: the program does not run.
    """
    try:
        result = subprocess.run(
            [program, "--version"], env=environment, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QemuUnavailable(f"{program} does not run: {error}") from error
    match = re.search(r"(\d+(?:\.\d+)+)", result.stdout)
    if result.returncode or not match:
        raise QemuUnavailable(f"{program} does not run: {(result.stderr or result.stdout).strip()}")
    return tuple(map(int, match[1].split(".")))


def boot_id() -> str:
    """@return: what is different after every start of this machine; empty where there is no such thing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
