"""
What is wrong with a configuration beyond single values: sections that
contradict one another, and a machine that is not as the file expects it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from relaymux.errors import ConfigurationError
from relaymux.service.config_sections import Configuration, LinkSection, ServiceSection
from relaymux.service.config_values import MIB, format_size
from relaymux.transports.registry import find_transport

__all__ = ["check_configuration", "find_contradictions"]


def find_contradictions(configuration: Configuration) -> list[ConfigurationError]:
    """
    @param configuration: as read, places of wrong values filled with stand-ins.
    @return: what the sections of it say against one another, or against themselves.
    """
    links = {link.name: link for link in configuration.links}
    problems = list(_too_little_memory(configuration))
    problems += [problem for link in configuration.links for problem in _link_contradictions(link)]
    problems += [problem for pair in combinations(configuration.links, 2) for problem in _same_address(*pair)]
    for service in configuration.services:
        if service.link in links:
            problems += _too_many_connections(service, links[service.link])
    for pair in combinations(configuration.services, 2):
        problems += _same_name(*pair)
        problems += _same_path(*pair)
    return [problem.within(file=configuration.file) for problem in problems]


def check_configuration(configuration: Configuration, reactor: object) -> list[ConfigurationError]:
    """
    Hold C{configuration} against this machine, as the user who runs this;
    nothing is started, made or changed.

    @param reactor: given to the transports, which do not use it yet.
    @return: what would keep the daemon from working, every error of it.
    """
    problems = [problem for link in configuration.links for problem in _transport_problems(link, reactor)]
    will_be_made = configuration.directories_to_make()
    if will_be_made:
        problems += _runtime_directory_problems(will_be_made[0])
    for service in configuration.services:
        if service.role == "listen":
            problems += _socket_problems(service, will_be_made)
    return [problem.within(file=configuration.file) for problem in problems]


def _too_little_memory(configuration: Configuration) -> Iterator[ConfigurationError]:
    least = configuration.least_memory()
    if configuration.memory < least:
        yield ConfigurationError(
            f"{len(configuration.links)} links and {len(configuration.services)} services, with their sizes,"
            " need more to begin with",
            section="relay",
            key="memory",
            found=format_size(configuration.memory),
            expected=f"at least {-(-least // MIB)}M, or a smaller replay-buffer or window",
        )


def _link_contradictions(link: LinkSection) -> Iterator[ConfigurationError]:
    if link.window > link.replay_buffer:
        # Both ends usually have the same sizes, and then no more than the replay
        # buffer is ever on its way to one window.
        yield ConfigurationError(
            "the window of one stream is larger than the replay-buffer of its link",
            section=link.section,
            key="window",
            found=format_size(link.window),
            expected=f"at most {format_size(link.replay_buffer)}, or a larger replay-buffer",
        )


def _same_address(first: LinkSection, second: LinkSection) -> Iterator[ConfigurationError]:
    if first.role == second.role == "listen" and first.transport == second.transport:
        for address in second.addresses:
            if address in first.addresses:
                yield ConfigurationError(
                    f"[{first.section}] listens there already",
                    section=second.section,
                    key="listen",
                    found=address,
                    expected="another address: a link listens for one peer",
                )


def _too_many_connections(service: ServiceSection, link: LinkSection) -> Iterator[ConfigurationError]:
    if service.max_connections > link.max_streams:
        yield ConfigurationError(
            f"the link carries fewer streams: [{link.section}] has max-streams = {link.max_streams}",
            section=service.section,
            key="max-connections",
            found=str(service.max_connections),
            expected=f"at most {link.max_streams}, or a larger max-streams",
        )


def _same_name(first: ServiceSection, second: ServiceSection) -> Iterator[ConfigurationError]:
    if first.name == second.name:
        yield ConfigurationError(
            f"the name is taken by [{first.section}]; disks and streams share one set of names",
            section=second.section,
            expected="another name, on both sides of the link",
        )


def _same_path(first: ServiceSection, second: ServiceSection) -> Iterator[ConfigurationError]:
    """Several sections may dial one socket: QEMU has one NBD server for all its disks."""
    if first.path != second.path or first.path == Path():
        return
    if first.role == second.role == "listen":
        yield ConfigurationError(
            f"[{first.section}] makes the same socket",
            section=second.section,
            key="listen",
            found=str(second.path),
            expected="a path of its own for each section",
        )
    elif first.role != second.role and first.link == second.link:
        yield ConfigurationError(
            f"[{first.section}] says {first.role} for the same path: the peer would talk to itself",
            section=second.section,
            key=second.role,
            found=str(second.path),
            expected="the path of QEMU's socket after connect, and a path of relaymux's own after listen",
        )


def _transport_problems(link: LinkSection, reactor: object) -> Iterator[ConfigurationError]:
    transport = find_transport(link.transport)
    make = transport.client if link.role == "connect" else transport.server
    seen: set[tuple[str, str]] = set()
    for settings in link.settings():
        try:
            make(reactor, settings)
        except ConfigurationError as error:
            # What is wrong with the certificate is wrong at every address.
            if (error.key, str(error)) not in seen:
                seen.add((error.key, str(error)))
                yield error.within(section=link.section, key=link.role)


def _runtime_directory_problems(directory: Path) -> Iterator[ConfigurationError]:
    where = {"section": "relay", "key": "runtime-directory", "found": str(directory)}
    if os.path.lexists(directory):
        if not directory.is_dir():
            yield ConfigurationError(
                "this is not a directory", **where, expected="a directory, or nothing yet"
            )
    elif not directory.parent.is_dir():
        yield ConfigurationError(
            f"the directory {directory.parent} does not exist",
            **where,
            expected=f"it to be there, the last part alone is made: mkdir -p {directory.parent}",
        )
    elif not os.access(directory.parent, os.W_OK | os.X_OK):
        yield ConfigurationError(
            f"the user with id {os.geteuid()} may not make a directory in {directory.parent}",
            **where,
            expected="a place that belongs to the daemon's user",
        )


def _socket_problems(service: ServiceSection, will_be_made: tuple[Path, ...]) -> Iterator[ConfigurationError]:
    problem = expected = ""
    directory = service.path.parent
    if not os.path.lexists(directory):
        if directory not in will_be_made:
            problem = f"the directory {directory} does not exist"
            expected = (
                f"it to be made: install -d -m 0700 {directory}; the daemon itself makes directories only in "
                "the runtime-directory of [relay]"
            )
    elif not directory.is_dir():
        problem, expected = f"{directory} is not a directory", "a directory of relaymux's own"
    elif _anyone_may_replace_files(directory):
        problem = f"everyone on this machine may replace files in {directory}"
        expected = f"a directory that others cannot write to: chmod o-w {directory}"
    elif not os.access(directory, os.W_OK | os.X_OK):
        problem = f"the user with id {os.geteuid()} may not make files in {directory}"
        expected = "a directory that belongs to the daemon's user"
    elif os.path.lexists(service.path) and not stat.S_ISSOCK(os.lstat(service.path).st_mode):
        problem, expected = (
            "something that is not a socket is there",
            "nothing, or a socket that relaymux left",
        )
    if problem:
        yield ConfigurationError(
            problem, section=service.section, key="listen", found=str(service.path), expected=expected
        )
    yield from _ownership_problems(service)


def _anyone_may_replace_files(directory: Path) -> bool:
    mode = directory.stat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def _ownership_problems(service: ServiceSection) -> Iterator[ConfigurationError]:
    user = os.geteuid()
    if user == 0:
        return
    if service.owner not in (None, user):
        yield ConfigurationError(
            f"the user with id {user} cannot give files to another one; only root can",
            section=service.section,
            key="owner",
            found=str(service.owner),
            expected="no owner, and a group that both users are in; or the daemon to run as root",
        )
    if service.group is not None and service.group not in (os.getegid(), *os.getgroups()):
        yield ConfigurationError(
            f"the user with id {user} is not in this group",
            section=service.section,
            key="group",
            found=str(service.group),
            expected="a group of the daemon's user: usermod -a -G GROUP USER, then a new login",
        )
