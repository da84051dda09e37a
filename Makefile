# thaw: everything from a clean clone with Python >= 3.10, git, make and a C compiler.
# Each target makes .venv and fetches what it needs; a second run finds it there.

PYTHON ?= python3
ENGINE ?= transformers
PYTEST_ARGS ?=
# Extra flags for pip, e.g. PIP_FLAGS="--extra-index-url …" for an index with CPU builds of torch.
PIP_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTRAS := transformers,testing,dev

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install model demo test-fast test soak lint format docs clean
.DELETE_ON_ERROR:

help: ## what can be done here
	@echo "thaw: git for a running LLM"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  ENGINE=transformers|fake, THAW_MODEL=/path/to/a/model (make demo), PYTHON=python3.12, PYTEST_ARGS='-k fork -x'"

install: $(INSTALLED) ## make .venv with everything (1 to 3 minutes, once)

$(INSTALLED): pyproject.toml constraints.txt src/thaw/_version.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "thaw needs Python 3.10 or newer, $(PYTHON) is older: make PYTHON=python3.12 …"; exit 1; }
	@echo "· making .venv and installing thaw with torch (CPU) and the tools; typically 1 to 3 minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
	@echo "· installed"

model: $(INSTALLED) ## the demo's model, unless THAW_MODEL is set (98 MB to fetch, half a minute, once)
	@$(BIN)/python -m thaw.demo.model >/dev/null

ifneq ($(ENGINE),fake)
demo: model
endif
demo: $(INSTALLED) ## a real model reads a document once; four children go on in a fresh process
	@$(BIN)/thaw demo --engine $(ENGINE)

test-fast: $(INSTALLED) ## without the real model and long tests (under 2 minutes)
	@echo "· tests without the real model; under 2 minutes"
	@$(BIN)/python -m pytest -q -m "not slow and not model and not soak" $(PYTEST_ARGS)

test: $(INSTALLED) model ## everything but the soak tests (under 40 minutes)
	@echo "· all tests but the soak; under 40 minutes on 2 cores"
	@$(BIN)/python -m pytest -m "not soak" --durations=15 $(PYTEST_ARGS)

soak: $(INSTALLED) model ## everything, with the long tests; receipts go to receipts/ (hours)
	@echo "· all tests and the soak; hours, receipts in receipts/"
	@mkdir -p receipts
	@THAW_SOAK=1 THAW_RECEIPTS_DIR=$(CURDIR)/receipts \
		$(BIN)/python -m pytest -m "soak or not soak" --durations=25 $(PYTEST_ARGS)

lint: $(INSTALLED) ## ruff, mypy and the layers (under a minute)
	@echo "· ruff"
	@$(BIN)/ruff check src tests
	@echo "· mypy (half a minute the first time)"
	@$(BIN)/mypy
	@echo "· import layers"
	@$(BIN)/lint-imports

format: $(INSTALLED) ## fix what ruff can fix
	@$(BIN)/ruff check --fix src tests

docs: $(INSTALLED) ## write the generated pages and pictures of docs/ anew
	@$(BIN)/python docs/generate.py

clean: ## remove .venv and caches; the model's folder and your repositories stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
