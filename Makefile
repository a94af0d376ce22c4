# Two commands: `make demo` and `make test`. Everything they need goes into .venv, once.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml constraints.txt
RUNS ?= runs/demo

.PHONY: demo test test-slow test-faults lint constraints clean

demo: .venv/installed
	$(BIN)/scaling sweep experiments/mnist_dit --workdir $(RUNS) --workers 2

test: .venv/installed-test lint
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

test-slow: .venv/installed-test
	$(PIP) -e '.[tpu]'
	$(BIN)/python -m pytest -q -m slow

test-faults: .venv/installed-test
	$(BIN)/python -m tests.faults $(PART)

lint: .venv/installed-test
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

constraints:
	uv pip compile --universal --python-version 3.11 --no-header --no-annotate --quiet pyproject.toml \
	    --extra test --extra parity --extra cuda --extra tpu -o constraints.txt

clean:
	rm -rf .venv build *.egg-info

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make: needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/installed: $(INPUTS) | .venv/bin/python
	@echo "installing into .venv (a few minutes, once)"
	$(PIP) -e .
	@touch $@

.venv/installed-test: $(INPUTS) | .venv/bin/python
	@echo "installing into .venv with the test extras (a few minutes, once)"
	$(PIP) -e '.[test,parity]'
	$(PIP) --no-deps open_clip_torch==3.3.0  # its tokenizer; of what it depends on, torchvision breaks others
	@touch $@ .venv/installed
