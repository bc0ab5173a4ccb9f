"""
Reads the configuration file: INI into frozen dataclasses, or errors that name
the file, the section, the key, what was found and what was expected.

All errors of a file are collected: C{relaymux check} shows all of them, and the
daemon, which ends with the first, raises it (L{load_configuration}).  What
can be known from the file alone is checked here; what depends on the machine
is L{check_configuration}'s part.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final

from relaymux.errors import ConfigurationError
from relaymux.interfaces import IRelayTransport
from relaymux.service import config_sections as sections
from relaymux.service.config_check import check_configuration, find_contradictions
from relaymux.service.config_sections import (
    Configuration,
    LinkSection,
    Role,
    ServiceKind,
    ServiceSection,
    VmSection,
)
from relaymux.service.config_services import (
    LIBVIRT_KEYS,
    SERVICE_KEYS,
    VM_KEYS,
    parse_count,
    read_libvirt,
    read_service,
    read_vm,
)
from relaymux.service.config_syntax import Section, parse_ini, read_text
from relaymux.service.config_values import (
    GIB,
    KIB,
    MIB,
    parse_addresses,
    parse_directory,
    parse_name,
    parse_socket_path,
    seconds_between,
    size_between,
    suggestion,
)
from relaymux.transports.registry import find_transport

__all__ = [
    "LIBVIRT_KEYS",
    "LINK_KEYS",
    "RELAY_KEYS",
    "SERVICE_KEYS",
    "VM_KEYS",
    "Configuration",
    "LinkSection",
    "Role",
    "ServiceKind",
    "ServiceSection",
    "VmSection",
    "check_configuration",
    "load_configuration",
    "read_configuration",
]

RELAY_KEYS: Final = ("name", "memory", "drain-timeout", "progress", "status", "runtime-directory")
LINK_KEYS: Final = (
    "transport",
    "connect",
    "listen",
    "window",
    "replay-buffer",
    "max-streams",
    "silence",
    "resume-window",
)

_KINDS: Final = ("relay", "link", "disk", "stream", "libvirt", "vm")

#: Those that come once, without a name.
_NAMELESS: Final = ("relay", "libvirt")

# The lower ends are for tests and tiny machines; with less the two sides talk of
# credit more than they move data.  Above the upper ends are typing errors: 1 GiB
# on its way is 10 Gbit/s at 850 ms.
_parse_window = size_between(16 * KIB, GIB)
_parse_replay_buffer = size_between(64 * KIB, GIB)
# Above the upper end are typing errors.
_parse_memory = size_between(MIB, 1024 * GIB)
# A busy host is silent for a good part of a second without being dead.
_parse_silence = seconds_between(0.5, 3600)
# An hour without a link is an incident that somebody looks at.
_parse_resume_window = seconds_between(0, 3600)
_parse_progress = seconds_between(0, 3600)
_parse_drain_timeout = seconds_between(0, 86400)


def load_configuration(file: Path | str) -> Configuration:
    """
    @param file: relative paths in it are relative to the directory it is in.
    @raise ConfigurationError: the first thing in it that is wrong.
    """
    configuration, problems = read_configuration(file)
    if configuration is None:
        raise problems[0]
    return configuration


def read_configuration(file: Path | str) -> tuple[Configuration | None, list[ConfigurationError]]:
    """@return: the configuration and no errors; or L{None} and all of them, at least one."""
    problems: list[ConfigurationError] = []
    try:
        text = read_text(file)
    except ConfigurationError as error:
        return None, [error]
    written = parse_ini(text, str(file), problems)
    if not written and problems:
        return None, problems
    configuration = _read_sections(written, str(file), Path(file).absolute().parent, problems)
    return (None if problems else configuration), problems


def _read_sections(
    written: list[Section], file: str, directory: Path, problems: list[ConfigurationError]
) -> Configuration:
    usable = [section for section in written if _is_usable(section)]
    of_kind = {kind: [section for section in usable if section.kind == kind] for kind in _KINDS}
    for kind, header, expected in (
        ("relay", "[relay]", "one, with a line name = NAME: the name of this daemon"),
        ("link", "[link NAME]", "at least one, which says how to reach the peer"),
    ):
        if not any(section.kind == kind for section in written):
            problem = f"there is no {header} section"
            problems.append(ConfigurationError(problem, file=file, expected=expected))
    links = {section.name: _read_link(section, directory) for section in of_kind["link"]}
    services = [
        read_service(section, kind, directory, links)
        for section in usable
        for kind in ("disk", "stream")
        if section.kind == kind
    ]
    relay = next(iter(of_kind["relay"]), Section(file, "relay", {"name": "unnamed"}, problems))
    relay.refuse_unknown(RELAY_KEYS, "[relay]")
    name = relay.require("name", parse_name, "", "the name of this daemon, another one than its peers have")
    libvirt = read_libvirt(next(iter(of_kind["libvirt"]), None), directory)
    vms = [read_vm(section, name, libvirt, links) for section in of_kind["vm"]]
    configuration = Configuration(
        file=file,
        name=name,
        links=tuple(links.values()),
        services=(*services, *(service for vm in vms if not vm.is_any for service in vm.services)),
        memory=relay.get("memory", _parse_memory, sections.DEFAULT_MEMORY),
        drain_timeout=relay.get("drain-timeout", _parse_drain_timeout, sections.DEFAULT_DRAIN_TIMEOUT),
        progress=relay.get("progress", _parse_progress, sections.DEFAULT_PROGRESS),
        status=relay.get("status", partial(parse_socket_path, directory=directory), None),
        runtime_directory=relay.get("runtime-directory", partial(parse_directory, directory=directory), None),
        libvirt=libvirt,
        vms=tuple(vms),
    )
    problems += find_contradictions(configuration)
    return configuration


def _is_usable(section: Section) -> bool:
    """@return: whether kind and name are right; it is reported if not."""
    if section.kind not in _KINDS:
        problem = f"there is no such kind of section{suggestion(section.kind, _KINDS)}"
        expected = "[relay], [link NAME], [disk NAME], [stream NAME], [libvirt] or [vm NAME]"
        section.wrong(ConfigurationError(problem, expected=expected))
        return False
    if section.kind in _NAMELESS:
        if section.name:
            problem = "this kind of section has no name"
            section.wrong(ConfigurationError(problem, expected=f"[{section.kind}]"))
        return not section.name
    try:
        if not section.name:
            raise ConfigurationError("the section has no name", expected=f"[{section.kind} NAME]")
        if (section.kind, section.name) != ("vm", "*"):
            parse_name(section.name)
    except ConfigurationError as error:
        section.wrong(error)
        return False
    return True


def _read_link(section: Section, directory: Path) -> LinkSection:
    transport: IRelayTransport | None = section.require(
        "transport", find_transport, None, "the name of a transport, such as tls"
    )
    options: dict[str, str] = {}
    if transport is not None:
        own = [key for key in transport.keys if key not in LINK_KEYS]
        section.refuse_unknown((*LINK_KEYS, *own), f"a [link] section with transport = {transport.name}")
        options = {key: section.get(key, str, "") for key in own if key in section.values}
    role = section.role()
    window = section.get("window", _parse_window, sections.DEFAULT_WINDOW)
    # More than the replay buffer is never on its way to a window of the same size.
    replay_buffer = max(window, sections.DEFAULT_REPLAY_BUFFER)
    return LinkSection(
        name=section.name,
        transport=section.values.get("transport", ""),
        role=role,
        addresses=section.get(role, parse_addresses, ()),
        options=options,
        directory=directory,
        window=window,
        replay_buffer=section.get("replay-buffer", _parse_replay_buffer, replay_buffer),
        max_streams=section.get("max-streams", parse_count, sections.DEFAULT_MAX_STREAMS),
        silence=section.get("silence", _parse_silence, sections.DEFAULT_SILENCE),
        resume_window=section.get("resume-window", _parse_resume_window, sections.DEFAULT_RESUME_WINDOW),
    )
