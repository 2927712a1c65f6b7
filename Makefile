# Two commands matter: `make demo` and `make test`. Both install what they need, say what they are
# doing, and are safe to run twice. Everything built lands in .venv and $XDG_CACHE_HOME/vmcell.

SHELL := /bin/bash
PYTHON ?= $(shell for p in /usr/bin/python3 python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# Of tests of which there are many alike some are run; DEEP=1 runs all of them.
DEEP ?=
TIER := $(if $(DEEP),, and not deep)
PYTEST := $(BIN)/python -m pytest
# A lane that is over its time ends after the test it is in, with what failed and which were slow.
LANE_S := $(if $(DEEP),3600,1800)
LANE := $(PYTEST) --session-timeout $(LANE_S) --durations 12

.PHONY: demo test test-plain test-root test-kvm test-vm test-long test-api-cases \
	test-state-machines test-hostile fuzz hostile-agents host venv artifacts interpreter-image \
	containerd2 dev-up clean help

help:
	@echo "make demo   boot a microVM and drive it with the E2B SDK"
	@echo "make test   the tests: plain, root, kvm and vm lane"
	@echo "make test DEEP=1   all of them; about twice the time"
	@echo "make test-api-cases   5,000 requests made from the API's document; 10 minutes"
	@echo "make test-state-machines   200,000 random runs of the device models; 20 minutes"
	@echo "make test-hostile SEEDS=200   hostile guests, 10 s each, four at once (docs/hostile-guest.md)"
	@echo "make fuzz   every parser against mutated input, 10 minutes each; SECONDS= and TARGET="
	@echo "make hostile-agents   500 guests whose agent attacks the shim; 30 minutes"
	@echo "make test-long   two hours' worth of Task calls in random order; 20 minutes"

host:
	@tools/install-packages

venv: .venv/.installed

.venv/.installed: setup.cfg pyproject.toml | host
	@echo "python: installing the project and its tools into .venv"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[api,dev]'
	@touch $@

artifacts: venv
	@$(BIN)/vmcell kernel build
	@$(BIN)/vmcell image base
	@$(BIN)/vmcell image build small
	@$(BIN)/vmcell image build base

# Half a gigabyte, and only sandboxes of code-interpreter-v1 need it.
interpreter-image: venv
	@$(BIN)/vmcell image build code-interpreter-v1

demo: artifacts
	@$(BIN)/vmcell demo

# First the lanes that need no guest, two at a time, each of which keeps one processor busy and writes to
# build/lanes; then the vm lane alone: a dev VM that shares its processors is slower than it saves time,
# and its guests' deadlines are near. BUILT keeps the lanes from making the same thing twice. Where
# there is no /dev/kvm the kvm lane needs the dev VM too.
DEV_IMAGES := small base
LANES := $(MAKE) --no-print-directory -k BUILT=1 DEV_IMAGES="$(DEV_IMAGES) code-interpreter-v1"
HAS_KVM := $(wildcard /dev/kvm)

test: venv artifacts containerd2 interpreter-image
	@status=0; \
	$(BIN)/python tests/support/run_lanes.py build/lanes 'plain=$(LANES) test-plain' \
		'root-kvm=$(LANES) test-root $(if $(HAS_KVM),test-kvm)' || status=1; \
	$(LANES) $(if $(HAS_KVM),,test-kvm) test-vm || status=1; \
	exit $$status

ifndef BUILT
test-plain test-root test-kvm test-vm: venv
test-root dev-up: containerd2
test-vm: interpreter-image
test-vm: DEV_IMAGES += code-interpreter-v1
dev-up: artifacts
endif

test-plain:
	$(LANE) -m 'not kvm and not vm and not root$(TIER)'

# Where Go or its module proxy is missing, the tests that want these programs are skipped by name.
containerd2: venv
	@if command -v go >/dev/null; then $(BIN)/vmcell dev containerd; else false; fi || \
		echo "containerd 2.x and nerdctl are not built; their tests will be skipped"

test-root:
	$(LANE) -m 'root and not vm$(TIER)'

# On a machine without /dev/kvm the same tests run inside the dev VM.
test-kvm:
	@if [ -e /dev/kvm ]; then \
		$(LANE) -m 'kvm and not vm$(TIER)'; \
	else \
		$(MAKE) dev-up && $(BIN)/vmcell dev run -- $(CURDIR)/.venv/bin/python -m pytest \
			--rootdir $(CURDIR) -p no:cacheprovider -m 'kvm and not vm$(TIER)' $(CURDIR)/tests; \
	fi

# Five calls a second for two hours; the fake guest is quicker than that.
test-long: venv
	VMCELL_CONTRACT_CALLS=36000 $(PYTEST) -o faulthandler_timeout=0 tests/shim/test_contract_machine.py

# Hostile guests on this machine's /dev/kvm; make test runs 20 seeds. SEED=17 is where to begin.
SEED ?= 1
test-hostile: SEEDS ?= 200
test-hostile: venv
	VMCELL_HOSTILE_SEEDS=$(SEEDS) VMCELL_HOSTILE_SEED=$(SEED) $(PYTEST) -m kvm tests/hostile \
		-k hurts_only_itself -o log_cli=true -o log_cli_level=INFO

# Requests made from the API's document; make test runs 400 of them.
test-api-cases: venv
	VMCELL_API_CASES=5000 $(PYTEST) tests/api/test_api_cases.py

# Runs of the state machines of memory, queue, register window and devices, others each time; make test
# does the same 10,000 each time.
test-state-machines: venv
	VMCELL_STATE_MACHINE_RUNS=$${VMCELL_STATE_MACHINE_RUNS:-200000} $(PYTEST) -o faulthandler_timeout=0 \
		--timeout 0 tests/virtio/machines tests/runtime/test_memory_machine.py
# Longer than make test does, and with other random numbers each time: make fuzz SECONDS=3600
# TARGET=blk_request. TARGET=all is every one of them, two at a time.
SECONDS ?= 600
TARGET ?= all
fuzz: venv
	@$(BIN)/python tests/fuzz/run_fuzz.py $(TARGET) --seconds $(SECONDS) --keep

# Guests whose agent is an attacker, as many as SEEDS; make test DEEP=1 has 20 of them.
hostile-agents: SEEDS ?= 500
hostile-agents: venv
	VMCELL_HOSTILE_SEEDS=$(SEEDS) $(PYTEST) tests/shim/test_hostile_agent.py

dev-up:
	@$(BIN)/vmcell dev up --store $${VMCELL_DEV_NAME:-make} --api-port 0 --data-port 0 \
		$(addprefix --image ,$(DEV_IMAGES))

test-vm: dev-up
	$(LANE) -m 'vm$(TIER)' --timeout 300 tests/vm; status=$$?; $(BIN)/vmcell dev down; exit $$status

clean:
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis
