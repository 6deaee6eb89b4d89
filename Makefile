# Two commands do everything on a bare machine with Python 3.11+ and gcc: `make quickstart` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
export PATH := $(abspath $(BIN)):$(PATH)
export TORCH_EXTENSIONS_DIR := $(abspath $(VENV))/torch_extensions

.PHONY: setup quickstart test lint clean

setup: $(STAMP)

# DeepSpeed's small CPU communication op is compiled here, once, instead of at the start of the first run.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1); set PYTHON=..."; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv module (on Debian: apt-get install python3-venv)"; exit 2; }
	@command -v gcc >/dev/null && command -v g++ >/dev/null || \
	  { echo "error: gcc and g++ are needed to build DeepSpeed's CPU op (on Debian: apt-get install g++)"; exit 2; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "error: Python.h is missing (on Debian: apt-get install python3-dev)"; exit 2; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch setuptools wheel ninja packaging py-cpuinfo psutil
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev]'
	DS_ACCELERATOR=cpu $(BIN)/python -c 'from deepspeed.accelerator import get_accelerator; \
	  get_accelerator().create_op_builder("ShareMemCommBuilder").load()' >$(VENV)/ops.log 2>&1 || \
	  { cat $(VENV)/ops.log; echo "error: DeepSpeed's CPU communication op did not compile"; exit 2; }
	touch $@

quickstart: $(STAMP)
	$(BIN)/python launchers/quickstart.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests/unit
	$(BIN)/python -m pytest -q tests/distributed tests/e2e tests/slurm

clean:
	rm -rf $(VENV) quickstart
