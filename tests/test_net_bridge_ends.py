"""Each way in which a bridged connection can end, and bridges over a real link."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from relaymux.interfaces import TransportSettings
from relaymux.net.bridge import Bridge
from relaymux.net.dialer import Dialer, LinkFactory
from relaymux.transports.registry import find_transport
from tests.bridges import LARGE, BridgeTestCase
from tests.peers import stamped
from tests.sockets import reactor


class EndTests(BridgeTestCase):
    """Each way in which a connection can end."""

    async def test_half_closes_in_every_order(self) -> None:
        """What is written before a half-close, and after the other one's, arrives, and so do both ends."""
        self.serve()
        for order in itertools.permutations(("near write", "near end", "far write", "far end")):
            if order.index("near write") > order.index("near end"):
                continue
            if order.index("far write") > order.index("far end"):
                continue
            near, far = await self.pair()
            for step in order:
                who, other = (near, far) if step.startswith("near") else (far, near)
                if step.endswith("write"):
                    await self.send(who, step.encode())
                    self.assertEqual(await self.read(other, len(step)), step.encode(), order)
                else:
                    who.shutdown(socket.SHUT_WR)
                    self.assertEqual(await self.read(other), b"", order)
            await self.until(lambda: not self.open_connections, f"the stream was over; {order}")
        self.assertEqual(self.lines("ended as an error"), [])
        self.assertEqual((self.listener.totals.failed, self.dialer.totals.failed), (0, 0))

    async def test_half_closed_for_long(self) -> None:
        """A direction stays open as long as it likes after the other has ended."""
        self.serve()
        near, far = await self.pair()
        near.shutdown(socket.SHUT_WR)
        self.assertEqual(await self.read(far), b"")
        data = stamped(LARGE)
        await deferLater(reactor, 0.3)
        await self.nothing(near)
        await self.send(far, data[:1000])
        self.assertEqual(await self.read(near, 1000), data[:1000])
        sending = self.send(far, data[1000:])
        sent = Deferred.fromCoroutine(sending)
        self.same(await self.read(near, len(data) - 1000), data[1000:])
        await sent

    async def test_closed_by_either(self) -> None:
        """A program that closes in order ends the other's connection in order."""
        self.serve()
        for closing in (0, 1):
            pair = await self.pair()
            await self.send(pair[0], b"question")
            await self.read(pair[1], 8)
            await self.send(pair[1], b"answer")
            await self.read(pair[0], 6)
            pair[closing].close()
            self.assertEqual(await self.read(pair[1 - closing]), b"")
            pair[1 - closing].close()
            await self.until(lambda: not self.open_connections, "the stream was over")

    async def test_closed_with_unread_data(self) -> None:
        """A program that closes before it has read everything is an error to the other one."""
        self.serve()
        for closing in (0, 1):
            pair = await self.pair()
            data = self.fill(pair[1 - closing])
            await self.turns(20)
            pair[closing].recv(10)
            pair[closing].close()
            await self.cannot_write(pair[1 - closing])
            await self.ended(pair[1 - closing])
            self.assertGreater(len(data), 10)
            await self.until(lambda: not self.open_connections, "the stream was over")
        self.assertEqual(len(self.lines("ended as an error")), 4)
        self.assertEqual((self.listener.totals.failed, self.dialer.totals.failed), (2, 2))

    async def test_input_shut(self) -> None:
        """A program that takes nothing more makes the other one's writes fail, and may go on writing."""
        self.serve()
        near, far = await self.pair()
        near.shutdown(socket.SHUT_RD)
        await self.cannot_write(far)
        await self.send(near, b"still talking")
        self.assertEqual(await self.read(far, 13), b"still talking")

    async def test_link_cut(self) -> None:
        """With the link both programs lose their connection; what they got is a prefix of what was sent."""
        self.serve()
        near, far = await self.pair()
        data = self.fill(near)
        await self.until(lambda: self.dialer.connections._open, "it was connected")
        await self.turns()
        self.connection.cut()
        got = await self.ended(far)
        self.assertTrue(data.startswith(got))
        await self.ended(near)
        await self.cannot_write(near)
        await self.until(lambda: len(self.lines("connection 1 ended as an error")) == 2, "both logged it")

    async def test_link_cut_after_the_last_words(self) -> None:
        """A program that had closed in order, while its bytes were under way: logged as the loss it is."""
        self.serve()
        near, far = await self.pair()
        far.shutdown(socket.SHUT_WR)
        self.assertEqual(await self.read(near), b"")
        self.connection.stall()
        await self.send(near, b"lost with the link")
        near.close()
        await self.until(
            lambda: not self.listener.connections._open or not self._only_bridge().is_local_open,
            "its closing was noticed",
        )
        self.connection.cut()
        self.assertEqual(await self.ended(far), b"")
        await self.until(lambda: len(self.lines("connection 1 ended as an error")) == 2, "both logged it")

    def _only_bridge(self) -> Bridge:
        [bridge] = self.listener.connections._open
        return bridge

    async def test_reset_frees_both(self) -> None:
        """After all of that the same sockets serve new connections."""
        self.serve()
        for _ in range(5):
            near, far = await self.pair()
            self.fill(near)
            far.close()
            await self.ended(near)
            near.close()
        near, far = await self.pair()
        await self.send(near, b"fine")
        self.assertEqual(await self.read(far, 4), b"fine")


