"""
The records of TLS 1.3, protected by ourselves once OpenSSL has shaken hands.

OpenSSL copies each byte five times on its way through both ends, between its own
buffers.  L{RecordEngine} takes over the keys after the handshake, as kernels do for
their TLS, and leaves to OpenSSL what has no cost per byte: handshake, certificates,
exported keys.  The cipher is pyca/cryptography's; the loops around it are compiled
(F{_sealing.c}, F{_opening.c}).  What is done here is RFC 8446, 5 (records), 6 (alerts), 4.6
(messages behind the handshake) and 7.2 (new keys).

An installation without the compiled loops keeps OpenSSL's records, and nobody who
talks to it can tell the difference.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Final

from cryptography.exceptions import InvalidTag
from OpenSSL import SSL

from relaymux.interfaces import Buffer
from relaymux.net.buffers import BufferPool
from relaymux.net.compiled import native
from relaymux.net.tlsengine import Engine, FastEngine
from relaymux.net.tlskeys import SUITES, TrafficSecret, keep_secrets, take_secrets

__all__ = ["KEY_RECORDS", "RecordEngine", "prepare", "take_over"]

#: Records sent with one key: a new one is taken long before 2**24.5, up to which AES-GCM
#: is safe by a wide margin (RFC 8446, 5.5).  Some 256 GiB.
KEY_RECORDS = 2**24

#: Records that the fast path may send before they are counted here: many times what a lease
#: (L{relaymux.net.fastpath.LEASE_SECONDS}) has time for.
LENT_RECORDS = 2**16

#: New keys that a peer may take without sending anything between them.
_UPDATES: Final = 32

#: The longest message behind the handshake: a ticket for a session, which nobody uses here.
_MESSAGE: Final = 128 * 1024

#: The shortest (RFC 8446, 4.6.1): lifetime, age, nonce, a ticket of one byte, extensions.
_TICKET: Final = 14

_HEADER: Final = 5
_ALERT, _HANDSHAKE, _DATA = 21, 22, 23
_NEW_SESSION_TICKET, _KEY_UPDATE = 4, 24
_WARNING, _FATAL = b"\1", b"\2"
_CLOSE_NOTIFY, _UNEXPECTED_MESSAGE, _ILLEGAL_PARAMETER, _DECODE_ERROR, _USER_CANCELED = 0, 10, 47, 50, 90
_KEY_UPDATE_NOT_REQUESTED: Final = b"\x18\0\0\1\0"

#: Alerts by which a peer ends a connection (RFC 8446, 6.2).
_ALERTS: Final = {
    10: "unexpected message",
    20: "bad record mac",
    22: "record overflow",
    40: "handshake failure",
    42: "bad certificate",
    43: "unsupported certificate",
    44: "certificate revoked",
    45: "certificate expired",
    46: "certificate unknown",
    47: "illegal parameter",
    48: "unknown ca",
    49: "access denied",
    50: "decode error",
    51: "decrypt error",
    70: "protocol version",
    71: "insufficient security",
    80: "internal error",
    109: "missing extension",
    110: "unsupported extension",
    116: "certificate required",
}


class _Break(Exception):
    """
    The peer does not keep to TLS.

    @ivar alert: by which to tell it.
    """

    def __init__(self, alert: int, what: str) -> None:
        super().__init__(what)
        self.alert = alert


def _error(text: str) -> SSL.Error:
    """An error in the form of OpenSSL's, for people."""
    return SSL.Error([("TLS", "", text)])


