"""
A real QEMU live migration to test relays with: finding QEMU, a guest that
checks itself, machines, the migration, and a pair of relay daemons.
"""
