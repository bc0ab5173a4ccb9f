"""
Tests with a real QEMU, and of what is around it.

They use what C{python -m relaymux.testing.qemu.install} (part of C{make
test}) has found or fetched, and skip where there is none.
"""
