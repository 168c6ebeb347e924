# Every target sets up what it needs: a virtual environment in .venv with this package and all that it uses.
.PHONY: help setup demo test test-all lint audit docs bench bench-gpu bench-search bench-analysis bench-curves bench-report bench-range-test bench-fine-tuning bench-ray bench-scale bench-store bench-many chaos constraints clean
PYTHON ?= python3
BIN := .venv/bin
# Tests start hundreds of processes; without its .pyc files each would compile the package again.
unexport PYTHONDONTWRITEBYTECODE
# One process more than the machine has cores, long groups of tests first (tests/conftest.py). Tests that share a server
# run in the same process.
# A process that crashes ends the run: in its place xdist would start one that has been seen to wait for ever.
PYTEST := $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=8 --dist=loadgroup --no-loadscope-reorder --max-worker-restart=0

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | expand -t 18

setup: .venv/installed ## install the package and its tools in .venv

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "hpo needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup ## run the first study
	$(BIN)/hpo run studies/quickstart.toml

test: setup ## run the tests to run while working: every property, in a few minutes
	$(PYTEST) -m "not slow and not cluster and not browser"

test-all: setup ## run all tests: also the slow ones, with clusters, databases and browsers
	$(PYTEST) --durations=20

lint: setup ## check style, imports, types and documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python -m scripts.reference --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@if curl --silent --max-time 5 --output /dev/null https://api.osv.dev; then $(MAKE) audit; \
	else echo "make audit was left out: api.osv.dev cannot be reached"; fi

audit: setup ## look up the packages of constraints.txt among known vulnerabilities
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --vulnerability-service osv

docs: setup ## build the documents as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: setup ## measure the start, the plain engine and the store
	$(BIN)/python -m scripts.bench.start
	$(BIN)/python -m scripts.bench.engine
	$(BIN)/python -m scripts.bench.store

bench-gpu: setup ## measure all on a GPU, in eight minutes
	$(BIN)/python -m scripts.gpu_day --out gpu_day $(GPU_DAY)

bench-search: setup ## compare the search with other tools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt 'ray[tune]>=2.40'
	$(BIN)/python -m scripts.bench.search

bench-analysis: setup ## measure how good the answers are
	$(BIN)/python -m scripts.bench.analysis

bench-curves: setup ## measure the answers on networks of others
	$(BIN)/python -m scripts.bench.curves $(CURVES)

bench-report: setup ## measure the report of a large study
	$(BIN)/python -m scripts.bench.report

bench-range-test: setup ## measure the learning-rate range test
	$(BIN)/python -m scripts.bench.range_test $(if $(CIFAR10),--cifar10 $(CIFAR10)) $(RANGE_TEST)

bench-fine-tuning: setup ## measure the best rates of fine-tuning
	$(BIN)/python -m scripts.bench.fine_tuning --cifar10 $(CIFAR10) --cifar100 $(CIFAR100) $(FINE_TUNING)

bench-ray: setup ## measure what Ray costs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt 'ray[client,default,tune]>=2.40'
	$(BIN)/python -m scripts.bench.ray_cost

bench-scale: setup ## measure many workers on one store
	$(BIN)/python -m scripts.bench.scale $(SCALE)

bench-store: setup ## measure the store under load, and its reports beside plain Optuna
	$(BIN)/python -m scripts.bench.store_rates
	$(BIN)/python -m scripts.bench.first_claims
	$(BIN)/python -m scripts.bench.store $(STORE)

bench-many: setup ## measure the commands that read, on large stores
	$(BIN)/python -m scripts.bench.many $(MANY)

chaos: setup ## run a study under faults of every kind
	$(BIN)/python -m scripts.chaos $(CHAOS)

constraints: setup ## renew constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile pyproject.toml --quiet --universal --all-extras --python-version 3.11 --no-annotate --no-header -o constraints.new
	{ grep '^#' constraints.txt; cat constraints.new; } > constraints.newer
	mv constraints.newer constraints.txt
	rm constraints.new

clean: ## remove .venv
	rm -rf .venv
