"""
The command C{relaymux fault-proxy}.

Every event goes to standard output as a line, and at the end what was carried.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twisted.internet.defer import DeferredList

from relaymux.errors import ConfigurationError, LocalError, TransportError
from relaymux.service.config_values import size_between
from relaymux.testing.fault_control import ControlSocket
from relaymux.testing.fault_script import COMMANDS, parse_script
from relaymux.testing.faults import FaultEvent, FaultProxy

__all__ = ["DESCRIPTION", "add_arguments", "main", "run"]

DESCRIPTION = (
    "Stands between two daemons and does to their link what networks do. Let the\n"
    "dialling daemon connect to LISTEN instead of TARGET. What goes to TARGET goes\n"
    "up, what comes back comes down."
)

_parse_buffer = size_between(1, 2**30)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes to C{parser}, which is made with L{DESCRIPTION}."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(
        [
            "SCRIPT is statements with ; between them: COMMAND, `at SECONDS COMMAND`, or",
            "`every SECONDS COMMAND`, also `every 1..3 COMMAND` for random intervals. Commands:",
            "",
            *(f"  {usage}" for usage in COMMANDS.values()),
            "",
            "Example:",
            "  relaymux fault-proxy 127.0.0.1:16516 hv-b.example:16515 'at 3 cut; at 10 blackhole 5'",
            "",
            "Exit status: 0 after SIGINT or SIGTERM, 1 if it cannot listen, 2 for a wrong",
            "command line.",
        ]
    )
    parser.add_argument("listen", metavar="LISTEN", help="HOST:PORT, or the path of a UNIX socket to make")
    parser.add_argument("target", metavar="TARGET", help="HOST:PORT, or the path of a UNIX socket")
    parser.add_argument("script", metavar="SCRIPT", nargs="?", default="", help="what is to happen")
    parser.add_argument("--script", metavar="FILE", dest="file", help="a file with a script, done first")
    parser.add_argument("--control", metavar="PATH", help="make a UNIX socket that takes commands")
    parser.add_argument("--cut-every", metavar="SECONDS", help="cut again and again; 1..3: random intervals")
    parser.add_argument("--fin", action="store_true", help="with --cut-every: a FIN instead of a RST")
    parser.add_argument("--refuse", metavar="SECONDS", help="with --cut-every: refuse connections so long")
    parser.add_argument("--delay", metavar="SECONDS", help="deliver everything later, both ways")
    parser.add_argument("--jitter", metavar="SECONDS", help="with --delay: and up to so much more")
    parser.add_argument("--rate", metavar="BYTES", help="carry so much a second, each way; 100K, 1M")
    parser.add_argument("--segments", metavar="BYTES", help="send in such pieces; 1..100 for random sizes")
    parser.add_argument("--corrupt", metavar="P", help="flip a bit in a byte with this probability")
    parser.add_argument(
        "--receive-buffer", metavar="BYTES", help="of the proxy's sockets; small with --rate, little waits"
    )
    parser.add_argument("--seed", type=int, help="repeat what was random in another run, which said its seed")
    parser.add_argument("--quiet", action="store_true", help="no lines for events, only at start and end")


def _script(arguments: argparse.Namespace) -> str:
    """@return: all that is to be done, as one script."""
    parts = []
    if arguments.file:
        try:
            parts.append(Path(arguments.file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"cannot read the script: {error}", file=arguments.file) from error
    for option in ("rate", "segments", "corrupt"):
        if getattr(arguments, option) is not None:
            parts.append(f"{option} {getattr(arguments, option)}")
    if arguments.delay is not None:
        parts.append(f"delay {arguments.delay} {arguments.jitter or 0}")
    elif arguments.jitter is not None:
        raise ConfigurationError("--jitter needs --delay", expected="both, or neither")
    if arguments.cut_every is not None:
        refuse = "" if arguments.refuse is None else f" refuse {arguments.refuse}"
        parts.append(f"every {arguments.cut_every} cut {'fin' if arguments.fin else 'rst'}{refuse}")
    elif arguments.refuse is not None or arguments.fin:
        raise ConfigurationError("--refuse and --fin need --cut-every", expected="it too, or a script")
    return "\n".join([*parts, arguments.script])


def run(arguments: argparse.Namespace, reactor: Any) -> int:
    """
    Be the proxy until a signal comes.

    @param arguments: what a parser with L{add_arguments} gave.
    @param reactor: not running yet; runs until the end.
    @return: the exit status.
    """
    # As in the daemon: a clock that is set must not move the faults.
    reactor.seconds = time.monotonic
    try:
        operations = parse_script(_script(arguments))
        buffer = arguments.receive_buffer
        proxy = FaultProxy(
            reactor,
            arguments.listen,
            arguments.target,
            seed=arguments.seed,
            receive_buffer=None if buffer is None else _parse_buffer(buffer),
            on_event=_ignore if arguments.quiet else _print,
        )
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    started: list[FaultProxy | ControlSocket] = []
    reactor.addSystemEventTrigger(
        "before", "shutdown", lambda: DeferredList([part.stop() for part in started])
    )
    status = 0
    try:
        proxy.start()
        started.append(proxy)
        if arguments.control:
            control = ControlSocket(reactor, arguments.control, proxy)
            control.start()
            started.append(control)
        for operation in operations:
            operation(proxy)
        print(f"ready on {proxy.address}, seed {proxy.seed}", flush=True)
    except (LocalError, TransportError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
        # Runs for a moment, to remove what was made.
        reactor.callWhenRunning(reactor.stop)
    reactor.run()
    if not status:
        for name, count in proxy.status().items():
            print(f"{name} {count}")
    return status


def main(arguments: Sequence[str], reactor: Any) -> int:
    """The command by itself.  @param arguments: without its name."""
    parser = argparse.ArgumentParser(prog="relaymux fault-proxy", description=DESCRIPTION)
    add_arguments(parser)
    return run(parser.parse_args(arguments), reactor)


def _print(event: FaultEvent) -> None:
    print(event, flush=True)


def _ignore(event: FaultEvent) -> None:
    """Nobody wants to read them."""
