"""The fault proxy: forwarding, cutting, refusing, and what it tells."""

from __future__ import annotations

import os
import socket
import stat
from typing import Any

from twisted.internet.defer import ensureDeferred, gatherResults

from relaymux.errors import ConfigurationError, TransportError
from relaymux.testing import fault_connection, fault_traffic
from relaymux.testing.fault_lane import SLICE_BYTES
from relaymux.testing.faults import Ending, FaultProxy
from tests.proxies import LONG, RESET, FaultProxyTestCase
from tests.sockets import content, reactor, reset


class Ways:
    """What works over TCP and UNIX sockets alike."""

    async def test_forwards(self: Any) -> None:
        """Without faults everything passes, both ways at once, far above what the proxy holds."""
        near, far = await self.pair()
        size = 4 * SLICE_BYTES + 17
        up, down = content(size, 1), content(size, 2)
        received = await gatherResults(
            [
                ensureDeferred(self.read_while(self.send(near, up), far, size)),
                ensureDeferred(self.read_while(self.send(far, down), near, size)),
            ]
        )
        self.assertTrue(received == [up, down], "bytes differ")
        self.assertEqual(self.proxy.lanes["up"].delivered, size)

    async def test_half_close(self: Any) -> None:
        """An end of input is a half-close on the other side; the connection is gone after both."""
        near, far = await self.pair()
        await self.send(near, b"request")
        near.shutdown(socket.SHUT_WR)
        self.assertEqual(await self.read(far), b"request")
        await self.send(far, b"answer")
        far.shutdown(socket.SHUT_WR)
        self.assertEqual(await self.read(near), b"answer")
        await self.until(lambda: "ended" in self.kinds(), "the connection ended")

    async def test_unreachable(self: Any) -> None:
        """Who connects while the target is not there is reset, and the event log says why."""
        self.target.close()
        if self.is_unix:
            os.unlink(self.proxy._target)
        near = self.connect()
        await self.ending(near)
        await self.until(lambda: "ended" in self.kinds(), "the connection ended")
        self.assertEqual(
            self.kinds(), ["listening", "accepted", "unreachable", "ended"], list(self.proxy.events)
        )

    async def test_cut(self: Any) -> None:
        """A cut reaches both sides; the next connection is a whole one."""
        near, far = await self.pair()
        await self.carries(near, far)
        self.assertEqual(self.proxy.cut(), 1)
        expected = (b"", "end" if self.is_unix else RESET)
        self.assertEqual(await self.ending(near), expected)
        self.assertEqual(await self.ending(far), expected)
        await self.carries(*await self.pair())
        self.assertEqual(self.proxy.status()["cuts"], 1)

    async def test_refuse(self: Any) -> None:
        """While it refuses nobody can connect, what is connected stays, and afterwards all is as before."""
        near, far = await self.pair()
        self.proxy.refuse()
        await self.until(lambda: isinstance(self.try_connect(), OSError), "a connection was refused")
        await self.carries(near, far)
        self.proxy.refuse(0)
        await self.until(lambda: not isinstance(self.try_connect(), OSError), "the proxy listened again")

    async def test_refuse_for_a_time(self: Any) -> None:
        """It listens again by itself, at the same address."""
        address = self.proxy.address
        self.proxy.refuse(0.05)
        await self.until(lambda: self.kinds().count("listening") == 2, "the proxy listened again")
        await self.turns(2)
        self.assertEqual(self.proxy.address, address)
        await self.carries(*await self.pair())


