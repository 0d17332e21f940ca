# Nothing but Python (>= 3.10) and make is needed. PYTHON picks another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ACCELERATE = $(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml

.PHONY: help quickstart images test test-slow test-minimum lint format bench rare-pool rare clean

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/'

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

quickstart: $(VENV)/installed ## pretrain a small GPT, then match it to a target (about 4 minutes on 2 cores)
	$(ACCELERATE) recipes/quickstart/run.py --config recipes/quickstart/config.yaml $(OPTIONS)

images: $(VENV)/installed ## a GAN on scikit-learn's digits, with metrics and a grid of samples
	$(ACCELERATE) recipes/images/run.py --config recipes/images/config.yaml $(OPTIONS)

test: $(VENV)/installed ## the test suite (about 10 minutes on 2 cores)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile $(OPTIONS)

test-slow: $(VENV)/installed ## checks that take minutes each
	$(BIN)/python -m pytest -q -m slow $(OPTIONS)

lint: $(VENV)/installed ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed ## ruff, fixing what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-minimum: ## the tests with the oldest supported versions, in an environment of its own
	$(PYTHON) -m venv .venv-minimum
	.venv-minimum/bin/python -m pip install --quiet --upgrade pip
	.venv-minimum/bin/python -m pip install --quiet -c constraints-minimum.txt -e ".[test]"
	.venv-minimum/bin/python -m pytest -q $(OPTIONS)

bench: $(VENV)/installed ## the trainer's step against a bare loop
	$(BIN)/python recipes/benchmarks/gdc_step.py

rare-pool: $(VENV)/installed ## 2.4 million samples of the benchmarks' base, to judge `make rare` by (an hour and more)
	$(BIN)/python recipes/benchmarks/rare.py --pool

rare: $(VENV)/installed ## a constraint that 1 of 10,000 samples of the base satisfies (10 minutes)
	OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file recipes/accelerate/cpu_two_processes.yaml recipes/benchmarks/rare.py

clean: ## remove environments and caches, not outputs
	rm -rf .venv .venv-minimum build dist *.egg-info .pytest_cache .ruff_cache
