"""Reward models from preferences, by TRL's RewardTrainer: P(chosen) = sigmoid(r(chosen) - r(rejected)) (Bradley and Terry).

Texts are tokenised as a `Reward` will read them: TRL would end plain text with EOS in training, which no reward model sees
later. What is reported comes from the saved model, read as a `Reward` reads it.

Left out: margins, and rewards of single steps or tokens.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..arguments import suggest_options
from ..checkpoints import claim_output_dir
from ..data import load_preferences
from ..hub import write_model_card
from ..loading import adapter_config, loading_options
from ..reward_models import reward_model
from ..trl_compat import ModelConfig, RewardConfig, RewardTrainer

COMMAND = "accelerate launch recipes/reward_model/run.py --config recipes/reward_model/config.yaml"


@suggest_options
@dataclass
class RewardModelArguments:
    """The preferences; the model and its adapter are TRL's ModelConfig, the training is TRL's RewardConfig."""

    data: str = field(
        default="stories",
        metadata={
            "help": 'Preferences: "stories", a .jsonl file, a folder, or a dataset of the Hub, with `chosen`, `rejected` and '
            "`prompt`, or without `prompt` as whole texts or chats."
        },
    )
    num_pairs: int = field(default=4000, metadata={"help": 'How many pairs if data is "stories".'})
    preference_temperature: float = field(
        default=1.0, metadata={"help": "Noise of the stories' preferences, in units of their true reward."}
    )
    preference_seed: int = field(default=1, metadata={"help": "Which stories they are about."})
    validation_percent: int = field(default=10, metadata={"help": "The last so many percent are held out."})
    overwrite: bool = field(
        default=False, metadata={"help": "Start in an output_dir that is not empty: its checkpoints are deleted."}
    )

    def __post_init__(self):
        if not 1 <= self.validation_percent <= 99:
            raise ValueError(f"validation_percent must be from 1 to 99, but is {self.validation_percent}.")

    def load(self) -> tuple[Dataset, Dataset]:
        """Pairs to train on and held-out ones, with a column `prompt` (empty where the data has none)."""
        split = 100 - self.validation_percent
        made = {"num_pairs": self.num_pairs, "temperature": self.preference_temperature, "seed": self.preference_seed}
        parts = [load_preferences(self.data, part, **made) for part in (f"train[:{split}%]", f"train[{split}%:]")]
        return tuple(_with_prompt(part) for part in parts)


def _with_prompt(rows: Dataset) -> Dataset:
    if "prompt" in rows.column_names:
        return rows
    empty = "" if isinstance(rows[0]["chosen"], str) else []
    return rows.map(lambda row: {"prompt": empty})


def tokenize_pairs(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Dataset:
    """Rows of `chosen_ids` and `rejected_ids`: prompt and completion as one text, or one chat in the template.

    Pairs with a text of more than `max_length` tokens are left out: cut, it would not be what was judged.

    Raises:
        ValueError: no pair is short enough, or chats without a chat template.
    """
    chats = not isinstance(pairs[0]["chosen"], str)
    if chats and tokenizer.chat_template is None:
        raise ValueError("the preferences are chats, and the tokenizer has no chat template: set its chat_template.")

    def ids(prompts: list, completions: list) -> list[list[int]]:
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        if chats:
            texts = tokenizer.apply_chat_template(texts, tokenize=False)
        return tokenizer(texts, add_special_tokens=not chats, verbose=False)["input_ids"]

    def tokenize(batch: dict) -> dict:
        return {f"{which}_ids": ids(batch["prompt"], batch[which]) for which in ("chosen", "rejected")}

    rows = pairs.map(tokenize, batched=True, remove_columns=pairs.column_names)
    if max_length is None:
        return rows
    longest = [max(map(len, row)) for row in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)]
    if min(longest) > max_length:
        raise ValueError(
            f"every pair has a text of more than max_length={max_length} tokens (the shortest one has {min(longest)}): raise "
            "max_length."
        )
    return rows.select([n for n, length in enumerate(longest) if length <= max_length])


def train_reward_model(
    options: RewardModelArguments,
    model: ModelConfig,
    args: RewardConfig,
    resume_from_checkpoint: bool | str | None = None,
) -> tuple[Path, dict[str, float]]:
    """Train, save and measure a reward model, whole or as an adapter.

    Args:
        model: `model_name_or_path` is a causal model, which gets a new head, or one for sequence classification.

    Returns:
        Its folder, `output_dir/model`, and `judge`'s numbers on the held-out pairs.

    Raises:
        ValueError: an output_dir in use, data without preferences, or texts that are all too long.
    """
    if model.model_name_or_path is None:
        raise ValueError("which model? --model_name_or_path takes a path or an id of the Hub.")
    name, folder = model.model_name_or_path, Path(args.output_dir) / "model"
    if not resume_from_checkpoint:
        claim_output_dir(args.output_dir, options.overwrite)
    train, held_out = options.load()
    loading = loading_options(model, args.trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=model.model_revision)
    args.model_init_kwargs = {**loading, **(args.model_init_kwargs or {})}
    rows, args.max_length = tokenize_pairs(train, tokenizer, args.max_length), None  # TRL's versions cut or leave out
    if len(rows) < len(train):
        print(f"left out {len(train) - len(rows)} of {len(train)} pairs, which are too long")
    trainer = RewardTrainer(
        name,
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapter_config(replace(model, lora_task_type="SEQ_CLS")),
    )
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()  # the first process writes; all may load
    metrics = judge(str(folder), held_out, args.per_device_eval_batch_size)
    if trainer.is_world_process_zero():
        write_model_card(
            folder,
            title=f"A reward model on {Path(name).name}",
            formula="P(chosen is preferred to rejected) = sigmoid(r(chosen) - r(rejected))",
            command=COMMAND,
            results=metrics,
            data="preferences over the embedded stories of hf_gdc" if options.data == "stories" else options.data,
            base_model=name,
            template="reward_model_card.md",
        )
    return folder, metrics


def judge(path: str, pairs: Dataset, batch_size: int = 64) -> dict[str, float]:
    """How well a saved reward model tells the chosen from the rejected.

    Returns `accuracy` (a tie counts half), `log_loss` in nats (log 2 for knowing nothing) and `margin`, the mean
    difference. With the true rewards also `accuracy_of_truth`, what they themselves reach on noisy preferences;
    `correlation`, Pearson's, of differences with true differences; and `slope`, by how much r grows with the true reward.
    """
    reward = reward_model(path, batch_size=batch_size)
    chosen, rejected = (reward(pairs["prompt"], pairs[which]) for which in ("chosen", "rejected"))
    margin = chosen - rejected
    metrics = {"accuracy": _accuracy(margin), "log_loss": float(torch.nn.functional.softplus(-margin).mean())}
    metrics["margin"] = float(margin.mean())
    if "chosen_reward" in pairs.column_names:
        truth = torch.tensor(pairs["chosen_reward"], dtype=torch.float64)
        truth -= torch.tensor(pairs["rejected_reward"], dtype=torch.float64)
        both = (
            margin @ truth
        )  # uncentred: which of two is called chosen is a convention, and differences have no offset
        metrics |= {"accuracy_of_truth": _accuracy(truth), "slope": float(both / truth.square().sum())}
        metrics["correlation"] = float(both / (margin.norm() * truth.norm()))
    return metrics


def _accuracy(margin: Tensor) -> float:
    return float(((margin > 0).double() + 0.5 * (margin == 0).double()).mean())
