"""What OpenSSL reports, as sentences for operators."""

from __future__ import annotations

from pathlib import Path

from OpenSSL import SSL
from twisted.internet.error import ConnectionLost

from relaymux.errors import TransportError

__all__ = ["handshake_error", "lost_error"]

# Words of the alerts by which a peer says that it is our certificate it does not want.
# The last is what OpenSSL sends when not it but its user did not like the name in it.
_ABOUT_CERTIFICATES = ("certificate", "unknown ca", "access denied", "internal error")

# What OpenSSL says when what it reads is no TLS, or an older one.
_NO_TLS = (
    "wrong version number",
    "http request",
    "unsupported protocol",
    "protocol version",
    "packet length",
)


def _text(error: Exception) -> str:
    """All that OpenSSL says, e.g. C{"tlsv1 alert unknown ca"}."""
    if isinstance(error, SSL.ZeroReturnError):
        return "closed by the peer"
    reasons = error.args[0] if error.args else None
    if isinstance(reasons, list) and reasons:
        return ", ".join(dict.fromkeys(str(reason[-1]) for reason in reasons))
    return str(error) or type(error).__name__


def _refusal(text: str, peer: str, certificate: Path) -> TransportError | None:
    if "alert" in text and any(word in text for word in _ABOUT_CERTIFICATES):
        return TransportError(
            f"{peer} does not accept the certificate in {certificate} ({text}); its log says why",
            retry=False,
        )
    return None


def handshake_error(error: Exception, problem: str, peer: str, certificate: Path) -> TransportError:
    """
    Why a handshake failed.

    @param problem: what our own check of the peer's certificate found, if anything.
    @param peer: the peer's address, for the message.
    @param certificate: the file of our certificate.
    """
    if problem:
        return TransportError(f"{peer}: {problem}", retry=False)
    text = _text(error)
    refusal = _refusal(text, peer, certificate)
    if refusal is not None:
        return refusal
    if any(words in text for words in _NO_TLS):
        return TransportError(f"{peer} does not speak TLS 1.3 ({text}); do both ends say 'transport = tls'?")
    if "peer did not return a certificate" in text:
        return TransportError(f"{peer} shows no certificate; each end needs one of its own", retry=False)
    return TransportError(f"the TLS handshake with {peer} failed: {text}")


def lost_error(error: Exception, peer: str, certificate: Path) -> Exception:
    """
    Why an established connection is over.

    In TLS 1.3 this is where a client learns that the server does not accept it.
    """
    text = _text(error)
    return _refusal(text, peer, certificate) or ConnectionLost(f"TLS with {peer} broke: {text}")
