"""Real QEMU under test: finding, installing and driving it."""
