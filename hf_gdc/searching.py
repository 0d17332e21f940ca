"""Hyperparameter search on a trainer as it stands: every trial starts from the same weights and the same own state.

transformers' search builds a model per trial by `model_init`. Here the start is known (a policy's start is its reference,
too), so weights, target, partition and rollouts are put back, and a trial gives what a fresh run with its options gives.

Left out: options that a trainer reads while it is built, such as `divergence` or `max_completion_length`: one trainer for each.
"""

import copy
from collections.abc import Callable
from dataclasses import fields

from accelerate.utils import set_seed
from transformers import TrainingArguments
from transformers.trainer_utils import BestRun

from .arguments import check_options
from .checkpoints import claim_output_dir

Suggest = Callable[[object], dict]  # from an optuna trial to options


class Searchable:
    """Mixin for `SafeCheckpoints` trainers: `hyperparameter_search` without a `model_init`.

    Subclasses give `searchable`, those of their own options that may change between trials, and `search_metric`.
    """

    searchable: tuple[str, ...] = ()

    def search_metric(self) -> str:
        """What a search minimises unless it is told otherwise: a name that `evaluate` gives."""
        raise NotImplementedError

    def hyperparameter_search(
        self,
        hp_space: Suggest | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str = "minimize",
        **kwargs,
    ) -> BestRun:
        """As `Trainer.hyperparameter_search`. The trainer, its weights and its options are then as before the search.

        Args:
            hp_space: options of a trial. Default: a learning rate up to ten times smaller or larger.
            compute_objective: default `args.metric_for_best_model`, else the trainer's `search_metric`.
            kwargs: as there; more go to `optuna.create_study`. With `load_if_exists` an earlier search's folder is no error.

        Raises:
            ValueError: a folder in use, or an option that can't change between trials.
        """
        if not kwargs.get("load_if_exists") and self.is_world_process_zero():
            claim_output_dir(self.args.output_dir, self.args.overwrite)
        model, before = self.model, dict(vars(self.args))
        weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        own_state = copy.deepcopy(self.process_state())
        known = [f.name for f in fields(TrainingArguments)] + list(self.searchable)
        rate, suggest = self.args.learning_rate, hp_space

        def options(trial) -> dict:
            if suggest is None:
                return {"learning_rate": trial.suggest_float("learning_rate", rate / 10, rate * 10, log=True)}
            found = suggest(trial)
            check_options(found, known, f"a search on {type(self).__name__}")
            return found

        def restart():
            model.load_state_dict(weights)
            self.load_process_state(copy.deepcopy(own_state))
            set_seed(before["seed"], device_specific=True)
            return model

        metric = self.args.metric_for_best_model or self.search_metric()
        metric = metric if metric.startswith("eval_") else f"eval_{metric}"

        def chosen(metrics: dict[str, float]) -> float:
            if metric not in metrics:
                have = ", ".join(sorted(metrics))
                raise ValueError(f"a search needs {metric!r}, and evaluate gave {have}: set metric_for_best_model.")
            return metrics[metric]

        self.model_init = restart
        try:
            return super().hyperparameter_search(options, compute_objective or chosen, n_trials, direction, **kwargs)
        finally:
            self.model_init, self.hp_search_backend = None, None
            vars(self.args).update(before)
            self.model = self.model_wrapped = restart()
            self.optimizer = self.lr_scheduler = None


def search_space(specs: list[str]) -> Suggest:
    """Options of a trial from text: `learning_rate=1e-3..1e-1 log`, `adam_beta2=0.9..0.99`, `warmup_steps=0|0.05|0.1`.

    Raises:
        ValueError: what can't be read so.
    """
    ranges: dict[str, tuple[float, float, bool]] = {}
    choices: dict[str, list] = {}
    for spec in specs:
        name, equals, values = (part.strip() for part in spec.partition("="))
        try:
            if ".." in values:
                ends, _, word = values.partition(" ")
                low, high = (float(end) for end in ends.split(".."))
                if not low < high or word.strip() not in ("", "log") or (word and low <= 0):
                    raise ValueError
                ranges[name] = low, high, bool(word)
            else:
                choices[name] = [_read(value) for value in values.split("|")]
        except ValueError:
            equals = ""
        if not (name and equals and values):
            raise ValueError(
                f"can't read {spec!r}: spell a range `name=1e-3..1e-1 log` (or without log), choices `name=16|32|64`."
            )

    def suggest(trial) -> dict:
        found = {name: trial.suggest_float(name, low, high, log=log) for name, (low, high, log) in ranges.items()}
        return found | {name: trial.suggest_categorical(name, values) for name, values in choices.items()}

    return suggest


def _read(value: str) -> bool | int | float | str:
    value = value.strip()
    if value in ("true", "false"):
        return value == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
