"""
The UNIX sockets that a C{[disk]} or C{[stream]} section with C{listen} makes for QEMU.

What comes through such a socket is a guest's memory and disks, so there must
be no moment at which a stranger could connect, and nothing of a stranger's
may be harmed.  Making one:

 1. The lock file beside it is taken (L{relaymux.net.locks}).  Taken already:
    the path is in use, and the file says by whom.
 2. Whatever is at the path is left alone, unless it is the very socket that
    the lock file names: then its maker was killed, and it is removed.
 3. The socket is bound under another name with mode 0600, given its mode and
    owner, set to listen, and only then renamed to its path: whoever sees it
    there can connect.

Alternatives declined:

 - To find out whether a socket lives by connecting to it.  QEMU takes the
   first connection to its migration socket as the migration, so the probe
   alone could ruin what it finds.  Only a socket known to be ours is probed.
 - To bind and chmod at the path itself.  Between the two the mode is another,
   and until listen() whoever waited for the file is refused.
 - A link, which would not replace a stranger's file made in the microseconds
   since the check.  AppArmor judges whoever connects by the name that the
   bound socket carries, and that moves along with a rename only.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from typing import NamedTuple

from relaymux.net.locks import SocketLock, in_use, refusal, unlink_same

__all__ = [
    "MAX_PATH_BYTES",
    "BoundSocket",
    "PeerCredentials",
    "bind_unix",
    "clear_unix",
    "ensure_directory",
    "explain_denied",
    "peer_credentials",
]

#: What fits into C{sun_path} with its final NUL.
MAX_PATH_BYTES = 107

#: Connections that wait to be accepted.  Above the 255 channels that multifd
#: can open in a burst; beyond it a client waits, or gets EAGAIN if it cannot.
BACKLOG = 512

#: What SO_PEERCRED says of a socket that has no peer, or is no UNIX socket.
_NO_UID = 0xFFFFFFFF

_KINDS = {
    stat.S_IFSOCK: "a socket that relaymux did not make",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class PeerCredentials(NamedTuple):
    """Who is at the other end of a UNIX socket."""

    pid: int
    uid: int
    gid: int


class BoundSocket:
    """
    A listening UNIX socket at its path, from L{bind_unix}.

    @ivar socket: listening, non-blocking, close-on-exec.
    @ivar path: where it is.  (Its C{getsockname} is the name it was bound under.)
    """

    def __init__(self, listening: socket.socket, lock: SocketLock, status: os.stat_result) -> None:
        """
        @param listening: at the lock's path; ours from now on.
        @param lock: ours from now on.
        @param status: of the file it was bound to.
        """
        self.path = lock.path
        self.socket = listening
        self._lock = lock
        self._status = status
        self._removed = False

    def remove(self) -> None:
        """
        Stop listening and delete the socket, unless something else has taken
        its place, then the lock file.  Does nothing the second time.

        Whoever still waits to be accepted is reset.

        @raise OSError: a file could not be deleted.  Everything is closed all the same.
        """
        if self._removed:
            return
        self._removed = True
        try:
            unlink_same(self.path, self._status)
        finally:
            self.socket.close()
            self._lock.release()


def bind_unix(
    path: str,
    *,
    mode: int = 0o600,
    owner: int | None = None,
    group: int | None = None,
    backlog: int = BACKLOG,
) -> BoundSocket:
    """
    Make a listening UNIX socket that appears at C{path} complete: with its
    mode and owner, and accepting.

    To be called by the process that will serve it (after daemonizing): the
    lock file names this process.  The directory must exist.  Its owner and,
    if it is writable to them, its group are trusted; one that is writable to
    everybody must be sticky.

    @param path: absolute, at most 107 bytes.
    @param mode: permission bits.  Connecting takes write permission.
    @param owner: uid; L{None} leaves our own.  Another one takes CAP_CHOWN.
    @param group: gid; L{None} leaves the directory's or our own.
    @param backlog: connections that may wait to be accepted.
    @raise ConfigurationError: C{path} cannot be used, is in use, or is taken
        by something that is not ours, which was left alone.
    """
    _check_path(path)
    try:
        _check_directory(path)
        lock = SocketLock(path)
        try:
            _clear(lock)
            return _bind(lock, mode, owner, group, backlog)
        except BaseException:
            lock.release()
            raise
    except OSError as e:
        place = os.fsdecode(e.filename or path)
        denied = isinstance(e, PermissionError)
        cure = explain_denied(place) if denied else "a place where this user can make a socket"
        raise refusal(path, f"{place}: {e.strerror}", cure) from e


def clear_unix(path: str) -> None:
    """
    Remove the socket at C{path} that a killed process had from L{bind_unix}, and its lock file.

    @raise ConfigurationError: it is in use, or not ours, and was left alone.
    @raise OSError: a file could not be removed.
    """
    lock = SocketLock(path)
    try:
        _clear(lock)
    finally:
        lock.release()


def ensure_directory(path: str, mode: int = 0o700, owner: int | None = None) -> None:
    """
    Make the directory C{path}, unless it is there; its parent must be.

    A directory that is there stays as it is: L{bind_unix} judges it.

    @param mode: permission bits.
    @param owner: uid; L{None} leaves our own.  Another one takes CAP_CHOWN.
    @raise ConfigurationError: it could not be made.
    """
    path = path.rstrip("/")
    try:
        if os.path.isdir(path):
            return
        _check_directory(path)
        os.mkdir(path, 0o700)
        try:
            os.chmod(path, mode)
            if owner is not None:
                os.chown(path, owner, -1)
        except BaseException:
            os.rmdir(path)
            raise
    except PermissionError as e:
        raise refusal(path, f"the directory cannot be made: {e.strerror}", explain_denied(path)) from e
    except OSError as e:
        if isinstance(e, FileExistsError) and os.path.isdir(path):
            return  # another daemon that starts just now was faster
        raise refusal(path, f"the directory cannot be made: {e.strerror}", "a place for a directory") from e


def peer_credentials(connection: socket.socket) -> PeerCredentials:
    """
    Who connected to us, or who listens where we connected, as of that moment.

    @param connection: a connected UNIX socket.
    @raise OSError: it is not one.
    """
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    peer = PeerCredentials(*struct.unpack("iII", packed))
    if peer.uid == _NO_UID:
        raise OSError(errno.ENOTCONN, "no peer whose credentials are known")
    return peer


def explain_denied(path: str) -> str:
    """@return: for a message: what to check after EACCES or EPERM for C{path}."""
    return (
        f"uid {os.geteuid()} to be allowed: check the permissions of {path} and of each directory above it; "
        "if these are right, SELinux or AppArmor may forbid it ('ausearch -m avc' or 'journalctl -k' tells)"
    )


def _check_path(path: str) -> None:
    if path.startswith(("@", "\0")):
        shown = path.replace("\0", "@", 1)
        raise refusal(shown, "an abstract socket has no permissions, so anybody may connect", "a path")
    if not path.startswith("/") or path.endswith(("/", "/.", "/..")) or "\0" in path:
        raise refusal(repr(path), "not the absolute path of a file", "such as '/run/relaymux/vda.sock'")
    if path.endswith("~"):
        raise refusal(path, "such a name is that of a socket in the making", "one that does not end in '~'")
    size = len(os.fsencode(path))
    if size > MAX_PATH_BYTES:
        raise refusal(path, f"the path is {size} bytes long", f"at most {MAX_PATH_BYTES}, the kernel's limit")


def _check_directory(path: str) -> None:
    """Refuse a directory in which anybody could put something else in C{path}'s place."""
    directory = os.path.dirname(path)
    try:
        mode = os.stat(directory).st_mode
    except FileNotFoundError as e:
        raise refusal(path, f"the directory {directory} does not exist", "it to be made first") from e
    if not stat.S_ISDIR(mode):
        raise refusal(path, f"{directory} is not a directory", "a path in a directory")
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise refusal(
            path,
            f"everybody may replace files in {directory} (mode {stat.S_IMODE(mode):04o})",
            f"a directory that others cannot write to ('chmod o-w {directory}')",
        )


