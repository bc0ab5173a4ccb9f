"""
Which parts of this installation are compiled.

Two are, where it was made with a C compiler at hand: the innermost loops of the data
path (F{_native.c}, without which the same is done by other means), and the core with the
modules around it that each byte passes, from the same source that is else interpreted.
"""

from __future__ import annotations

from types import ModuleType

from relaymux.core import link

__all__ = ["describe_compiled", "native"]

native: ModuleType | None
try:
    from relaymux.net import _native as native
except ImportError:
    native = None


def describe_compiled() -> str:
    """@return: what is compiled, for people: C{"nothing"} if that is so."""
    core = "" if link.__file__.endswith(".py") else "core"
    loops = "" if native is None else "data path"
    return " and ".join(filter(None, (core, loops))) or "nothing"
