"""How numbers of bytes are written for people."""

from __future__ import annotations

__all__ = ["exact_amount", "rate", "rough_amount"]

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def rough_amount(count: float) -> str:
    """C{"1.5 MiB"}"""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count /= 1024
        unit += 1
    return f"{count:.1f} {_UNITS[unit]}" if unit else f"{count:.0f} bytes"


def exact_amount(count: int) -> str:
    """C{"1.5 MiB (1572864 bytes)"}: one to read, one to add up."""
    return f"{rough_amount(count)} ({count} bytes)" if count >= 1024 else f"{count} bytes"


def rate(count: int, seconds: float) -> str:
    """C{"1.5 MiB/s"}; of no time it is no rate."""
    return f"{rough_amount(count / seconds)}/s" if seconds > 0 else "-"
