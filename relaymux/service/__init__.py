"""The daemon: configuration and the tree of services made from it."""
