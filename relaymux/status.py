"""
C{relaymux status}: asks a daemon how it is, and shows it to a person.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from relaymux.errors import ConfigurationError
from relaymux.net.amounts import rate, rough_amount
from relaymux.service.config import Configuration, load_configuration

__all__ = ["ask", "show", "status_socket"]

#: Seconds for the daemon to answer.
PATIENCE = 5.0

#: Seconds between the two looks that give the rates.
BETWEEN_LOOKS = 1.0


def status_socket(place: Path) -> Path:
    """
    @param place: a daemon's configuration file, or its status socket.
    @raise ConfigurationError: the file has errors, or no status socket.
    """
    if place.is_socket():
        return place
    configuration: Configuration = load_configuration(place)
    if configuration.status is None:
        raise ConfigurationError(
            "the daemon makes no status socket",
            file=str(place),
            section="relay",
            key="status",
            expected="the path of one, such as status = /run/relaymux/status.sock",
        )
    return configuration.status


def ask(path: Path) -> dict[str, Any]:
    """
    @return: the daemon's document.
    @raise OSError: it cannot be reached.
    @raise ValueError: what is there is no such daemon.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(str(path))
        parts = []
        while part := connection.recv(1 << 16):
            parts.append(part)
    document = json.loads(b"".join(parts))
    if not isinstance(document, dict) or document.get("format") != 1:
        raise ValueError("another form of status than this version of relaymux understands")
    return document


def show(path: Path) -> Iterator[str]:
    """@return: lines.  If something is open, it takes L{BETWEEN_LOOKS} to learn how fast it moves."""
    before, seconds = ask(path), 0.0
    now = before
    if any(served["connections"] for served in before["sockets"]):
        began = time.monotonic()
        time.sleep(BETWEEN_LOOKS)
        now, seconds = ask(path), time.monotonic() - began
    yield f"daemon {now['daemon']}, relaymux {now['version']}, pid {now['pid']}, up {now['seconds']:.0f} s"
    yield ""
    yield from _table(
        ("link", "state", "peer", "streams", "unacknowledged", "resumed"), map(_link, now["links"])
    )
    yield ""
    moved = {_key(served, one): one for served in before["sockets"] for one in served["connections"]}
    rows = [row for served in now["sockets"] for row in _served(served, moved, seconds)]
    yield from _table(("socket", "connection", "disk", "sent", "received", "rate", "for"), rows)


def _link(link: Mapping[str, Any]) -> Sequence[str]:
    state = link["state"]
    if link["away_seconds"] is not None:
        state += f" {link['away_seconds']:.0f} s of {link['resume_window_seconds']:g}"
    return (
        link["link"],
        state,
        link["peer"] or "-",
        str(link["streams"]),
        rough_amount(link["unacknowledged_bytes"]),
        f"{link['resumes']} times",
    )


def _key(served: Mapping[str, Any], connection: Mapping[str, Any]) -> tuple[object, ...]:
    return served["link"], served["service"], "listen" in served, connection["number"]


def _served(
    served: Mapping[str, Any], before: Mapping[tuple[object, ...], Mapping[str, Any]], seconds: float
) -> Iterator[Sequence[str]]:
    label = f"{served['section']} {served['part']}" if served["part"] else served["section"]
    label += f" {'to' if 'listen' in served else 'from'} {served['link']}"
    if not served["connections"]:
        told = f"{served['opened']} before" if served["opened"] else "none yet"
        amounts = [rough_amount(served[f"{way}_bytes"]) for way in ("sent", "received")]
        yield label, told, "", *amounts, "", ""
    for one in served["connections"]:
        earlier = before.get(_key(served, one))
        moved = "-"
        if earlier is not None:
            moved = rate(sum(one[way] - earlier[way] for way in ("sent_bytes", "received_bytes")), seconds)
        disk = one["disk"]
        yield (
            label,
            f"{one['number']}" if one["joined"] else f"{one['number']}, waiting",
            f"{disk['name']}, {rough_amount(disk['bytes'])}" if disk else "",
            rough_amount(one["sent_bytes"]),
            rough_amount(one["received_bytes"]),
            moved,
            f"{one['seconds']:.0f} s",
        )


def _table(heads: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> Iterator[str]:
    """@return: lines with columns as wide as they have to be."""
    lines = [heads, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
