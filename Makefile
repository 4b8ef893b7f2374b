# Everything happens in .venv, pinned by constraints.txt; nothing global is touched.
# PYTHON chooses the interpreter, TORCH_INDEX an extra index for torch (for instance
# https://download.pytorch.org/whl/cpu, which spares Linux machines the CUDA packages).

PYTHON ?= python3
TORCH_INDEX ?=
DEMO_ARGS ?=
TEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
SOURCES := moiety experts routers compose analysis tests benchmarks experiments setup.py

.PHONY: help install install-dev demo test check sanitize emulate format bench clean

help:
	@echo "make demo     the whole pipeline on text this machine has, into ./moiety-demo"
	@echo "make test     every test"
	@echo "make check    ruff, pyright and the architecture test"
	@echo "make sanitize the kernels under sanitizers;  make emulate  those of every CPU"
	@echo "make bench    what moiety claims, measured against peers"
	@echo "make install  only the set-up;  make clean  removes what make made"

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and f"error: moiety needs Python 3.11 or newer, but $(PYTHON) is {v}; set PYTHON=...")'
	@echo "making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt --upgrade pip
	@touch $@

$(VENV)/.installed: $(VENV)/.python pyproject.toml setup.py constraints.txt $(wildcard experts/kernels/cpu/* routers/kernel/*)
	@echo "installing moiety and what it needs (a few minutes the first time)"
	@$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@$(PIP) install -c constraints.txt -e .
	@$(BIN)/python -c 'from moiety.experts import kernels; print(kernels.description())'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "installing the developers' tools"
	@$(PIP) install -c constraints.txt --group dev
	@touch $@

demo: install
	@$(BIN)/moiety demo $(DEMO_ARGS)

# Two workers of one thread each: tiny models gain nothing from threads. TEST_ARGS="-n 8" takes more.
test: install-dev
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal $(TEST_ARGS)

check: install-dev
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/pyright
	@$(BIN)/pytest -q tests/test_architecture.py

# Both need only g++ and, for emulate, SIMDe (Debian: libsimde-dev).
sanitize:
	@$(MAKE) --no-print-directory -C tests/experts/kernels/cpp sanitized

emulate:
	@$(MAKE) --no-print-directory -C tests/experts/kernels/cpp emulated

format: install-dev
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

bench: install-dev
	@$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage
