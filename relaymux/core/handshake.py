"""
The first frames of a link (protocol.md 7): who we are, what we accept.

HELLO and WELCOME begin with a magic word and the version, at the same place in
every version, so that two daemons which do not understand one another can say
so.  What may come later is a list of extensions; an unknown one is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from struct import Struct
from struct import error as StructError

from relaymux.core.frames import MAX_CONTROL_PAYLOAD
from relaymux.errors import ErrorCode, LocalError, RemoteProtocolError

MAGIC = b"relaymux"
VERSION = 1

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)

#: Longest error text on the wire, in bytes of UTF-8: one line for a log.
MAX_TEXT = 200

#: Smallest limits a peer may announce.  Below them it could not take part: a frame
#: could not be sent, or every few bytes would wait for a credit or an ack.
MIN_PAYLOAD = 1024
MIN_WINDOW = 1024
MIN_REPLAY = 4096
MIN_SILENCE_MS = 500

_PREFIX = Struct("!8sH")
_FIXED = Struct("!HIIQQII16s")
_EXTENSION = Struct("!HH")
_IDS = Struct("!16s32s")
_CODE = Struct("!H")
_REJECT = Struct("!HH")


@dataclass(frozen=True)
class Limits:
    """
    What one side accepts from the other.

    @ivar max_payload: longest DATA payload, bytes.  1 MiB: four times what we
        send, so that a peer may choose longer frames; one frame per link is
        held in parts at most.
    @ivar max_streams: streams the peer may have open at once.  256: a hundred
        disks (the limit of QEMU's NBD server) twice, with room for migration
        channels.
    @ivar window: bytes held for one stream, and its first credit.  4 MiB: fills
        1 Gbit/s at 30 ms, and is what a stalled reader costs in memory.
    @ivar replay: unacknowledged bytes the announcing side keeps; tells the
        peer how often to acknowledge.  32 MiB: 1 Gbit/s at 100 ms twice over.
    @ivar resume_window: seconds for which a session outlives its link.  0: it
        ends with the link.
    @ivar silence: seconds without a byte after which the announcing side holds
        the link for dead.  15: longer than any pause that a busy host or a
        TCP retransmission makes, shorter than libvirt's 30 s of patience.
    """

    max_payload: int = 1024 * 1024
    max_streams: int = 256
    window: int = 4 * 1024 * 1024
    replay: int = 32 * 1024 * 1024
    resume_window: float = 0.0
    silence: float = 15.0


@dataclass(frozen=True)
class Identity:
    """
    This daemon, as it introduces itself.

    @ivar name: the configured name.
    @ivar instance: 16 random bytes, new with every start.
    """

    name: str
    instance: bytes


@dataclass(frozen=True)
class Hello:
    """
    The dialling side's introduction.

    @ivar name: the daemon's configured name.
    @ivar instance: 16 random bytes, new with every start of the daemon.
    """

    name: str
    instance: bytes
    limits: Limits
    extensions: Mapping[int, bytes] = field(default_factory=dict)

    def encode(self) -> bytes:
        """@return: the payload of a HELLO."""
        return _PREFIX.pack(MAGIC, VERSION) + _pack_terms(self)


@dataclass(frozen=True)
class Welcome(Hello):
    """
    The accepting side's introduction and its consent.

    @ivar session_id: 16 random bytes; public.
    @ivar resume_key: 32 random bytes; a secret of the two daemons.
    """

    session_id: bytes = bytes(16)
    resume_key: bytes = field(default=bytes(32), repr=False)

    def encode(self) -> bytes:
        """@return: the payload of a WELCOME."""
        return _PREFIX.pack(MAGIC, VERSION) + _IDS.pack(self.session_id, self.resume_key) + _pack_terms(self)


def decode_hello(payload: bytes) -> Hello:
    """@raise RemoteProtocolError: no relaymux, another version, or malformed."""
    check_prefix(payload)
    name, instance, limits, extensions = _unpack_terms(payload[_PREFIX.size :], "HELLO")
    return Hello(name, instance, limits, extensions)


def decode_welcome(payload: bytes) -> Welcome:
    """@raise RemoteProtocolError: no relaymux, another version, or malformed."""
    check_prefix(payload)
    rest = payload[_PREFIX.size :]
    if len(rest) < _IDS.size:
        raise _malformed("WELCOME")
    session_id, resume_key = _IDS.unpack_from(rest)
    name, instance, limits, extensions = _unpack_terms(rest[_IDS.size :], "WELCOME")
    return Welcome(name, instance, limits, extensions, session_id, resume_key)


def encode_reject(code: int, text: str) -> bytes:
    """@return: the payload of a REJECT, which also names our version."""
    return _REJECT.pack(code, VERSION) + encode_text(text)


def decode_reject(payload: bytes) -> tuple[int, int, str]:
    """@return: code, the peer's version, text."""
    if len(payload) < _REJECT.size:
        raise _malformed("REJECT")
    code, version = _REJECT.unpack_from(payload)
    return code, version, decode_text(payload[_REJECT.size :])


def encode_coded_text(code: int, text: str) -> bytes:
    """@return: the payload of REFUSED, GOAWAY and BYE."""
    return _CODE.pack(code) + encode_text(text)


def decode_coded_text(payload: bytes, frame: str) -> tuple[int, str]:
    """@return: code and text of REFUSED, GOAWAY and BYE."""
    if len(payload) < _CODE.size:
        raise _malformed(frame)
    return _CODE.unpack_from(payload)[0], decode_text(payload[_CODE.size :])


def encode_text(text: str) -> bytes:
    """@return: at most L{MAX_TEXT} bytes of UTF-8, whole characters."""
    return text.encode("utf-8", "replace")[:MAX_TEXT].decode("utf-8", "ignore").encode()


def decode_text(data: bytes) -> str:
    """@return: one printable line, whatever the peer sent: it goes into logs."""
    text = data[:MAX_TEXT].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in text)


