"""
The benchmarks run: with sizes so small that their numbers mean nothing.

None of the programs that relaymux is compared with is needed.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import SkipTest
from unittest.mock import patch

from twisted.trial.unittest import SynchronousTestCase

from benchmarks import bulk, generators, latency, stall
from benchmarks.generators import compiler, program, traffic
from benchmarks.processes import BenchmarkError, Unavailable
from benchmarks.relays import Relays, direct, plain_twisted, relaymux
from benchmarks.streams import Stream
from benchmarks.traffic import BLOCK_BYTES, STAMP, check_stamps, verify_bytes

MIB = 1024 * 1024


class BenchmarkCase(SynchronousTestCase):
    """With a directory whose path is short enough for UNIX sockets."""

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rmx-"))
        self.addCleanup(shutil.rmtree, self.directory)

    def need_compiler(self) -> None:
        if compiler() is None:
            raise SkipTest("no C compiler")

    def without_compiler(self) -> None:
        """Let the ends be those for machines without one."""
        patcher = patch.object(generators, "compiler", return_value=None)
        patcher.start()
        self.addCleanup(patcher.stop)


class Meddler(threading.Thread):
    """A relay between UNIX sockets that does something to what goes from the source to the sink."""

    def __init__(self, directory: Path, meddle: Callable[[int, bytes], bytes]) -> None:
        """@param meddle: from the offset of some bytes and them, what is sent on instead."""
        super().__init__(daemon=True)
        self.entry, self.exit = directory / "in", directory / "out"
        self._meddle = meddle
        self._port = socket.socket(socket.AF_UNIX)
        self._port.bind(str(self.entry))
        self._port.listen()

    def run(self) -> None:
        near, far = self._port.accept()[0], socket.socket(socket.AF_UNIX)
        with self._port, near, far:
            far.connect(str(self.exit))
            offset = 0
            try:
                while data := near.recv(65536):
                    far.sendall(self._meddle(offset, data))
                    offset += len(data)
                far.shutdown(socket.SHUT_WR)
                far.recv(1)
            except OSError:
                return  # The sink has given up, as it should.


class TrafficTests(BenchmarkCase):
    """A source and a sink that notice what a relay does to their bytes."""

    def through(self, meddle: Callable[[int, bytes], bytes], *options: object) -> Stream:
        relay = Meddler(self.directory, meddle)
        relay.start()
        self.addCleanup(relay.join, 10)
        stream = Stream(relay.entry, relay.exit)
        self.addCleanup(stream.__exit__)
        stream.start(["--bytes", 3 * BLOCK_BYTES, *options], options)
        return stream

    def check(self) -> None:
        """Flip one bit; lose bytes; send some twice."""
        place = BLOCK_BYTES + 77777

        def flip(offset: int, data: bytes) -> bytes:
            changed = bytearray(data)
            if offset <= place < offset + len(data):
                changed[place - offset] ^= 1
            return bytes(changed)

        def lose(offset: int, data: bytes) -> bytes:
            return data[4:] if offset <= place < offset + len(data) else data

        def double(offset: int, data: bytes) -> bytes:
            return data + data if offset <= place < offset + len(data) else data

        for meddle, options, said in (
            (flip, ["--verify"], f"byte {place}: "),
            (lose, [], "byte "),
            (double, [], "byte "),
        ):
            stream = self.through(meddle, *options)
            error = self.assertRaises(BenchmarkError, stream.finish, 30)
            self.assertIn(f"the sink at {self.directory}/out failed", str(error))
            self.assertIn(said, str(error))
            shutil.rmtree(self.directory)
            self.directory.mkdir()
        honest = self.through(lambda offset, data: data, "--verify")
        self.assertEqual(honest.finish(30).total_bytes, 3 * BLOCK_BYTES)

    def test_notices(self) -> None:
        """The compiled ends notice a flipped bit, lost bytes and doubled bytes, and nothing else."""
        self.need_compiler()
        self.check()

    def test_notices_without_compiler(self) -> None:
        """So do those that need none."""
        self.without_compiler()
        self.check()

    def test_duplex(self) -> None:
        """Both ends send, and both get all of it, however different the amounts."""
        self.need_compiler()
        path = self.directory / "direct"
        with Stream(path, path) as stream:
            stream.start(
                ["--bytes", 64 * BLOCK_BYTES, "--duplex", "--verify"],
                ["--bytes", 2 * BLOCK_BYTES, "--duplex", "--verify"],
            )
            # Each says with one block more that it was the last.
            self.assertEqual(stream.finish(30).total_bytes, 68 * BLOCK_BYTES)

    def test_a_missing_relay_is_an_error(self) -> None:
        """A source that finds nobody to connect to ends the run at once and says so."""
        with Stream(self.directory / "nobody", self.directory / "out") as stream:
            stream.start([])
            with self.assertRaises(BenchmarkError) as caught:
                stream._report("source", 30)
        self.assertIn("nobody", str(caught.exception))

    def test_who_has_failed(self) -> None:
        """A sink that has waited in vain is not what is wrong: the source is."""
        with Stream(self.directory / "nobody", self.directory / "out") as stream:
            stream.start([])
            with self.assertRaises(BenchmarkError) as caught:
                stream.finish(1)
        self.assertIn("the source at", str(caught.exception))

    def check_name(self) -> None:
        """As soon as a sink's socket has its name, a source can connect to it."""
        for number in range(20):
            path = self.directory / f"direct{number}"
            with Stream(path, path) as stream:
                stream.start(["--bytes", BLOCK_BYTES])
                self.assertEqual(stream.finish(30).total_bytes, BLOCK_BYTES)
                self.assertEqual([other.name for other in self.directory.glob("*~")], [])

    def test_name(self) -> None:
        """With the ends in C."""
        self.need_compiler()
        self.check_name()

    def test_name_without_compiler(self) -> None:
        """And with those in Python."""
        self.without_compiler()
        self.check_name()

    def test_python_stamps_tell_where_a_block_belongs(self) -> None:
        """Offsets are checked wherever in a read they lie; a block in the wrong place is noticed."""
        for offset in (0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 7 * BLOCK_BYTES + 5):
            received = bytearray(2 * BLOCK_BYTES)
            for place in range(-offset % BLOCK_BYTES, len(received) - STAMP.size + 1, BLOCK_BYTES):
                STAMP.pack_into(received, place, offset + place)
            check_stamps(memoryview(received), offset)
            with self.assertRaises(ConnectionError):
                check_stamps(memoryview(received), offset + BLOCK_BYTES)
            with self.assertRaises(ConnectionError):
                verify_bytes(memoryview(received), offset)


