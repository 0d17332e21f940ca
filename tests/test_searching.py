"""Hyperparameter search by optuna: every trial is a fresh run with its options, and the trainer is left as it was."""

import optuna
import pytest
import tiny
import torch
from test_pretraining import config, options, weights

from hf_gdc import Moment, Pointwise, Reference
from hf_gdc.searching import search_space
from hf_gdc.trainers.pretraining import build_trainer

RATES = [1e-3, 1e-2]
optuna.logging.set_verbosity(optuna.logging.ERROR)


def search(trainer, **kwargs):
    """-> (the best run, the value of every trial, by its rate)."""
    storage = optuna.storages.InMemoryStorage()
    grid = optuna.samplers.GridSampler({"learning_rate": RATES}, seed=0)
    study = {"storage": storage, "study_name": "rates", "sampler": grid}
    space = search_space([f"learning_rate={RATES[0]}|{RATES[1]}"])
    best = trainer.hyperparameter_search(space, n_trials=2, **study, **kwargs)
    trials = optuna.load_study(study_name="rates", storage=storage).trials
    return best, {trial.params["learning_rate"]: trial.value for trial in trials}


def test_trials_of_pretraining_equal_fresh_runs(tmp_path):
    trainer = build_trainer(options(), config(tmp_path / "search", learning_rate=5e-3))
    start = weights(trainer.model)
    best, found = search(trainer)
    for rate in RATES:
        fresh = build_trainer(options(), config(tmp_path / str(rate), learning_rate=rate))
        fresh.train()
        assert found[rate] == fresh.evaluate()["eval_nll_per_token"]
    assert best.objective == min(found.values()) and found[best.hyperparameters["learning_rate"]] == best.objective
    assert torch.equal(weights(trainer.model), start) and trainer.args.learning_rate == 5e-3
    trainer.args.output_dir = str(tmp_path / "then")
    trainer.train()  # and it still can
    assert not torch.equal(weights(trainer.model), start)


def test_trials_of_gdc_equal_fresh_runs(tmp_path):
    def make(folder, **kwargs):
        target = Reference() * Pointwise(tiny.has_b) * Moment(tiny.count_a, 1.3)
        sizes = {"max_steps": 3, "per_device_train_batch_size": 32, "eval_samples": 64, "reference_samples": 256}
        return tiny.trainer(target, tmp_path / folder, replay_samples=8, **sizes | kwargs)

    trainer = make("search")
    start = weights(trainer.model)
    best, found = search(trainer)
    for rate in RATES:
        fresh = make(str(rate), learning_rate=rate)
        fresh.train()
        assert found[rate] == fresh.evaluate()["eval_js"]
    assert found[RATES[0]] != found[RATES[1]]
    assert best.objective == min(found.values())
    assert torch.equal(weights(trainer.model), start) and trainer.target.moments[0].lam == 0


def test_what_a_search_cannot_change_is_refused_before_any_step(tmp_path):
    trainer = tiny.trainer(Reference() * Pointwise(tiny.has_b), tmp_path / "out")
    start = weights(trainer.model)
    with pytest.raises(ValueError, match="a search on GDCTrainer has no option `divergence`"):
        trainer.hyperparameter_search(search_space(["divergence=js|kl"]), n_trials=1)
    assert torch.equal(weights(trainer.model), start) and trainer.state.global_step == 0
    with pytest.raises(ValueError, match="a search needs 'eval_bleu', and evaluate gave .*eval_js"):
        trainer.args.metric_for_best_model = "bleu"
        trainer.hyperparameter_search(n_trials=1)


def test_a_search_needs_a_folder_of_its_own(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    trainer = build_trainer(options(), config(tmp_path))
    with pytest.raises(ValueError, match="is not empty"):
        trainer.hyperparameter_search(n_trials=1)


def test_a_space_as_text():
    space = search_space(
        ["learning_rate=1e-3..1e-1 log", "adam_beta2=0.9..0.99", "muon=true|false", "warmup_steps=0|0.1"]
    )
    seen = {}

    class Trial:
        def suggest_float(self, name, low, high, log):
            seen[name] = low, high, log
            return low

        def suggest_categorical(self, name, values):
            seen[name] = values
            return values[-1]

    assert space(Trial()) == {"learning_rate": 1e-3, "adam_beta2": 0.9, "muon": False, "warmup_steps": 0.1}
    assert seen["learning_rate"] == (1e-3, 1e-1, True) and seen["adam_beta2"] == (0.9, 0.99, False)
    assert seen["muon"] == [True, False] and seen["warmup_steps"] == [0, 0.1]


@pytest.mark.parametrize(
    "spec", ["learning_rate", "learning_rate=", "x=2..1", "x=1..2 lgo", "x=-1..2 log", "x=a..b", "=1|2"]
)
def test_a_space_that_cannot_be_read(spec):
    with pytest.raises(ValueError, match="can't read .*spell a range"):
        search_space([spec])
