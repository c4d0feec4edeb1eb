SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-oldest lint clean

PYTHON ?= python3
BIN := .venv/bin
# Tests and the demo never reach for a network.
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# .venv/.made stands for a whole environment: a pip that fails half way leaves none, and the next make starts over.
.venv: .venv/.made
.PHONY: .venv

.venv/.made: pyproject.toml constraints.txt
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv
	$(BIN)/moa demo -o out/demo --overwrite

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist . > /dev/null
	$(BIN)/check-wheel-contents dist

# The lower end of the supported range of transformers, in an environment of its own.
.venv-oldest/.made: pyproject.toml constraints.txt
	rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	grep -v -E '^(transformers|huggingface_hub)==' constraints.txt > .venv-oldest/constraints.txt
	echo transformers==5.17.0 >> .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install --disable-pip-version-check -q -c .venv-oldest/constraints.txt torch==2.13.0
	.venv-oldest/bin/pip install --disable-pip-version-check -q -c .venv-oldest/constraints.txt -e '.[dev]'
	touch $@

test-oldest: .venv-oldest/.made
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest -n logical --maxprocesses 8 --dist loadfile tests/hf tests/kernels tests/profile tests/test_load.py

clean:
	rm -rf .venv .venv-oldest dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