class RecordEngine(Engine):
    """One side of a connection whose handshake is through."""

    def __init__(
        self, before: FastEngine, secrets: tuple[TrafficSecret, TrafficSecret], is_server: bool
    ) -> None:
        """
        @param before: whose handshake it was; it is not used any more.
        @param secrets: the client's and the server's.
        @param is_server: which of them is ours.
        """
        super().__init__(before.connection, before.pool)
        client, server = secrets
        self._is_server = is_server
        self._reading, self._writing = (client, server) if is_server else (server, client)
        # Bounded, as of FastEngine: all is read before more is fed.
        last, unread = before.hand_over()
        self._fed: deque[memoryview] = deque(unread)
        self._outgoing = last
        # A server has sent its tickets as the first records under its new key.
        self._sealer = self._new_sealer(_count_records(last) if is_server else 0)
        self._opener = self._new_opener()
        self._plain: deque[memoryview] = deque()  # read, and not fetched yet; bounded by what was fed
        # The beginning of one behind the handshake; bounded by _MESSAGE and a record more.
        self._message = bytearray()
        self._broken = False  # an exception left something out of what was to be sent or read
        self._updates = 0
        self._update_due = False
        self._closed = False
        self._read_before = 0  # records, when the keys were lent

    def _new_sealer(self, sent: int = 0) -> Any:
        assert native is not None
        return native.Sealer(self._writing.cipher().encrypt_into, self._writing.iv(), sent)

    def _new_opener(self) -> Any:
        assert native is not None
        return native.Opener(self._reading.cipher().decrypt_into, self._reading.iv())

    # Sending

    def encrypt(self, buffers: Sequence[Buffer]) -> list[memoryview]:
        if self._closed or self.failed:
            raise _error("nothing can be sent behind the end")
        if self._update_due or self._sealer.records >= KEY_RECORDS:
            self._update_due = False
            self._send(_HANDSHAKE, _KEY_UPDATE_NOT_REQUESTED)
            self._writing = self._writing.updated()
            self._sealer = self._new_sealer()
        sealed = self._seal(buffers, _DATA)
        return self.take() + sealed if self._outgoing else sealed

    def take(self) -> list[memoryview]:
        taken, self._outgoing = self._outgoing, []
        return taken

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if not self._broken:  # else the peer is not to believe that it has everything
                self._send(_ALERT, _WARNING + bytes([_CLOSE_NOTIFY]))

    def _send(self, kind: int, message: bytes) -> None:
        self._outgoing += self._seal((message,), kind)

    def _seal(self, buffers: Sequence[Buffer], kind: int) -> list[memoryview]:
        """What follows an exception must not be taken for what follows C{buffers}: nothing does."""
        if self._broken:
            raise _error("nothing can be sent behind what could not be encrypted")
        self._broken = True
        sealed: list[memoryview] = self._sealer.seal(self.pool, buffers, kind)
        self._broken = False
        return sealed

    # Receiving

    def feed(self, data: memoryview) -> None:
        self._fed.append(data)

    def read(self, pool: BufferPool) -> list[memoryview]:
        views = list(self._plain)
        self._plain.clear()
        try:
            while self._fed and self.error is None:
                self._read_from(self._fed.popleft(), pool, views)
        except BaseException:
            # What follows must not be taken for what follows C{views}.
            self._broken = True
            self.error = self.error or _error("reading failed")
            raise
        if not views:
            self._raise_error()
        return views

    def _raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def _read_from(self, data: memoryview, pool: BufferPool, views: list[memoryview]) -> None:
        """Decrypt C{data}.  Behind what ends the connection nothing is read."""
        while True:
            plain, used, alert, kind, message = self._opener.open(pool, data, InvalidTag)
            try:
                if plain:
                    self._check_alone()
                    self._updates = 0
                    views += plain
                self._judge(alert, kind, message)
            except _Break as broken:
                self._break(broken)
            if self.error is not None:
                self._fed.clear()
                return
            if used == len(data):
                return
            data = data[used:]

    def _judge(self, alert: int, kind: int, message: bytes | None) -> None:
        """
        A record has arrived that is no application data, or that may not be; or neither.

        @raise _Break: it may not be.
        """
        if alert:
            raise _Break(alert, _ALERTS[alert])
        if kind:
            assert message is not None
            self._control(kind, message)

    def _break(self, broken: _Break) -> None:
        self.error = _error(str(broken))
        self._send_fatal(broken.alert)

    def read_into(self, room: memoryview) -> int:
        if not self._plain:
            self._plain += self.read(self.pool)
        count = 0
        while self._plain and count < len(room):
            view = self._plain.popleft()
            part = min(len(view), len(room) - count)
            room[count : count + part] = view[:part]
            count += part
            if part < len(view):
                self._plain.appendleft(view[part:])
        return count

    # Lending the keys

    @property
    def at_rest(self) -> bool:
        """Whether there is nothing but data to send and to read for a while: then another one may do so."""
        return not (
            self._outgoing
            or self._fed
            or self._plain
            or self._message
            or self._update_due
            or self._closed
            or self._broken
            or self.error is not None
            or self._sealer.records >= KEY_RECORDS - LENT_RECORDS
        )

    def lend(self) -> tuple[Any, Any, BufferPool, type[Exception]]:
        """
        Have another one protect our records, until L{take_back}.

        @return: what seals and opens them, where what is encrypted goes, and what a wrong tag raises.
        """
        self._read_before = self._opener.records
        return self._sealer, self._opener, self.pool, InvalidTag

    def take_back(self, hole: bool, odd: tuple[int, int, bytes | None, list[memoryview]] | None) -> None:
        """
        Go on in place of one who has sent and read data.

        @param hole: whether something was left out of it, so that nothing may follow.
        @param odd: the record that is no data, or may not be, as of L{_judge}; and what was received
            behind it.
        """
        if hole:
            self._broken = True
        if self._opener.records - self._read_before > (odd is not None):
            self._updates = 0
        if odd is None:
            return
        alert, kind, message, unread = odd
        try:
            self._judge(alert, kind, message)
        except _Break as broken:
            self._break(broken)
        if self.error is None:
            self._fed.extend(unread)

    def unread(self, plain: Sequence[Buffer]) -> None:
        """C{plain} was read, and is still to be passed on, before all else."""
        self._plain.extend(memoryview(data) for data in plain)

    # What is not data

    def _control(self, kind: int, message: bytes) -> None:
        """A whole record of anything else has arrived."""
        if kind == _ALERT:
            self._check_alone()
            self._alert(message)
        elif kind == _HANDSHAKE and message:
            self._message += message
            self._messages()
        else:
            raise _Break(_UNEXPECTED_MESSAGE, "unexpected record")

    def _check_alone(self) -> None:
        """Nothing comes between the records of one message (RFC 8446, 5.1)."""
        if self._message:
            raise _Break(_UNEXPECTED_MESSAGE, "other records within a message")

    def _alert(self, message: bytes) -> None:
        if len(message) != 2:
            raise _Break(_DECODE_ERROR, "malformed alert")
        code = message[1]
        if code == _CLOSE_NOTIFY:
            self.error = SSL.ZeroReturnError()
        elif code != _USER_CANCELED:  # which close_notify follows
            self.error = _error("alert " + _ALERTS.get(code, str(code)))

    def _messages(self) -> None:
        message = self._message
        at, end = 0, len(message)
        while end - at >= 4:
            kind, size = message[at], int.from_bytes(message[at + 1 : at + 4], "big")
            if kind == _KEY_UPDATE:
                if size != 1:
                    raise _Break(_DECODE_ERROR, "malformed key update")
            elif kind != _NEW_SESSION_TICKET or not _TICKET <= size <= _MESSAGE:
                raise _Break(_UNEXPECTED_MESSAGE, "unexpected message behind the handshake")
            elif self._is_server:
                raise _Break(_UNEXPECTED_MESSAGE, "a ticket from a client")
            if end - at < 4 + size:
                break
            at += 4 + size
            if kind == _KEY_UPDATE:
                if at < end:
                    raise _Break(_UNEXPECTED_MESSAGE, "other records within a message")
                self._key_update(message[at - 1])
        del message[:at]

    def _key_update(self, request: int) -> None:
        """The peer sends with a new key from now on (RFC 8446, 4.6.3)."""
        if request > 1:
            raise _Break(_ILLEGAL_PARAMETER, "malformed key update")
        self._updates += 1
        if self._updates > _UPDATES:
            raise _Break(_UNEXPECTED_MESSAGE, "too many key updates")
        self._reading = self._reading.updated()
        self._opener = self._new_opener()
        # One answer is enough for all that are asked for before our next data.
        self._update_due = self._update_due or request == 1

    def _send_fatal(self, alert: int) -> None:
        if not (self._closed or self._broken):
            self._send(_ALERT, _FATAL + bytes([alert]))


