"""Listening UNIX sockets: made whole, never over a stranger's, recovered, removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from relaymux.errors import ConfigurationError
from relaymux.net.disks import (
    BoundSocket,
    bind_unix,
    ensure_directory,
    explain_denied,
    peer_credentials,
)

#: Seconds that another process may take for anything.
DEADLINE = 60

NOBODY = 65534

#: Binds what its first argument says, tells how that went, stays until its input ends or it is killed.
BINDER = """
import sys
from relaymux.errors import ConfigurationError
from relaymux.net.disks import bind_unix
for line in sys.stdin:
    try:
        bound = bind_unix(sys.argv[1])
    except ConfigurationError as e:
        print("refused", e, flush=True)
        sys.stdin.readline()
    else:
        print("bound", flush=True)
        sys.stdin.readline()
        bound.remove()
    print("done", flush=True)
"""

#: Collects the modes at a path, as fast as it can, until there is a file named as its second argument.
WATCHER = """
import os, sys
seen = set()
print("watching", flush=True)
while not os.path.exists(sys.argv[2]):
    for _ in range(200):
        try:
            seen.add(os.lstat(sys.argv[1]).st_mode)
        except FileNotFoundError:
            pass
print(*sorted(map(oct, seen)), flush=True)
"""

#: Binds, hands the listening socket to a child that outlives it, prints the child's pid.
BEQUEATHER = """
import subprocess, sys, time
from relaymux.net.disks import bind_unix
bound = bind_unix(sys.argv[1])
child = subprocess.Popen(["sleep", "60"], pass_fds=[bound.socket.fileno()], stdout=subprocess.DEVNULL)
print(child.pid, flush=True)
time.sleep(60)
"""


class Helper:
    """A Python process that is told lines and answers lines."""

    def __init__(self, script: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            text=True,
        )

    def tell(self, line: str = "go") -> None:
        """Say a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        """@return: its next line."""
        assert self.process.stdout is not None
        previous = signal.signal(signal.SIGALRM, self._too_late)
        signal.alarm(DEADLINE)
        try:
            return self.process.stdout.readline().rstrip("\n")
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)

    def _too_late(self, *_: object) -> None:
        raise AssertionError(f"no answer from pid {self.process.pid} within {DEADLINE} s")

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone.  More than once does no harm."""
        self.process.kill()
        self.process.communicate(timeout=DEADLINE)


class WithSockets(SynchronousTestCase):
    """Gives each test a private directory."""

    def setUp(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="rmx")
        self.addCleanup(shutil.rmtree, self.directory)
        self.path = os.path.join(self.directory, "vda.sock")

    def bind(self, path: str = "") -> BoundSocket:
        """@return: a socket that is removed after the test."""
        bound = bind_unix(path or self.path)
        self.addCleanup(bound.remove)
        return bound

    def helper(self, script: str, *arguments: str) -> Helper:
        """@return: a process that is killed after the test."""
        helper = Helper(script, *arguments)
        self.addCleanup(helper.kill)
        return helper

    def refuse(self, *words: str, path: str = "", **options: int) -> str:
        """C{bind_unix} must refuse, with all of C{words}.  @return: the message."""
        with self.assertRaises(ConfigurationError) as caught:
            bind_unix(path or self.path, **options)
        for word in words:
            self.assertIn(word, str(caught.exception))
        return str(caught.exception)

    def content(self) -> list[str]:
        """@return: what is in the directory."""
        return sorted(os.listdir(self.directory))

    def call(self, path: str = "") -> socket.socket:
        """@return: a client connected to the path; closed after the test."""
        client = socket.socket(socket.AF_UNIX)
        self.addCleanup(client.close)
        client.settimeout(DEADLINE)
        client.connect(path or self.path)
        return client

    def assert_serves(self, bound: BoundSocket) -> None:
        """Whoever connects to the path reaches C{bound}."""
        client = self.call(bound.path)
        accepted, _ = bound.socket.accept()
        with accepted:
            accepted.sendall(b"here")
        self.assertEqual(client.recv(16), b"here")

    def assert_untouched(self, listening: socket.socket) -> None:
        """Nobody has connected to C{listening}."""
        listening.setblocking(False)
        self.assertRaises(BlockingIOError, listening.accept)

    @contextlib.contextmanager
    def as_nobody(self) -> Iterator[None]:
        """Act as an unprivileged user."""
        if os.geteuid() != 0:
            raise SkipTest("only root can act as another user")
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(0)


class BindUnixTests(WithSockets):
    """L{bind_unix} where nothing is in the way, and L{BoundSocket.remove}."""

    def test_socket(self) -> None:
        """The socket listens, does not block, is not inherited, and is for its owner only."""
        bound = self.bind()
        self.assertEqual(bound.path, self.path)
        self.assertEqual(os.lstat(self.path).st_mode, stat.S_IFSOCK | 0o600)
        self.assertFalse(bound.socket.getblocking())
        self.assertFalse(bound.socket.get_inheritable())
        self.assert_serves(bound)

    def test_mode_whatever_the_umask(self) -> None:
        """The configured mode is the mode, under any umask and in a directory of a group."""
        os.chmod(self.directory, 0o2770)
        for umask in (0, 0o22, 0o777):
            for mode in (0o600, 0o660, 0o666):
                previous = os.umask(umask)
                try:
                    bound = bind_unix(self.path, mode=mode)
                finally:
                    os.umask(previous)
                self.assertEqual(os.lstat(self.path).st_mode, stat.S_IFSOCK | mode)
                bound.remove()

    def test_owner_and_group(self) -> None:
        """Owner and group are set; each alone leaves the other."""
        if os.geteuid() != 0:
            raise SkipTest("only root can give files away")
        for (owner, group), expected in (
            ((12, 34), (12, 34)),
            ((12, None), (12, 0)),
            ((None, 34), (0, 34)),
        ):
            bound = bind_unix(self.path, owner=owner, group=group)
            self.addCleanup(bound.remove)
            status = os.lstat(self.path)
            self.assertEqual((status.st_uid, status.st_gid), expected)
            self.assert_serves(bound)
            bound.remove()

    def test_owner_not_ours_to_give(self) -> None:
        """Without the privilege, giving it away is refused, says why, and leaves nothing."""
        with self.as_nobody():
            directory = tempfile.mkdtemp(prefix="rmx")
            self.addCleanup(shutil.rmtree, directory)
            self.refuse("owner 0, group None", "CAP_CHOWN", path=f"{directory}/a", owner=0)
        self.assertEqual(os.listdir(directory), [])

    def test_remove(self) -> None:
        """After remove nothing is left and nobody can connect; a second remove does nothing."""
        bound = bind_unix(self.path)
        waiting = self.call()
        bound.remove()
        self.assertEqual(self.content(), [])
        self.assertRaises(ConnectionResetError, waiting.recv, 1)
        again = self.bind()
        bound.remove()
        self.assert_serves(again)

    def test_remove_leaves_a_stranger(self) -> None:
        """What has taken our socket's place is not ours to delete."""
        bound = bind_unix(self.path)
        os.unlink(self.path)
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.bind(self.path)
            bound.remove()
            self.assertEqual(self.content(), ["vda.sock"])

    def test_remove_when_gone(self) -> None:
        """Somebody having deleted the files, or the directory, is no error."""
        for what in (self.path, f"{self.path}.lock"):
            bound = bind_unix(self.path)
            os.unlink(what)
            bound.remove()
            self.assertEqual(self.content(), [])
        bound = bind_unix(self.path)
        shutil.rmtree(self.directory)
        bound.remove()
        os.mkdir(self.directory)

    def test_remove_denied(self) -> None:
        """A socket that may no longer be deleted is an error, but does not stay open."""
        with self.as_nobody():
            directory = tempfile.mkdtemp(prefix="rmx")
            self.addCleanup(shutil.rmtree, directory)
            bound = bind_unix(f"{directory}/a")
        os.chown(directory, 0, 0)
        os.chmod(directory, 0o755)
        with self.as_nobody():
            self.assertRaises(PermissionError, bound.remove)
        self.assertEqual(bound.socket.fileno(), -1)
        with self.assertRaises(ConnectionRefusedError):
            self.call(f"{directory}/a")

    def test_longest_path(self) -> None:
        """107 bytes are fine, also for who has to be recovered; 108 are refused and counted, in bytes."""
        base = os.path.join(self.directory, "")
        longest = base + "x" * (107 - len(base))
        killed = self.helper(BINDER, longest)
        killed.tell()
        self.assertEqual(killed.hear(), "bound")
        killed.kill()
        bound = self.bind(longest)
        self.assert_serves(bound)
        bound.remove()
        self.assertEqual(self.content(), [])
        self.refuse("108 bytes", "at most 107", path=longest + "x")
        self.refuse("108 bytes", path=longest[:-1] + "\u00e4")
        self.assertEqual(self.content(), [])

    def test_bad_paths(self) -> None:
        """What is no absolute path of a file is refused: abstract, relative, a directory's, with NUL."""
        for path in ("@relaymux", "\0relaymux"):
            self.refuse("@relaymux", "abstract", path=path)
        for path in (
            "vda.sock",
            "./a",
            f"{self.directory}/",
            f"{self.directory}/..",
            f"{self.directory}/a\0b",
        ):
            self.refuse("absolute path", path=path)
        self.refuse("'~'", path=f"{self.path}~")

    def test_directory(self) -> None:
        """A missing directory, one that is none, and one that everybody may write to are refused."""
        self.refuse("does not exist", f"{self.directory}/web1", path=f"{self.directory}/web1/vda.sock")
        Path(self.path).touch()
        self.refuse("is not a directory", self.path, path=f"{self.path}/vda.sock")
        os.unlink(self.path)
        os.chmod(self.directory, 0o777)
        self.refuse("mode 0777", "chmod o-w")
        for mode in (0o1777, 0o770):
            os.chmod(self.directory, mode)
            self.bind().remove()

    def test_permission_denied(self) -> None:
        """Being denied names the place, and SELinux and AppArmor, which ls does not show."""
        os.chmod(self.directory, 0o755)
        with self.as_nobody():
            self.refuse(self.path, "Permission denied", f"uid {NOBODY}", "SELinux", "AppArmor")
        self.assertIn("/run/x", explain_denied("/run/x"))

    def test_full_disk_leaves_nothing(self) -> None:
        """An error half way names the place, removes what was made, and the path can be tried again."""
        self.patch(socket.socket, "listen", self.fail_to_listen)
        self.refuse("No space left on device")
        self.assertEqual(self.content(), [])
        self.refuse("No space left on device")

    def fail_to_listen(self, backlog: int) -> None:
        """Stands in for C{socket.listen}."""
        raise OSError(28, "No space left on device")

    def test_never_another_mode(self) -> None:
        """Somebody who looks all the time while it starts and stops 200 times sees the one mode only."""
        stop = os.path.join(self.directory, "stop")
        watcher = self.helper(WATCHER, self.path, stop)
        self.assertEqual(watcher.hear(), "watching")
        for _ in range(200):
            bind_unix(self.path, mode=0o640).remove()
        self.addCleanup(
            bind_unix(self.path, mode=0o640).remove
        )  # stays, so that the watcher has seen at least this one
        Path(stop).touch()
        self.assertEqual(watcher.hear(), oct(stat.S_IFSOCK | 0o640))
        os.unlink(stop)

    def test_complete_at_first_sight(self) -> None:
        """Looked at before and after every single call that makes it, it is not there or it is complete."""
        seen: list[int] = []
        in_the_making: set[int] = set()

        def look(*_: object) -> None:
            with contextlib.suppress(FileNotFoundError):
                in_the_making.add(os.lstat(f"{self.path}~").st_mode & stat.S_IRWXO)
            with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as client:
                seen.append(os.lstat(self.path).st_mode)
                client.connect(self.path)

        self.addCleanup(os.umask, os.umask(0))
        previous = sys.getprofile()
        sys.setprofile(look)
        try:
            bound = bind_unix(self.path, mode=0o660)
        finally:
            sys.setprofile(previous)
        self.addCleanup(bound.remove)
        self.assertGreater(len(seen), 1)
        self.assertEqual(set(seen), {stat.S_IFSOCK | 0o660})
        self.assertEqual(in_the_making, {0})


