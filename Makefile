# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv first.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-fast soak lint types install wheel clean cluster-up cluster-down cluster-status

help:
	@echo "make demo       the whole study on real images, in minutes, on this machine"
	@echo "make test       lint, types and all tests"
	@echo "make test-fast  lint, types and the quick tests"
	@echo "make soak       random faults in a pool of workers for 20 minutes (MINUTES=, SEED=)"
	@echo "make install    .venv alone"
	@echo "make cluster-up a Slurm of four hosts on this machine, as root; cluster-down, cluster-status"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/maehpc run pipeline --recipe pipeline/demo --name demo --datasets 'digits,retinamnist?,breastmnist?'

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

test: lint types
	$(BIN)/pytest

test-fast: lint types
	$(BIN)/pytest -m "not slow"

MINUTES ?= 20
soak: $(INSTALLED)
	$(BIN)/python tests/soak/soak.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

wheel: $(INSTALLED)
	$(BIN)/python -m build --wheel

clean:
	rm -rf dist build .mypy_cache .pytest_cache .ruff_cache

# See cluster/mini/README.md. Needs root and Debian's Slurm, and nothing of .venv.
cluster-up:
	$(PYTHON) cluster/mini/mini.py start

cluster-down:
	$(PYTHON) cluster/mini/mini.py stop

cluster-status:
	$(PYTHON) cluster/mini/mini.py status
