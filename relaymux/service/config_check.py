"""
What is wrong with a configuration beyond single values: sections that
contradict one another, and a machine that is not as the file expects it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Container, Iterator
from itertools import combinations
from pathlib import Path

from relaymux.errors import ConfigurationError
from relaymux.service.config_sections import (
    Configuration,
    LibvirtSection,
    LinkSection,
    ServiceSection,
)
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
    problems += _status_taken(configuration)
    any_vm = configuration.any_vm
    services = (*configuration.services, *(any_vm.services if any_vm else ()))
    # One for all sockets that a section has on a link.
    for service in {(service.section, service.link): service for service in services}.values():
        if service.link in links:
            problems += _too_many_connections(service, links[service.link])
    for pair in combinations(configuration.services, 2):
        if not pair[0].vm or pair[0].vm != pair[1].vm:  # one VM's do not contradict one another
            problems += _same_name(*pair)
            problems += _same_path(*pair)
    # Two sockets of one section may say the same.
    different = {str(problem.within(file=configuration.file)): problem for problem in problems}
    return list(different.values())


def check_configuration(configuration: Configuration, reactor: object) -> list[ConfigurationError]:
    """
    Hold C{configuration} against this machine, as the user who runs this;
    nothing is started, made or changed.

    @param reactor: given to the transports, which do not use it yet.
    @return: what would keep the daemon from working, every error of it.
    """
    problems = [problem for link in configuration.links for problem in _transport_problems(link, reactor)]
    will_be_made = {directory.path for directory in configuration.directories_to_make()}
    for key, section, directory in (
        ("runtime-directory", "relay", configuration.runtime_directory),
        ("directory", "libvirt", configuration.libvirt.directory if configuration.vms else None),
    ):
        if directory is not None:
            problems += _made_directory_problems(directory, section, key)
    if any(vm.arrives for vm in configuration.vms):
        problems += _arrival_problems(configuration.libvirt, configuration.name)
    if configuration.any_vm is not None and configuration.any_vm.leaves:
        problems += _state_problems(configuration.libvirt.state_directory)
    if configuration.status is not None:
        problems += _place_problems(configuration.status, "relay", "status", will_be_made)
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
            key=_path_key(second),
            found=str(second.path),
            expected="a path of its own for each section",
        )
    elif first.role != second.role and first.link == second.link:
        yield ConfigurationError(
            f"[{first.section}] says {first.role} for the same path: the peer would talk to itself",
            section=second.section,
            key=_path_key(second),
            found=str(second.path),
            expected="the path of QEMU's socket after connect, and a path of relaymux's own after listen",
        )


def _status_taken(configuration: Configuration) -> Iterator[ConfigurationError]:
    for service in configuration.services:
        if service.path == configuration.status:
            yield ConfigurationError(
                f"[{service.section}] has the same socket",
                section="relay",
                key="status",
                found=str(service.path),
                expected="a path of its own",
            )


def _path_key(service: ServiceSection) -> str:
    """@return: the key that says the path; a VM's follow from its name."""
    return "" if service.vm else service.role


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


def _made_directory_problems(directory: Path, section: str, key: str) -> Iterator[ConfigurationError]:
    """A directory that the daemon makes, with its parent there."""
    where = {"section": section, "key": key, "found": str(directory)}
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


def _arrival_problems(libvirt: LibvirtSection, name: str) -> Iterator[ConfigurationError]:
    """Whether QEMU may make its sockets where VMs arrive."""
    directory = libvirt.directory / name
    if libvirt.qemu_user is None or not directory.is_dir():
        return
    status = directory.stat()
    # What groups and access lists allow is the operator's business.
    if status.st_uid != libvirt.qemu_user and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        yield ConfigurationError(
            f"the user with id {libvirt.qemu_user}, which QEMU runs as, may not make sockets in {directory}",
            section="libvirt",
            key="directory",
            found=str(libvirt.directory),
            expected=f"QEMU's user to own it: chown {libvirt.qemu_user} {directory}; "
            "or the user that libvirt's qemu.conf names as qemu-user",
        )


def _state_problems(directory: Path) -> Iterator[ConfigurationError]:
    """Whether it can be seen which VMs run.  Before libvirt was started there is no such directory."""
    if directory.exists() and not (directory.is_dir() and os.access(directory, os.R_OK | os.X_OK)):
        yield ConfigurationError(
            f"the user with id {os.geteuid()} cannot see in {directory} which VMs run",
            section="libvirt",
            key="state-directory",
            found=str(directory),
            expected="the directory in which libvirt has NAME.xml for each of them, and a user who may read "
            "it; or a [vm NAME] section for each VM in place of [vm *]",
        )


def _socket_problems(service: ServiceSection, will_be_made: Container[Path]) -> Iterator[ConfigurationError]:
    yield from _place_problems(service.path, service.section, _path_key(service), will_be_made)
    yield from _ownership_problems(service)


def _place_problems(
    path: Path, section: str, key: str, will_be_made: Container[Path]
) -> Iterator[ConfigurationError]:
    """Whether a socket can be made at C{path}."""
    problem = expected = ""
    directory = path.parent
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
    elif os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        problem, expected = (
            "something that is not a socket is there",
            "nothing, or a socket that relaymux left",
        )
    if problem:
        yield ConfigurationError(
            problem,
            section=section,
            key=key,
            found=str(path),
            expected=expected,
        )


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
