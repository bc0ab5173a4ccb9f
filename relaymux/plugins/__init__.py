"""
Where transports are found: each module here holds L{IRelayTransport} providers.

Other distributions add modules of their own (without an C{__init__.py}).
"""

from twisted.plugin import pluginPackagePaths

__path__.extend(pluginPackagePaths(__name__))
__all__: list[str] = []
