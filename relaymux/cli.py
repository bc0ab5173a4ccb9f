"""
The C{relaymux} command: what an operator needs beside C{twistd relaymux}.

Output is for people: what was understood goes to standard output, what is
wrong to standard error, one line each.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from relaymux import __version__, status
from relaymux.certificates import make_certificates
from relaymux.errors import ConfigurationError
from relaymux.service.config import (
    Configuration,
    LinkSection,
    ServiceSection,
    VmSection,
    check_configuration,
    read_configuration,
)
from relaymux.service.config_values import format_size
from relaymux.testing import fault_proxy

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """
    The command line.

    @param arguments: without the command's name; L{None} takes the process's own.
    @return: the exit status: 0, or 1 if something is wrong.  A wrong command
        line exits with 2.
    """
    options = _parser().parse_args(arguments)
    if options.command == "check":
        return _check(options.file)
    if options.command == "status":
        return _status(options.place, as_json=options.json)
    if options.command == "fault-proxy":
        from twisted.internet import reactor

        return fault_proxy.run(options, reactor)
    return _make_certificates(options.directory, options.names)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="relaymux",
        description="Beside the daemon itself, which `twistd relaymux --config FILE` starts.",
    )
    parser.add_argument("--version", action="version", version=f"relaymux {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="say what a configuration file means and everything that is wrong with it",
        description=(
            "Reads a configuration file, and the certificates it names, as the daemon would, and looks at "
            "the directories of its sockets. Starts, makes and changes nothing. Run it as the user that the "
            "daemon runs as."
        ),
        epilog="Exit status: 0 if the daemon would start with it, else 1.",
    )
    check.add_argument("file", metavar="FILE", help="the file, such as etc/relay.ini")
    telling = commands.add_parser(
        "status",
        help="show what a running daemon carries: links, disks, bytes, rates",
        description=(
            "Asks a daemon, at the socket that its configuration names with status = PATH in [relay], and "
            "shows its links and what is open through its sockets. Run it as the daemon's user, or as root."
        ),
        epilog="Exit status: 0, or 1 if the daemon does not answer.",
    )
    telling.add_argument("place", metavar="FILE", type=Path, help="its configuration, or its status socket")
    telling.add_argument("--json", action="store_true", help="the daemon's answer as it is; no rates")
    certificates = commands.add_parser(
        "make-certificates",
        help="make a certificate authority and host certificates for trying out",
        description=(
            "Makes NAME.pem and NAME.key in DIR for every NAME, and the authority ca.pem and ca.key that "
            "signs them unless it is there. Overwrites nothing. Each host gets its own two files and ca.pem; "
            "ca.key stays where it is. NAME is what the other host says after `peer =`."
        ),
        epilog="Example: relaymux make-certificates pki hv-a.example hv-b.example",
    )
    certificates.add_argument("directory", metavar="DIR", type=Path, help="made if it is missing")
    certificates.add_argument("names", metavar="NAME", nargs="+", help="a host name or an IP address")
    faults = commands.add_parser(
        "fault-proxy",
        help="stand between two daemons and cut, delay or damage their link",
        description=fault_proxy.DESCRIPTION,
    )
    fault_proxy.add_arguments(faults)
    return parser


def _check(file: str) -> int:
    configuration, problems = read_configuration(file)
    if configuration is not None:
        from twisted.internet import reactor

        print(*_describe(configuration), sep="\n")
        problems = check_configuration(configuration, reactor)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print(f"{file}: {len(problems)} error{'s' * (len(problems) > 1)}", file=sys.stderr)
        return 1
    print(f"{file}: no errors found")
    return 0


def _status(place: Path, *, as_json: bool) -> int:
    try:
        path = status.status_socket(place)
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    try:
        if as_json:
            print(json.dumps(status.ask(path), indent=2))
        else:
            for line in status.show(path):
                print(line)
    except OSError as error:
        problem = f"{path}: {error.strerror or error}; is the daemon running, as this user?"
        print(f"error: no answer from {problem}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {path}: {error}", file=sys.stderr)
        return 1
    return 0


def _make_certificates(directory: Path, names: Sequence[str]) -> int:
    try:
        written = make_certificates(directory, names)
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in written:
        print(f"made {path}")
    return 0


def _describe(configuration: Configuration) -> list[str]:
    """@return: lines that say what the daemon would do, one for each section, or several for a VM."""
    return [
        f"daemon {configuration.name}: {format_size(configuration.memory)} of memory for all links; "
        f"SIGTERM waits up to {configuration.drain_timeout:g} s for open streams",
        *map(_describe_link, configuration.links),
        *(_describe_service(service) for service in configuration.services if not service.vm),
        *(line for vm in configuration.vms for line in _describe_vm(vm, configuration)),
    ]


def _describe_link(link: LinkSection) -> str:
    verb = "connects to" if link.role == "connect" else "listens on"
    return (
        f"link {link.name}: {link.transport} {verb} {', or '.join(link.addresses)}; "
        f"at most {link.max_streams} streams, each with a window of {format_size(link.window)} or more, "
        f"replay buffer {format_size(link.replay_buffer)} or more; dead after {link.silence:g} s of silence"
    )


def _describe_service(service: ServiceSection) -> str:
    if service.role == "listen":
        ownership = f"mode {service.mode:04o}"
        if service.owner is not None:
            ownership += f", owner {service.owner}"
        if service.group is not None:
            ownership += f", group {service.group}"
        what = f"makes the socket {service.path} ({ownership}) and opens streams over link {service.link}"
    else:
        what = f"connects streams that come over link {service.link} to the socket {service.path}"
    return (
        f"{service.kind} {service.name}: {what}; "
        f"at most {service.max_connections} at once, {service.open_timeout:g} s to open one"
    )


def _describe_vm(vm: VmSection, configuration: Configuration) -> list[str]:
    """@return: where its sockets are, and what to tell virsh."""
    libvirt = configuration.libvirt
    limits = vm.services[0]
    which = "any that has no section, here called NAME: " if vm.is_any else ""
    lines = [
        f"vm {vm.name}: {which}over link {', or '.join(vm.links)}; "
        f"at most {limits.max_connections} connections to a socket at once, "
        f"{limits.open_timeout:g} s to open one"
    ]
    if vm.is_any:
        vm = vm.called("NAME")
    if vm.arrives:
        paths = vm.paths_to(configuration.name, libvirt)
        lines += [
            f"  may arrive here: its QEMU makes {paths['ram']} and {paths['nbd']};",
            f"  the peer's libvirt is connected to {', or to '.join(map(str, libvirt.sockets))}",
        ]
    for link in vm.links if vm.leaves else ():
        paths = vm.paths_to(link, libvirt)
        lines += [
            f"  may leave: makes {', '.join(map(str, paths.values()))}"
            f" (mode {limits.mode:04o}); this moves it to {link}:",
            f"    virsh migrate --live --p2p --copy-storage-all --migrate-disks DISK,DISK {vm.name} \\",
            f"      --desturi 'qemu+unix:///system?socket={paths['control']}' \\",
            f"      --migrateuri unix://{paths['ram']} \\",
            f"      --disks-uri unix://{paths['nbd']}",
        ]
    return lines
