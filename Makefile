# Two commands do everything on a fresh machine with Python: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test setup lint types tests slow clean

help:
	@echo "make demo    set up, export the demo checkpoint, verify it, decode, print the speed table"
	@echo "make test    set up, then lint, types and tests"
	@echo "make setup   fill $(VENV) with the pinned versions of constraints.txt"
	@echo "make slow    the tests that take minutes"

demo: setup
	$(BIN)/cllm-export demo

test: lint types tests

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		"setuptools" --editable ".[cpu,train,evaluate,dev]"
	touch $(READY)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

tests: setup
	$(BIN)/python -m pytest -m "not slow and not gpu and not tensorrt"

slow: setup
	$(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) demo-bundle build *.egg-info
