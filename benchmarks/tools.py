"""Where the programs are that relaymux is compared with, and which package has them."""

from __future__ import annotations

import os
import shutil
from functools import cache

from benchmarks.processes import Unavailable

__all__ = ["PACKAGES", "find"]

#: Debian's packages of the programs.
PACKAGES = {
    "ssh": "openssh-client",
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "stunnel": "stunnel4",
    "haproxy": "haproxy",
    "socat": "socat",
    "nbdkit": "nbdkit",
    "nbdcopy": "libnbd-bin",
    "qemu-img": "qemu-utils",
}

#: Daemons are not on everybody's PATH.
_MORE = "/usr/local/sbin:/usr/sbin:/sbin"


@cache
def find(name: str) -> str:
    """
    @param name: one of L{PACKAGES}.
    @return: the program's path.
    @raise Unavailable: it is not installed.
    """
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_MORE}")
    if found is None:
        raise Unavailable(f"{name} (Debian: {PACKAGES[name]})")
    return found
