"""The daemon's reactor: what Twisted's own does, and in the same order."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet import error
from twisted.internet.abstract import FileDescriptor
from twisted.internet.threads import deferToThreadPool
from twisted.python.threadpool import ThreadPool
from twisted.trial.unittest import SynchronousTestCase, TestCase

from relaymux.net.buffers import BufferPool
from relaymux.net.descriptor import Descriptor
from relaymux.net.families import transport_for
from relaymux.net.reactor import RelayReactor
from tests.daemons import Daemon
from tests.sockets import Recorder, content

#: Seconds after which a test is given up.
DEADLINE = 20.0

#: More than the kernel takes at once, and than is read in one turn.
LARGE = content(8 * 1024 * 1024)


class ReactorTests(SynchronousTestCase):
    def setUp(self) -> None:
        self.reactor: Any = RelayReactor()
        self.late = self.reactor.callLater(DEADLINE, self.give_up)
        self.addCleanup(self.close)

    def close(self) -> None:
        self.reactor.removeAll()
        for descriptor in (self.reactor.waker.i, self.reactor.waker.o):
            os.close(descriptor)
        self.reactor._poller.close()

    def give_up(self) -> None:
        self.gave_up = True
        self.reactor.stop()

    def run_reactor(self) -> None:
        """Run until somebody stops it."""
        self.gave_up = False
        self.reactor.run(installSignalHandlers=False)
        self.assertFalse(self.gave_up, "nobody stopped the reactor")

    def pair(self) -> tuple[Any, Recorder, Any, Recorder]:
        """Two of our transports that are connected with one another, and their protocols."""
        made: list[Any] = []
        for sock in socket.socketpair():
            protocol = Recorder()
            transport = transport_for(self.reactor, sock, protocol, BufferPool())
            self.assertIsInstance(transport, Descriptor)
            self.reactor.callWhenRunning(transport.begin)
            made += [transport, protocol]
        return tuple(made)

    def stop_when(self, protocol: Recorder, condition: Callable[[], bool]) -> None:
        """Stop the reactor as soon as C{protocol} has received something and C{condition} holds."""

        def look() -> None:
            if condition():
                self.reactor.stop()

        protocol.on_data = look

    def test_bulk(self) -> None:
        """Bytes arrive whole, in both directions at once."""
        near, near_end, far, far_end = self.pair()
        self.reactor.callWhenRunning(near.writeBuffers, [LARGE])
        self.reactor.callWhenRunning(far.writeBuffers, [LARGE])
        for end in (near_end, far_end):
            self.stop_when(end, lambda: len(near_end.received) == len(LARGE) == len(far_end.received))
        self.run_reactor()
        self.assertEqual(near_end.received, LARGE)
        self.assertEqual(far_end.received, LARGE)

    def test_stopped_from_within(self) -> None:
        """A protocol that stops the reactor is the last one that is called."""
        near, _, _, far_end = self.pair()
        self.reactor.callWhenRunning(near.writeBuffers, [LARGE])
        self.stop_when(far_end, lambda: True)
        self.run_reactor()
        self.assertEqual(far_end.deliveries, 1)

    def test_turns_end(self) -> None:
        """What is to be done at the end of a turn is: behind all that can be read now, before any waiting."""
        near, near_end, far, far_end = self.pair()
        called: list[str] = []

        def end(name: str) -> Callable[[], None]:
            return lambda: called.append(name)

        def read(name: str) -> Callable[[], None]:
            def on_data() -> None:
                called.append(f"read {name}")
                self.reactor.callAtTurnsEnd(end(f"end {name}"))

            return on_data

        near_end.on_data, far_end.on_data = read("near"), read("far")

        def both_write() -> None:
            near.write(b"x")
            far.write(b"x")
            self.reactor.callAtTurnsEnd(end("end of a timer"))
            self.reactor.callLater(0.05, self.reactor.stop)

        self.reactor.callLater(0.01, both_write)
        self.run_reactor()
        self.assertEqual(sorted(called[:2]), ["read far", "read near"])
        self.assertEqual(sorted(called[2:]), ["end far", "end near", "end of a timer"])

    def test_turns_end_again_and_again(self) -> None:
        """Who asks for another turn's end each time keeps nobody from reading, nor timers from their time."""
        near, _, _, far_end = self.pair()
        times: list[float] = []

        def again() -> None:
            times.append(self.reactor.seconds())
            if not far_end.received:
                self.reactor.callAtTurnsEnd(again)

        self.reactor.callWhenRunning(again)
        self.reactor.callLater(0.01, near.write, b"x")
        self.stop_when(far_end, lambda: True)
        self.run_reactor()
        self.assertGreater(len(times), 2)

    def test_turns_end_that_raises(self) -> None:
        """An exception is logged, and the others have their turn."""

        def stop() -> None:
            self.reactor.callLater(0, self.reactor.stop)

        self.reactor.callWhenRunning(self.reactor.callAtTurnsEnd, lambda: 1 / 0)
        self.reactor.callWhenRunning(self.reactor.callAtTurnsEnd, stop)
        self.run_reactor()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)

    def test_cancelled_timers(self) -> None:
        """Timers that are set and cancelled with every message are not kept until their time."""
        near, near_end, far, far_end = self.pair()
        timers: list[Any] = [self.reactor.callLater(DEADLINE, lambda: None)]
        most = 0

        def answer(transport: Any) -> Callable[[], None]:
            def on_data() -> None:
                nonlocal most
                most = max(most, len(self.reactor._pendingTimedCalls))
                timers.append(self.reactor.callLater(DEADLINE, lambda: None))
                timers.pop(0).cancel()
                transport.write(b"x")
                if near_end.deliveries == 1000:
                    self.reactor.stop()

            return on_data

        near_end.on_data, far_end.on_data = answer(near), answer(far)
        self.reactor.callWhenRunning(near.write, b"x")
        self.run_reactor()
        self.assertLess(most, 200, "of 2000")

    def test_timers_beside_bulk(self) -> None:
        """What is due is called while sockets have always something to read; new timers count as well."""
        near, _, _, far_end = self.pair()
        called: list[str] = []

        def again() -> None:
            near.writeBuffers([LARGE[:1024]])

        def later() -> None:
            called.append("first")
            self.reactor.callLater(0.01, then)

        def then() -> None:
            called.append("second")
            self.reactor.stop()

        far_end.on_data = again
        self.reactor.callWhenRunning(again)
        self.reactor.callLater(0.01, later)
        self.run_reactor()
        self.assertEqual(called, ["first", "second"])

    def test_timer_made_by_bulk(self) -> None:
        """A timer that is made while sockets have always something to read is not forgotten."""
        near, _, _, far_end = self.pair()
        made: list[str] = []

        def again() -> None:
            if not made:
                made.append("timer")
                self.reactor.callLater(0.01, self.reactor.stop)
            near.writeBuffers([LARGE[:1024]])

        far_end.on_data = again
        self.reactor.callWhenRunning(near.writeBuffers, [LARGE[:1024]])
        self.run_reactor()

    def test_other_threads_beside_bulk(self) -> None:
        """So are calls from threads."""
        near, _, _, far_end = self.pair()
        threads = ThreadPool(0, 1)
        threads.start()
        self.addCleanup(threads.stop)

        def again() -> None:
            near.writeBuffers([LARGE[:1024]])

        far_end.on_data = again
        self.reactor.callWhenRunning(again)

        def answered(number: int) -> None:
            numbers.append(number)
            self.reactor.stop()

        def begin() -> None:
            deferToThreadPool(self.reactor, threads, lambda: 42).addCallback(answered)

        numbers: list[int] = []
        self.reactor.callWhenRunning(begin)
        self.run_reactor()
        self.assertEqual(numbers, [42])

    def test_exception(self) -> None:
        """A protocol's exception is logged and ends its connection, and no other."""
        near, _, _, far_end = self.pair()
        other, _, _, other_end = self.pair()

        def fail() -> None:
            raise ZeroDivisionError("on purpose")

        far_end.on_data = fail
        self.reactor.callWhenRunning(near.write, b"a")
        self.reactor.callLater(0.05, other.write, b"b")
        self.stop_when(other_end, lambda: True)
        self.run_reactor()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertIsInstance(far_end.reason, ZeroDivisionError)
        self.assertNotIn("lost", other_end.events[:-1])

    def test_far_timer(self) -> None:
        """A timer that is further away than epoll can wait does no harm."""
        self.late.cancel()
        self.reactor.callLater(30 * 86_400, self.fail)
        near, _, _, far_end = self.pair()
        self.reactor.callWhenRunning(near.write, b"a")
        self.stop_when(far_end, lambda: True)
        self.run_reactor()
        self.assertEqual(self.flushLoggedErrors(), [])

    def test_iterate(self) -> None:
        """One turn is one turn, for who turns the reactor by hand."""
        near, _, far, far_end = self.pair()
        self.late.cancel()
        near.begin()
        far.begin()
        near.write(b"a")
        for _ in range(2):
            self.reactor.wakeUp()  # else it would wait
            self.reactor.iterate(0)
        self.assertEqual(far_end.received, b"a")

    def test_exception_about_an_exception(self) -> None:
        """One who fails again when told of the end is logged, and who comes after is served."""
        near, _, _, far_end = self.pair()
        other, _, _, other_end = self.pair()

        def fail() -> None:
            raise ZeroDivisionError("on purpose")

        def fail_again(reason: object) -> None:
            raise KeyError("again")

        far_end.on_data = fail
        far_end.connectionLost = fail_again  # type: ignore[method-assign, assignment]
        self.reactor.callWhenRunning(near.write, b"a")
        self.reactor.callWhenRunning(other.write, b"b")
        self.stop_when(other_end, lambda: True)
        self.run_reactor()
        self.assertEqual(len(self.flushLoggedErrors(ZeroDivisionError)), 1)
        self.assertEqual(len(self.flushLoggedErrors(KeyError)), 1)

    def test_end(self) -> None:
        """The end of a connection is told, whichever side makes it."""
        near, near_end, _, far_end = self.pair()
        self.reactor.callWhenRunning(near.loseConnection)

        def look() -> None:
            if near_end.reasons and far_end.reasons:
                self.reactor.stop()
            else:
                self.reactor.callLater(0.01, look)

        self.reactor.callWhenRunning(look)
        self.run_reactor()
        for end in (near_end, far_end):
            self.assertIsInstance(end.reason, error.ConnectionDone)

    def test_others_descriptors(self) -> None:
        """What is no socket of ours is called as by any reactor: in its own context."""
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        read: list[bytes] = []
        reactor = self.reactor

        class Other(FileDescriptor):
            def fileno(self) -> int:
                return ours.fileno()

            def doRead(self) -> None:
                read.append(ours.recv(100))
                reactor.stop()

        other = Other(reactor)
        self.reactor.callWhenRunning(other.startReading)
        self.reactor.callLater(0.01, theirs.send, b"x")
        self.run_reactor()
        self.assertEqual(read, [b"x"])