class TCPTests(Ways, FaultProxyTestCase):
    """Over TCP."""

    async def test_fin(self) -> None:
        """A cut with FIN looks like an end of input on both sides, whatever was unread."""
        near, far = await self.pair()
        self.proxy.blackhole(sides="up")
        await self.send(near, b"never delivered")
        self.proxy.cut(Ending.FIN)
        self.proxy.blackhole(0)
        self.assertEqual(await self.ending(near), (b"", "end"))
        self.assertEqual(await self.ending(far), (b"", "end"))
        near.close()
        far.close()
        await self.until(lambda: "ended" in self.kinds(), "the connection ended")
        self.assertEqual(self.proxy.lanes["up"].delivered, 0)

    async def test_fin_nobody_closes(self) -> None:
        """Sides that do not answer the FIN are reset after a while."""
        self.patch(fault_connection, "_FIN_SECONDS", 0.05)
        near, far = await self.pair()
        self.proxy.cut(Ending.FIN)
        await self.until(lambda: "ended" in self.kinds(), "the connection ended")
        self.assertRaises(OSError, lambda: [far.send(b"x") for _ in range(3)])
        self.assertRaises(OSError, lambda: [near.send(b"x") for _ in range(3)])

    async def test_reset_passes(self) -> None:
        """A side's own reset reaches the other side."""
        near, far = await self.pair()
        await self.carries(near, far)
        reset(near)
        self.assertEqual(await self.ending(far), (b"", RESET))

    async def test_refuse_with_resets(self) -> None:
        """With `reset` the connection is made and lost at once, and the target sees nothing of it."""
        self.proxy.refuse(reset=True)
        self.assertEqual(await self.ending(self.connect()), (b"", RESET))
        self.proxy.refuse(0)
        await self.carries(*await self.pair())
        self.assertEqual(self.proxy.status()["refused"], 1)
        self.assertEqual(self.kinds().count("connected"), 1)

    async def test_port_stays_reserved(self) -> None:
        """While the proxy refuses, nobody else gets its port."""
        self.proxy.refuse()
        await self.turns(3)
        port = int(self.proxy.address.rpartition(":")[2])
        with socket.socket() as other:
            self.assertRaises(OSError, other.bind, ("127.0.0.1", port))

    async def test_cut_and_refuse(self) -> None:
        """One operation cuts and keeps the dialler waiting."""
        near, _ = await self.pair()
        self.proxy.cut(refuse=LONG)
        self.assertEqual(await self.ending(near), (b"", RESET))
        self.assertIsInstance(self.try_connect(), ConnectionRefusedError)
        self.proxy.clear()
        await self.carries(*await self.pair())

    async def test_cut_while_dialling(self) -> None:
        """A connection whose other half is not made yet is cut like any."""
        near = self.connect()
        await self.until(lambda: "accepted" in self.kinds(), "the connection was accepted")
        self.proxy.cut()
        self.assertEqual(await self.ending(near), (b"", RESET))
        await self.until(lambda: "ended" in self.kinds(), "the connection ended")

    async def test_stop_while_open(self) -> None:
        """Stopping resets what is open and returns when it is closed."""
        near, far = await self.pair()
        await self.proxy.stop()
        self.assertEqual(await self.ending(near), (b"", RESET))
        self.assertEqual(await self.ending(far), (b"", RESET))
        self.assertIsInstance(self.try_connect(), ConnectionRefusedError)

    async def test_too_many(self) -> None:
        """There is a bound to the connections; the one above it is reset."""
        self.patch(fault_traffic, "MAX_CONNECTIONS", 1)
        near, far = await self.pair()
        self.assertEqual(await self.ending(self.connect()), (b"", RESET))
        await self.carries(near, far)


class UNIXTests(Ways, FaultProxyTestCase):
    """Over UNIX sockets."""

    is_unix = True

    def test_mode(self) -> None:
        """Only the owner may connect."""
        self.assertEqual(stat.S_IMODE(os.stat(self.proxy.address).st_mode), 0o600)


class EventTests(FaultProxyTestCase):
    """What is told."""

    async def test_events(self) -> None:
        """Each step of a connection is an event with its number; an observer hears them as they come."""
        heard: list[str] = []
        self.proxy._on_event = lambda event: heard.append(str(event))
        near, _ = await self.pair()
        await self.until(lambda: "connected" in self.kinds(), "the connection was made")
        self.proxy.cut()
        await self.until(lambda: "ended" in self.kinds(), "the connection ended")
        near.close()
        self.assertEqual(self.kinds(), ["listening", "accepted", "connected", "cut", "ended"])
        self.assertEqual([event.connection for event in self.proxy.events], [0, 1, 1, 1, 1])
        self.assertEqual(heard, [str(event) for event in self.proxy.events][1:])
        self.assertRegex(heard[2], r"^ +[0-9.]+ #1 cut: RST after 0 bytes up, 0 bytes down; 0 bytes dropped$")

    async def test_operation_from_an_event(self) -> None:
        """An observer may act at once: here every connection is cut as soon as it is made."""

        def act(event: Any) -> None:
            if event.kind == "connected":
                self.proxy.cut()

        self.proxy._on_event = act
        for _ in range(3):
            self.assertEqual(await self.ending(self.connect()), (b"", RESET))

    async def test_bad_addresses(self) -> None:
        """What is no address is said before anything is opened, an address in use when it is needed."""
        self.assertRaises(ConfigurationError, FaultProxy, reactor, "nowhere", "127.0.0.1:1")
        self.assertRaises(ConfigurationError, FaultProxy, reactor, "127.0.0.1:0", "127.0.0.1:0")
        second = FaultProxy(reactor, self.proxy.address, "127.0.0.1:1")
        error = self.assertRaises(TransportError, second.start)
        self.assertEqual(str(error), f"cannot listen on {self.proxy.address}: Address already in use")
