# `make demo` and `make test` set everything up in .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint clean

demo: $(STAMP) ## the quickstart: SFT, reward model, PPO, in minutes on a CPU
	$(BIN)/rlhf pipeline

test: $(STAMP) $(VENV)/.kernels ## lint, types, tests
	$(BIN)/ruff check rlhf tests experiments docs
	$(BIN)/ruff format --check rlhf tests experiments docs
	$(BIN)/mypy
	$(BIN)/pytest

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

$(VENV)/.kernels: $(STAMP) ## Triton, whose interpreter runs the GPU kernels on a CPU; builds of torch for GPUs bring their own
	$(BIN)/pip install --quiet -c constraints.txt -e '.[kernels]'
	touch $(VENV)/.kernels

clean: ## removes the virtual environment and what tools left
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
