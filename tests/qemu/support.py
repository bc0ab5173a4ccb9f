"""What the tests with a real QEMU have in common."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from relaymux.testing.qemu.install import installed_tools
from relaymux.testing.qemu.tools import QemuTools, QemuUnavailable

T = TypeVar("T")

MIB = 1 << 20


def run(action: Coroutine[Any, Any, T], seconds: float = 90.0) -> T:
    """Run C{action} to its end, in an event loop of its own, for at most C{seconds}."""

    async def limited() -> T:
        return await asyncio.wait_for(action, seconds)

    return asyncio.run(limited())


def write_random(path: Path, mebibytes: int) -> str:
    """@return: the digest of what was written."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for _ in range(mebibytes):
            chunk = os.urandom(MIB)
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    """@return: the digest of a whole file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(MIB):
            digest.update(chunk)
    return digest.hexdigest()


class DirectoryTestCase(SynchronousTestCase):
    """@ivar directory: empty, private, and with a path short enough for sockets."""

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rmx-"))
        self.addCleanup(shutil.rmtree, self.directory)


class QemuTestCase(DirectoryTestCase):
    """@ivar tools: QEMU; without it the tests skip and say what is missing."""

    tools: QemuTools

    def setUp(self) -> None:
        super().setUp()
        try:
            self.tools = installed_tools()
        except QemuUnavailable as error:
            raise SkipTest(str(error)) from None
