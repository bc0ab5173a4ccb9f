"""What tests of the fault proxy share: a target, the proxy before it, and raw sockets on both sides."""

from __future__ import annotations

import socket
from collections.abc import Coroutine
from typing import Any

from twisted.internet.defer import Deferred, ensureDeferred

from relaymux.testing.faults import FaultProxy
from tests.sockets import SocketTestCase, content, reactor

#: Seconds; long enough that no test sees the end.
LONG = 3600.0

#: How a connection ends that does not end with an end of input.
RESET = "reset"


class FaultProxyTestCase(SocketTestCase):
    """A target, a proxy before it, and raw sockets on both sides."""

    is_unix = False

    def setUp(self) -> None:
        if self.is_unix:
            directory = self.directory()
            target = f"{directory}/target"
            self.target = socket.socket(socket.AF_UNIX)
            self.target.bind(target)
            self.target.listen()
            listen = f"{directory}/proxy"
        else:
            self.target = socket.create_server(("127.0.0.1", 0))
            target = f"127.0.0.1:{self.target.getsockname()[1]}"
            listen = "127.0.0.1:0"
        self.target.setblocking(False)
        self.addCleanup(self.target.close)
        self.proxy = FaultProxy(reactor, listen, target, seed=4)
        self.proxy.start()
        self.addCleanup(self.end)

    async def end(self) -> None:
        """Whatever a test did, the proxy can be stopped, and its ledger balances."""
        await self.proxy.stop()
        status = self.proxy.status()
        for side in ("up", "down"):
            self.assertEqual(
                status[f"{side}_received"], status[f"{side}_delivered"] + status[f"{side}_dropped"], status
            )
            self.assertEqual(status[f"{side}_queued"], 0)
        self.assertEqual(status["open"], 0)

    def connect(self) -> socket.socket:
        """@return: a socket that dialled the proxy."""
        near = self.try_connect()
        if isinstance(near, OSError):
            raise near
        return near

    def try_connect(self) -> socket.socket | OSError:
        near = socket.socket(socket.AF_UNIX if self.is_unix else socket.AF_INET)
        try:
            if self.is_unix:
                near.connect(self.proxy.address)
            else:
                host, _, port = self.proxy.address.rpartition(":")
                near.connect((host, int(port)))
        except OSError as error:
            near.close()
            return error
        self.addCleanup(near.close)
        return near

    async def accept(self) -> socket.socket:
        """@return: what the target accepts next."""
        accepted: list[socket.socket] = []

        def step() -> bool:
            try:
                accepted.append(self.target.accept()[0])
            except BlockingIOError:
                return False
            return True

        await self.until(step, "the target accepted a connection")
        self.addCleanup(accepted[0].close)
        return accepted[0]

    async def pair(self) -> tuple[socket.socket, socket.socket]:
        """@return: both ends of a connection through the proxy."""
        near = self.connect()
        far = await self.accept()
        # The target's kernel is faster: the proxy may not know yet that it was accepted.
        await self.until(lambda: all(one.far.open for one in self.proxy._live()), "the proxy is connected")
        return near, far

    async def carries(self, near: socket.socket, far: socket.socket, size: int = 300_000) -> None:
        """The connection delivers, both ways."""
        for sender, receiver, seed in ((near, far, 1), (far, near, 2)):
            data = content(size, seed)
            sending = self.send(sender, data)
            self.assertTrue(await self.read_while(sending, receiver, size) == data, "bytes differ")

    async def read_while(
        self, sending: Coroutine[Deferred[Any], Any, None], receiver: socket.socket, size: int
    ) -> bytes:
        """Read C{size} bytes while C{sending}, which takes more than the kernel's buffers, goes on."""
        sent = ensureDeferred(sending)
        data = await self.read(receiver, size)
        await sent
        return data

    async def ending(self, peer: socket.socket) -> tuple[bytes, str]:
        """@return: all that C{peer} still reads, and how it ends."""
        data = bytearray()
        while True:
            try:
                piece = await self.read(peer, 1)
            except ConnectionResetError:
                return bytes(data), RESET
            if not piece:
                return bytes(data), "end"
            data += piece

    def silent(self, peer: socket.socket) -> None:
        """Nothing is there to be read, not even an end."""
        peer.setblocking(False)
        self.assertRaises(BlockingIOError, peer.recv, 1)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.proxy.events]
