# thaw: everything from a clean clone with Python >= 3.10, git, make and a C compiler.
# Each target makes .venv and fetches what it needs; a second run finds it there.

PYTHON ?= python3
ENGINE ?= transformers
PYTEST_ARGS ?=
# Processes that share the tests, a core for each.
JOBS ?= 2
# Extra flags for pip, e.g. PIP_FLAGS="--extra-index-url …" for an index with CPU builds of torch.
PIP_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTRAS := transformers,vllm,trl,s3,server,ray,langgraph,testing,dev

# Engines whose requirements conflict get an environment each. vLLM on CPU: one release for `make test` and the demo, the
# others, the oldest that thaw supports first, for `make soak`. constraints-vllm.txt says why the recipe is what it is.
VLLM := 0.32
VLLM_OTHERS := 0.26 0.29
VLLM_VENV := .venv-vllm
VLLM_TESTS := tests/engines/on_vllm
VLLM_MORE := tests/weights/on_vllm tests/remote/on_vllm tests/with_ray/on_vllm
VLLM_WHOLE := tests/snapshot/on_vllm

# SGLang on CPU, likewise. constraints-sglang.txt says why the recipe is what it is.
SGLANG := 0.5.23
SGLANG_OTHERS := 0.5.22
SGLANG_VENV := .venv-sglang
SGLANG_TESTS := tests/engines/on_sglang
SGLANG_MORE := tests/weights/on_sglang tests/remote/on_sglang
SGLANG_WHOLE := tests/snapshot/on_sglang

CODE := src tests benchmarks examples docs/generate.py

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install model azurite demo test-fast test soak bench-gpu lint format docs clean
.PHONY: $(VLLM_VENV) $(VLLM_OTHERS:%=$(VLLM_VENV)-%) test-vllm soak-vllm $(VLLM_OTHERS:%=soak-vllm-%)
.PHONY: $(SGLANG_VENV) $(SGLANG_OTHERS:%=$(SGLANG_VENV)-%) test-sglang soak-sglang $(SGLANG_OTHERS:%=soak-sglang-%)
.DELETE_ON_ERROR:
.SECONDARY:

help: ## what can be done here
	@echo "thaw: git for a running LLM"
	@echo
	@awk -F ':.*## ' '/^[.a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  ENGINE=transformers|fake|vllm|sglang, THAW_MODEL=/path/to/a/model (make demo), PYTHON=python3.12, PYTEST_ARGS='-k fork -x'"

install: $(INSTALLED) ## make .venv with everything (1 to 3 minutes, once)

$(INSTALLED): pyproject.toml constraints.txt src/thaw/_version.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "thaw needs Python 3.10 or newer, $(PYTHON) is older: make PYTHON=python3.12 …"; exit 1; }
	@echo "· making .venv and installing thaw with torch and the tools; typically 1 to 3 minutes, once"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
	@echo "· installed"

.venv-vllm: $(VLLM_VENV)/.installed ## the environment with vLLM on CPU (3 GB, 3 to 6 minutes, once); .venv-vllm-0.26, -0.29

$(VLLM_VENV)/.installed: constraints-vllm-$(VLLM).txt
	$(call install-vllm,$(VLLM),$(VLLM_VENV))

$(VLLM_OTHERS:%=$(VLLM_VENV)-%): %: %/.installed

$(VLLM_VENV)-%/.installed: constraints-vllm-%.txt
	$(call install-vllm,$*,$(VLLM_VENV)-$*)

$(VLLM_VENV)/.installed $(VLLM_OTHERS:%=$(VLLM_VENV)-%/.installed): constraints-vllm.txt pyproject.toml src/thaw/_version.py

