# Everything runs in .venv, which the first target that needs it sets up.
VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS := constraints.txt
# Without an NVIDIA GPU torch comes as its small CPU build; TORCH_INDEX= forces the full one.
TORCH_INDEX ?= $(shell nvidia-smi -L >/dev/null 2>&1 || echo https://download.pytorch.org/whl/cpu)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Test files side by side; those that start processes take two cores and more by themselves.
WORKERS ?= 2
# Of `make torture`.
ROUNDS := 500

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test coverage torture lint clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## Install everything into .venv (VENV=; Python 3.10 to 3.12; a CPU build of torch without a GPU).

quickstart: $(READY) ## Train a small model on the text every Python carries, evaluate it and sample from it.
	$(BIN)/sedd-scale quickstart

test: $(READY) ## Run the tests.
	$(BIN)/python -m pytest -q --durations=10 -n $(WORKERS) --dist loadfile --no-loadscope-reorder

coverage: $(READY) ## Run the tests and print what of each file they ran, in all their processes.
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		--cov --cov-report=term:skip-covered

torture: $(READY) ## Kill saving processes 500 times and resume after each kill (ROUNDS=, 4 to 15 minutes).
	PYTHONPATH=. OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/checkpoint/torture.py --rounds $(ROUNDS)

lint: $(READY) ## Check style, formatting, and types under the oldest and the newest Python.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy sedd_scale
	$(BIN)/mypy --python-version 3.10 sedd_scale
	$(BIN)/mypy --python-version 3.12 sedd_scale

clean: ## Remove .venv and caches; runs and prepared data stay.
	rm -rf $(VENV) build sedd_scale.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): setup.py $(CONSTRAINTS)
	@command -v $(PYTHON) >/dev/null || \
		{ echo "error: there is no '$(PYTHON)'; name one: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 10) <= v < (3, 13) or sys.exit( \
		"error: $(PYTHON) is Python %d.%d, but 3.10, 3.11 or 3.12 is needed; " \
		"name one: make setup PYTHON=python3.12" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
# The index of CPU builds may be out of reach: one quick try with it, then pip's own settings.
ifneq ($(TORCH_INDEX),)
	$(BIN)/pip install --retries 0 --timeout 10 --extra-index-url $(TORCH_INDEX) -c $(CONSTRAINTS) torch \
		|| $(BIN)/pip install -c $(CONSTRAINTS) torch
else
	$(BIN)/pip install -c $(CONSTRAINTS) torch
endif
	$(BIN)/pip install -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@
