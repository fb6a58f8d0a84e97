# Each target makes its own set-up: on a fresh machine `make demo` or `make test` is the first command.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help docs docs-serve demo examples test coverage lint format bench bench-speed dist clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.cli: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[cli]'
	@touch $@

$(VENV)/.all: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	@touch $@ $(VENV)/.cli $(VENV)/.docs

$(VENV)/.docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

$(VENV)/.examples: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[examples]'
	@touch $@ $(VENV)/.cli

docs: $(VENV)/.docs ## Build the documentation site in site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(VENV)/.docs ## Show the site at http://localhost:8000 while pages are written
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

demo: $(VENV)/.cli ## Train, calibrate, prune and compare on real digits (two minutes, no network)
	$(BIN)/tp-twoaxis demo --out demo-output --force

examples: $(VENV)/.examples ## Run every example with its defaults (five minutes, no network), in build/examples
	mkdir -p build/examples
	cd build/examples && for script in $(CURDIR)/examples/*.py; do \
	    echo "== $$script" && $(abspath $(BIN))/python $$script || exit 1; \
	done

test: $(VENV)/.all ## Run all tests and docstring examples
	$(BIN)/python -m pytest

coverage: $(VENV)/.all ## The tests with a coverage table
	$(BIN)/python -m pytest --cov

lint: $(VENV)/.all ## Check style, types and the documentation site
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/.all ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-speed: $(VENV)/.all ## What calibration, selection, repair and removal cost, as ratios (two hours)
	$(BIN)/python benchmarks/speed.py

bench: $(VENV)/.all ## README's accuracy tables, hours, resumable; needs TP_TWOAXIS_DATA and _CHECKPOINTS
	mkdir -p benchmarks/results
	for sweep in cifar10_selection cifar10_resnet20 cifar10_resnet20_finetune; do \
	    $(BIN)/tp-twoaxis bench --config benchmarks/configs/$$sweep.json --out benchmarks/results/$$sweep \
	        --workers 2 && $(BIN)/tp-twoaxis report benchmarks/results/$$sweep || exit 1; \
	done

dist: $(VENV)/bin/python ## Build the wheel and the source archive, and check them
	$(BIN)/python -m pip install --quiet build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean: ## Remove what the other targets made
	rm -rf $(VENV) build dist site *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
