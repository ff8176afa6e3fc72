# Set-up is two commands on a machine with Python >= 3.10, pip and make: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests run in this many processes, each with one thread.
JOBS ?= 2
SOURCES := src tests docs/site examples run_exp.py eval_gsm8k.py recipes $(wildcard benchmarks)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-versions fuzz lint bench docs links clean

help:
	@echo "make demo      environment, model, the main job: fine-tune a small model on word problems"
	@echo "make test      environment if needed, then all tests but the slow ones"
	@echo "make test-all  the slow tests too"
	@echo "make test-versions  a built wheel with the lowest and the newest versions, in fresh environments: gigabytes"
	@echo "make fuzz      100,000 adapter files, 20,000 configs and run directories, 1,000 command lines, all odd: hours"
	@echo "make lint      ruff and mypy --strict"
	@echo "make docs      the documentation as a site, in build/docs/html"
	@echo "make links     asks for every external link of the documentation: needs a network"
	@echo "make bench     every benchmark, one after another"
	@echo "make clean     remove the environment and the caches; runs/ stays"

demo: $(VENV)/.runtime
	$(BIN)/lorafa train

# Compiled files are kept, whatever the caller has set: tests start some 200 processes.
test test-all: export PYTHONDONTWRITEBYTECODE =

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -x -n $(JOBS) -m "not slow"

test-all: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS)

# VERSIONS=lowest takes one of them. Each needs its own Python, and takes about 6 GB of disk while it is tried.
test-versions: $(VENV)/.dev
	$(BIN)/python tests/versions/try_versions.py $(VERSIONS)

# LORAFA_FUZZ=0.1 takes a tenth of them; LORAFA_SEED takes those of a seed that was printed again.
fuzz: $(VENV)/.dev
	LORAFA_FUZZ=$${LORAFA_FUZZ:-1} OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -n 0 -k many tests/faults/test_fuzzed_*.py

lint: $(VENV)/.dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

# Not in parallel: they measure time.
bench: $(VENV)/.dev
	@set -e; for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file; done

# Where Python comes without ensurepip, its pip installs into the new environment from outside.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "lorafa needs Python >= 3.10; $(PYTHON) is older. Name another one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || \
	    { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }

$(VENV)/.runtime: requirements.lock pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -r requirements.lock
	$(BIN)/python -m pip install --no-deps -e .
	touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.runtime
	$(BIN)/python -m pip install -r requirements-dev.lock
	touch $@

docs: $(VENV)/.dev
	$(BIN)/python docs/site/make_site.py

links: $(VENV)/.dev
	$(BIN)/python docs/site/make_site.py links

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
