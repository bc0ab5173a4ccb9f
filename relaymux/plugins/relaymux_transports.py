"""The built-in transports.  Every C{twistd} on the host may load this file: it imports next to nothing."""

from relaymux.transports.registry import LazyTransport

tcp = LazyTransport("tcp", "relaymux.transports.tcp.transport")
tls = LazyTransport("tls", "relaymux.transports.tls.transport")
unix = LazyTransport("unix", "relaymux.transports.unix.transport")
