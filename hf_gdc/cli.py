"""Options of the recipes: dataclasses filled from a YAML file and the command line, which overrides it; targets as text.

Left out: the `hf-gdc` command.
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import TrainingArguments

from .arguments import check_options
from .targets import Moment, Pointwise, Reference, Reward, Target
from .targets.base import Factor
from .trl_compat import TrlParser


def parse_options(*dataclasses: type, argv: Sequence[str] | None = None) -> tuple:
    """One instance of each dataclass, from `--config FILE.yaml` and `--option value ...`.

    A list takes several values, `--pointwise contains:dragon contains:castle`; a mapping takes a JSON object.

    Args:
        argv: the arguments, by default the program's.

    Raises:
        ValueError: an option that no dataclass has, with the nearest one; a config that is no YAML mapping; several
            processes that don't know of each other. Values of the wrong type end the program with argparse's message.
    """
    parser = TrlParser(dataclasses, allow_abbrev=False)
    config, words = _split_config(list(sys.argv[1:] if argv is None else argv))
    flags = {flag for action in parser._actions for flag in action.option_strings}
    known = [action.dest for action in parser._actions]
    spelt = [word.partition("=")[0] for word in words if word.startswith("--")]
    check_options([flag[2:] for flag in spelt if flag not in flags], known, "the command line")
    values = _read_config(config) if config is not None else {}
    check_options(values, known, str(config))
    for action in parser._actions:
        if action.nargs in ("+", "*") and isinstance(values.get(action.dest), str):
            values[action.dest] = [values[action.dest]]  # one value of a list needs no brackets
    parser.set_defaults_with_config(**values)
    parsed = tuple(parser.parse_args_into_dataclasses(args=words))
    for args in parsed:
        if isinstance(args, TrainingArguments):
            _check_world(args)
    return parsed


def resume_option(args: TrainingArguments) -> bool | str | None:
    """`--resume_from_checkpoint` as `train` takes it: True for "true" (the newest checkpoint), None for "false"."""
    value = args.resume_from_checkpoint
    return {"true": True, "false": None}.get(str(value).lower(), value)


def _check_world(args: TrainingArguments) -> None:
    """Refuse processes that don't know of each other: each would train alone, in the same folder."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if args.world_size != launched:
        raise ValueError(
            f"{launched} processes were launched, but each sees a world of {args.world_size}. Without GPUs, add"
            " `--use_cpu` to the options of the recipe."
        )


def _split_config(words: list[str]) -> tuple[Path | None, list[str]]:
    """The file of `--config FILE` or `--config=FILE`, and the other words."""
    for i, word in enumerate(words):
        if word == "--config" and i + 1 < len(words):
            return Path(words[i + 1]), words[:i] + words[i + 2 :]
        if word.startswith("--config="):
            return Path(word.partition("=")[2]), words[:i] + words[i + 1 :]
    if "--config" in words:
        raise ValueError("--config needs a YAML file after it.")
    return None, words


def _read_config(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"--config needs a YAML file, and there is no {str(path)!r}.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a YAML mapping `option: value`, not {values!r}.")
    return values


# ---- targets, as options ----


@dataclass
class TargetArguments:
    """The target's factors, as text: see `hf_gdc.features` for how a feature is spelt."""

    pointwise: list[str] | None = field(
        default=None,
        metadata={"help": "Features that every sample must have: contains:dragon my_features.py:is_valid."},
    )
    moment: list[str] | None = field(
        default=None,
        metadata={
            "help": "Features with their wanted means: contains:she=0.5 'contains:she=0.5 per topic' "
            "'contains:she={fable: 0.5, news: 0.3} per topic', where `topic` is a column of the dataset, or `prompt`."
        },
    )
    reward: list[str] | None = field(
        default=None, metadata={"help": "Reward functions, added up: my_rewards.py:helpful org/reward-model."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "A weight for each reward function. Default: 1."}
    )
    beta: float = field(
        default=0.1, metadata={"help": "Temperature of the rewards: the target has exp(reward / beta)."}
    )


def build_target(options: TargetArguments, base: Factor | None = None) -> Target:
    """Reference(), or another base, times the factors that the options name.

    Raises:
        ValueError: no factor at all, a moment without its mean or means, or a feature that can't be found.
    """
    target = Target([Reference() if base is None else base])
    for spec in options.pointwise or []:
        target = target * Pointwise(spec)
    for spec in options.moment or []:
        target = target * _moment(spec)
    if options.reward:
        target = target * Reward(options.reward, options.beta, options.reward_weights)
    if len(target.terms) == 1:
        raise ValueError("the target is its base alone, unchanged: give it a --pointwise, --moment or --reward.")
    return target


def _moment(spec: str) -> Moment:
    """feature=mean, `feature=mean per column` or `feature={group: mean, ...} per column`."""
    found = re.fullmatch(r"(?s)(?P<feature>.+)=(?P<mean>\s*\{[^{}]*\}|[^=]*?)( per (?P<column>[^={}]+))?", spec)
    mean = None if found is None else _mean_of(found["mean"], found["column"] is not None)
    if mean is None:
        raise ValueError(
            f"the moment {spec!r} lacks its wanted mean: spell it feature=mean, as in contains:she=0.5, or for groups of "
            "prompts 'contains:she=0.5 per column' or 'contains:she={group: 0.5, other: 0.3} per column'."
        )
    return Moment(found["feature"], mean, per=found["column"] and found["column"].strip())


def _mean_of(text: str, grouped: bool) -> float | dict[str, float] | None:
    """A number or, for groups, a mapping from group to number; None for anything else."""
    try:
        if not (grouped and text.strip().startswith("{")):
            return float(text)
        means = yaml.load(text, Loader=yaml.BaseLoader)  # plain texts: a group called `no` is no truth value
        return {group: float(mean) for group, mean in means.items()}
    except (ValueError, TypeError, yaml.YAMLError):
        return None