def _count_records(views: Sequence[memoryview]) -> int:
    """@return: how many encrypted records C{views} have, which hold whole ones."""
    data = b"".join(views)
    count = at = 0
    while at < len(data):
        count += data[at] == _DATA
        at += _HEADER + int.from_bytes(data[at + 3 : at + 5], "big")
    return count


def _can_protect() -> bool:
    ciphers = [suite.cipher for suite in SUITES.values()]
    return native is not None and all(
        hasattr(c, "encrypt_into") and hasattr(c, "decrypt_into") for c in ciphers
    )


#: Whether this installation has what a L{RecordEngine} needs.
_CAN_PROTECT = _can_protect()


def prepare(context: SSL.Context) -> None:
    """Have the handshakes of C{context} leave what L{take_over} needs."""
    if _CAN_PROTECT:
        keep_secrets(context)


def take_over(engine: Engine, *, is_server: bool) -> Engine:
    """
    Go on after a handshake.

    @param engine: by which it was made; what it has not sent is sent by the one returned.
    @return: the fastest engine for what follows: C{engine} itself where its records cannot be taken over.
    """
    secrets = take_secrets(engine.connection)  # in any case: nobody else fetches them
    if secrets is None or not _CAN_PROTECT or not isinstance(engine, FastEngine):
        return engine
    return RecordEngine(engine, secrets, is_server)
