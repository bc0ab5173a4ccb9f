"""
Reads the sections that couple UNIX sockets to a link: C{[disk NAME]} and
C{[stream NAME]}, one socket each; and C{[vm NAME]}, all those that libvirt needs
to move a VM, with what C{[libvirt]} says about all of them.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from relaymux.errors import ConfigurationError
from relaymux.net.disks import MAX_PATH_BYTES
from relaymux.service import config_sections as sections
from relaymux.service.config_sections import (
    Direction,
    LibvirtSection,
    LinkSection,
    Role,
    ServiceKind,
    ServiceSection,
    VmPart,
    VmSection,
)
from relaymux.service.config_syntax import Section
from relaymux.service.config_values import (
    count_between,
    parse_directory,
    parse_group,
    parse_mode,
    parse_owner,
    parse_socket_path,
    seconds_between,
    suggestion,
)

__all__ = [
    "LIBVIRT_KEYS",
    "SERVICE_KEYS",
    "VM_KEYS",
    "parse_count",
    "read_libvirt",
    "read_service",
    "read_vm",
]

_SOCKET_KEYS: Final = ("mode", "owner", "group")
SERVICE_KEYS: Final = ("link", "listen", "connect", *_SOCKET_KEYS, "open-timeout", "max-connections")
LIBVIRT_KEYS: Final = ("directory", "socket", "state-directory", "qemu-user")
VM_KEYS: Final = ("link", "direction", *_SOCKET_KEYS, "open-timeout", "max-connections")

_DIRECTIONS: Final[dict[str, Direction]] = {"both": "both", "in": "in", "out": "out"}

# More than any host gives a process in file descriptors.
parse_count = count_between(1, 65536)
_parse_open_timeout = seconds_between(0.1, 3600)


def read_service(
    section: Section, kind: ServiceKind, directory: Path, links: Mapping[str, LinkSection]
) -> ServiceSection:
    """A C{[disk]} or C{[stream]}."""
    section.refuse_unknown(SERVICE_KEYS, f"a [{kind}] section")
    role = section.role()
    if "listen" not in section.values:
        _refuse_socket_keys(
            section,
            "the key says how the socket is made, and with connect it is not made here",
            "listen",
        )
    link = section.require("link", partial(_known_link, links=links), "", "the name of a [link NAME] section")
    path = section.get(role, partial(parse_socket_path, directory=directory), Path())
    settings = _Settings.read(section)
    return settings.applied_to(ServiceSection(kind, section.name, link, role, path), links.get(link))


def read_libvirt(section: Section | None, directory: Path) -> LibvirtSection:
    """C{[libvirt]}, or what holds without one."""
    if section is None:
        return LibvirtSection(qemu_user=_usual_qemu_user())
    section.refuse_unknown(LIBVIRT_KEYS, "the [libvirt] section")
    socket = section.get("socket", partial(parse_socket_path, directory=directory), None)
    return LibvirtSection(
        directory=section.get(
            "directory", partial(parse_directory, directory=directory), sections.DEFAULT_DIRECTORY
        ),
        sockets=sections.DEFAULT_LIBVIRT_SOCKETS if socket is None else (socket,),
        state_directory=section.get(
            "state-directory",
            partial(parse_directory, directory=directory),
            sections.DEFAULT_STATE_DIRECTORY,
        ),
        qemu_user=section.get("qemu-user", parse_owner, _usual_qemu_user()),
    )


def read_vm(
    section: Section, name: str, libvirt: LibvirtSection, links: Mapping[str, LinkSection]
) -> VmSection:
    """
    A C{[vm]}.

    @param name: this daemon's.
    """
    section.refuse_unknown(VM_KEYS, "a [vm] section")
    if len(section.name) > sections.LONGEST_VM_NAME:
        section.wrong(
            ConfigurationError(
                f"the name has {len(section.name)} characters",
                expected=f"a VM's name of at most {sections.LONGEST_VM_NAME}, since more is added to it",
            )
        )
    vm = VmSection(
        name=section.name,
        links=section.require(
            "link",
            partial(_known_links, links=links, name=name),
            (),
            "the name of a [link NAME] section, or several with commas between them",
        ),
        direction=section.get("direction", _parse_direction, "both"),
    )
    if not vm.leaves:
        _refuse_socket_keys(
            section,
            "the key says how sockets are made, and with direction = in none are",
            "another direction",
        )
    settings = _Settings.read(section)
    found: list[ServiceSection] = []
    for link in vm.links:
        if vm.leaves:
            found += _sockets(vm, link, "listen", vm.paths_to(link, libvirt))
        if vm.arrives:
            found += _sockets(vm, link, "connect", vm.paths_to(name, libvirt), libvirt.sockets)
    for service in found:
        _check_length(section, service.path)
    return replace(vm, services=tuple(settings.applied_to(service, links[service.link]) for service in found))


def _sockets(
    vm: VmSection, link: str, role: Role, paths: Mapping[VmPart, Path], libvirt: Sequence[Path] = ()
) -> Iterator[ServiceSection]:
    """@param libvirt: where the control connection of a VM that arrives leads to."""
    for part, path in paths.items():
        others: Sequence[Path] = ()
        if part == "control" and libvirt:
            path, *others = libvirt
        yield ServiceSection(
            "vm", f"{vm.name}.{part}", link, role, path, others=tuple(others), vm=vm.name, part=part
        )


@dataclass(frozen=True)
class _Settings:
    """The keys that all these sections have."""

    mode: int
    owner: int | None
    group: int | None
    open_timeout: float
    max_connections: int | None

    @classmethod
    def read(cls, section: Section) -> _Settings:
        return cls(
            mode=section.get("mode", parse_mode, sections.DEFAULT_MODE),
            owner=section.get("owner", parse_owner, None),
            group=section.get("group", parse_group, None),
            open_timeout=section.get("open-timeout", _parse_open_timeout, sections.DEFAULT_OPEN_TIMEOUT),
            max_connections=section.get("max-connections", parse_count, None),
        )

    def applied_to(self, service: ServiceSection, link: LinkSection | None) -> ServiceSection:
        streams = link.max_streams if link else sections.DEFAULT_MAX_STREAMS
        return replace(
            service,
            mode=self.mode,
            # With a VM it is QEMU's user, and a guest that broke out of QEMU must not get at the
            # other host's libvirt.
            owner=None if service.part == "control" else self.owner,
            group=self.group,
            open_timeout=self.open_timeout,
            max_connections=self.max_connections or min(sections.DEFAULT_MAX_CONNECTIONS, streams),
        )


def _usual_qemu_user() -> int | None:
    """@return: what libvirt runs QEMU as, if this daemon could give it a directory."""
    if os.geteuid() == 0:
        for name in sections.QEMU_USERS:
            try:
                return pwd.getpwnam(name).pw_uid
            except KeyError:
                continue
    return None


def _refuse_socket_keys(section: Section, problem: str, expected: str) -> None:
    for key in _SOCKET_KEYS:
        if key in section.values:
            section.wrong(ConfigurationError(problem, expected=f"{expected}, or no {key}"), key)


def _check_length(section: Section, path: Path) -> None:
    length = len(os.fsencode(path))
    if length > MAX_PATH_BYTES:
        section.wrong(
            ConfigurationError(
                f"a socket's path would have {length} bytes, and there is room for {MAX_PATH_BYTES}",
                found=str(path),
                expected="a shorter name of the VM or of the host, or a shorter directory in [libvirt]",
            )
        )


def _known_link(text: str, links: Collection[str]) -> str:
    if text not in links:
        problem = f"there is no section [link {text}]{suggestion(text, links)}"
        raise ConfigurationError(
            problem, found=text, expected="the name of a link, one of " + (", ".join(links) or "none")
        )
    return text


def _known_links(text: str, links: Collection[str], name: str) -> tuple[str, ...]:
    found = tuple(_known_link(part.strip(), links) for part in text.split(","))
    for link in found:
        if found.count(link) > 1:
            raise ConfigurationError("the same link comes twice", found=link, expected="every link once")
        if link == name:
            raise ConfigurationError(
                "the link is called as this daemon is, and the sockets of both hosts would be the same",
                found=link,
                expected="a link with the name of the daemon at its other end, which the paths contain",
            )
    return found


def _parse_direction(text: str) -> Direction:
    if text not in _DIRECTIONS:
        raise ConfigurationError(
            "this is not a direction", found=text, expected="out (it may leave), in (it may arrive) or both"
        )
    return _DIRECTIONS[text]
