"""
The multiplexing protocol without I/O: bytes and calls in, events and bytes out.

Nothing in here imports Twisted, reads a clock or logs.  docs/protocol.md is
the normative text; the modules name its sections.
"""
