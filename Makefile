# Every command sets itself up: a fresh machine needs Python (3.10 or newer), git, make and a C compiler.
#
#   make demo    the example of the README, a robot arm, and a picture (demo.png)
#   make test    the tests, with coverage
#   make test-newest   part of the tests on the newest torch that can be installed
#   make test-python   the same on another Python: PYTHON=python3.13, PYTHON=newest, PYTHON=oldest;
#                      and another torch: TORCH=2.14.1, TORCH=oldest
#   make bench   the benchmark table of the README
#   make lint    ruff check, ruff format --check, mypy
#   make replay  what is computed, compared with another revision: REV=main~1; K=name for some cases
#   make ci      everything the continuous integration runs
#   make clean   remove the virtual environment and everything generated
#
# Settings:  PYTHON=...      the interpreter that creates .venv
#            PIP_FLAGS=...   more flags for pip, such as the index of CPU builds of torch
#            PYTEST_FLAGS=.. more flags for pytest, such as -k name, or -m 'not slow'

PYTHON ?= $(shell command -v python3.11 2>/dev/null || command -v python3)
PIP_FLAGS ?=
PYTEST_FLAGS ?=
TORCH ?= newest
REV ?= main
K ?=
BENCH_FLAGS ?=

BIN := .venv/bin
# The constraints file belongs to every pip call: see its first lines. Of torch pip takes the build
# for CPUs where it can see it.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
SETUP_FILES := pyproject.toml constraints.txt

.PHONY: help demo test test-newest test-python bench replay lint format ci clean
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
	@$(BIN)/python tools/which_torch.py
	@touch $@

demo: .venv/.installed-pictures
	$(BIN)/python examples/demo.py

# Two workers with one thread each: more threads than cores make small torch kernels slower.
test: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --cov --cov-report=term $(PYTEST_FLAGS)

# Environments of their own, removed at the end: they bring gigabytes.
test-newest:
	PIP_FLAGS="$(PIP_FLAGS)" $(PYTHON) tools/try_version.py --torch newest

test-python:
	PIP_FLAGS="$(PIP_FLAGS)" python3 tools/try_version.py --python "$(PYTHON)" --torch "$(TORCH)"

bench: .venv/.installed-test
	$(BIN)/python -m benchmarks --update-readme $(BENCH_FLAGS)

replay: .venv/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python tools/replay.py --against "$(REV)" -k "$(K)"

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
	rm -rf .venv .venv-other .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* dist demo.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
