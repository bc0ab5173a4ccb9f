"""
Two libvirt hosts on one machine, and live migrations between them.

L{relaymux.testing.libvirt.rig} has the hosts, L{relaymux.testing.libvirt.rehearsal} a
migration with everything around it.
"""
