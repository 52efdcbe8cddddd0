# `make train` trains dense to sparse on generated data; `make test` passes all tests.
# Both first make .venv with the pinned versions of constraints.txt, once. `make test-versions`
# tests both ends of the ranges in setup.py, each in a .venv-PACKAGE-VERSION on top of it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: train test test-versions lint setup clean

setup: $(READY)

$(READY): setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev,mpi]'
	touch $@

train: $(READY)
	$(BIN)/python launch/train.py --recipe listops_small --ds_config ds_configs/zero2.json

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal

test-versions: $(READY)
	$(BIN)/python tests/versions.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(VENV)-* build dist *.egg-info