def encode_extensions(extensions: Mapping[int, bytes]) -> bytes:
    """@return: type, length and value of each."""
    return b"".join(_EXTENSION.pack(kind, len(value)) + value for kind, value in extensions.items())


def decode_extensions(data: bytes, frame: str) -> dict[int, bytes]:
    """@raise RemoteProtocolError: cut off, or one type twice."""
    extensions: dict[int, bytes] = {}
    position = 0
    while position < len(data):
        if position + _EXTENSION.size > len(data):
            raise _malformed(frame)
        kind, length = _EXTENSION.unpack_from(data, position)
        position += _EXTENSION.size
        if position + length > len(data) or kind in extensions:
            raise _malformed(frame)
        extensions[kind] = data[position : position + length]
        position += length
    return extensions


def _pack_terms(hello: Hello) -> bytes:
    limits = hello.limits
    name = hello.name.encode("ascii")
    data = (
        _FIXED.pack(
            0,
            limits.max_payload,
            limits.max_streams,
            limits.window,
            limits.replay,
            round(limits.resume_window * 1000),
            round(limits.silence * 1000),
            hello.instance,
        )
        + bytes([len(name)])
        + name
        + encode_extensions(hello.extensions)
    )
    if len(data) > MAX_CONTROL_PAYLOAD - _PREFIX.size - _IDS.size:
        raise LocalError("extensions do not fit into one frame")
    return data


def _unpack_terms(data: bytes, frame: str) -> tuple[str, bytes, Limits, dict[int, bytes]]:
    try:
        _, max_payload, max_streams, window, replay, resume_ms, silence_ms, instance = _FIXED.unpack_from(
            data
        )
        name_end = _FIXED.size + 1 + data[_FIXED.size]
        name = data[_FIXED.size + 1 : name_end].decode("ascii")
    except (StructError, IndexError, UnicodeDecodeError) as error:
        raise _malformed(frame) from error
    if name_end > len(data) or not NAME.fullmatch(name):
        raise _malformed(frame)
    for what, value, least in (
        ("max_payload", max_payload, MIN_PAYLOAD),
        ("window", window, MIN_WINDOW),
        ("replay", replay, MIN_REPLAY),
        ("silence", silence_ms, MIN_SILENCE_MS),
    ):
        if not least <= value < 2**62:
            raise RemoteProtocolError(ErrorCode.PROTOCOL_ERROR, f"{frame} with {what} {value}")
    limits = Limits(max_payload, max_streams, window, replay, resume_ms / 1000, silence_ms / 1000)
    return name, instance, limits, decode_extensions(data[name_end:], frame)


def check_prefix(payload: bytes) -> None:
    """@raise RemoteProtocolError: the payload is no relaymux's, or of another version."""
    if len(payload) < _PREFIX.size or not payload.startswith(MAGIC):
        raise RemoteProtocolError(ErrorCode.PROTOCOL_ERROR, "the peer does not speak relaymux's protocol")
    version = _PREFIX.unpack_from(payload)[1]
    if version != VERSION:
        raise RemoteProtocolError(
            ErrorCode.VERSION_UNSUPPORTED,
            f"the peer speaks protocol version {version}, this side version {VERSION}",
        )


def _malformed(frame: str) -> RemoteProtocolError:
    return RemoteProtocolError(ErrorCode.PROTOCOL_ERROR, f"malformed {frame}")
