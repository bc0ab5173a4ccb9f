"""
Taking a session on to a new link (protocol.md 10).

Both sides remember a L{Ticket}.  The dialling side proves with RESUME that it is
the daemon the session was made with, and says what it has; the accepting side
proves the same with RESUMED.  The proof covers every field, so that nobody can
make either side skip or repeat bytes.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from enum import IntEnum
from struct import Struct

from relaymux.core.handshake import MAGIC, VERSION, check_prefix, decode_extensions
from relaymux.errors import ErrorCode, RemoteProtocolError

#: What the TLS exporter is asked for, and how many bytes of it.
EXPORTER_LABEL = "EXPERIMENTAL-relaymux-resume"
EXPORTER_BYTES = 32

_LABEL = b"relaymux resume 1"
_LENGTH = Struct("!H")
_FIELDS = Struct("!8sH16sI16s16sQ")
_PROOF_BYTES = 32

MAX_GENERATION = 2**32 - 1


class Role(IntEnum):
    """Who proves: the byte that keeps an answer from being the question's echo."""

    DIALER = 1
    ACCEPTOR = 2


@dataclass(frozen=True)
class Ticket:
    """
    What both sides keep of a session to recognise it.

    @ivar session_id: 16 bytes; public.
    @ivar resume_key: 32 bytes; known to the two daemons alone.
    @ivar dialer: instance id of the dialling daemon, 16 bytes.
    @ivar acceptor: instance id of the accepting daemon, 16 bytes.
    """

    session_id: bytes
    resume_key: bytes = field(repr=False)
    dialer: bytes
    acceptor: bytes


@dataclass(frozen=True)
class Resume:
    """
    A RESUME or RESUMED as it was received: nothing of it is to be believed before L{is_proven_by}.

    @ivar generation: the number of the link in the session.
    @ivar rx_next: what the sender has of our sequenced frames.
    """

    session_id: bytes
    generation: int
    dialer: bytes
    acceptor: bytes
    rx_next: int
    signed: bytes = field(repr=False)
    proof: bytes = field(repr=False)

    def is_proven_by(self, ticket: Ticket, role: Role, exporter: bytes) -> bool:
        """Whether C{role} of the ticket's session sent this on the link with this C{exporter} value."""
        expected = _prove(ticket, role, self.signed, exporter)
        named = (self.session_id, self.dialer, self.acceptor)
        return hmac.compare_digest(expected, self.proof) and named == (
            ticket.session_id,
            ticket.dialer,
            ticket.acceptor,
        )


def encode_resume(ticket: Ticket, role: Role, generation: int, rx_next: int, exporter: bytes) -> bytes:
    """@return: the payload of RESUME (by the dialer) or RESUMED (by the acceptor)."""
    fields = _FIELDS.pack(
        MAGIC, VERSION, ticket.session_id, generation, ticket.dialer, ticket.acceptor, rx_next
    )
    return fields + _prove(ticket, role, fields + _LENGTH.pack(0), exporter)


def decode_resume(payload: bytes) -> Resume:
    """@raise RemoteProtocolError: no relaymux, another version, or malformed."""
    check_prefix(payload)
    fixed = _FIELDS.size + _PROOF_BYTES
    if len(payload) < fixed:
        raise RemoteProtocolError(ErrorCode.PROTOCOL_ERROR, "malformed RESUME")
    _, _, session_id, generation, dialer, acceptor, rx_next = _FIELDS.unpack_from(payload)
    extensions = payload[fixed:]
    decode_extensions(extensions, "RESUME")
    signed = payload[: _FIELDS.size] + _LENGTH.pack(len(extensions)) + extensions
    return Resume(session_id, generation, dialer, acceptor, rx_next, signed, payload[_FIELDS.size : fixed])


def _prove(ticket: Ticket, role: Role, signed: bytes, exporter: bytes) -> bytes:
    return hmac.digest(ticket.resume_key, _LABEL + bytes([role]) + signed + exporter, "sha256")
