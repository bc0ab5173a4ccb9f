"""What the tests with real libvirt hosts have in common."""

from __future__ import annotations

from twisted.trial.unittest import SkipTest, SynchronousTestCase

from relaymux.testing.libvirt.install import Edition, LibvirtUnavailable, installed_libvirt
from relaymux.testing.libvirt.rig import RigUnavailable, check_machine


class LibvirtTestCase(SynchronousTestCase):
    """Skips where there can be no hosts, and says why."""

    def setUp(self) -> None:
        try:
            check_machine()
            installed_libvirt(Edition.RELEASE)
        except (RigUnavailable, LibvirtUnavailable) as error:
            raise SkipTest(str(error)) from None
