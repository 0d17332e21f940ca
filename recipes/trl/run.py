"""TRL's own RLOO, GRPO or, where TRL 1.12 is installed, PPO, on a model and reward functions of hf_gdc.

    accelerate launch recipes/trl/run.py --config recipes/trl/config.yaml --method rloo \
        --model_name_or_path outputs/pretrain/model --reward count:was
    PYTHONPATH=.trl-1.12 accelerate launch recipes/trl/run.py --config recipes/trl/ppo.yaml --method ppo \
        --model_name_or_path outputs/pretrain/model --reward count:was

Options are those of TRL's config for the method. TRL's code runs as it is; the model goes to OUTPUT_DIR/model. Left out:
adapters, and resuming, which TRL does not do exactly.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Trainer, TrainingArguments

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from hf_gdc.checkpoints import claim_output_dir  # noqa: E402
from hf_gdc.cli import parse_options  # noqa: E402
from hf_gdc.data import load_prompts  # noqa: E402
from hf_gdc.features import Feature  # noqa: E402
from recipes.trl.ppo import import_ppo, trl_ppo  # noqa: E402

METHODS = ("rloo", "grpo", "ppo")


@dataclass
class RunArguments:
    """What is no option of TRL's."""

    method: str = field(metadata={"help": "rloo, grpo or ppo.", "choices": METHODS})
    model_name_or_path: str = field(metadata={"help": "Path of the model, or its id on the Hub."})
    reward: list[str] = field(metadata={"help": "Reward functions, added up: count:was my_rewards.py:helpful."})
    data: str | None = field(
        default=None,
        metadata={"help": "Prompts: a .jsonl file or a Hub dataset with a column `prompt`. Default: the empty prompt."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Start in an output_dir that is not empty."})


def trl_classes(method: str) -> tuple[type, type]:
    """TRL's config and trainer of a method.

    Raises:
        ValueError: ppo, where TRL has none.
    """
    if method == "ppo":
        return import_ppo()
    import trl

    return getattr(trl, f"{method.upper()}Config"), getattr(trl, f"{method.upper()}Trainer")


def reward_function(spec: str) -> Callable:
    """A feature as a function with a name, which TRL wants."""
    feature = Feature(spec)

    def function(**given) -> list[float]:
        return feature.function(**given)

    function.__name__ = feature.name
    return function


def empty_prompt(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text whose tokens are the start alone, where our own trainers take "": TRL tokenises it as it stands."""
    return "" if tokenizer("")["input_ids"] else tokenizer.bos_token or tokenizer.eos_token


def make_trainer(
    method: str,
    model_path: str,
    rewards: Sequence[str],
    args: TrainingArguments,
    data: str | None = None,
    callbacks: list | None = None,
) -> Trainer:
    """TRL's trainer for the method.

    Args:
        model_path: of the policy; the reference is the same model.
        rewards: features as text.
        args: TRL's config for the method.
        data: prompts, see `load_prompts`; None: the empty prompt.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_path)
    functions = [reward_function(spec) for spec in rewards]
    at_once = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    prompts = [empty_prompt(tokenizer)] * at_once if data is None else load_prompts(data)["prompt"]
    if method == "ppo":
        return trl_ppo(model, functions, args, prompts, tokenizer, callbacks)
    _, trainer = trl_classes(method)
    rows = Dataset.from_dict({"prompt": prompts})
    return trainer(model, functions, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks)


def chosen_method(argv: Sequence[str] | None) -> str:
    """The word after `--method`, which says whose options the others are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", choices=METHODS, default="rloo")
    return parser.parse_known_args(argv)[0].method


def main(argv: list[str] | None = None) -> None:
    config, _ = trl_classes(chosen_method(argv))
    run, args = parse_options(RunArguments, config, argv=argv)
    claim_output_dir(args.output_dir, run.overwrite)
    trainer = make_trainer(run.method, run.model_name_or_path, run.reward, args, run.data)
    trainer.train()
    folder = Path(args.output_dir) / "model"
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        trainer.processing_class.save_pretrained(folder)
        print(f"saved {folder}")


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
