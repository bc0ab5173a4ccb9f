"""The fault proxy's control socket: a line of script in, a line of answer out."""

from __future__ import annotations

import contextlib
import socket
from typing import Any, Final

from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IAddress
from twisted.internet.protocol import Factory, Protocol, connectionDone
from twisted.protocols.basic import LineOnlyReceiver
from twisted.python.failure import Failure

from relaymux.errors import ConfigurationError, LocalError, TransportError
from relaymux.testing.fault_listener import cannot_listen
from relaymux.testing.fault_script import parse_script
from relaymux.testing.faults import FaultProxy

__all__ = ["ControlSocket", "tell"]

#: Connections at a time; the next is closed.
_MAX_CONNECTIONS: Final = 16


class _Control(LineOnlyReceiver):
    """One connection to the socket."""

    delimiter = b"\n"
    #: A longer line ends the connection.
    MAX_LENGTH = 16_384

    transport: Any

    def __init__(self, owner: ControlSocket) -> None:
        self._owner = owner

    def connectionMade(self) -> None:
        self._owner.connections.add(self)
        if len(self._owner.connections) > _MAX_CONNECTIONS:
            self.sendLine(b"error there are already %d connections" % _MAX_CONNECTIONS)
            self.transport.loseConnection()

    def lineReceived(self, line: bytes) -> None:
        self.sendLine(self._owner.answer(line.decode("utf-8", "backslashreplace")).encode())

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._owner.connections.discard(self)
        self._owner.check_stopped()


class ControlSocket(Factory):
    """
    A UNIX socket, for its owner alone, that takes a proxy's commands.

    Each line is a script.  The answer is one line: C{ok}, with what the
    commands return behind it, or C{error} and why.  A line that is not
    understood to its end does nothing.

    @ivar connections: the open ones.
    """

    noisy = False

    def __init__(self, reactor: Any, path: str, proxy: FaultProxy) -> None:
        self.connections: set[_Control] = set()
        self._reactor = reactor
        self._path = path
        self._proxy = proxy
        self._port: Any = None
        self._stopping: Deferred[None] | None = None

    def start(self) -> None:
        """
        Make the socket.

        @raise TransportError: that is impossible.
        """
        try:
            self._port = self._reactor.listenUNIX(self._path, self, mode=0o600)
        except (OSError, CannotListenError) as error:
            raise TransportError(cannot_listen(self._path, error)) from error

    def buildProtocol(self, addr: IAddress | None) -> Protocol:
        return _Control(self)

    def answer(self, line: str) -> str:
        """Do what C{line} says.  @return: the answer to it."""
        try:
            operations = parse_script(line)
            results = [operation(self._proxy) for operation in operations]
        except (ConfigurationError, LocalError) as error:
            return f"error {error}"
        return " ".join(["ok", *(str(result) for result in results if result is not None)])

    def stop(self) -> Deferred[None]:
        """Remove the socket and close its connections.  @return: fires when it is done."""
        done: Deferred[None] = Deferred()
        self._stopping = done
        closed = maybeDeferred(self._port.stopListening)
        for connection in list(self.connections):
            connection.transport.abortConnection()
        self.check_stopped()
        return done.addCallback(lambda _: closed)

    def check_stopped(self) -> None:
        """A connection is gone."""
        if self._stopping is not None and not self.connections:
            stopping, self._stopping = self._stopping, None
            stopping.callback(None)


def tell(path: str, line: str, seconds: float = 10.0) -> str:
    """
    Tell a proxy in another process what to do, and wait until it is done.

    Blocks: not for a thread with a reactor.

    @param path: its control socket.
    @param line: a script without line ends.
    @param seconds: how long to wait for it.
    @return: what comes behind C{ok}.
    @raise OSError: the socket cannot be reached, or no answer came in time.
    @raise LocalError: the answer is an error.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(seconds)
        connection.connect(path)
        # It may have closed the connection at once, and said why before.
        with contextlib.suppress(BrokenPipeError):
            connection.sendall(line.encode() + b"\n")
        with connection.makefile("r", encoding="utf-8") as answers:
            answer = answers.readline()
    outcome, _, rest = answer.strip().partition(" ")
    if outcome != "ok":
        raise LocalError(f"{path}: {line!r}: {rest if outcome == 'error' else 'the proxy ended'}")
    return rest
