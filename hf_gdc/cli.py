"""What recipes share: options from a YAML file and the command line, which overrides it; targets as text; saving a run.

Left out: the `hf-gdc` command (`commands`).
"""

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import yaml
from transformers import Trainer, TrainingArguments

from .arguments import check_options
from .data import load_prompts, load_text
from .hub import write_model_card
from .loading import loading_options
from .targets import Discriminator, Moment, Pointwise, Reference, Reward, Target, Teacher
from .trl_compat import ModelConfig, TrlParser


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


@dataclass
class PromptArguments:
    """The prompts; the model and its adapter are TRL's ModelConfig."""

    data: str | None = field(
        default=None,
        metadata={"help": "Prompts: a .jsonl file or a Hub dataset with a column `prompt`. Default: the empty prompt."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read the prompts as a stream."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the model."})

    def dataset(self):
        """What a trainer takes as `train_dataset`."""
        return None if self.data is None else load_prompts(self.data, streaming=self.streaming)


@dataclass
class RealTextArguments:
    """The real texts, and the discriminator that reads them; the policy and its adapter are TRL's ModelConfig."""

    data: str = field(
        default="stories",
        metadata={
            "help": '"stories", a .txt or .jsonl file, a folder or a dataset of the Hub, with `text` or with `prompt` and '
            "`completion`."
        },
    )
    num_stories: int = field(default=2_000, metadata={"help": 'How many stories to sample if data is "stories".'})
    sample_by: str = field(
        default="paragraph", metadata={"help": "What is one text of a .txt file: a paragraph, a line, or the document."}
    )
    validation_percent: int = field(default=10, metadata={"help": "The last so many percent are held out."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the model."})
    discriminator: str | None = field(
        default=None,
        metadata={
            "help": "Path or id of the discriminator's model, or \"adapter\": one on the policy's own base weights (with "
            "--use_peft). Default: the policy's own start, with a new head."
        },
    )
    dense: bool = field(default=False, metadata={"help": "It scores every prefix: credit for every token."})
    logit_clip: float | None = field(default=None, metadata={"help": "Bound its logits smoothly by +- this."})

    def datasets(self) -> tuple:
        """The texts to learn, and those that are held out."""
        parts = (f"train[:{100 - self.validation_percent}%]", f"train[{100 - self.validation_percent}%:]")
        load = partial(load_text, self.data, num_stories=self.num_stories, sample_by=self.sample_by)
        return tuple(map(load, parts))

    def make_discriminator(self, policy: str, batch_size: int) -> Discriminator:
        """The discriminator for the policy of this name."""
        name = None if self.discriminator == "adapter" else self.discriminator or policy
        return Discriminator(name, self.dense, self.logit_clip, batch_size)


def name_model(model: ModelConfig, trust_remote_code: bool, args: TrainingArguments) -> str:
    """The model's id or path; everything else that was said of it goes to `args.model_init_kwargs`.

    Raises:
        ValueError: no model was named.
    """
    if model.model_name_or_path is None:
        raise ValueError(
            "which model? --model_name_or_path takes a path or an id of the Hub; recipes/pretrain makes a small one."
        )
    args.model_init_kwargs = {**loading_options(model, trust_remote_code), **(args.model_init_kwargs or {})}
    return model.model_name_or_path


# ---- targets, as options ----


@dataclass
class FactorArguments:
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
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "A model with the policy's tokenizer, in place of the reference: alone it is the target, with other "
            "factors it is what they weigh."
        },
    )


@dataclass
class TargetArguments(FactorArguments):
    """The target's factors, with the temperature of the rewards."""

    beta: float = field(
        default=0.1, metadata={"help": "Temperature of the rewards: the target has exp(reward / beta)."}
    )


def build_target(options: FactorArguments, beta: float | None = None) -> Target:
    """Reference(), or the teacher, times the factors that the options name.

    Args:
        beta: temperature of the rewards, where the options (no `TargetArguments`) have none.

    Raises:
        ValueError: no factor at all, a moment without its mean or means, or a feature that can't be found.
    """
    first = Target([Reference() if options.teacher is None else Teacher(options.teacher)])
    further = further_factors(options, beta)
    if further is None and options.teacher is None:
        raise ValueError("the target is the reference itself: give it a --pointwise, --moment, --reward or --teacher.")
    return first if further is None else first * further


def further_factors(options: FactorArguments, beta: float | None = None) -> Target | None:
    """The factors beside the reference that the options name; None where they name none."""
    terms: list = [Pointwise(spec) for spec in options.pointwise or []]
    terms += [_moment(spec) for spec in options.moment or []]
    if options.reward:
        terms.append(Reward(options.reward, options.beta if beta is None else beta, options.reward_weights))
    return Target(terms) if terms else None


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


# ---- the end of a run ----


def train_and_save(
    trainer: Trainer,
    title: str,
    command: str,
    data: str,
    base_model: str,
    judge: Callable[[], dict[str, float]] | None = None,
) -> None:
    """Train, or go on, evaluate, and put the model with its target and card into `output_dir/model`.

    Args:
        judge: further metrics of the trained model, named as `evaluate` names its own.
        title, command, data, base_model: see `write_model_card`.
    """
    trainer.train(resume_from_checkpoint=resume_option(trainer.args))
    metrics = trainer.evaluate() | (judge() if judge is not None else {})
    folder = Path(trainer.args.output_dir) / "model"
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        save_run(trainer, metrics, [folder], title, command, data, base_model)


def save_run(
    trainer: Trainer,
    metrics: dict[str, float],
    folders: list[Path],
    title: str,
    command: str,
    data: str,
    base_model: str,
) -> None:
    """Put the target and a card beside the models saved in `folders`, and print what was measured. One process calls it.

    Args:
        metrics: what `evaluate` gave. title, command, data, base_model: see `write_model_card`.
    """
    shown = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    for folder in folders:
        trainer.target.save_pretrained(folder)
        formula, f = trainer.target.formula(), trainer.args.divergence
        write_model_card(folder, title, formula, command, shown, data, base_model, divergence=f)
    for name, value in shown.items():
        print(f"{name:40} {value:.4g}")
    print(f"saved {' and '.join(str(folder) for folder in folders)}")
