"""Search for options of pretraining or of GDC with optuna.

    accelerate launch recipes/search/run.py --config recipes/search/config.yaml
    accelerate launch recipes/search/run.py --recipe gdc --config recipes/search/gdc.yaml --model_name_or_path MODEL

`--space` says what may change: `learning_rate=1e-3..3e-2 log`, `adam_beta2=0.9..0.99`, `per_device_train_batch_size=16|32`. All
other options are those of the recipe. Every trial starts from the same weights, and its value is what `evaluate` gives at its
end. The study is a file, OUTPUT_DIR/study.db: the same command with `--resume_from_checkpoint true` goes on with it. The table
of trials goes to OUTPUT_DIR/trials.md, the best options to OUTPUT_DIR/best.yaml.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import optuna
import yaml
from accelerate import PartialState
from transformers import Trainer

from hf_gdc import GDCConfig, GDCTrainer
from hf_gdc.cli import PromptArguments, TargetArguments, build_target, name_model, parse_options, resume_option
from hf_gdc.loading import adapter_config
from hf_gdc.searching import search_space
from hf_gdc.trainers.pretraining import PretrainArguments, PretrainConfig, build_trainer
from hf_gdc.trl_compat import ModelConfig


@dataclass
class SearchArguments:
    """What may change, and how often."""

    space: list[str] = field(metadata={"help": "'learning_rate=1e-3..3e-2 log' 'per_device_train_batch_size=16|32'"})
    n_trials: int = field(default=10, metadata={"help": "Trials in all, those of an earlier run included."})
    search_seed: int = field(default=0, metadata={"help": "Of optuna's sampler."})


def pretraining(argv: list[str]) -> tuple[SearchArguments, Trainer]:
    search, options, args = parse_options(SearchArguments, PretrainArguments, PretrainConfig, argv=argv)
    return search, build_trainer(options, args)


def control(argv: list[str]) -> tuple[SearchArguments, Trainer]:
    kinds = (SearchArguments, PromptArguments, ModelConfig, TargetArguments, GDCConfig)
    search, prompts, model, factors, args = parse_options(*kinds, argv=argv)
    name = name_model(model, prompts.trust_remote_code, args)
    peft_config = adapter_config(model)
    return search, GDCTrainer(
        name, build_target(factors), args=args, train_dataset=prompts.dataset(), peft_config=peft_config
    )


RECIPES: dict[str, Callable] = {"pretrain": pretraining, "gdc": control}


def table(study: optuna.Study, metric: str) -> str:
    """The trials, best first, in Markdown."""
    done = sorted(study.get_trials(states=[optuna.trial.TrialState.COMPLETE]), key=lambda trial: trial.value)
    names = list(done[0].params)

    def line(cells) -> str:
        return "| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"

    rows = [[t.number, *t.params.values(), t.value, t.duration.total_seconds()] for t in done]
    return "\n".join([line(["trial", *names, metric, "seconds"]), "|" + "---|" * (len(names) + 3), *map(line, rows)])


def main(argv: list[str] | None = None) -> None:
    which = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which.add_argument("--recipe", choices=RECIPES, default="pretrain")
    chosen, words = which.parse_known_args(sys.argv[1:] if argv is None else argv)
    search, trainer = RECIPES[chosen.recipe](words)
    folder, suggest = Path(trainer.args.output_dir), search_space(search.space)
    goes_on = bool(resume_option(trainer.args))
    if not goes_on and (folder / "study.db").exists():
        raise ValueError(
            f"{folder} has a study: go on with it by `--resume_from_checkpoint true`, or take another output_dir."
        )
    storage, name = f"sqlite:///{folder.resolve() / 'study.db'}", chosen.recipe
    finished = 0
    if goes_on:
        past = optuna.load_study(study_name=name, storage=storage).get_trials(states=[optuna.trial.TrialState.COMPLETE])
        finished = len(past)
    folder.mkdir(parents=True, exist_ok=True)
    sampler = optuna.samplers.TPESampler(seed=search.search_seed + finished)
    kwargs = {"storage": storage, "study_name": name, "load_if_exists": goes_on, "sampler": sampler}
    if finished < search.n_trials:
        trainer.hyperparameter_search(suggest, n_trials=search.n_trials - finished, **kwargs)
    if trainer.is_world_process_zero():
        study = optuna.load_study(study_name=name, storage=storage)
        shown = table(study, trainer.args.metric_for_best_model or trainer.search_metric())
        (folder / "trials.md").write_text(shown + "\n")
        (folder / "best.yaml").write_text(yaml.safe_dump(study.best_params))
        print(shown)
        print(f"saved {folder / 'trials.md'} and {folder / 'best.yaml'}")


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
