# Every command sets itself up: a fresh machine needs Python 3.11, git, make and a C compiler.
#
#   make demo    the example of the README, a robot arm, and a picture (demo.png)
#   make test    the tests, with coverage
#   make bench   the benchmark table of the README
#   make lint    ruff check, ruff format --check, mypy
#   make ci      everything the continuous integration runs
#   make clean   remove the virtual environment and everything generated
#
# Settings:  PYTHON=...      the interpreter that creates .venv
#            PIP_FLAGS=...   more flags for pip, such as the index of a CPU-only torch
#            PYTEST_FLAGS=.. more flags for pytest, such as -k name, or -m 'not slow'

PYTHON ?= $(shell command -v python3.11 2>/dev/null || command -v python3)
PIP_FLAGS ?=
PYTEST_FLAGS ?=
BENCH_FLAGS ?=

BIN := .venv/bin
# The constraints file belongs to every pip call: see its first lines.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
SETUP_FILES := pyproject.toml constraints.txt

.PHONY: help demo test bench lint format ci clean
.SECONDARY:

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no python3 found: set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv

# One stamp per extra of pyproject.toml: .venv/.installed-test means `pip install -e '.[test]'` is done.
.venv/.installed-%: $(SETUP_FILES) | $(BIN)/python
	@echo "setting up .venv for '$*' (the first time takes a few minutes)"
	$(INSTALL) -e '.[$*]'
	@touch $@

demo: .venv/.installed-pictures
	$(BIN)/python examples/demo.py

# Two workers with one thread each: more threads than cores make small torch kernels slower.
test: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term $(PYTEST_FLAGS)

bench: .venv/.installed-test
	$(BIN)/python -m benchmarks --update-readme $(BENCH_FLAGS)

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ci:
	.ci/run

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* dist demo.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
