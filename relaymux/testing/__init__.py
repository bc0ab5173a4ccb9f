"""Test kit for transports, ours and others: conformance suites, a transport in memory."""
