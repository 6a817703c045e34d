# Each target does its own set-up: Python 3.11 (or 3.12), pip and make are all that a machine needs.
# `make help` lists what there is; CONTRIBUTING.md says more.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# A pyenv shim named python3.11 may exist and not run, so each candidate is asked.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
VENV_EXTRAS ?= .venv-extras
# Index to take torch from; empty means pip's own. See "Choosing a torch build" in CONTRIBUTING.md.
TORCH_INDEX ?=
# PY=python runs a target in an environment that already has everything, without any set-up.
PY ?=

SIZE ?= small
CHECKPOINT ?=
ARGS ?=
# Test processes; a file's tests stay together, for what they share is expensive to make.
JOBS ?= 2
IN_PARALLEL = $(if $(filter-out 0 1,$(JOBS)),-n $(JOBS) --dist loadfile)
MINUTES ?= 240

# Caches stay inside the checkout: nothing is left in the home folder, and `make clean` finds all of it.
export TORCHINDUCTOR_CACHE_DIR ?= $(CURDIR)/.cache/inductor
export TRITON_CACHE_DIR ?= $(CURDIR)/.cache/triton
export FXFUSE_CACHE ?= $(CURDIR)/.cache/fxfuse
export PIP_DISABLE_PIP_VERSION_CHECK = 1

STAMP := $(VENV)/.installed
STAMP_OLDEST := $(VENV_OLDEST)/.installed
STAMP_EXTRAS := $(VENV_EXTRAS)/.installed
RUN := $(or $(PY),$(VENV)/bin/python)
NEEDS := $(if $(PY),,$(STAMP))

# $(call install,venv,constraints,extra): torch first and alone, so that nothing else can choose another build of it.
# Where the system's Python comes without ensurepip, pip is put into the new environment from outside.
define install
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed and none was found; name one: make $@ PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "==> [1/3] environment $(1), $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(1) >/dev/null || { $(PYTHON) -m venv --clear --without-pip $(1) && $(PYTHON) -m pip --python $(1)/bin/python install pip; }
	@echo "==> [2/3] torch (the large one: some 200 MB for a CPU build)"
	$(1)/bin/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c $(2) torch
	@echo "==> [3/3] fxfuse (editable), transformers and the tools"
	$(1)/bin/python -m pip install -c $(2) setuptools
	$(1)/bin/python -m pip install -c $(2) --no-build-isolation -e '.[$(3)]'
	@touch $(1)/.installed
endef

.PHONY: help setup demo test test-all test-nightly test-oldest test-extras test-gpu lint format typecheck docs bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  make demo SIZE=0.8b | make demo CHECKPOINT=folder | make test ARGS='-k weights' | make bench ARGS=name"

setup: $(NEEDS)  ## create the environment in .venv

$(STAMP): pyproject.toml constraints-base.txt constraints.txt
	$(call install,$(VENV),constraints.txt,dev)

$(STAMP_OLDEST): pyproject.toml constraints-base.txt constraints-oldest.txt
	$(call install,$(VENV_OLDEST),constraints-oldest.txt,dev)

$(STAMP_EXTRAS): pyproject.toml constraints-base.txt constraints.txt
	$(call install,$(VENV_EXTRAS),constraints.txt,extras)

demo: $(NEEDS)  ## run the main job end to end and judge it: SIZE=small|0.8b|2b or CHECKPOINT=folder
	$(RUN) -m fxfuse demo $(if $(CHECKPOINT),'$(CHECKPOINT)') --size $(SIZE) $(ARGS)

test: $(NEEDS)  ## the fast tests
	$(RUN) -m pytest -m "not slow" $(IN_PARALLEL) $(ARGS)

test-all: $(NEEDS)  ## every test, the slow ones too
	$(RUN) -m pytest $(IN_PARALLEL) $(ARGS)

test-nightly: $(NEEDS)  ## the property suites with large numbers; summary in docs/nightly.md (MINUTES for each suite)
	$(RUN) tests/properties/nightly.py run --jobs $(JOBS) --minutes $(MINUTES)

test-oldest: $(STAMP_OLDEST)  ## the fast tests with the oldest supported transformers, in an environment of their own
	$(VENV_OLDEST)/bin/python -m pytest -m "not slow" $(IN_PARALLEL) $(ARGS)

EXTRAS = adapters value_head trainers quantised_libraries processors

test-extras: $(STAMP_EXTRAS)  ## the tests that need third-party libraries (PEFT, TRL, bitsandbytes, ...)
	$(VENV_EXTRAS)/bin/python -m pytest $(EXTRAS:%=tests/daily/test_%.py) $(ARGS)

# Each shape that a test draws is compiled anew, so there are many processes for one device.
GPU_JOBS ?= 8

test-gpu: $(NEEDS)  ## the tests that need a CUDA device, in GPU_JOBS processes
	@$(RUN) -c "import sys, torch; torch.cuda.is_available() or sys.exit(f'make test-gpu: torch {torch.__version__} sees no CUDA device; name an environment whose torch does: make test-gpu PY=/path/to/python')"
	$(RUN) -c "import torch, triton, transformers; print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, transformers.__version__)"
	timeout --signal=INT 3600 $(RUN) -m pytest -m gpu $(if $(filter-out 0 1,$(GPU_JOBS)),-n $(GPU_JOBS) --dist load) --durations=10 $(ARGS)

lint: $(NEEDS)  ## ruff: rules and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(NEEDS)  ## let ruff rewrite what it can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

typecheck: $(NEEDS)  ## mypy
	$(RUN) -m mypy

docs: $(NEEDS)  ## write docs/api.md anew from the docstrings
	$(RUN) docs/make_api.py

bench: $(NEEDS)  ## list the benchmarks, or run one: ARGS="name and its arguments"
	$(RUN) -m fxfuse bench $(ARGS)

clean:  ## remove environments, caches and build outputs
	rm -rf $(VENV) $(VENV_OLDEST) $(VENV_EXTRAS) .cache build dist *.egg-info src/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
