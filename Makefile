# make bench    the benchmark, from a clean checkout
# make check    the search for a false zero claim, from a clean checkout
# make test     everything that must pass, from a clean checkout
#
# All make .venv first. Needs make and Python >= 3.11 with venv; no root.
# Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet -c constraints.txt
BENCH   ?=
SERIES  ?=
MUTANTS ?=

# Rooms that are compiled; their tests run a second time with the compiler off.
COMPILED := $(wildcard tests/mm/test_*.py tests/check/small/test_*.py tests/test_jit.py)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help bench test test-vm lint types tests tests-uncompiled series mutants coverage clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

bench: $(VENV)/.runtime ## run the benchmark (arguments: make bench BENCH="--quick --json out.json")
	@$(BIN)/hostzero bench $(BENCH)

.PHONY: check safety
CHECK ?=

check: $(VENV)/.runtime ## search for a page that is believed zero and is not (arguments: make check CHECK="--seconds 600")
	@$(BIN)/hostzero check $(CHECK)

safety: $(VENV)/.runtime ## find the lines of code of the lifecycle table in docs/safety.md again
	@$(BIN)/python -m hostzero.check.lifecycle_doc docs/safety.md

test: lint types tests tests-uncompiled ## lint, types, tests, and the compiled rooms' tests with the compiler off

lint: $(VENV)/.dev ## ruff check, ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(VENV)/.dev ## mypy --strict over src and tests
	@$(BIN)/mypy

tests: $(VENV)/.dev ## the tests
	@$(BIN)/python -m pytest -q

tests-uncompiled: $(VENV)/.dev ## the compiled rooms' tests as plain Python
ifneq ($(COMPILED),)
	@echo "the compiled rooms once more, as plain Python (NUMBA_DISABLE_JIT=1)"
	@NUMBA_DISABLE_JIT=1 $(BIN)/python -m pytest -q -m "not compiled_only" $(COMPILED)
endif

test-vm: $(VENV)/.dev ## the device on real virtual machines: prepares QEMU and a guest below the user's cache first
	@$(BIN)/hostzero vm setup
	@$(BIN)/python -m pytest -q tests_vm

series: $(VENV)/.dev ## take each patch's behaviour out and watch its tests fail (one patch: make series SERIES="--patch 25")
	@$(BIN)/python -m tests.take_out $(SERIES)

mutants: $(VENV)/.runtime ## search each mutant for what is wrong in it (arguments: make mutants MUTANTS="--name merge --seconds 5")
	@$(BIN)/hostzero check --mutants $(MUTANTS)

coverage: $(VENV)/.dev ## line and branch coverage, with the compiler off so that kernels count
	@NUMBA_DISABLE_JIT=1 $(BIN)/coverage run -m pytest -q -m "not compiled_only"
	@$(BIN)/coverage report

clean: ## remove .venv, caches and builds
	rm -rf $(VENV) build dist src/*.egg-info .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps are written last, so that an interrupted installation is done again; and because a package may have
# been cut in half by then, it is done from the start (.installing is there only while pip runs).
AGAIN := $(if $(wildcard $(VENV)/.installing),--force-reinstall)

$(VENV)/.runtime: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "installing hostzero into $(VENV)"
	@touch $(VENV)/.installing
	@$(PIP) $(AGAIN) --editable .
	@rm $(VENV)/.installing
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "installing hostzero and its development tools into $(VENV)"
	@touch $(VENV)/.installing
	@$(PIP) $(AGAIN) --editable '.[dev]'
	@rm $(VENV)/.installing
	@touch $@ $(VENV)/.runtime

$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	    echo "hostzero needs Python 3.11 or newer; there is no '$(PYTHON)' here (make PYTHON=... names another)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "hostzero needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1) (make PYTHON=... names another)" >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo "'$(PYTHON)' lacks the venv module: on Debian and Ubuntu, install the package python3-venv" >&2; exit 2; }
	@echo "making $(VENV) with $$($(PYTHON) -V)"
	@# an environment of another Python, or one that was moved, is made anew
	@$(BIN)/python -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "'"$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')"'")' 2>/dev/null \
	    || rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@touch $@
