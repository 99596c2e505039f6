# Everything runs in .venv, which each target sets up by itself. Needs Python 3.11+, a C++20 compiler and make.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*)
# Without isolation the build tools stay put, so that a changed source rebuilds only what it touches.
INSTALL = $(BIN)/pip install --quiet --no-build-isolation --editable

SEEDS ?= 5000
CASES ?= 10000

.PHONY: demo test simulate fuzz lint sanitize bench clean

demo: .venv/run.stamp
	$(BIN)/intaglio demo

test: .venv/test.stamp
	$(BIN)/pytest -n 2

# The engine under simulated faults; nightly with SEEDS=100000.
simulate: .venv/test.stamp
	PYTHONPATH=tests $(BIN)/python -m simulation --seeds $(SEEDS)

# The server under requests generated from its own description.
fuzz: .venv/test.stamp
	$(BIN)/python tests/fuzz.py --cases $(CASES)

lint: .venv/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sanitize: .venv/test.stamp
	scripts/sanitize.sh

bench: .venv/run.stamp
	$(BIN)/intaglio bench

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .venv/*.stamp

.venv/tools.stamp:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Intaglio needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "scikit-build-core>=0.11" "nanobind>=3,<4" cmake ninja
	touch $@

.venv/run.stamp: .venv/tools.stamp $(SOURCES)
	$(INSTALL) .
	touch $@

.venv/test.stamp: .venv/tools.stamp $(SOURCES)
	$(BIN)/pip install --quiet torch==2.13.0
	$(INSTALL) '.[test]'
	touch .venv/run.stamp $@

.venv/lint.stamp: .venv/tools.stamp pyproject.toml
	$(INSTALL) '.[lint]'
	touch $@