# $(1) is the release, $(2) the folder. One that was left unfinished is made again.
define install-vllm
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "vLLM $(1) needs Python 3.11 or newer, $(PYTHON) is older: make PYTHON=python3.12 …"; exit 1; }
@echo "· making $(2) with vLLM $(1) for the CPU; typically 3 to 6 minutes, once"
@$(2)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(2)
@$(2)/bin/python -m pip install --quiet $(PIP_FLAGS) -c constraints-vllm.txt $$(grep '^torch==' constraints-vllm-$(1).txt)
@$(2)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps -r constraints-vllm-$(1).txt
@$(2)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps -e .
@touch $(2)/.installed
@echo "· installed"
endef

# What vLLM 0.32 imports to look at a multimodal class, beside its environment: there is no build for its CPU torch, so
# only the Python part of this one is used. The tests on vLLM put it on their path.
TORCHVISION := 0.28.0
VISION := .vision

$(VISION)/.installed: $(VLLM_VENV)/.installed tools/sglang-cpu/thaw_sglang_cpu.py
	@echo "· fetching torchvision $(TORCHVISION) for the tests of multimodal classes on vLLM; seconds, once"
	@rm -rf $(VISION)
	@$(VLLM_VENV)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps --target $(VISION) torchvision==$(TORCHVISION)
	@cp tools/sglang-cpu/thaw_sglang_cpu.py $(VISION)
	@{ echo 'import thaw_sglang_cpu'; cat $(VISION)/torchvision/__init__.py; } > $(VISION)/whole.py
	@mv $(VISION)/whole.py $(VISION)/torchvision/__init__.py
	@touch $@

.venv-sglang: $(SGLANG_VENV)/.installed ## the environment with SGLang on CPU (3 GB, 2 to 5 minutes, once); .venv-sglang-0.5.22

$(SGLANG_VENV)/.installed: constraints-sglang-$(SGLANG).txt
	$(call install-sglang,$(SGLANG),$(SGLANG_VENV))

$(SGLANG_OTHERS:%=$(SGLANG_VENV)-%): %: %/.installed

$(SGLANG_VENV)-%/.installed: constraints-sglang-%.txt
	$(call install-sglang,$*,$(SGLANG_VENV)-$*)

$(SGLANG_VENV)/.installed $(SGLANG_OTHERS:%=$(SGLANG_VENV)-%/.installed): constraints-sglang.txt pyproject.toml \
	src/thaw/_version.py tools/sglang-cpu/thaw_sglang_cpu.py tools/sglang-cpu/sgl_kernel/__init__.py

# $(1) is the release, $(2) the folder.
define install-sglang
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "SGLang $(1) needs Python 3.11 or newer here, $(PYTHON) is older: make PYTHON=python3.12 …"; exit 1; }
@echo "· making $(2) with SGLang $(1) for the CPU; typically 2 to 5 minutes, once"
@$(2)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(2)
@$(2)/bin/python -m pip install --quiet $(PIP_FLAGS) $$(grep '^torch==' constraints-sglang.txt)
@$(2)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps -r constraints-sglang-$(1).txt
@$(2)/bin/python -m pip install --quiet $(PIP_FLAGS) --no-deps -e .
@site=$$($(2)/bin/python -c 'import site; print(site.getsitepackages()[0])') && \
	cp -r tools/sglang-cpu/thaw_sglang_cpu.py tools/sglang-cpu/sgl_kernel $$site/ && \
	echo 'import thaw_sglang_cpu' > $$site/thaw_sglang_cpu.pth
@touch $(2)/.installed
@echo "· installed"
endef

model: $(INSTALLED) ## the demo's model, unless THAW_MODEL is set (98 MB to fetch, half a minute, once)
	@$(BIN)/python -m thaw.demo.model >/dev/null

AZURITE := 3.35.0
azurite: ## Azure's emulator in .azurite, which the tests of az:// need (npm; 15 seconds, once)
	@npm install --silent --no-audit --no-fund --prefix .azurite azurite@$(AZURITE)
	@echo "· installed"

