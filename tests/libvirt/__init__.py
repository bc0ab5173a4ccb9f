"""Tests with two real libvirt hosts on this machine."""
