# Nothing but Python (>= 3.10) and make is needed. PYTHON picks another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TRL_PPO = .trl-1.12
ACCELERATE = $(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml

.PHONY: help quickstart rlhf glm images test test-slow test-transformers lint format test-minimum test-trl-ppo bench rare-pool rare clean

help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/'

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

quickstart: $(VENV)/installed ## pretrain a small GPT, then match it to a target (about 4 minutes on 2 cores)
	$(ACCELERATE) recipes/quickstart/run.py --config recipes/quickstart/config.yaml $(OPTIONS)

rlhf: $(VENV)/installed ## pretraining, fine-tuning, a reward model and PPO, offline, with a table (minutes on 2 cores)
	$(ACCELERATE) recipes/rlhf/run.py --config recipes/rlhf/config.yaml $(OPTIONS)

glm: $(VENV)/installed ## pretraining, fine-tuning, a GAN and the joint objective, offline, with a table (minutes on one core)
	$(ACCELERATE) recipes/glm/run.py --config recipes/glm/config.yaml $(OPTIONS)

images: $(VENV)/installed ## a GAN on scikit-learn's digits, with metrics and a grid of samples
	$(ACCELERATE) recipes/images/run.py --config recipes/images/config.yaml $(OPTIONS)

test: $(VENV)/installed ## the test suite (10 to 15 minutes on 2 cores)
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(OPTIONS)

test-slow: $(VENV)/installed ## checks that take minutes each
	$(BIN)/python -m pytest -q -m slow $(OPTIONS)

test-transformers: $(VENV)/installed ## the tests that transformers runs on its own models (about 2 minutes)
	$(BIN)/python tests/transformers_common/transformers_sources.py
	$(BIN)/python -m pytest -q -m slow -n auto --maxprocesses 8 tests/transformers_common $(OPTIONS)

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

# TRL 1.12 was the last with PPO: it stays in a folder of its own, in front of the installed TRL for whoever asks for it.
$(TRL_PPO)/installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(TRL_PPO) trl==1.12.0
	touch $@

test-trl-ppo: $(TRL_PPO)/installed ## PPO against TRL 1.12's, and the recipe that runs it
	PYTHONPATH=$(TRL_PPO) $(BIN)/python -c "import trl.experimental.ppo.ppo_trainer"
	PYTHONPATH=$(TRL_PPO) $(BIN)/python -m pytest -q tests/test_ppo_terms.py tests/test_trl_recipe.py $(OPTIONS)

bench: $(VENV)/installed ## the trainer's step against a bare loop
	$(BIN)/python recipes/benchmarks/gdc_step.py

rare-pool: $(VENV)/installed ## 2.4 million samples of the benchmarks' base, to judge `make rare` by (an hour and more)
	$(BIN)/python recipes/benchmarks/rare.py --pool

rare: $(VENV)/installed ## a constraint that 1 of 10,000 samples of the base satisfies (10 minutes)
	OMP_NUM_THREADS=1 $(BIN)/accelerate launch --config_file recipes/accelerate/cpu_two_processes.yaml recipes/benchmarks/rare.py

clean: ## remove environments and caches, not outputs
	rm -rf .venv .venv-minimum $(TRL_PPO) build dist *.egg-info .pytest_cache .ruff_cache