ifeq ($(ENGINE),vllm)
DEMO_BIN := $(VLLM_VENV)/bin
demo: $(VLLM_VENV)/.installed
else ifeq ($(ENGINE),sglang)
DEMO_BIN := $(SGLANG_VENV)/bin
demo: $(SGLANG_VENV)/.installed
else
DEMO_BIN := $(BIN)
demo: $(INSTALLED)
endif
demo: ## a real model reads a document once; four children go on in a fresh process
	@test $(ENGINE) = fake || $(DEMO_BIN)/python -m thaw.demo.model >/dev/null
	@$(DEMO_BIN)/thaw demo --engine $(ENGINE)

test-fast: $(INSTALLED) ## without the real model and long tests (under 2 minutes)
	@echo "· tests without the real model; under 2 minutes"
	@$(ONE_CORE) $(BIN)/python -m pytest -q -n $(JOBS) --dist loadscope -m "not slow and not model and not soak" $(PYTEST_ARGS)

test: $(INSTALLED) model ## everything but the soak tests, on every engine (about 35 minutes, installs apart)
	@echo "· all tests but the soak; about 35 minutes on 2 quiet cores: thaw's own 15, vLLM's 15, SGLang's 6"
	@$(ONE_CORE) $(BIN)/python -m pytest -n $(JOBS) --dist loadscope $(SUITE) $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory test-vllm test-sglang

# Processes side by side compute on a core each. Laws about an engine on several cores (all_cores) have the machine alone.
ONE_CORE := OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind
SUITE := -m "not soak and not all_cores" --durations=10
ALL_CORES := -m "all_cores and not soak"
BY_FILE := -n $(JOBS) --dist loadfile --no-loadscope-reorder $(SUITE)

test-sglang: $(SGLANG_VENV)/.installed model ## the tests on real SGLang alone
	@echo "· tests on SGLang $(SGLANG)"
	@$(ONE_CORE) $(SGLANG_VENV)/bin/python -m pytest $(BY_FILE) $(SGLANG_TESTS) $(SGLANG_MORE) $(PYTEST_ARGS)

test-vllm: $(VLLM_VENV)/.installed $(VISION)/.installed model ## the tests on real vLLM alone
	@echo "· tests on vLLM $(VLLM)"
	@$(ONE_CORE) $(VLLM_VENV)/bin/python -m pytest $(BY_FILE) $(VLLM_TESTS) $(VLLM_MORE) $(PYTEST_ARGS)
	@$(VLLM_VENV)/bin/python -m pytest $(ALL_CORES) $(VLLM_TESTS) $(PYTEST_ARGS) || \
		test $$? -eq 5 -a -n "$(PYTEST_ARGS)"

soak: $(INSTALLED) $(VLLM_VENV)/.installed $(SGLANG_VENV)/.installed model ## everything, with the long tests and the other releases of vLLM and SGLang; receipts in receipts/soak (hours)
	@echo "· all tests and the soak; hours, receipts in receipts/soak"
	@mkdir -p receipts/soak
	@THAW_SOAK=1 THAW_RECEIPTS_DIR=$(CURDIR)/receipts/soak \
		$(BIN)/python -m pytest -m "soak or not soak" --durations=25 $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory soak-vllm $(VLLM_OTHERS:%=soak-vllm-%) soak-sglang $(SGLANG_OTHERS:%=soak-sglang-%)

# The soak on the release of `make test`, its engines booted cold, and the tests of `make test` on the others.
soak-sglang: $(SGLANG_VENV)/.installed model
	@echo "· tests and soak on SGLang $(SGLANG)"
	@THAW_SOAK=1 THAW_COLD_BOOTS=1 THAW_RECEIPTS_DIR=$(CURDIR)/receipts/soak \
		$(SGLANG_VENV)/bin/python -m pytest -m "soak or not soak" --durations=25 $(SGLANG_TESTS) $(SGLANG_MORE) $(SGLANG_WHOLE) $(PYTEST_ARGS)