#: Prints which reactor is installed by whom.
_PROGRAM = """
import sys
{before}
from relaymux.net.reactor import install
install()
from twisted.internet import reactor
print(type(reactor).__name__)
"""


class DaemonTests(TestCase):
    """Which reactor C{twistd relaymux} runs with."""

    def start(self, *options: str) -> Daemon:
        """@return: a daemon that has started, with C{options} for twistd."""
        directory = tempfile.mkdtemp(prefix="rm")
        self.addCleanup(shutil.rmtree, directory)
        config = Path(directory, "relay.ini")
        config.write_text(
            "[relay]\nname = hv-a\n[link hv-b]\ntransport = unix\nlisten = link\n"
            "[stream ram]\nlink = hv-b\nlisten = ram\n"
        )
        daemon = Daemon(config, *options)
        self.addCleanup(daemon.kill)
        daemon.wait_for(" started: ")
        return daemon

    def reactor_class(self, *options: str) -> str:
        """@return: what twistd says of it."""
        daemon = self.start(*options)
        self.assertEqual(daemon.stop(), 0, daemon.output())
        [name] = re.findall(r"reactor class: (.*)\.", daemon.output())
        return str(name)

    def test_ours(self) -> None:
        """It brings its own."""
        self.assertEqual(self.reactor_class(), "relaymux.net.reactor.RelayReactor")

    def test_chosen(self) -> None:
        """Whoever chooses one gets it."""
        self.assertIn("PollReactor", self.reactor_class("--reactor", "poll"))

    def test_late_signals(self) -> None:
        """A SIGTERM to a daemon that has ended already, and said how, does not make it a killed one."""
        for _ in range(3):
            daemon = self.start()
            daemon.process.send_signal(signal.SIGTERM)
            until = time.monotonic() + DEADLINE
            # A second one before that is another matter: it ends a drain.
            while "Server Shut Down" not in daemon.output() and time.monotonic() < until:
                time.sleep(0.0003)
            while daemon.process.poll() is None:
                daemon.process.send_signal(signal.SIGTERM)
                time.sleep(0.0005)
            self.assertEqual(daemon.process.returncode, 0, daemon.output())


