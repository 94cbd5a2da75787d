# Two commands do everything on a fresh machine with Python 3.10+, pip and make: `make quickstart` and `make test`.
# Each sets up its own .venv first; a second call finds it there.

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help quickstart test test-slow check clean

help:
	@sed -n 's/^## //p' Makefile

## make quickstart   set up, then plan, train, evaluate, merge and prove a real model on a CPU, in minutes
quickstart: .venv/quickstart.done
	$(BIN)/python -m tools.quickstart

## make test         set up, then lint, check types and run the tests
test: check
	$(PYTEST)

## make test-slow    the proofs that take minutes
test-slow: .venv/dev.done
	$(PYTEST) -m slow

## make check        lint, format and types only
check: .venv/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/quickstart.done: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[quickstart]'
	touch $@

.venv/dev.done: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

## make clean        remove what the commands made: .venv, model, data, runs
clean:
	rm -rf .venv models data runs .cache build *.egg-info