$(SGLANG_OTHERS:%=soak-sglang-%): soak-sglang-%: $(SGLANG_VENV)-%/.installed model
	@echo "· tests on SGLang $*"
	@THAW_SUITE=sglang-$* THAW_RECEIPTS_DIR=$(CURDIR)/receipts/soak \
		$(ONE_CORE) $(SGLANG_VENV)-$*/bin/python -m pytest $(BY_FILE) $(SGLANG_TESTS) $(PYTEST_ARGS)

soak-vllm: $(VLLM_VENV)/.installed $(VISION)/.installed model
	@echo "· tests and soak on vLLM $(VLLM)"
	@THAW_SOAK=1 THAW_COLD_BOOTS=1 THAW_RECEIPTS_DIR=$(CURDIR)/receipts/soak \
		$(VLLM_VENV)/bin/python -m pytest -m "soak or not soak" --durations=25 $(VLLM_TESTS) $(VLLM_MORE) $(VLLM_WHOLE) $(PYTEST_ARGS)

$(VLLM_OTHERS:%=soak-vllm-%): soak-vllm-%: $(VLLM_VENV)-%/.installed model
	@echo "· tests on vLLM $*"
	@$(VLLM_VENV)-$*/bin/python -m pytest $(ALL_CORES) $(VLLM_TESTS)
	@THAW_SUITE=vllm-$* THAW_RECEIPTS_DIR=$(CURDIR)/receipts/soak \
		$(ONE_CORE) $(VLLM_VENV)-$*/bin/python -m pytest $(BY_FILE) $(VLLM_TESTS) $(PYTEST_ARGS)

# PARTS: some of pressure, hydrate, fork, dma, first, gap, idle; a run that was cut off keeps what it has, boots of idle go on.
# On a host with an NVIDIA GPU of 80 GB and vLLM for CUDA, both with GPU_PYTHON; 16 GB in GPU_MODEL, as much again in GPU_OUT.
GPU_PYTHON ?= python3
GPU_MODEL ?= /dev/shm/thaw-8b
GPU_OUT ?= /dev/shm/thaw-gpu
PARTS ?= pressure,hydrate,fork
bench-gpu: ## on a host with an H100 or H200 and vLLM: GPU_PYTHON=, GPU_MODEL=, GPU_OUT=, PARTS=, CHILDREN=, ROUNDS=, READERS= (10 minutes)
	@test -e $(GPU_MODEL)/config.json || PYTHONPATH=src $(GPU_PYTHON) benchmarks/gpu/make_model.py $(GPU_MODEL)
	@PYTHONPATH=src $(GPU_PYTHON) benchmarks/gpu/bench.py $(GPU_MODEL) $(GPU_OUT) $(PARTS) \
	  $(if $(CHILDREN),--children $(CHILDREN)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(READERS),--readers $(READERS))

lint: $(INSTALLED) ## ruff, mypy, the layers, the receipts of the soak (under a minute)
	@echo "· ruff"
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/ruff format --check --quiet $(CODE) || { echo "make format writes them as they should be"; exit 1; }
	@echo "· mypy (half a minute the first time)"
	@$(BIN)/mypy
	@echo "· import layers"
	@$(BIN)/lint-imports
	@echo "· receipts of the soak"
	@$(BIN)/python tests/soak_receipts.py

format: $(INSTALLED) ## fix what ruff can fix, and write code as ruff does
	@$(BIN)/ruff check --fix $(CODE)
	@$(BIN)/ruff format $(CODE)

docs: $(INSTALLED) ## rewrite the generated pages and pictures of docs/
	@$(BIN)/python docs/generate.py

clean: ## remove the environments and caches; the model's folder and your repositories stay
	rm -rf $(VENV) .azurite $(VISION) $(VLLM_VENV) $(VLLM_OTHERS:%=$(VLLM_VENV)-%) $(SGLANG_VENV) $(SGLANG_OTHERS:%=$(SGLANG_VENV)-%) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
