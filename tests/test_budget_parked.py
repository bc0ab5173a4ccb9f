"""Two daemons whose links are all lost while everything is full, with real sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path

from relaymux.core.budget import link_beginning
from relaymux.core.session import Session
from relaymux.service.config import load_configuration
from relaymux.service.daemon import RelayService
from tests.accounting import assert_accounted
from tests.sockets import SocketTestCase, content, reactor

KIB, MIB = 1024, 1024 * 1024

LINKS, STREAMS = 4, 3
WINDOW, REPLAY = 64 * KIB, 256 * KIB

#: Of each daemon: what links and streams begin with, and as much again to grow into.
MEMORY = 24 * MIB

#: Bytes of a stream: more than four windows and two replay buffers even if one of each
#: has grown by all that there is.
FLOW = 16 * MIB

#: Bytes of a stream after which its reader stops for a while.
FIRST = 4 * MIB

#: Bytes beside what is counted that this process, which is all of it at once, may take:
#: buffers to receive into, what malloc keeps, and what the test itself holds.
ALLOWANCE = 96 * MIB

#: Bytes that a program reads or writes at a time.
PIECE = 256 * KIB


class Flow:
    """One connection to the source daemon that comes out of the other one."""

    def __init__(self, near: str, far: str, data: bytes) -> None:
        self.data = data
        self.sent = self.received = 0
        self.wanted = FIRST
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(far)
        self.listener.listen()
        self.listener.setblocking(False)
        self.sender = socket.socket(socket.AF_UNIX)
        self.near = near
        self.receiver: socket.socket | None = None

    def connect(self) -> None:
        self.sender.connect(self.near)
        self.sender.setblocking(False)

    def step(self) -> bool:
        """Write and read what can be at the moment.  @return: whether anything could."""
        sent, received = self.sent, self.received
        try:
            while self.sent < len(self.data):
                self.sent += self.sender.send(memoryview(self.data)[self.sent : self.sent + PIECE])
        except BlockingIOError:
            pass
        try:
            if self.receiver is None:
                self.receiver = self.listener.accept()[0]
                self.receiver.setblocking(False)
            while self.received < self.wanted:
                piece = self.receiver.recv(min(PIECE, self.wanted - self.received))
                assert piece, "the end before the end"
                assert self.data[self.received :][: len(piece)] == piece, f"other bytes at {self.received}"
                self.received += len(piece)
        except BlockingIOError:
            pass
        return (sent, received) != (self.sent, self.received)

    def close(self) -> None:
        for sock in (self.sender, self.receiver, self.listener):
            if sock is not None:
                sock.close()


class ParkedTests(SocketTestCase):
    """Sessions without a link hold what they hold, within the memory of their daemon."""

    def start(self, name: str, sections: Iterable[str]) -> RelayService:
        lines = ["[relay]", f"name = {name}", f"memory = {MEMORY}", "drain-timeout = 5", *sections]
        file = Path(self.path) / f"{name}.ini"
        file.write_text("\n".join(lines) + "\n")
        service = RelayService(reactor, load_configuration(file))
        service._take_signals = lambda: None  # type: ignore[method-assign]
        service.startService()
        self.addCleanup(service.stopService)
        return service

    def sessions(self, service: RelayService) -> list[Session]:
        held = [peer._held for peer in service._peers.values()]
        return [one.streams.session for one in held if one is not None]

    def check(self) -> None:
        """The budgets say what is, and hold."""
        for service in self.services:
            assert_accounted(service._budget, [REPLAY] * LINKS, self.sessions(service))

    def resident(self) -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    async def rest(self, what: str) -> None:
        """Wait until no flow has moved for some time."""
        quiet = 0

        def step() -> bool:
            nonlocal quiet
            moved = [flow.step() for flow in self.flows]
            quiet = 0 if any(moved) else quiet + 1
            return quiet > 50

        await self.until(step, what)

    async def test_links_parked_with_full_buffers(self) -> None:
        """Four links are lost when twelve readers have stopped; all goes on later, without a byte wrong."""
        self.path = self.directory()
        common = [f"window = {WINDOW}", f"replay-buffer = {REPLAY}"]
        near, far = [], []
        names = [(link, f"s{link}{number}") for link in range(LINKS) for number in range(STREAMS)]
        for link in range(LINKS):
            address = f"{self.path}/link{link}"
            near += [f"[link l{link}]", "transport = unix", f"connect = {address}", *common]
            far += [f"[link l{link}]", "transport = unix", f"listen = {address}", *common]
        for link, name in names:
            near += [f"[stream {name}]", f"link = l{link}", f"listen = {self.path}/{name}n"]
            far += [f"[stream {name}]", f"link = l{link}", f"connect = {self.path}/{name}f"]
        data = [content(FLOW, seed) for seed in range(STREAMS)]
        self.flows = [
            Flow(f"{self.path}/{name}n", f"{self.path}/{name}f", data[number % STREAMS])
            for number, (_, name) in enumerate(names)
        ]
        for flow in self.flows:
            self.addCleanup(flow.close)
        self.services = source, destination = self.start("a", near), self.start("b", far)
        for flow in self.flows:
            flow.connect()
        before = self.resident()

        # Enough has flowed for everything to have grown that does.
        def flowing() -> bool:
            for flow in self.flows:
                flow.step()
            self.check()
            return all(flow.received == FIRST for flow in self.flows)

        await self.until(flowing, "the first part of each had arrived")
        grown = [
            stream.receive.window.size
            for session in self.sessions(destination)
            for stream in session.streams.values()
        ]
        self.assertGreater(max(grown), WINDOW)

        # Readers want no more; then the links go, in the midst of what is on its way, and nothing moves.
        await self.rest("windows were full")
        for flow in self.flows[::STREAMS]:
            flow.wanted += 2 * MIB
            flow.step()
        ports, destination._ports = destination._ports, []
        for port in ports:
            await port.stop()
        for peer in source._peers.values():
            assert peer._link is not None
            peer._link.abort()
        await self.until(
            lambda: not any(peer.is_up for service in self.services for peer in service._peers.values()),
            "all links were down",
        )
        await self.rest("all was parked")
        self.check()
        for service in self.services:
            held = sum(
                session.unconsumed_bytes
                + session.replay.held_bytes
                + sum(session.queued(stream_id) for stream_id in session.streams)
                for session in self.sessions(service)
            )
            self.assertLessEqual(held, service._budget.drawn)
            # One flow of each link went on, and may have taken nearly all that there was for it.
            self.assertGreater(held, (len(self.flows) - LINKS) * WINDOW)
        self.assertLess(self.resident() - before, 2 * MEMORY + ALLOWANCE)
        drawn = [service._budget.drawn for service in self.services]
        await self.rest("it was parked still")
        self.assertEqual([service._budget.drawn for service in self.services], drawn)

        # The links come back.
        destination._ports = ports
        for port in ports:
            await port.start()
        for flow in self.flows:
            flow.wanted = FLOW

        def complete() -> bool:
            for flow in self.flows:
                flow.step()
            self.check()
            return all(flow.received == FLOW for flow in self.flows)

        await self.until(complete, "everything had arrived")
        for flow in self.flows:
            flow.close()

        def given_back() -> bool:
            for service in self.services:
                for session in self.sessions(service):
                    session.rest()
            return all(service._budget.drawn == LINKS * link_beginning(REPLAY) for service in self.services)

        await self.until(given_back, "everything was given back")
