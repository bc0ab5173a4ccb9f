"""Lets relaymux find the transport.  Every twistd on the host may load this file."""

from relaymux.transports.registry import LazyTransport

loop = LazyTransport("loop", "relaymux_loop.transport")
