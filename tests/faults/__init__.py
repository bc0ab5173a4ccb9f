"""
Faults of every kind between, and in, two real daemons.

Each test moves position-stamped bytes (L{tests.faults.content}) through local
sockets (L{tests.faults.traffic}) and a pair of daemons with the fault proxy
between them (L{tests.faults.pair}).  With C{RELAYMUX_THOROUGH=1}, as C{make
test-faults} sets it, the long ones run as well.
"""
