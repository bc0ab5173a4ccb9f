"""What the kernel knows about a process: processor time, memory, connections."""

from __future__ import annotations

import ipaddress
import os
import sys
from pathlib import Path

__all__ = ["cpu_seconds", "peak_memory", "tcp_connections", "unix_connections"]

_LISTENING = "0A"

_CONNECTED = "03"


def cpu_seconds(pid: int) -> float:
    """@return: user and system time that C{pid} has used."""
    fields = (
        Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    )
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_memory(pid: int) -> int:
    """@return: the most bytes of memory that C{pid} has had resident."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def tcp_connections(pid: int) -> set[tuple[str, str]]:
    """@return: this and the other end of each TCP connection that C{pid} holds."""
    inodes = _socket_inodes(pid)
    found = set()
    for name in ("tcp", "tcp6"):
        for line in _table(f"/proc/{pid}/net/{name}"):
            local, remote, state, inode = line[1], line[2], line[3], line[9]
            if inode in inodes and state != _LISTENING:
                found.add((_address(local), _address(remote)))
    return found


def unix_connections(pid: int) -> set[str]:
    """
    @return: the inodes of the connections that C{pid} has accepted on UNIX
        sockets.  Those have the listening socket's name; the ones it has
        made itself have none.
    """
    inodes = _socket_inodes(pid)
    rows = _table("/proc/net/unix")
    return {line[6] for line in rows if len(line) > 7 and line[5] == _CONNECTED and line[6] in inodes}


def _address(text: str) -> str:
    """Turn the kernel's notation, hexadecimal words in the machine's byte order, into the usual one."""
    host, _, port = text.partition(":")
    words = (int(host[place : place + 8], 16) for place in range(0, len(host), 8))
    address = ipaddress.ip_address(b"".join(word.to_bytes(4, sys.byteorder) for word in words))
    return f"{address}:{int(port, 16)}"


def _table(path: str) -> list[list[str]]:
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:  # a kernel without IPv6 has no tcp6
        return []
    return [line.split() for line in lines[1:]]


def _socket_inodes(pid: int) -> set[str]:
    inodes = set()
    directory = Path(f"/proc/{pid}/fd")
    for entry in directory.iterdir():
        try:
            target = os.readlink(entry)
        except FileNotFoundError:  # closed since it was listed
            continue
        if target.startswith("socket:["):
            inodes.add(target[len("socket:[") : -1])
    return inodes
