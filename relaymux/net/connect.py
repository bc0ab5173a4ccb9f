"""Connecting stream sockets, TCP or UNIX, within a deadline."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from socket import AF_INET, AF_INET6, AF_UNIX, SO_ERROR, SOCK_NONBLOCK, SOCK_STREAM, SOL_SOCKET, socket
from typing import Any

from twisted.internet.abstract import FileDescriptor
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.defer import TimeoutError as DeferredTimeout
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IHostResolution,
    IProtocol,
    IProtocolFactory,
    IResolutionReceiver,
)
from twisted.python.failure import Failure
from zope.interface import implementer

from relaymux.errors import TransportError
from relaymux.net.addresses import address_of, describe
from relaymux.net.buffers import BufferPool
from relaymux.net.families import transport_for

__all__ = ["connect_tcp", "connect_unix", "connect_unix_at_once"]

#: Seconds until a UNIX socket whose backlog was full is tried again: first,
#: and at most; each wait is twice the one before.
BACKLOG_PAUSE = 0.005
BACKLOG_PAUSE_LIMIT = 0.1

_HINTS = {
    errno.ENOENT: "there is no such socket; is the program that listens on it running?",
    errno.ECONNREFUSED: "nobody listens there any more; the file is left over",
    errno.EACCES: (
        "permission denied; look at the permissions of the socket and of each directory above it,"
        " and whether SELinux or AppArmor forbids it"
    ),
    errno.EPROTOTYPE: "it is not a stream socket",
    errno.EAGAIN: "its backlog stayed full; the program that listens on it does not accept",
    errno.ELOOP: "it is a symbolic link, which is not followed in a directory that belongs to others",
}


def _dial(sock: socket, target: Any, *, follow_links: bool) -> None:
    """@raise OSError: as of C{connect}, or C{target} is a symbolic link and must not be one."""
    if follow_links:
        sock.connect(target)
        return
    # Looked at and connected to by one descriptor: nothing can take its place in between.
    descriptor = os.open(target, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if stat.S_ISLNK(os.fstat(descriptor).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        sock.connect(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


class _Attempt(FileDescriptor):
    """One C{connect}, without blocking.  A full UNIX backlog (EAGAIN) is tried again."""

    def __init__(self, reactor: Any, address: IAddress, seconds: float, *, follow_links: bool = True) -> None:
        super().__init__(reactor)
        self._clock = reactor
        self._follow_links = follow_links
        self._target: Any
        if isinstance(address, UNIXAddress):
            family, self._target = AF_UNIX, address.name
        elif isinstance(address, IPv6Address):
            family = AF_INET6
            self._target = (address.host, address.port, address.flowInfo, address.scopeID)
        else:
            assert isinstance(address, IPv4Address)
            family, self._target = AF_INET, (address.host, address.port)
        self._socket = socket(family, SOCK_STREAM)
        self._socket.setblocking(False)
        self._timers: list[IDelayedCall] = [self._clock.callLater(seconds, self._overdue)]
        self._pause = BACKLOG_PAUSE
        self._refusal = errno.ETIMEDOUT
        self._result: Deferred[socket] = Deferred(lambda _: self._stop().close())

    def start(self) -> Deferred[socket]:
        """@return: fires with the connected socket or fails with C{OSError}."""
        self._try()
        return self._result

    def fileno(self) -> int:
        return self._socket.fileno()

    def _try(self) -> None:
        try:
            _dial(self._socket, self._target, follow_links=self._follow_links)
        except BlockingIOError as error:
            if error.errno == errno.EINPROGRESS:
                self.startWriting()
                return
            self._refusal = errno.EAGAIN
            self._timers.append(self._clock.callLater(self._pause, self._try))
            self._pause = min(2 * self._pause, BACKLOG_PAUSE_LIMIT)
        except OSError as error:
            self._give_up(error)
        else:
            self._result.callback(self._stop())

    def doWrite(self) -> None:
        code = self._socket.getsockopt(SOL_SOCKET, SO_ERROR)
        if code:
            self._fail(code)
        else:
            self._result.callback(self._stop())

    def connectionLost(self, reason: Failure) -> None:
        """Called by the reactor: refused, or the reactor stops."""
        self._fail(self._socket.getsockopt(SOL_SOCKET, SO_ERROR) or errno.ECONNABORTED)

    def _overdue(self) -> None:
        self._fail(self._refusal)

    def _fail(self, code: int) -> None:
        self._give_up(OSError(code, os.strerror(code)))

    def _give_up(self, error: OSError) -> None:
        self._stop().close()
        self._result.errback(Failure(error))

    def _stop(self) -> socket:
        self.stopWriting()
        for timer in self._timers:
            if timer.active():
                timer.cancel()
        return self._socket


def connect_unix_at_once(
    reactor: Any, path: str, target: IProtocol, pool: BufferPool, *, follow_links: bool = True
) -> bool:
    """
    As L{connect_unix}, if it takes no waiting: a UNIX socket whose backlog has room never does.

    @return: whether C{target} is connected.  If not, nothing has happened, and
        L{connect_unix} knows what to do or what to say.
    """
    try:
        sock = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK)
    except OSError:
        return False
    try:
        _dial(sock, path, follow_links=follow_links)
        transport = transport_for(reactor, sock, target, pool, address_of(path), host=address_of(None))
    except OSError:
        sock.close()
        return False
    transport.begin()
    return True


def connect_unix(
    reactor: Any,
    path: str,
    target: IProtocolFactory | IProtocol,
    seconds: float,
    pool: BufferPool,
    flush_seconds: float | None = None,
    *,
    others: Sequence[str] = (),
    follow_links: bool = True,
) -> Deferred[IProtocol]:
    """
    Connect to the UNIX stream socket at C{path}.

    A full backlog is waited for; no socket, and one that nobody listens on,
    are failures at once.

    @param others: paths to try in turn after such a failure.
    @param follow_links: whether a path may be a symbolic link.  Not where others than us
        make what is there: they could lead us to a socket that we may use and they may not.
    @param target: the protocol, or a factory that is asked for one once the
        connection is there.
    @param seconds: how long to try; above 0.
    @param flush_seconds: see L{SocketTransport}.
    @return: fires with the connected protocol, fails with L{TransportError};
        cancelling gives up.
    """
    return Deferred.fromCoroutine(
        _connect(
            reactor,
            list(map(UNIXAddress, (path, *others))),
            target,
            seconds,
            pool,
            None,
            flush_seconds,
            follow_links=follow_links,
        )
    )


def connect_tcp(
    reactor: Any,
    host: str,
    port: int,
    target: IProtocolFactory | IProtocol,
    seconds: float,
    pool: BufferPool,
    prepare: Callable[[socket], None] | None = None,
    flush_seconds: float | None = None,
) -> Deferred[IProtocol]:
    """
    Connect to a TCP port.

    @param host: an IP address or a name.  The addresses of a name are tried
        in the resolver's order, each with its share of the time left.
    @param prepare: called with the connected socket, to set its options.

    Else as L{connect_unix}.
    """

    async def resolve_and_connect() -> IProtocol:
        until = reactor.seconds() + seconds
        addresses = await _resolve(reactor, host, port, seconds)
        left = max(0.0, until - reactor.seconds())
        return await _connect(reactor, addresses, target, left, pool, prepare, flush_seconds)

    return Deferred.fromCoroutine(resolve_and_connect())


async def _connect(
    reactor: Any,
    addresses: Sequence[IAddress],
    target: IProtocolFactory | IProtocol,
    seconds: float,
    pool: BufferPool,
    prepare: Callable[[socket], None] | None,
    flush_seconds: float | None,
    *,
    follow_links: bool = True,
) -> IProtocol:
    until = reactor.seconds() + seconds
    failures: list[str] = []
    for number, address in enumerate(addresses):
        share = max(0.0, until - reactor.seconds()) / (len(addresses) - number)
        try:
            sock = await _Attempt(reactor, address, share, follow_links=follow_links).start()
            if prepare is not None:
                prepare(sock)
        except OSError as error:
            hint = _HINTS.get(error.errno or 0) if isinstance(address, UNIXAddress) else None
            failures.append(f"{describe(address)}: {hint or error.strerror or error}")
            continue
        if IProtocolFactory.providedBy(target):
            protocol = target.buildProtocol(address)
            if protocol is None:
                sock.close()
                raise TransportError(f"the connection to {describe(address)} is not wanted any more")
        else:
            protocol = target
        transport_for(reactor, sock, protocol, pool, address, flush_seconds).begin()
        return protocol
    raise TransportError("cannot connect to " + "; ".join(failures))


@implementer(IResolutionReceiver)
class _Addresses:
    """Collects what the resolver finds."""

    def __init__(self) -> None:
        self.found: list[IAddress] = []
        self.complete: Deferred[None] = Deferred()

    def resolutionBegan(self, resolutionInProgress: IHostResolution) -> None:
        pass

    def addressResolved(self, address: IAddress) -> None:
        self.found.append(address)

    def resolutionComplete(self) -> None:
        self.complete.callback(None)


async def _resolve(reactor: Any, host: str, port: int, seconds: float) -> list[IAddress]:
    try:
        literal = ip_address(host)
    except ValueError:
        pass
    else:
        return [(IPv4Address if literal.version == 4 else IPv6Address)("TCP", host, port)]
    addresses = _Addresses()
    reactor.nameResolver.resolveHostName(addresses, host, port)
    try:
        # A look-up cannot be cancelled; a late answer is dropped.
        await addresses.complete.addTimeout(seconds, reactor)
    except DeferredTimeout:
        raise TransportError(f"cannot connect to {host}: no answer from the name service") from None
    if not addresses.found:
        raise TransportError(f"cannot connect to {host}: the name has no address")
    return addresses.found