class TCPLinkTests(BridgeTestCase):
    """The same with a real link, kept up by a real dialer."""

    async def link(self) -> None:
        """Listen and dial on the loopback device."""
        transport = find_transport("tcp")
        port: Any = await transport.server(reactor, TransportSettings("127.0.0.1:0")).listen(
            LinkFactory(self.far)
        )
        self.ports.append(port)
        address = f"127.0.0.1:{port.getHost().port}"
        client = transport.client(reactor, TransportSettings(address))
        self.link_dialer = Dialer(reactor, self.near, [(address, client)])
        self.link_dialer.start()
        await self.until(lambda: self.near.is_up and self.far.is_up, "the link was up")

    async def close_link(self) -> None:
        """Take the link down, and see that it goes."""
        self.link_dialer.stop()
        for drained in (self.near.drain(1.0), self.far.drain(1.0)):
            await drained
        await self.turns(20)

    def abort_link(self) -> None:
        link: Any = self.near._link
        link.transport.abortConnection()

    async def test_both_ways(self) -> None:
        """Far more than any limit goes both ways at once."""
        self.serve()
        near, far = await self.pair()
        await self.exchange([(near, far, stamped(2 * LARGE, 1)), (far, near, stamped(2 * LARGE, 2))])

    async def test_link_returns(self) -> None:
        """A link that is reset is dialled again; old connections have failed, new ones work."""
        self.serve()
        near, far = await self.pair()
        data = self.fill(near)
        self.abort_link()
        self.assertTrue(data.startswith(await self.ended(far)))
        await self.ended(near)
        near, far = await self.pair()
        await self.send(near, b"again")
        self.assertEqual(await self.read(far, 5), b"again")

    async def test_stalled_reader(self) -> None:
        """The bound holds with the kernel's buffers of a real link in between, too."""
        self.serve()
        near, far = await self.pair()
        sent = await self.overfill(near)
        near.shutdown(socket.SHUT_WR)
        self.assertEqual(len(await self.ended(far)), sent)


class ProgramErrorTests(BridgeTestCase):
    """Errors that the kernel reports of a program's socket."""

    async def test_reading_fails(self) -> None:
        """An error while reading is told to the other side as a reset, with its reason in the log."""
        self.serve()
        near, far = await self.pair()
        await self.send(near, b"x")
        await self.read(far, 1)
        [bridge] = self.listener.connections._open
        transport: Any = bridge.local.transport
        transport._receiving_failed(OSError(errno.EIO, os.strerror(errno.EIO)))
        self.assertEqual(await self.ended(far), b"")
        await self.until(
            lambda: self.lines("connection 1 ended as an error", os.strerror(errno.EIO)), "logged"
        )
