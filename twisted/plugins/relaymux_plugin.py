"""
Makes C{twistd relaymux} exist.

Every twistd on the machine may load this file, so it imports nothing of
relaymux.  The attribute's name is part of Twisted's cache: keep it for ever.
"""

from twisted.application.service import ServiceMaker

relaymux = ServiceMaker(
    "relaymux",
    "relaymux.tap",
    "Every stream of a live migration through one connection between two hosts.",
    "relaymux",
)