def _temporary_path(path: str) -> bytes:
    """The name to bind to: never too long, and telling in C{ss -xl}, which shows it for ever."""
    return os.fsencode(path)[: MAX_PATH_BYTES - 1] + b"~"


def _clear(lock: SocketLock) -> None:
    """Remove what a killed process left behind, and nothing else."""
    temporary = _temporary_path(lock.path)
    for name in (os.fsencode(lock.path), temporary):
        try:
            status = os.lstat(name)
        except FileNotFoundError:
            continue
        # One in the making may not have been recorded yet, nor given away.
        ours = lock.names(status) or (name == temporary and status.st_uid == os.geteuid())
        if not (ours and stat.S_ISSOCK(status.st_mode)):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
            raise refusal(
                lock.path,
                f"{os.fsdecode(name)} is {kind} (owner uid {status.st_uid})",
                "nothing to be there; if nobody needs it, remove it",
            )
        _check_unserved(lock.path, name)
        os.unlink(name)


def _check_unserved(path: str, name: bytes) -> None:
    """Our own socket, whose maker is gone: refuse if somebody inherited it and serves it."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            probe.connect(name)
        except (ConnectionRefusedError, PermissionError):
            # No permission: it was given to another user.  Then the lock alone
            # has to tell, which its maker no longer holds.
            return
        except BlockingIOError:
            raise in_use(path, 0) from None
        raise in_use(path, peer_credentials(probe).pid)


def _bind(lock: SocketLock, mode: int, owner: int | None, group: int | None, backlog: int) -> BoundSocket:
    temporary = _temporary_path(lock.path)
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.setblocking(False)
        os.fchmod(listening.fileno(), 0o600)  # at most this is what bind() makes the file with
        listening.bind(temporary)
        try:
            status = os.lstat(temporary)
            lock.record(status)
            os.chmod(temporary, mode)
            _give_away(lock.path, temporary, owner, group)
            listening.listen(backlog)
            os.rename(temporary, lock.path)
        except BaseException:
            os.unlink(temporary)
            raise
    except BaseException:
        listening.close()
        raise
    return BoundSocket(listening, lock, status)


def _give_away(path: str, temporary: bytes, owner: int | None, group: int | None) -> None:
    if owner is None and group is None:
        return
    try:
        os.chown(temporary, -1 if owner is None else owner, -1 if group is None else group)
    except PermissionError as e:
        raise refusal(
            path,
            f"uid {os.geteuid()} may not give it to owner {owner}, group {group}",
            "a group that this user is in; anything else takes root or CAP_CHOWN",
        ) from e
