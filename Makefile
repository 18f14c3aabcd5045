# `make demo` and `make test` set everything up by themselves; `make help` lists the rest.
#   PYTHON=python3.12   interpreter for the environment (default: the first one found that is new enough)
#   VENV=dir            where the environment lives
#   ARGS="-k ring -x"   more arguments for pytest
#   WORKERS=1           processes that run tests side by side (default: one a core; a file stays on one of them)

VENV ?= .venv
PYTHON ?=
ARGS ?=
WORKERS ?= logical
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3 python3.13 python3.12 python3.11)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test fast gpu lint format types check clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(INSTALLED) ## Create the environment and install cpbench in it, editable, with its developer tools

# The stamp is written last, so an interrupted installation is repeated; a change of the dependencies repeats it too.
$(INSTALLED): pyproject.toml
	@found=; for python in $(CANDIDATES); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then found="$$python"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "cpbench needs Python 3.11 or newer; none of these is: $(CANDIDATES)." >&2; \
	  echo "Install one, or name one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; \
	fi; \
	if [ ! -x $(BIN)/python ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  echo "creating $(VENV) with $$("$$found" --version)"; \
	  clear=; if [ -f $(VENV)/pyvenv.cfg ]; then clear=--clear; fi; \
	  "$$found" -m venv $$clear $(VENV) || { \
	    echo "$$found cannot create an environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	fi
	@echo "installing cpbench and its packages in $(VENV) (a few minutes the first time)"
	$(BIN)/python -m pip install -e ".[dev]"
	@touch $@

demo: $(INSTALLED) ## Run the smoke scenario on CPU processes and make its report
	@resume=; if [ -f runs/demo/run.json ]; then resume=--resume; fi; \
	code=0; $(BIN)/cpbench sweep --scenario smoke --name demo $$resume || code=$$?; \
	if [ $$code -eq 2 ] && [ -n "$$resume" ]; then echo "To start the demo afresh: rm -r runs/demo && make demo" >&2; fi; \
	if [ $$code -ne 0 ] && [ $$code -ne 3 ]; then exit $$code; fi; \
	$(BIN)/cpbench report runs/demo --out demo-report || exit $$?; \
	echo; \
	echo "Open the page in a browser; it needs no network. To run everything again: rm -r runs/demo && make demo"; \
	exit $$code

test: $(INSTALLED) ## Run every test (browser tests need Chromium, gpu tests a CUDA device; else they are skipped)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

fast: $(INSTALLED) ## Run the tests that take no more than seconds
	$(BIN)/python -m pytest -q -m "not slow and not browser and not gpu" $(ARGS)

gpu: $(INSTALLED) ## Kernels, methods and estimate on one GPU in under 9 minutes (ARGS="--skip verify" and the like)
	$(BIN)/python -m cpbench.gpu_checks $(ARGS)

lint: $(INSTALLED) ## Check style, formatting and spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

format: $(INSTALLED) ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED) ## Check types
	$(BIN)/mypy

check: lint types test ## Everything that must pass before a change is merged

clean: ## Remove the environment, caches and what the demo made
	@if [ -f $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist demo-report runs/demo
