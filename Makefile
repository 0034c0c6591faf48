# kvkeep: `make demo` shows it, `make test` checks it. Both make .venv first (see setup). PYTHON chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.kvkeep-setup
LOCK := requirements/lock.txt

# vLLM's environment is one of its own: it wants an older Transformers. See docs/engines/vllm.md.
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.kvkeep-setup
VLLM_LOCK := requirements/lock-vllm.txt

# More threads than cores only costs time, and a busy machine is measured wrongly.
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 1)
export PYTHONUTF8 := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup setup-vllm demo test lint tests tests-model bench wheel clean

help:
	@echo "make setup   create $(VENV) with kvkeep and what demo and tests need"
	@echo "make demo    a real model, a long document: cold, from memory, after a restart"
	@echo "make test    lint, types and all tests, those with a real model too"
	@echo "make bench   the figures of docs/benchmarks.md"
	@echo "make wheel   build dist/*.whl"
	@echo "make clean   remove what these make, $(VENV) included"

setup: $(STAMP)

$(STAMP): pyproject.toml $(LOCK) requirements/venv.sh requirements/servers.sh
	bash requirements/venv.sh "$(PYTHON)" "$(VENV)" "$(LOCK)"
	bash requirements/servers.sh
	@touch $@

demo: setup
	$(BIN)/kvkeep demo $(ARGS)

test: lint tests tests-model

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tests: setup
	$(BIN)/python -m pytest -m "not model" $(ARGS)

tests-model: setup
	$(BIN)/python -m pytest -m model --timeout 600 $(ARGS)

bench: setup
	$(BIN)/python -m bench $(ARGS)

setup-vllm: $(VLLM_STAMP)

$(VLLM_STAMP): pyproject.toml $(VLLM_LOCK) requirements/venv-vllm.sh
	bash requirements/venv-vllm.sh "$(PYTHON)" "$(VLLM_VENV)" "$(VLLM_LOCK)"
	@touch $@

wheel: setup
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf $(VENV) dist build demo-out bench-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
