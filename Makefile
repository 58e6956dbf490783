# make demo: extend the embedded model's context.   make test: lint, types, tests.
PYTHON ?= python3
BIN := .venv/bin
# A wheel for the CPU comes with the pinned torch where the index offers one.
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint clean

demo: .venv/demo
	$(BIN)/longspan demo

test: .venv/test lint
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: .venv/test
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/pyright

# torch goes first and alone: asked for as somebody's dependency, pip may take a build for GPUs.
.venv/torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) torch
	touch $@

.venv/demo: .venv/torch pyproject.toml
	$(INSTALL) -e '.[all]'
	touch $@

.venv/test: .venv/torch pyproject.toml
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv
