"""
The file beside a listening UNIX socket that says whose it is.

C{vda.sock.lock} is locked (C{flock}) as long as the process lives that made
C{vda.sock}: the kernel lets go of it when the process ends, however it ends.
What it says outlives the process: the process id, and which socket it made,
by inode number and time of making.  Ownership would not do: libvirt hands the
socket to QEMU's user, and root owns a lot that is not relaymux's.

A clean stop deletes the file.  Whoever has opened it by then and locks it
afterwards finds that it is no longer at its path, and starts over.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat

from relaymux.errors import ConfigurationError

__all__ = ["SocketLock", "in_use", "is_same", "refusal", "unlink_same"]

#: A file that vanishes this often in a row between open and lock is not one daemon's clean stop.
_ATTEMPTS = 100

#: Process id, inode number, modification time in ns: of fixed width, so that
#: a reader never sees half of one and half of another.
_RECORD = "{:>10} {:>20} {:>20}\n"
_RECORD_PATTERN = re.compile(rb" *(\d+) +(\d+) +(\d+)\n")

#: In place of a socket's identity: there is none yet.
_NOTHING = (0, 0)


def refusal(path: str, problem: str, expected: str) -> ConfigurationError:
    """@return: the error that says why there will be no socket at C{path}, and what to do."""
    return ConfigurationError(f"cannot listen on {path}: {problem}", expected=expected)


def in_use(path: str, pid: int) -> ConfigurationError:
    """
    @param pid: who uses it; 0 when that is not known (it has only just taken the lock).
    @return: the error that says that a living process serves C{path}.
    """
    if pid == os.getpid():
        return refusal(path, f"in use by this process (pid {pid})", "one section for each path")
    user = f"pid {pid}" if pid else "another process"
    return refusal(path, f"in use by {user}", "another path, or that process to be stopped first")


def is_same(path: str, status: os.stat_result) -> bool:
    """@return: whether the file of which C{status} was taken is at C{path}."""
    try:
        now = os.lstat(path)
    except FileNotFoundError:
        return False
    return (now.st_dev, now.st_ino) == (status.st_dev, status.st_ino)


def unlink_same(path: str, status: os.stat_result) -> None:
    """Delete C{path} if it is still the file of which C{status} was taken."""
    if is_same(path, status):
        os.unlink(path)


class SocketLock:
    """
    The right to make the socket at a path, held until L{release}.

    @ivar path: of the socket.
    """

    def __init__(self, path: str) -> None:
        """
        Take it.

        @raise ConfigurationError: another process has it, or the lock file is
            not one.
        @raise OSError: the lock file could not be opened.
        """
        self.path = path
        self._file = f"{path}.lock"
        self._descriptor = self._take()
        try:
            _, self._identity = _read(self._descriptor)
            self._write()
        except BaseException:
            os.close(self._descriptor)
            raise

    def _take(self) -> int:
        for _ in range(_ATTEMPTS):
            descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
            try:
                status = os.fstat(descriptor)
                if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                    raise refusal(
                        self.path,
                        f"{self._file} is not a file of this user (uid {os.geteuid()})",
                        "the same user each time; if the file is left over, remove it",
                    )
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_same(self._file, status):
                    return descriptor
            except BlockingIOError:
                pid, _ = _read(descriptor)
                os.close(descriptor)
                raise in_use(self.path, pid) from None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # whoever had it was just leaving, and took the file along
        raise refusal(self.path, f"{self._file} keeps vanishing", "nothing but relaymux to touch it")

    def names(self, status: os.stat_result) -> bool:
        """@return: whether C{status} is that of the socket recorded last, by us or who came before."""
        return _identity(status) == self._identity

    def record(self, status: os.stat_result) -> None:
        """Say that the socket of which C{status} was taken is ours.  Holds across chown, chmod and rename."""
        self._identity = _identity(status)
        self._write()

    def release(self) -> None:
        """
        Delete the lock file, unless it names a socket that is still at the
        path, and let go.  To be called once.

        @raise OSError: it could not be deleted.  The lock is let go of all the same.
        """
        try:
            if not (os.path.lexists(self.path) and self.names(os.lstat(self.path))):
                unlink_same(self._file, os.fstat(self._descriptor))
        finally:
            os.close(self._descriptor)

    def _write(self) -> None:
        os.pwrite(self._descriptor, _RECORD.format(os.getpid(), *self._identity).encode("ascii"), 0)


def _identity(status: os.stat_result) -> tuple[int, int]:
    """What tells a file from every other, earlier or later, in its directory."""
    return status.st_ino, status.st_mtime_ns


def _read(descriptor: int) -> tuple[int, tuple[int, int]]:
    """@return: process id and identity of its socket; zeros for what is not known."""
    found = _RECORD_PATTERN.fullmatch(os.pread(descriptor, 256, 0))
    if found is None:
        return 0, _NOTHING
    pid, inode, made = map(int, found.groups())
    return pid, (inode, made)
