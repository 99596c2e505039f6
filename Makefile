# Everything runs in .venv, which each target sets up by itself. Needs Python 3.11+, a C++20 compiler and make.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*.* csrc/*/*)
# Without isolation the build tools stay put, so that a changed source rebuilds only what it touches.
INSTALL = $(BIN)/pip install --quiet --no-build-isolation --editable

SEEDS ?= 5000
CASES ?= 10000
FAULTS ?= 200

.PHONY: demo test clients client-environments ray simulate fuzz faults lint docs sanitize bench clean

demo: .venv/run.stamp
	$(BIN)/intaglio demo

test: .venv/test.stamp
	$(BIN)/pytest -n 2

# Real clients of the API against the server. Their packages conflict with each other, so they have environments of
# their own, which take a few minutes to install; `make test` skips a client that is not there.
clients: .venv/test.stamp client-environments
	$(BIN)/pytest -n 2 tests/clients

client-environments: .venv-clients/stamp .venv-clients-llama-index/stamp

# Replicas on a local Ray cluster of two nodes; `make test` skips these tests where ray is not installed.
ray: .venv/ray.stamp
	$(BIN)/pytest tests/cluster/test_ray.py

# The engine, and groups of ranks on several hosts, under simulated faults; nightly with SEEDS=100000.
simulate: .venv/test.stamp
	PYTHONPATH=tests $(BIN)/python -m simulation --seeds $(SEEDS)
	PYTHONPATH=tests $(BIN)/python -m simulation --groups --seeds $(SEEDS)

# The server under requests generated from its own description.
fuzz: .venv/test.stamp
	PYTHONPATH=tests $(BIN)/python -m support.fuzz --cases $(CASES)

# Ranks killed, stopped and aborted at random moments, with the times until that is noticed and served again.
faults: .venv/test.stamp
	PYTHONPATH=tests $(BIN)/python -m support.faults --faults $(FAULTS)

lint: .venv/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml
	$(BIN)/kubernetes-validate --strict deploy/kubernetes.yaml

# The documentation site, in build/site. A warning (a broken link, a page outside the navigation) is an error.
docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

sanitize: .venv/test.stamp
	scripts/sanitize.sh

bench: .venv/run.stamp
	$(BIN)/intaglio bench

clean:
	rm -rf build dist .venv-clients* .pytest_cache .mypy_cache .ruff_cache .hypothesis .venv/*.stamp

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

.venv/ray.stamp: .venv/test.stamp
	$(INSTALL) '.[cluster]'
	touch $@

# No intaglio in these: the packages of one extra alone.
.venv-clients/stamp: EXTRA = clients
.venv-clients-llama-index/stamp: EXTRA = clients-llama-index
.venv-clients/stamp .venv-clients-llama-index/stamp: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet $$($(PYTHON) -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["$(EXTRA)"])')
	touch $@

.venv/lint.stamp: .venv/tools.stamp pyproject.toml
	$(INSTALL) '.[lint]'
	touch $@

# The site is made from sources, so nothing of the package is compiled for it.
.venv/docs.stamp: .venv/tools.stamp pyproject.toml
	$(BIN)/pip install --quiet $$($(BIN)/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@
