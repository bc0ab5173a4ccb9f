# make test     everything that is checked before a change goes in; prepares what is missing
# make test-compiled  the core's and the sockets' tests with what `pip install .` compiles; part of
#               make test where there is a C compiler
# make test-faults  the long tests of lost links, and planted bugs
# make test-libvirt  a machine moved by two real libvirt hosts, in all ways and with faults; as root
# make demo     a real live migration through the relay, on this machine
# make demo-libvirt  the same between two libvirt hosts on this machine; as root
# make lint     ruff and mypy alone
# make bench    what relaymux costs beside ssh, stunnel, haproxy and socat; about forty minutes
# make bench-quick  the most important of it, in less than two minutes
# make venv     the virtualenv alone
# make clean    removes what these made, the virtualenv too; .cache, with a QEMU that was
#               fetched, stays
#
# PYTHON=... chooses another interpreter (3.10 or newer) for the virtualenv,
# VENV=... another place for it, TESTS=... some tests instead of all.  CUTS=3 with demo
# cuts the link so often during the migration.

VENV ?= .venv
TESTS ?= tests
CUTS ?= 0
BIN = $(VENV)/bin

# trial runs the modules that take a moment, so that its own reactor and its way of
# finding tests are known to work too; pytest runs everything.
SLOW = tests/test_packaging.py tests/test_examples.py $(wildcard tests/test_properties*.py tests/test_resume*.py tests/test_faults*.py)
QUICK = $(subst /,.,$(basename $(filter-out $(SLOW),$(sort $(wildcard tests/test_*.py)))))

# What takes long or is rough: tests that cut, stop and kill real daemons and migrations
# by the hundred, and bugs that are planted to see them caught.
FAULTS = tests/faults tests/qemu/test_cuts.py $(wildcard tests/test_resume*.py)

# Where sources are copied to and compiled, as the checkout itself is never compiled; and what
# runs there: the tests of what is compiled, and of what calls it.
COMPILED = build/compiled
COMPILED_TESTS = $(sort $(wildcard tests/test_core*.py tests/test_properties*.py tests/test_resume*.py \
	tests/test_net_*.py tests/test_tls*.py)) \
	tests/test_sockets.py tests/test_reactor.py tests/test_buffers.py tests/test_turns.py tests/test_transports.py \
	tests/test_apart.py tests/test_connect.py tests/test_endings.py tests/test_given_up.py tests/test_status.py \
	tests/test_thirdparty.py tests/test_vms.py $(sort $(wildcard tests/test_fastpath*.py)) $(sort $(wildcard tests/test_budget*.py))
# The path is for the programs that tests start: the virtualenv leads them to the checkout.
IN_COMPILED = cd $(COMPILED) && PYTHONPATH=$(abspath $(COMPILED)) $(abspath $(BIN))/python

# A command for a copy that is compiled, and another one for where nothing can be.
define if-compiled
	@VENV=$(VENV) scripts/compiled-copy $(COMPILED) && status=0 || status=$$?; \
	case $$status in 0) $(1) ;; 3) $(2) ;; *) exit $$status ;; esac
endef

# Python as it runs where `pip install .` installed relaymux.
as-installed = $(call if-compiled,$(IN_COMPILED) $(1),$(BIN)/python $(1))

# What `make bench` compares relaymux with, and measures with.
PEERS = openssh-client openssh-server stunnel4 haproxy socat nbdkit libnbd-bin qemu-utils

.PHONY: test test-compiled test-faults test-libvirt demo demo-libvirt lint bench bench-quick bench-tools venv qemu libvirt clean

# Compiled first: it gets the compiler, where that is allowed, which some tests want, too.
test: lint qemu libvirt
	@VENV=$(VENV) scripts/compiled-copy $(COMPILED) || [ $$? = 3 ]
	$(BIN)/python -m twisted.trial --reporter=text --temp-directory=_trial_temp $(QUICK)
	$(BIN)/python -m pytest $(TESTS)
	$(call if-compiled,$(MAKE) test-compiled,echo "make test: without a C compiler the compiled variant was not tested")

# In one test OpenSSL's own client asks for new keys.
test-compiled: venv
	-scripts/debian-packages openssl
	VENV=$(VENV) scripts/compiled-copy $(COMPILED)
	$(IN_COMPILED) -m tests.compiled
	$(IN_COMPILED) -m pytest $(COMPILED_TESTS)

test-faults: qemu
	scripts/debian-packages faketime
	RELAYMUX_THOROUGH=1 $(BIN)/python -m pytest -o faulthandler_timeout=1200 $(FAULTS)
	$(BIN)/python -m tests.planted_bugs

test-libvirt: libvirt
	$(BIN)/python -m relaymux.testing.libvirt.suite

lint: venv
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# Debian's packages for the tests with a real QEMU.  Without them these skip and say so.
qemu: venv
	-$(BIN)/python -m relaymux.testing.qemu.install

# Debian's packages of libvirt, laid over the hosts' own files in the tests alone.
libvirt: venv
	-$(BIN)/python -m relaymux.testing.libvirt.install

demo:
	scripts/bootstrap demo $(VENV)
	$(BIN)/python -m relaymux.demo --cuts $(CUTS)

demo-libvirt:
	scripts/bootstrap demo $(VENV)
	$(BIN)/python -m relaymux.libvirt_demo

# The last row, whole migrations between two libvirt hosts, wants root and says so.
bench: bench-tools libvirt
	$(call as-installed,-m benchmarks)
	$(call as-installed,-m benchmarks.libvirt)

bench-quick: bench-tools
	$(call as-installed,-m benchmarks --quick)

# What relaymux is compared with.  The benchmark says what it could not measure without.
bench-tools: venv
	-scripts/debian-packages gcc libc6-dev $(PEERS)

venv:
	scripts/bootstrap dev $(VENV)

clean:
	[ ! -e $(VENV)/pyvenv.cfg ] || rm -rf $(VENV)
	rm -rf build dist *.egg-info _trial_temp* .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} + -o -name dropin.cache -exec rm -f {} +
	# Of build_ext --inplace: they would go on hiding the modules that they were compiled from.
	find relaymux -name '*.so' -exec rm -f {} +