class OccupiedPathTests(WithSockets):
    """L{bind_unix} where something is in the way."""

    def test_in_use_by_us(self) -> None:
        """Two sections with one path: the second is refused, the first never notices."""
        bound = self.bind()
        self.refuse(self.path, "in use by this process", f"pid {os.getpid()}")
        self.assert_untouched(bound.socket)
        self.assert_serves(bound)

    def test_in_use_by_another_process(self) -> None:
        """A second daemon is refused and told the first one's pid; the first is not even connected to."""
        first = self.bind()
        second = self.helper(BINDER, self.path)
        second.tell()
        answer = second.hear()
        self.assertIn(f"in use by pid {os.getpid()}", answer)
        second.tell()
        self.assertEqual(second.hear(), "done")
        self.assert_untouched(first.socket)
        self.assert_serves(first)
        self.assertEqual(self.content(), ["vda.sock", "vda.sock.lock"])

    def test_race(self) -> None:
        """Of four processes that start at once one gets the path, and the others' ends do not hurt it."""
        racers = [self.helper(BINDER, self.path) for _ in range(4)]
        for _ in range(40):
            for racer in racers:
                racer.tell()
            answers = [racer.hear() for racer in racers]
            self.assertEqual(sum(answer == "bound" for answer in answers), 1, answers)
            for racer, answer in zip(racers, answers, strict=True):
                if answer != "bound":
                    self.assertIn("in use by", answer)
                    racer.tell()
                    self.assertEqual(racer.hear(), "done")
            self.call().close()
            winner = racers[answers.index("bound")]
            winner.tell()
            self.assertEqual(winner.hear(), "done")
            self.assertEqual(self.content(), [])

    def test_lock_of_one_who_leaves(self) -> None:
        """A lock got while its last holder deletes its file is worth nothing: it is taken anew."""
        flock = fcntl.flock
        calls = []

        def leave_first(descriptor: int, operation: int) -> None:
            calls.append(descriptor)
            if len(calls) == 1:
                os.unlink(f"{self.path}.lock")
            flock(descriptor, operation)

        self.patch(fcntl, "flock", leave_first)
        self.assert_serves(self.bind())
        self.assertEqual(len(calls), 2)
        self.refuse("in use by this process")

    def test_strangers(self) -> None:
        """A link, file, directory or FIFO is refused and named, and left as it is; so is a dangling link."""
        target = os.path.join(self.directory, "target")
        Path(target).write_text("precious")
        for make, kind in (
            (lambda: os.symlink(target, self.path), "symbolic link"),
            (lambda: os.symlink("nowhere", self.path), "symbolic link"),
            (lambda: os.link(target, self.path), "regular file"),
            (lambda: os.mkdir(self.path), "directory"),
            (lambda: os.mkfifo(self.path), "FIFO"),
        ):
            make()
            before = os.lstat(self.path)
            self.refuse(f"{self.path} is a {kind}", "remove it")
            after = os.lstat(self.path)
            self.assertEqual((after.st_ino, after.st_mtime_ns), (before.st_ino, before.st_mtime_ns))
            self.assertEqual(self.content(), ["target", "vda.sock"])
            self.assertEqual(Path(target).read_text(), "precious")
            (os.rmdir if kind == "directory" else os.unlink)(self.path)

    def test_strange_sockets(self) -> None:
        """A socket that is not known to be ours, served or not, is left alone and never connected to."""
        for listening in (True, False):
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.bind(self.path)
                if listening:
                    stranger.listen()
                else:
                    stranger.close()
                self.refuse("a socket that relaymux did not make", f"owner uid {os.geteuid()}")
                if listening:
                    self.assert_untouched(stranger)
            self.assertEqual(self.content(), ["vda.sock"])
            os.unlink(self.path)

    def test_stranger_in_place_of_ours(self) -> None:
        """A lock file of a killed daemon does not make a stranger's socket at the path ours."""
        killed = self.helper(BINDER, self.path)
        killed.tell()
        self.assertEqual(killed.hear(), "bound")
        killed.kill()
        os.unlink(self.path)
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.bind(self.path)
            stranger.listen()
            self.refuse("a socket that relaymux did not make")
            self.assert_untouched(stranger)
        os.unlink(self.path)
        self.assert_serves(self.bind())

    def test_strange_lock_file(self) -> None:
        """A lock file that is a link, a directory or somebody else's is refused, named and left alone."""
        lock = f"{self.path}.lock"
        target = os.path.join(self.directory, "target")
        os.symlink(target, lock)
        self.refuse(lock)
        os.unlink(lock)
        os.mkdir(lock)
        self.refuse(lock)
        os.rmdir(lock)
        Path(lock).write_text("not ours")
        if os.geteuid() == 0:
            os.chown(lock, NOBODY, NOBODY)
            self.refuse(lock, "not a file of this user")
            os.chown(lock, 0, 0)
        self.assertEqual(self.content(), ["vda.sock.lock"])
        self.assert_serves(self.bind())

    def test_stranger_under_the_temporary_name(self) -> None:
        """What is not a socket of ours under the name used while making one is left alone."""
        Path(f"{self.path}~").write_text("a backup")
        self.refuse(f"{self.path}~ is a regular file")
        self.assertEqual(self.content(), ["vda.sock~"])


