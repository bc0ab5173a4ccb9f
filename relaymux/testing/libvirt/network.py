"""The link between two hosts: made, reset, swallowed, slowed down, and counted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from relaymux.testing.libvirt.host import Host

__all__ = ["Network"]

#: Inside the namespaces both are called so.
_INTERFACE = "link0"

#: Nobody has this hardware address.
_NOBODY = "02:00:00:00:00:99"

#: SYNs without ACK are connections being made.
_RULES = """
table inet rig {
    counter dialled { }
    chain output {
        type filter hook output priority 0; policy accept;
        oifname "link0" tcp flags & (syn | ack) == syn counter name dialled
    }
}
"""

#: A packet that carries RST itself has to pass, else nobody hears of the reset.
_RESET = """
table inet cut {
    chain output {
        type filter hook output priority 10; policy accept;
        oifname "link0" meta l4proto tcp tcp flags & rst == 0 reject with tcp reset
    }
    chain input {
        type filter hook input priority 10; policy accept;
        iifname "link0" meta l4proto tcp tcp flags & rst == 0 reject with tcp reset
    }
}
"""


@dataclass
class Network:
    """A veth pair, one end on each host."""

    one: Host
    other: Host

    @property
    def hosts(self) -> tuple[Host, Host]:
        """Both."""
        return self.one, self.other

    async def start(self) -> None:
        """Join the hosts, which are started."""
        # One host cannot see the other's processes, so it is given the namespace itself.
        with Path(f"/proc/{self.other.pid}/ns/net").open("rb") as other:
            peer = ("peer", "name", _INTERFACE, "netns", f"/proc/self/fd/{other.fileno()}")
            veth = ("ip", "link", "add", _INTERFACE, "type", "veth", *peer)
            await self.one.run(*veth, descriptors=[other.fileno()])
        for host in self.hosts:
            await host.run("ip", "address", "add", f"{host.address}/24", "dev", _INTERFACE)
            await host.run("ip", "link", "set", _INTERFACE, "up")
            await host.run("nft", "-f", "-", stdin=_RULES)
            hosts = "".join(f"{each.address} {each.name}\n" for each in self.hosts)
            host.path("/etc/hosts").write_text(f"127.0.0.1 localhost\n{hosts}", encoding="ascii")

    async def reset(self) -> None:
        """Reset every TCP connection between the hosts, and every one that is tried, until L{mend}."""
        for host in self.hosts:
            await host.run("nft", "-f", "-", stdin=_RESET)

    async def swallow(self) -> None:
        """Let every packet between the hosts vanish, until L{mend}."""
        for host, other in (self.hosts, self.hosts[::-1]):
            neighbour = ("to", other.address, "lladdr", _NOBODY, "dev", _INTERFACE, "nud", "permanent")
            await host.run("ip", "neighbour", "replace", *neighbour)

    async def mend(self) -> None:
        """Undo L{reset} and L{swallow}, if there was one."""
        for host, other in (self.hosts, self.hosts[::-1]):
            await host.run("nft", "-f", "-", stdin="table inet cut { }\ndelete table inet cut\n")
            await host.run("ip", "neighbour", "flush", "to", other.address, "dev", _INTERFACE, "nud", "all")

    async def limit(self, megabits: int) -> None:
        """
        Slow both directions down.

        @param megabits: per second; 0 for no limit.
        """
        for host in self.hosts:
            if megabits:
                rate = ("rate", f"{megabits}mbit", "burst", "64kb", "latency", "50ms")
                await host.run("tc", "qdisc", "replace", "dev", _INTERFACE, "root", "tbf", *rate)
            else:
                await host.run("sh", "-c", f"tc qdisc delete dev {_INTERFACE} root 2>/dev/null || true")

    async def dialled(self) -> int:
        """@return: how many TCP connections were tried between the hosts so far, by either."""
        count = 0
        for host in self.hosts:
            listing = json.loads((await host.run("nft", "-j", "list", "counters")).output)
            count += sum(item["counter"]["packets"] for item in listing["nftables"] if "counter" in item)
        return count
