"""relaymux: every stream of a live migration through one connection between two hosts."""

__version__ = "0.1.0"