class InstallTests(SynchronousTestCase):
    def installed(self, before: str = "") -> str:
        """@return: the name of the reactor's class when C{before} ran before L{install}."""
        command = [sys.executable, "-c", _PROGRAM.format(before=before)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def test_nobody_has_chosen(self) -> None:
        """It is the reactor of a process that has none."""
        self.assertEqual(self.installed(), "RelayReactor")

    def test_somebody_has_chosen(self) -> None:
        """Who has chosen another one keeps it."""
        chosen = "from twisted.internet import pollreactor; pollreactor.install()"
        self.assertEqual(self.installed(chosen), "PollReactor")

    def test_another_twisted(self) -> None:
        """With a Twisted that works in another way its own is taken."""
        other = "import relaymux.net.reactor as r; r._USED += ('of_the_future',)"
        self.assertEqual(self.installed(other), "EPollReactor")

    def test_signal(self) -> None:
        """SIGTERM stops it, whatever it is doing."""
        program = (
            "from relaymux.net.reactor import install; install()\n"
            "from twisted.internet import reactor\n"
            "reactor.callWhenRunning(print, 'running', flush=True)\n"
            "reactor.run()\n"
            "print('stopped')\n"
        )
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process:
            self.assertEqual(process.stdout.readline(), "running\n")
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.communicate(timeout=DEADLINE)[0], "stopped\n")