class RecoveryTests(WithSockets):
    """L{bind_unix} after its last user was killed."""

    def leave_behind(self) -> None:
        """Let a process make the socket and be killed."""
        killed = self.helper(BINDER, self.path)
        killed.tell()
        self.assertEqual(killed.hear(), "bound")
        killed.kill()
        self.assertEqual(self.content(), ["vda.sock", "vda.sock.lock"])

    def test_killed_again_and_again(self) -> None:
        """Each of twenty daemons killed in turn is recovered by the next."""
        for _ in range(20):
            self.leave_behind()
        bound = self.bind()
        self.assert_serves(bound)
        bound.remove()
        self.assertEqual(self.content(), [])

    def test_given_away(self) -> None:
        """A socket that libvirt has given to QEMU's user, with another mode, is still known as ours."""
        self.leave_behind()
        os.chmod(self.path, 0o755)
        if os.geteuid() == 0:
            os.chown(self.path, NOBODY, NOBODY)
        self.assert_serves(self.bind())

    def test_given_away_by_another_user(self) -> None:
        """So is one that we may no longer even connect to."""
        with self.as_nobody():
            directory = tempfile.mkdtemp(prefix="rmx")
            self.addCleanup(shutil.rmtree, directory)
            path = f"{directory}/a"
            process = os.fork()
            if process == 0:
                with contextlib.ExitStack() as leave:
                    leave.callback(os._exit, 1)
                    bind_unix(path)
                    os._exit(0)
            self.assertEqual(os.waitpid(process, 0), (process, 0))
        os.chown(path, 12, 34)
        with self.as_nobody():
            self.assertRaises(PermissionError, self.call, path)
            bound = self.bind(path)
            self.assert_serves(bound)
            bound.remove()

    def test_killed_while_making(self) -> None:
        """A socket that was not yet at its path when its maker was killed is removed."""
        for chowned in (False, True):
            self.leave_behind()
            os.rename(self.path, f"{self.path}~")
            if chowned and os.geteuid() == 0:
                os.chown(f"{self.path}~", NOBODY, NOBODY)
            if not chowned:
                os.unlink(f"{self.path}.lock")  # killed even before it was written down
            bound = self.bind()
            self.assert_serves(bound)
            bound.remove()
            self.assertEqual(self.content(), [])

    def test_inherited(self) -> None:
        """A socket that a child of the killed daemon still holds is in use; nothing is deleted."""
        killed = self.helper(BEQUEATHER, self.path)
        child = int(killed.hear())
        try:
            killed.kill()
            self.refuse(f"in use by pid {killed.process.pid}")
            self.assertEqual(self.content(), ["vda.sock", "vda.sock.lock"])
        finally:
            os.kill(child, signal.SIGKILL)


