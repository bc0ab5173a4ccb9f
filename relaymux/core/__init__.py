"""The protocol without any I/O: frames, windows, streams, links and sessions."""
