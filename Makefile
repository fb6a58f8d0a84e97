# Each target makes its own set-up: on a fresh machine `make demo` or `make test` is the first command.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CIFAR ?= $(TP_TWOAXIS_DATA)/cifar10
CHECKPOINTS ?= $(TP_TWOAXIS_CHECKPOINTS)

.DEFAULT_GOAL := help
.PHONY: help demo test coverage lint format bench bench-speed bench-cifar dist clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.cli: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[cli]'
	@touch $@

$(VENV)/.all: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[all]'
	@touch $@ $(VENV)/.cli

demo: $(VENV)/.cli ## Train, calibrate, prune and compare on real digits (two minutes, no network)
	$(BIN)/tp-twoaxis demo --out demo-output --force

test: $(VENV)/.all ## Run all tests and docstring examples
	$(BIN)/python -m pytest

coverage: $(VENV)/.all ## The tests with a coverage table
	$(BIN)/python -m pytest --cov

lint: $(VENV)/.all ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.all ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-speed: $(VENV)/.all ## Calibration's cost against plain forward and forward + backward passes
	$(BIN)/python benchmarks/calibration_speed.py

bench-cifar: $(VENV)/.all ## README's accuracy table; needs CIFAR=... and CHECKPOINTS=...
	$(BIN)/python benchmarks/cifar_resnet20.py --data $(CIFAR) --checkpoints $(CHECKPOINTS)

bench: $(VENV)/.all ## All criteria on CIFAR-10 ResNet-20, hours, resumable; needs TP_TWOAXIS_DATA and _CHECKPOINTS
	mkdir -p benchmarks/results
	$(BIN)/tp-twoaxis bench --config benchmarks/configs/cifar10_resnet20.json \
	    --out benchmarks/results/cifar10_resnet20 --workers 2
	$(BIN)/tp-twoaxis report benchmarks/results/cifar10_resnet20

dist: $(VENV)/.all ## Build the wheel and the source archive
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build

clean: ## Remove what the other targets made
	rm -rf $(VENV) build dist *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
