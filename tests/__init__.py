"""The tests of relaymux: run with pytest or C{python -m twisted.trial tests}."""
