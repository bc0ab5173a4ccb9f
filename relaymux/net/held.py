"""
A session as its peer holds it, whether or not there is a link.
"""

from __future__ import annotations

from twisted.internet.interfaces import IDelayedCall

from relaymux.core.handshake import Hello
from relaymux.core.resume import MAX_GENERATION, Resume, Role, Ticket, encode_resume
from relaymux.errors import ErrorCode
from relaymux.net.streams import SessionStreams

__all__ = ["HeldSession"]


class HeldSession:
    """
    One session, from its first link to its end.

    @ivar remote: how the other daemon introduced itself.
    @ivar streams: the session and its streams.
    @ivar identity: the name the transport had checked on the first link.
    @ivar window: seconds without a link after which the session is over; 0: at once.
    @ivar generation: the number of the newest link that was tried (by the dialler)
        or agreed to (by the acceptor).
    @ivar connection: the number of the newest connection that carried it.
    @ivar lost_at: when the last link was lost; L{None} while there is one.
    @ivar timer: ends the session when the window is over.
    """

    def __init__(
        self, ticket: Ticket, remote: Hello, streams: SessionStreams, identity: str, window: float
    ) -> None:
        self.remote = remote
        self.streams = streams
        self.identity = identity
        self.window = window
        self.generation = 0
        self.connection = 0
        self.lost_at: float | None = None
        self.timer: IDelayedCall | None = None
        self._ticket = ticket

    def ask(self, exporter: bytes) -> bytes:
        """@return: the payload of the RESUME for a new link, with a generation not used before."""
        self.generation += 1
        return self._encode(Role.DIALER, exporter)

    def refusal(self, resume: Resume, identity: str, exporter: bytes) -> tuple[ErrorCode, str] | None:
        """
        The acceptor's checks, in the order of protocol.md 10.2; they change nothing.

        @return: why the RESUME is refused, or L{None}.
        """
        if identity != self.identity or not resume.is_proven_by(self._ticket, Role.DIALER, exporter):
            return ErrorCode.UNKNOWN_SESSION, "there is no such session here; begin a new one"
        if not self.generation < resume.generation <= MAX_GENERATION:
            return ErrorCode.STALE_GENERATION, f"generation {self.generation} was resumed before"
        if not self.streams.session.replay.can_continue_at(resume.rx_next):
            return ErrorCode.OFFSET_MISMATCH, f"sending cannot go on at offset {resume.rx_next}"
        return None

    def agree(self, resume: Resume, exporter: bytes) -> tuple[bytes, int]:
        """
        Go on as C{resume}, which was not refused, says.

        @return: the payload of RESUMED, and how many bytes will be sent again.
        """
        self.generation = resume.generation
        again = self.streams.session.resume(resume.rx_next)
        return self._encode(Role.ACCEPTOR, exporter), again

    def is_answered_by(self, resume: Resume, exporter: bytes) -> bool:
        """Whether C{resume} is the acceptor's answer to our latest question."""
        return resume.generation == self.generation and resume.is_proven_by(
            self._ticket, Role.ACCEPTOR, exporter
        )

    def stop_timer(self) -> None:
        """There is a link again, or the session is over."""
        if self.timer is not None and self.timer.active():
            self.timer.cancel()
        self.timer = None

    def _encode(self, role: Role, exporter: bytes) -> bytes:
        return encode_resume(self._ticket, role, self.generation, self.streams.session.rx_next, exporter)
