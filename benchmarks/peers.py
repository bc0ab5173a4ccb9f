"""
What people use instead of relaymux, each at its best setting, between UNIX sockets.

All of them relay from UNIX sockets on one side through a connection over the
loopback device to UNIX sockets on the other.  ssh carries all streams through
one connection; the others open one for each.
"""

from __future__ import annotations

import getpass
import os
import pwd
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from benchmarks.processes import free_port, running, wait_for_port, wait_for_socket
from benchmarks.relays import Relays, Through, make_paths
from benchmarks.tools import find
from relaymux.certificates import make_certificates

__all__ = ["haproxy", "socat", "ssh", "stunnel"]

#: ssh's fastest cipher on processors with AES instructions.
_SSH_CIPHER = "aes128-gcm@openssh.com"

#: More than a second of anything; haproxy wants to be told.
_HAPROXY_TIMEOUT = "timeout connect 20s\n    timeout client 1h\n    timeout server 1h"


@contextmanager
def ssh(directory: Path, link: str, streams: int = 1, through: Through = nullcontext) -> Iterator[Relays]:
    """
    C{ssh -N -L SOCKET:SOCKET ...} and an sshd with keys and a configuration of its own.

    Run by root, sshd works as the user nobody, since root's own sshd would want
    more of the system than a benchmark should touch.  It must be able to pass
    through the directories above C{directory}.

    @param link: only C{"tls"}: ssh always encrypts.
    @param through: see L{Through}.
    """
    paths = make_paths(directory, streams)
    listening = free_port()
    user = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None
    name = getpass.getuser() if user is None else "nobody"
    for key in ("host", "client"):
        made = directory / key
        command = [find("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", str(made)]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    if user is not None:
        for path in (directory, directory / "host"):
            os.chown(path, user, user)
    (directory / "known_hosts").write_text(f"relay {(directory / 'host.pub').read_text()}")
    (directory / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{listening}\n"
        f"HostKey {directory}/host\n"
        f"AuthorizedKeysFile {directory}/client.pub\n"
        f"Ciphers {_SSH_CIPHER}\n"
        "AllowStreamLocalForwarding yes\n"
        "AuthenticationMethods publickey\n"
        "LogLevel ERROR\n"
        "PidFile none\n"
        "StrictModes no\n"
        # Without it an sshd that may not read /etc/shadow takes every account for locked.
        "UsePAM yes\n"
    )
    forwards = [word for entry, exit in paths for word in ("-L", f"{entry}:{exit}")]
    options = [
        *("BatchMode=yes", "IdentitiesOnly=yes", "ExitOnForwardFailure=yes", "HostKeyAlias=relay"),
        *(f"UserKnownHostsFile={directory}/known_hosts", "GlobalKnownHostsFile=none", "LogLevel=ERROR"),
    ]
    with ExitStack() as stack:
        command = [find("sshd"), "-D", "-e", "-f", f"{directory}/sshd_config"]
        far = stack.enter_context(running("sshd", command, directory, user=user))
        wait_for_port(listening, far)
        command = [find("ssh"), "-F", "none", "-N", "-c", _SSH_CIPHER, "-i", f"{directory}/client"]
        command += [word for option in options for word in ("-o", option)]
        command += ["-p", str(stack.enter_context(through(listening))), *forwards, f"{name}@127.0.0.1"]
        near = stack.enter_context(running("ssh", command, directory))
        wait_for_socket(paths[-1][0], near)
        yield Relays(paths, (near,), (far,))


@contextmanager
def stunnel(directory: Path, link: str, streams: int = 1) -> Iterator[Relays]:
    """
    Two stunnels, TLS 1.3 with certificates on both sides.

    @param link: only C{"tls"}.
    """
    paths = make_paths(directory, streams)
    make_certificates(directory / "pki", ["source", "destination"])
    ports = [free_port() for _ in paths]

    def command(role: str, peer: str) -> list[str]:
        lines = ["foreground = yes", "pid =", "debug = err", "syslog = no"]
        for number, (entry, exit) in enumerate(paths):
            lines += [f"[stream{number}]", "sslVersion = TLSv1.3", f"CAfile = {directory}/pki/ca.pem"]
            lines += [f"cert = {directory}/pki/{role}.pem", f"key = {directory}/pki/{role}.key"]
            lines += ["verifyChain = yes", f"checkHost = {peer}"]
            if role == "source":
                lines += ["client = yes", f"accept = {entry}", f"connect = 127.0.0.1:{ports[number]}"]
            else:
                lines += [f"accept = 127.0.0.1:{ports[number]}", f"connect = {exit}"]
        config = directory / f"{role}.conf"
        config.write_text("\n".join(lines) + "\n")
        return [find("stunnel"), str(config)]

    with ExitStack() as stack:
        far = stack.enter_context(running("destination", command("destination", "source"), directory))
        wait_for_port(ports[-1], far)
        near = stack.enter_context(running("source", command("source", "destination"), directory))
        wait_for_socket(paths[-1][0], near)
        yield Relays(paths, (near,), (far,))


@contextmanager
def haproxy(directory: Path, link: str, streams: int = 1) -> Iterator[Relays]:
    """
    Two haproxies.

    @param link: C{"tls"}: certificates on both sides; C{"tcp"} and C{"unix"}: splicing.
    """
    paths = make_paths(directory, streams)
    if link == "unix":
        links = [f"unix@{directory}/link{number}" for number in range(streams)]
    else:
        links = [f"127.0.0.1:{free_port()}" for _ in paths]
    # More threads than processors are left for them cost a tenth.
    tuning = [f"nbthread {max(1, (os.cpu_count() or 2) // 2)}", "maxconn 4096"]
    if link == "tls":
        tuning += ["tune.bufsize 131072", "ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256"]
        make_certificates(directory / "pki", ["source", "destination"])
    else:
        tuning += ["tune.pipesize 1048576"]

    def command(role: str, peer: str) -> list[str]:
        secure = ""
        if link == "tls":
            pki = directory / "pki"
            bundle = pki / f"{role}.bundle"
            bundle.write_text((pki / f"{role}.pem").read_text() + (pki / f"{role}.key").read_text())
            secure = f" ssl crt {bundle} ca-file {pki}/ca.pem verify required"
        lines = ["global", *(f"    {line}" for line in tuning)]
        lines += ["defaults", "    mode tcp", f"    {_HAPROXY_TIMEOUT}"]
        if not secure:
            lines += [f"    option splice-{when}" for when in ("auto", "request", "response")]
        for number, (entry, exit) in enumerate(paths):
            lines += [f"listen stream{number}"]
            if role == "source":
                verified = f"{secure} verifyhost {peer} sni str({peer})" if secure else ""
                lines += [f"    bind unix@{entry} mode 600", f"    server far {links[number]}{verified}"]
            else:
                lines += [f"    bind {links[number]}{secure}", f"    server program unix@{exit}"]
        config = directory / f"{role}.cfg"
        config.write_text("\n".join(lines) + "\n")
        return [find("haproxy"), "-db", "-f", str(config)]

    with ExitStack() as stack:
        far = stack.enter_context(running("destination", command("destination", "source"), directory))
        if link == "unix":
            wait_for_socket(directory / f"link{streams - 1}", far)
        else:
            wait_for_port(int(links[-1].rpartition(":")[2]), far)
        near = stack.enter_context(running("source", command("source", "destination"), directory))
        wait_for_socket(paths[-1][0], near)
        yield Relays(paths, (near,), (far,))


@contextmanager
def socat(directory: Path, link: str, streams: int = 1) -> Iterator[Relays]:
    """
    A pair of socats for each stream, with the largest buffer that helps; it forks for each connection.

    @param link: only C{"tcp"}.  Between UNIX sockets on all sides it comes to a
        standstill when both directions are full: it waits for each write.
    """
    paths = make_paths(directory, streams)
    near, far = [], []
    command = [find("socat"), "-b", "262144"]
    with ExitStack() as stack:
        for number, (entry, exit) in enumerate(paths):
            port = free_port()
            exits = [f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr,nodelay,fork", f"UNIX-CONNECT:{exit}"]
            far.append(stack.enter_context(running(f"destination{number}", [*command, *exits], directory)))
            wait_for_port(port, far[-1])
            entries = [f"UNIX-LISTEN:{entry},fork,backlog=1024", f"TCP:127.0.0.1:{port},nodelay"]
            near.append(stack.enter_context(running(f"source{number}", [*command, *entries], directory)))
            wait_for_socket(entry, near[-1])
        yield Relays(paths, tuple(near), tuple(far))
