"""The recipe of hyperparameter search: a table, the best options, and going on with a study."""

import json
import runpy
from pathlib import Path

import optuna
import pytest
import tiny
import yaml
from test_pretraining import TINY

RECIPE = Path(__file__).parents[1] / "recipes" / "search"
main = runpy.run_path(str(RECIPE / "run.py"))["main"]
optuna.logging.set_verbosity(optuna.logging.ERROR)


def test_a_search_on_pretraining_goes_on_where_it_stopped(tmp_path, capsys):
    folder = tmp_path / "out"
    argv = ["--config", str(RECIPE / "config.yaml"), "--output_dir", str(folder), "--use_cpu", "--num_stories", "100"]
    argv += ["--max_steps", "2", "--model_kwargs", json.dumps(TINY), "--disable_tqdm", "true"]
    main([*argv, "--n_trials", "2"])
    first = (folder / "trials.md").read_text()
    assert first.count("\n") == 4 and "nll_per_token" in first and "lr_scheduler_type" in first
    with pytest.raises(ValueError, match="has a study: go on with it by `--resume_from_checkpoint true`"):
        main([*argv, "--n_trials", "3"])
    main([*argv, "--n_trials", "3", "--resume_from_checkpoint", "true"])
    lines = (folder / "trials.md").read_text().splitlines()
    assert len(lines) == 5 and set(first.splitlines()) <= set(lines)
    values = [float(line.split("|")[-3]) for line in lines[2:]]
    assert values == sorted(values)
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert set(best) == {"learning_rate", "per_device_train_batch_size", "lr_scheduler_type"}
    assert f"{best['learning_rate']:.4g}" in lines[2] and "saved" in capsys.readouterr().out


def test_a_search_on_gdc(tmp_path):
    tiny.model(0).float().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    argv = ["--recipe", "gdc", "--config", str(RECIPE / "gdc.yaml"), "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    argv += ["--model_name_or_path", str(tmp_path / "model"), "--max_steps", "1", "--n_trials", "2"]
    argv += ["--per_device_train_batch_size", "16", "--max_completion_length", "3", "--moment", "contains:b=0.6"]
    main([*argv, "--fit_samples", "256", "--reference_samples", "256", "--eval_samples", "64"])
    assert "| js |" in (tmp_path / "out" / "trials.md").read_text()