class HelperFunctionTests(WithSockets):
    """L{ensure_directory} and L{peer_credentials}."""

    def test_directory_is_made(self) -> None:
        """The last component is made for its owner only, under a loose umask too; a second call is fine."""
        path = os.path.join(self.directory, "web1")
        self.addCleanup(os.umask, os.umask(0))
        ensure_directory(path)
        self.assertEqual(os.stat(path).st_mode, stat.S_IFDIR | 0o700)
        os.chmod(path, 0o750)
        ensure_directory(f"{path}/")
        self.assertEqual(os.stat(path).st_mode, stat.S_IFDIR | 0o750)

    def test_somebody_was_faster(self) -> None:
        """Two daemons that start together have one directory."""
        path = os.path.join(self.directory, "run")
        make = os.mkdir

        def after_the_other(path: str, mode: int) -> None:
            make(path, mode)
            make(path, mode)

        self.patch(os, "mkdir", after_the_other)
        ensure_directory(path)
        self.assertTrue(os.path.isdir(path))

    def test_directory_for_another_user(self) -> None:
        """With its mode, whatever the umask, and its owner; one that cannot be given away is not left."""
        path = os.path.join(self.directory, "hv-a")
        self.addCleanup(os.umask, os.umask(0o077))
        ensure_directory(path, 0o755)
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o755)
        os.rmdir(path)
        if os.geteuid() == 0:
            ensure_directory(path, 0o700, NOBODY)
            self.assertEqual(os.stat(path).st_uid, NOBODY)
            os.rmdir(path)
        os.chmod(self.directory, 0o777)
        with self.as_nobody(), self.assertRaises(ConfigurationError):
            ensure_directory(path, 0o700, 0)
        self.assertFalse(os.path.exists(path))

    def test_directory_cannot_be_made(self) -> None:
        """No parent, something else there, or no permission: refused, naming the place."""
        missing = os.path.join(self.directory, "no", "web1")
        taken = os.path.join(self.directory, "taken")
        Path(taken).touch()
        for path in (missing, taken):
            with self.assertRaises(ConfigurationError) as caught:
                ensure_directory(path)
            self.assertIn(path, str(caught.exception))
        os.chmod(self.directory, 0o755)
        with self.as_nobody(), self.assertRaises(ConfigurationError) as caught:
            ensure_directory(os.path.join(self.directory, "web2"))
        self.assertIn("SELinux", str(caught.exception))

    def test_peer_credentials(self) -> None:
        """Both ends learn the other's process, user and group."""
        us = (os.getpid(), os.getuid(), os.getgid())
        one, two = socket.socketpair(socket.AF_UNIX)
        with one, two:
            self.assertEqual(peer_credentials(one), us)
        listener = self.helper(BINDER, self.path)
        listener.tell()
        self.assertEqual(listener.hear(), "bound")
        self.assertEqual(peer_credentials(self.call()).pid, listener.process.pid)
        listener.tell()
        self.assertEqual(listener.hear(), "done")

    def test_not_connected(self) -> None:
        """Something that has no peer is an error, not zeros."""
        with socket.socket(socket.AF_INET) as other, self.assertRaises(OSError):
            peer_credentials(other)
