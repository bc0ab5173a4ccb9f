"""
The benchmarks run: with sizes so small that their numbers mean nothing.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

from benchmarks.bench import FORWARDING, OURS, Run, cpu_ratio, measure
from benchmarks.processes import BenchmarkError, Stream
from benchmarks.relays import Relays, direct, plain_twisted, relaymux
from benchmarks.stall import MIB, measure_stall
from benchmarks.traffic import BLOCK_BYTES, STAMP, check_stamps


class TrafficTests(SynchronousTestCase):
    """L{benchmarks.traffic}: a source and a sink that notice what a relay does to their bytes."""

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rmx-"))
        self.addCleanup(shutil.rmtree, self.directory)

    def test_counts_and_checksums(self) -> None:
        """Without a relay, the sink gets what the source sent: all of it, and the same."""
        ((entry, exit),) = direct(self.directory).paths
        with Stream(entry, exit) as stream:
            stream.start(["--bytes", 3 * BLOCK_BYTES, "--checksum"], ["--checksum"])
            report = stream.finish(30)
        self.assertEqual(report.total_bytes, 3 * BLOCK_BYTES)
        self.assertNotEqual(report.checksum, 0)

    def test_a_checksum_that_differs_is_an_error(self) -> None:
        """If the two ends disagree about the bytes there is no result."""
        ((entry, exit),) = direct(self.directory).paths
        with Stream(entry, exit) as stream:
            stream.start(["--bytes", BLOCK_BYTES, "--checksum"])
            self.assertRaisesRegex(BenchmarkError, "did not get what the source sent", stream.finish, 30)

    def test_a_missing_relay_is_an_error(self) -> None:
        """A source that finds nobody to connect to ends the run at once and says so."""
        with Stream(self.directory / "nobody", self.directory / "out") as stream:
            stream.start([])
            error = self.assertRaises(BenchmarkError, stream.finish, 30)
        self.assertIn("nobody", str(error))

    def test_stamps_tell_where_a_block_belongs(self) -> None:
        """Block numbers are checked wherever in a read they lie; a block in the wrong place is noticed."""
        for offset in (0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 7 * BLOCK_BYTES + 5):
            received = bytearray(2 * BLOCK_BYTES)
            for place in range(-offset % BLOCK_BYTES, len(received) - STAMP.size + 1, BLOCK_BYTES):
                STAMP.pack_into(received, place, (offset + place) // BLOCK_BYTES)
            check_stamps(memoryview(received), offset)
            with self.assertRaises(ConnectionError):
                check_stamps(memoryview(received), offset + BLOCK_BYTES)


class RelayTests(SynchronousTestCase):
    """L{benchmarks.relays}: each of the relays that are compared starts, carries, is accounted for."""

    def setUp(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="rmx-"))
        self.addCleanup(shutil.rmtree, self.directory)

    def check(self, relays: Relays) -> None:
        for _ in range(2):
            run = measure("any", "relay", relays, seconds=0.2)
            self.assertGreater(run.rate, 0)
        self.assertGreater(relays.cpu_seconds(), 0)

    def test_twisted_multiplexing(self) -> None:
        """The multiplexing yardstick carries one stream after the other."""
        with plain_twisted(self.directory, "tcp") as relays:
            self.check(relays)

    def test_twisted_multiplexing_tls(self) -> None:
        """The same through TLS."""
        with plain_twisted(self.directory, "tls") as relays:
            self.check(relays)

    def test_twisted_forwarding(self) -> None:
        """The forwarding yardstick, through TLS: what differs from the other is all on that path."""
        with plain_twisted(self.directory, "tls", forward=True) as relays:
            self.check(relays)

    def test_relaymux(self) -> None:
        """The daemons start from the files that the benchmark writes for them."""
        with relaymux(self.directory, "unix") as relays:
            self.check(relays)

    def test_relaymux_tls(self) -> None:
        """The same with the keys and certificates that TLS needs."""
        with relaymux(self.directory, "tls") as relays:
            self.check(relays)

    def test_stall(self) -> None:
        """A reader that stalls for a moment ends with all its bytes, and memory was looked at meanwhile."""
        options = {"window": "1M", "replay-buffer": "2M"}
        with relaymux(self.directory, "tcp", 2, options) as relays:
            stall = measure_stall(relays, "tcp", 0.5, MIB, 2 * MIB)
        self.assertGreater(stall.stalled_bytes, 0)
        self.assertGreaterEqual(stall.peak, max(stall.peak_source, stall.peak_destination))


class RatioTests(SynchronousTestCase):
    """L{cpu_ratio}, the number that counts."""

    def test_rounds_are_compared_pairwise(self) -> None:
        """A machine that becomes half as fast between two rounds changes nothing."""
        runs = [
            Run("tcp", relay, rate=1.0, cpu=cost * slowness)
            for slowness in (1.0, 2.0, 8.0)
            for relay, cost in ((FORWARDING, 1.0), (OURS, 0.5))
        ]
        self.assertEqual(cpu_ratio(runs, "tcp", FORWARDING), 0.5)