class CompilerTests(BenchmarkCase):
    """L{benchmarks.generators}."""

    def test_a_compiler_that_does_not_work(self) -> None:
        """What the compiler said is in the message, with the packages to install."""
        cache = patch.object(generators, "_cache_directory", return_value=self.directory)
        broken = self.directory / "cc"
        broken.write_text("#!/bin/sh\necho no such header >&2\nexit 1\n")
        broken.chmod(0o755)
        program.cache_clear()
        self.addCleanup(program.cache_clear)
        with cache, patch.object(generators, "compiler", return_value=str(broken)):
            error = self.assertRaises(Unavailable, program, "traffic")
        self.assertIn("no such header", str(error))
        self.assertIn("gcc", str(error))

    def test_wrong_options(self) -> None:
        """A misspelt option is an error, not a run that measures something else."""
        result = subprocess.run(
            traffic("source", "/nowhere/x", "--secnods", 1), capture_output=True, text=True, check=False
        )
        self.assertNotEqual(result.returncode, 0)
        self.assertIn("--secnods", result.stderr)


class RelayTests(BenchmarkCase):
    """L{benchmarks.relays}: each of the relays of our own starts, carries, is accounted for."""

    def check(self, relays: Relays) -> None:
        for _ in range(2):
            self.assertGreater(bulk.measure(relays, 0.2)["rate"], 0)
        near, far = relays.usage()
        self.assertGreater(near.total, 0)
        self.assertGreater(far.total, 0)

    def test_twisted_multiplexing(self) -> None:
        """The multiplexing yardstick carries one stream after the other, and no four at once."""
        with plain_twisted(self.directory, "tcp") as relays:
            self.check(relays)
            self.assertRaises(BenchmarkError, bulk.measure, relays, 0.2, streams=4)

    def test_twisted_forwarding(self) -> None:
        """The forwarding yardstick, through TLS: what differs from the other is all on that path."""
        with plain_twisted(self.directory, "tls", forward=True) as relays:
            self.check(relays)

    def test_relaymux(self) -> None:
        """The daemons start from the files that the benchmark writes for them."""
        with relaymux(self.directory, "unix") as relays:
            self.check(relays)

    def test_relaymux_tls(self) -> None:
        """The same with the keys and certificates that TLS needs; every byte is compared."""
        with relaymux(self.directory, "tls") as relays:
            relays.prove(MIB)
            self.check(relays)

    def test_no_relay(self) -> None:
        """The ends alone cost nothing that counts."""
        with direct(self.directory) as relays:
            self.assertEqual(list(bulk.measure(relays, 0.1)), ["rate"])


class RowTests(BenchmarkCase):
    """What the rows of the table measure, through relaymux."""

    def test_bulk(self) -> None:
        """Four streams, and both ways at once."""
        self.need_compiler()
        with relaymux(self.directory, "tcp", 4) as relays:
            for values in (bulk.measure(relays, 0.2, 4), bulk.measure(relays, 0.2, duplex=True)):
                self.assertAlmostEqual(
                    values["cpu"],
                    sum(values[f"{side}_{kind}"] for side in ("near", "far") for kind in ("user", "system")),
                )

    def test_latency(self) -> None:
        """Answers are asked for alone and beside a full stream."""
        self.need_compiler()
        with relaymux(self.directory, "tcp", 2) as relays:
            for busy in (False, True):
                values = latency.measure(relays, 64, 0.2, busy)
                self.assertGreaterEqual(values["max"], values["p99"])
                self.assertGreaterEqual(values["p99"], values["p50"])
                self.assertEqual("beside" in values, busy)

    def test_stall(self) -> None:
        """A reader that stalls for a moment ends with all its bytes, and memory was looked at meanwhile."""
        options = stall.OPTIONS
        with relaymux(
            self.directory,
            "tcp",
            stall.STREAMS,
            link_options=options["link_options"],
            relay_options=options["relay_options"],
        ) as relays:
            values = stall.measure(relays, 0.3, stalled=True)
        self.assertGreater(values["rate"], 0)
        self.assertGreater(values["growth"], 0)
