# Every target makes the environment it needs: a fresh clone needs no other step.
#   make test PYTHON=/usr/bin/python3.11      the interpreter to make .venv from
#   make suite PYTEST_ARGS='-k sigma -n 0'    options and files for pytest
#   make demo ARGS=--smoke                    options for the demo or the benchmarks

PYTHON ?= $(shell scripts/find_python.sh 3.11)
# The newest JAX needs Python 3.12. Empty where there is none.
NEWEST_PYTHON ?= $(shell scripts/find_python.sh 3.12 2>/dev/null)

ARGS ?=
PYTEST_ARGS ?=
GALLERY ?= cascade stable_transformer uncertainty learned_physics residual_flow robust_digits long_memory gan_stability
# What `make test` also runs in 64-bit JAX and on the newest JAX, and what it leaves to nightly.
X64_TESTS ?= $(addprefix tests/test_,power.py normalize.py)
NEWEST_TESTS ?= $(addprefix tests/test_,contract.py plan.py linen.py linen_operators.py)
FAST ?= -m 'not slow'

VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help check lint format types test suite x64 newest oldest nightly demo gallery bench reliability docs \
  clean distclean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' Makefile

check: lint types  ## lint and types

lint: $(VENV)/.has-lint  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.has-lint  ## let ruff fix and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.has-lint $(VENV)/.has-test  ## pyright on the package
	$(BIN)/pyright --pythonpath $(BIN)/python

# Tests run on the CPU wherever they run, unless told: JAX_PLATFORMS=cuda make suite
# $(call pytest,ENVIRONMENT,ARGUMENTS)
define pytest
	@$(1)/bin/python -c 'import platform as p, jax, flax; print("== tests: Python", \
	  p.python_version(), "jax", jax.__version__, "flax", flax.__version__, \
	  "x64 ==" if jax.config.jax_enable_x64 else "==", flush=True)'
	JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu} $(1)/bin/python -m pytest -q -n 2 --dist worksteal \
	  --durations=15 $(2) $(PYTEST_ARGS)
endef

test: suite x64 newest  ## all but the slow tests, and the core again: 64-bit, newest JAX

suite: $(VENV)/.has-test  ## all but the slow tests
	$(call pytest,$(VENV),$(FAST))

x64: $(VENV)/.has-test  ## the core tests in 64-bit JAX, where the CPU is one device, not eight
	$(call pytest,JAX_ENABLE_X64=1 XLA_FLAGS=--xla_force_host_platform_device_count=1 $(VENV),$(FAST) $(X64_TESTS))

ifneq ($(strip $(NEWEST_PYTHON)),)
newest: .venv-newest/.has-test  ## the core tests on the newest JAX
	$(call pytest,.venv-newest,$(FAST) $(NEWEST_TESTS))
else
newest:
	@echo 'no Python >= 3.12 found: newest JAX not tested here'
endif

oldest: .venv-oldest/.has-test  ## all but the slow tests on the oldest supported versions
	$(call pytest,.venv-oldest,$(FAST))

nightly:  ## all tests, the slow ones too, on every supported version
	$(MAKE) --no-print-directory suite x64 oldest newest FAST= NEWEST_TESTS=

demo: $(VENV)/.has-demo  ## train a small GAN with and without jsn, and compare
	$(BIN)/python examples/demo.py $(ARGS)

gallery: $(VENV)/.has-demo  ## measure the examples that have a page in the gallery again
	for name in $(GALLERY); do $(BIN)/python examples/$$name.py --save || exit 1; done

bench: $(VENV)/.has-bench  ## measure truth and cost beside other implementations
	$(BIN)/python -m benchmarks $(ARGS)

reliability: $(VENV)/.has-test  ## measure faults, hostile files, kills, a soak, the modes of JAX
	$(BIN)/python -m benchmarks.reliability $(ARGS)

docs: $(VENV)/.has-docs  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove what the tools leave behind
	rm -rf site dist build .coverage htmlcov .pytest_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove the environments
	rm -rf .venv .venv-newest .venv-oldest

# Environments. A stamp `.has-EXTRA` says that an extra of pyproject.toml is installed;
# a later pyproject.toml installs it again.

# $(call environment,DIRECTORY,INTERPRETER)
define environment
	@test -n '$(2)' || { echo 'make: give PYTHON=/path/to/python (>= 3.11)' >&2; exit 1; }
	test -x $(1)/bin/pip || '$(2)' -m venv $(1)
	@touch $@
endef
PIP := -m pip install --quiet --disable-pip-version-check

$(VENV)/.made:
	$(call environment,$(VENV),$(PYTHON))
.venv-newest/.made:
	$(call environment,.venv-newest,$(NEWEST_PYTHON))
.venv-oldest/.made:
	$(call environment,.venv-oldest,$(PYTHON))

$(VENV)/.has-%: pyproject.toml | $(VENV)/.made
	$(BIN)/python $(PIP) --editable '.[$*]'
	@touch $@
.venv-newest/.has-%: pyproject.toml | .venv-newest/.made
	.venv-newest/bin/python $(PIP) --upgrade --editable '.[$*]'
	@touch $@
.venv-oldest/.has-%: pyproject.toml requirements/oldest.txt | .venv-oldest/.made
	.venv-oldest/bin/python $(PIP) --editable '.[$*]' --constraint requirements/oldest.txt
	@touch $@
