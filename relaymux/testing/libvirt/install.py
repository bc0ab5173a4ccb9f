"""
Make libvirt available: C{python -m relaymux.testing.libvirt.install}.

Two editions can be had.  C{release} is what the distribution's release has (Debian 12:
libvirt 9.0 and QEMU 7.2), C{backports} what its backports have (libvirt 11.3 and QEMU
10.0), whose QEMU keeps track of a busy guest's memory without KVM.  They are unpacked
privately and laid over F{/usr} in the hosts' namespaces alone: nothing is installed.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path

from relaymux.testing.qemu import packages
from relaymux.testing.qemu.tools import QemuUnavailable, cache_directory

__all__ = ["Edition", "LibvirtUnavailable", "ensure_libvirt", "installed_libvirt", "main"]

_PACKAGES = (
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "libvirt-clients",
    "qemu-system-x86",
    "qemu-utils",
    "iproute2",
    "nftables",
)

#: What the hosts run; each is in the tree or on the machine.
_PROGRAMS = ("libvirtd", "virsh", "qemu-system-x86_64", "ip", "tc", "nft")


class LibvirtUnavailable(Exception):
    """There is no libvirt to use; the message says what is to be done."""


class Edition(str, Enum):
    """Which packages."""

    RELEASE = "release"
    BACKPORTS = "backports"


def ensure_libvirt(edition: Edition, report: Callable[[str], None] = print) -> Path:
    """
    Get the packages if they are not there.

    Several processes may do this at once; the others wait for the first.

    @param report: told each step that takes time.
    @return: the tree to lay over the machine's own files.
    @raise LibvirtUnavailable: the message says why they cannot be had.
    """
    cache = _cache(edition)
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if missing := _missing(cache / "tree"):
            if not packages.available():
                raise LibvirtUnavailable(
                    f"no {', '.join(missing)} here, and no apt to get {', '.join(_PACKAGES)} with"
                )
            try:
                backports = edition is Edition.BACKPORTS
                packages.fetch(_PACKAGES, cache, report, backports=backports, present=True)
            except (QemuUnavailable, OSError, subprocess.SubprocessError) as error:
                raise LibvirtUnavailable(f"getting {', '.join(_PACKAGES)} failed: {error}") from error
        return installed_libvirt(edition)


def installed_libvirt(edition: Edition) -> Path:
    """
    As L{ensure_libvirt}, without getting anything.

    @raise LibvirtUnavailable: the message says how to get it.
    """
    tree = _cache(edition) / "tree"
    if missing := _missing(tree):
        raise LibvirtUnavailable(
            f"there is no {', '.join(missing)}; "
            f"'python -m relaymux.testing.libvirt.install {edition.value}' gets what is missing"
        )
    return tree


def _cache(edition: Edition) -> Path:
    return cache_directory().with_name(f"libvirt-{edition.value}")


def _missing(tree: Path) -> list[str]:
    places = [tree / directory for directory in ("usr/bin", "usr/sbin", "bin", "sbin")]
    return [name for name in _PROGRAMS if not any((place / name).exists() for place in places)]


def main(arguments: list[str] | None = None) -> int:
    """@return: the exit status: 0 when all editions that were named can be used."""
    names = sys.argv[1:] if arguments is None else arguments
    try:
        for edition in [Edition(name) for name in names] or [Edition.RELEASE]:
            print(f"{edition.value}: {ensure_libvirt(edition)}")
    except (LibvirtUnavailable, ValueError) as error:
        print(f"relaymux: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
