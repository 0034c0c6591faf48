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
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_HERE := $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m))

# More threads than cores only costs time, and a busy machine is measured wrongly.
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 1)
export PYTHONUTF8 := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup setup-vllm demo demo-vllm test test-vllm skip-vllm bench-vllm bench-lmcache lint tests tests-model bench wheel audit clean

help:
	@echo "make setup   create $(VENV) with kvkeep and what demo and tests need"
	@echo "make demo    a real model, a long document: cold, from memory, after a restart"
	@echo "make test    lint, types and all tests, those with a real model too"
	@echo "make demo-vllm   a real vLLM server, asked before and after a restart; JSON=1: one line of JSON"
	@echo "make test-vllm   the tests on real vLLM (in $(VLLM_VENV)); make test runs them too"
	@echo "make bench-vllm  the figures of docs/engines/vllm.md; make bench-lmcache: with LMCache in the same table"
	@echo "make bench   the figures of docs/benchmarks.md"
	@echo "make wheel   build dist/*.whl"
	@echo "make audit   is what is installed what was pinned, unchanged, and without known vulnerabilities?"
	@echo "make clean   remove what these make, $(VENV) included"

setup: $(STAMP)

$(STAMP): pyproject.toml $(LOCK) requirements/venv.sh requirements/servers.sh
	bash requirements/venv.sh "$(PYTHON)" "$(VENV)" "$(LOCK)"
	bash requirements/servers.sh
	@touch $@

demo: setup
	$(BIN)/kvkeep demo $(ARGS)

test: lint tests tests-model $(if $(VLLM_HERE),test-vllm,skip-vllm)

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
	@bash requirements/venv-vllm.sh "$(PYTHON)" "$(VLLM_VENV)" "$(VLLM_LOCK)" >&2
	@touch $@

# JSON=1: one line of JSON on standard output, and nothing else there.
demo-vllm: setup-vllm
	@$(VLLM_BIN)/kvkeep demo-vllm $(if $(JSON),--json) $(ARGS)

test-vllm: setup-vllm
	$(VLLM_BIN)/python -m pytest tests/vllm --timeout 600 $(ARGS)

skip-vllm:
	@echo "make test-vllm is skipped: vLLM's CPU package is used on Linux x86-64 only, and this is $$(uname -s) $$(uname -m)"

bench-vllm: setup-vllm
	$(VLLM_BIN)/python -m bench.vllm $(ARGS)

# LMCache gets an environment of its own, and joins the same table.
bench-lmcache: setup-vllm
	bash requirements/venv-lmcache.sh "$(PYTHON)" .venv-lmcache "$(VLLM_VENV)"
	$(VLLM_BIN)/python -m bench.vllm --lmcache .venv-lmcache $(ARGS)

wheel: setup
	$(BIN)/python -m build --wheel --outdir dist .

audit: setup
	@test -x .venv-audit/bin/pip-audit || { $(BIN)/python -m venv .venv-audit && \
		.venv-audit/bin/python -m pip install --quiet -c $(LOCK) pip-audit; } || echo "pip-audit cannot be installed here"
	$(BIN)/python requirements/audit.py $(LOCK) .venv-audit/bin/pip-audit $(ARGS)

clean:
	rm -rf $(VENV) .venv-audit $(VLLM_VENV) .venv-lmcache dist build demo-out quality-out bench-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
