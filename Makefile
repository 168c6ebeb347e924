# Every target sets up what it needs: a virtual environment in .venv with this package and all that it uses.
.PHONY: setup demo test lint bench bench-gpu bench-search bench-analysis bench-report bench-range-test bench-ray bench-scale chaos constraints clean
PYTHON ?= python3
BIN := .venv/bin

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info < (3, 14) else "hpo needs Python 3.11, 3.12 or 3.13: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/hpo run studies/quickstart.toml

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python scripts/bench/engine.py
	$(BIN)/python scripts/bench/store.py

bench-gpu: setup
	$(BIN)/python scripts/bench/lanes.py --json bench-gpu.json

bench-search: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt 'ray[tune]>=2.40'
	$(BIN)/python scripts/bench/search.py

bench-analysis: setup
	$(BIN)/python scripts/bench/analysis.py

bench-report: setup
	$(BIN)/python scripts/bench/report.py

bench-range-test: setup
	$(BIN)/python scripts/bench/range_test.py $(if $(CIFAR10),--cifar10 $(CIFAR10)) $(RANGE_TEST)

bench-ray: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt 'ray[client,default,tune]>=2.40'
	$(BIN)/python scripts/bench/ray_cost.py

bench-scale: setup
	$(BIN)/python scripts/bench/scale.py $(SCALE)

chaos: setup
	$(BIN)/python -m scripts.chaos $(CHAOS)

constraints: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile pyproject.toml --quiet --universal --all-extras --python-version 3.11 --no-annotate --no-header -o constraints.new
	{ grep '^#' constraints.txt; cat constraints.new; } > constraints.newer
	mv constraints.newer constraints.txt
	rm constraints.new

clean:
	rm -rf .venv
