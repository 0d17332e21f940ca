"""Options of the recipes: dataclasses filled from a YAML file and the command line, which overrides it.

Left out: the `hf-gdc` command.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from transformers import TrainingArguments

from .arguments import check_options
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
