"""
libvirt gives up a migration while the link is away: its disks end, one after the other.

Its control connection is closed then, and it waits for QEMU, which waits for the disks.
"""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

from relaymux.net import apart
from relaymux.net.connections import LocalSocket
from relaymux.net.local import LocalDialer
from relaymux.service.abandoned import AbandonedMoves
from relaymux.service.config_sections import ServiceSection, VmPart
from relaymux.service.sockets import LocalSockets, Served
from tests import bridges
from tests.bridges import BridgeTestCase
from tests.peers import stamped
from tests.sockets import reactor

PARTS: tuple[VmPart, ...] = ("control", "ram", "nbd")


class GivenUpTests(BridgeTestCase):
    """The sockets of two VMs that leave, and what is at the other end of the link."""

    async def setUp(self) -> None:  # type: ignore[override]
        # Whoever waits does so until the test says otherwise.
        self.patch(apart, "APART_SECONDS", 3600)
        self.patch(bridges, "LIMITS", replace(bridges.LIMITS, resume_window=60.0))
        await super().setUp()
        peers = {"to-far": self.near}
        self.sockets = LocalSockets(reactor, peers)
        self.moves = AbandonedMoves(reactor, self.sockets, peers)
        self.served: dict[str, Served] = {}
        self.far_programs: dict[str, socket.socket] = {}
        for vm in ("web1", "web2"):
            for part in PARTS:
                self.offer(vm, part)

    def offer(self, vm: str, part: VmPart) -> None:
        """Make one of the VM's sockets here, and let a program listen for it at the other end."""
        name = f"{vm}.{part}"
        self.far_path = f"{self.path}/far-{name}"
        self.far_programs[name] = self.far_socket()
        local = LocalSocket(f"vm {vm} {part}", name, self.far_path, 10.0, 64)
        dialer = LocalDialer(reactor, self.far, local)
        self.far.register(name, dialer)
        section = ServiceSection(
            "vm", name, "to-far", "listen", Path(self.path, f"near-{name}"), vm=vm, part=part
        )
        self.served[name] = self.sockets.serve(section)
        self.sections.append(dialer)

    async def finish(self) -> None:
        """As in the other tests; the session is not to wait for a link."""
        self.sockets.close()
        if not self.near.is_up:
            await self.link()
        for program in self.programs:
            program.close()
        await self.until(
            lambda: (
                not self.open_connections and not any(s.connections.open_count for s in self.sockets.served)
            ),
            "all was over",
        )
        await self.near.drain(1.0)
        await self.far.drain(1.0)
        await super().finish()

    async def open(self, *names: str) -> list[socket.socket]:
        """@return: connections to these sockets, in this order, that have come through."""
        programs = []
        for name in names:
            self.near_path, self.program = f"{self.path}/near-{name}", self.far_programs[name]
            totals = self.served[name].connections.totals
            before = totals.opened
            programs.append(self.connect())
            await self.accept()
            await self.until(lambda: totals.opened > before, "it was answered")  # noqa: B023 (awaited here)
        return programs

    async def look(self) -> None:
        """More often than once, as a daemon does."""
        for _ in range(3):
            self.moves.look()
            await self.turns(5)

    async def lose_link(self) -> None:
        await self.close_link()
        await self.until(lambda: not self.near.is_up, "the link was down")

    def told(self, name: str) -> list[str]:
        """What was said of the ends of one socket's connections."""
        return self.lines(f"vm {name.replace('.', ' ')}: connection", " ended as an error: ", "near-")

    async def test_disks_end(self) -> None:
        """The first at once, the next one later; neither the memory nor another VM is concerned."""
        control, one, two, ram = await self.open("web1.control", "web1.nbd", "web1.nbd", "web1.ram")
        others = await self.open("web2.control", "web2.nbd")
        await self.lose_link()
        await self.look()
        await self.nothing(one)
        control.close()
        await self.look()
        await self.ended(one)
        for program in (two, ram, *others):
            await self.nothing(program)
        self.assertEqual(len(self.told("web1.nbd")), 1)
        # As a daemon does that stops: nothing waits any more.
        self.sockets.close()
        await self.ended(two)
        for program in (ram, *others):
            await self.nothing(program)
        await self.until(lambda: len(self.told("web1.nbd")) == 2, "each had its line")
        for number, line in enumerate(self.told("web1.nbd"), 1):
            self.assertIn(
                f"connection {number} ended as an error: relaymux gave up: link to-far is away,"
                " and libvirt here has closed its control connection, ",
                line,
            )

    async def test_not_read(self) -> None:
        """
        libvirt goes on asking whether the other one is there until it gives up: what cannot be sent
        is not read, and its end is behind that.
        """
        control, one = await self.open("web1.control", "web1.nbd")
        await self.lose_link()
        for _ in range(3):
            control.send(b"ping")
            await self.turns()
        [connection] = self.served["web1.control"].connections.open_connections
        self.assertEqual(connection.bridge.sent, 4)
        control.close()
        await self.look()
        await self.ended(one)

    async def test_link_is_up(self) -> None:
        """Then the other libvirt hears of it, and ends what there is to end."""
        control, one = await self.open("web1.control", "web1.nbd")
        control.close()
        await self.look()
        await self.nothing(one)

    async def test_control_goes_another_way(self) -> None:
        """Nobody here says that the migration was given up."""
        [one] = await self.open("web1.nbd")
        await self.lose_link()
        await self.look()
        await self.nothing(one)

    async def test_somebody_else(self) -> None:
        """An operator's virsh that goes away during an outage has nothing to do with the migration."""
        before, control, one, after = await self.open(
            "web1.control", "web1.control", "web1.nbd", "web1.control"
        )
        await self.lose_link()
        before.close()
        after.close()
        await self.look()
        await self.nothing(one)
        control.close()
        await self.look()
        await self.ended(one)

    async def test_only_its_own(self) -> None:
        """Disks that were there before the control connection was are another migration's."""
        earlier, control, one = await self.open("web1.nbd", "web1.control", "web1.nbd")
        await self.lose_link()
        control.close()
        await self.look()
        await self.ended(one)
        await self.nothing(earlier)

    async def test_link_comes_back(self) -> None:
        """What was ended meanwhile is over at the other end, too, and the rest goes on."""
        control, one, ram = await self.open("web1.control", "web1.nbd", "web1.ram")
        far_ram = self.programs[-1]
        await self.lose_link()
        control.close()
        await self.look()
        await self.ended(one)
        await self.link()
        await self.exchange(
            [(ram, far_ram, stamped(bridges.LARGE, 1)), (far_ram, ram, stamped(bridges.LARGE, 2))]
        )
        await self.until(
            lambda: len(self.lines("vm web1 nbd", "the other daemon gave it up")) == 1, "it was told there"
        )
