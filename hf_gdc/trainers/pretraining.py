"""Pretraining of a causal language model from scratch: the model that everything else starts from.

A text is one row, BOS text EOS; with `packing` the texts are one stream, cut into blocks. On the embedded stories the
validation loss has a known floor, and what is above it is KL(grammar || model).

Left out: streaming data, several languages in one run, anything but next-token prediction.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .. import stories
from ..arguments import check_options, suggest_options
from ..checkpoints import SafeCheckpoints
from ..data import char_tokenizer, load_text, train_tokenizer, word_tokenizer
from ..encoding import IGNORED_LABEL, RightPadCollator, tokenize_blocks, tokenize_rows
from ..loading import disable_dropout
from ..muon import MuonAdamW


@suggest_options
@dataclass
class PretrainArguments:
    """What to learn from and what to build."""

    data: str = field(
        default="stories",
        metadata={"help": 'Text: "stories", a .txt or .jsonl file, a folder, or a dataset of the Hub.'},
    )
    num_stories: int = field(default=20_000, metadata={"help": 'How many stories to sample if data is "stories".'})
    validation_percent: int = field(default=5, metadata={"help": "The last so many percent are held out."})
    tokenizer: str = field(
        default="bpe",
        metadata={"help": '"bpe", "word" or "char", trained on the data, or the path or id of a tokenizer.'},
    )
    vocab_size: int = field(default=768, metadata={"help": 'Most tokens of a "bpe" tokenizer.'})
    max_length: int = field(default=48, metadata={"help": "Tokens of a row: longer texts are cut, blocks are as long."})
    packing: bool | None = field(
        default=None, metadata={"help": "Cut the stream of all texts into blocks. Default: for a .txt file alone."}
    )
    model_type: str = field(
        default="small_gpt", metadata={"help": "small_gpt or any causal model type of transformers, such as gpt2."}
    )
    model_kwargs: dict | str | None = field(
        default=None, metadata={"help": 'Its configuration, a JSON object: {"n_embd": 128, "n_layer": 4, "n_head": 4}.'}
    )

    def __post_init__(self):
        if isinstance(self.model_kwargs, str):
            self.model_kwargs = json.loads(self.model_kwargs)
        if self.packing is None:
            self.packing = self.data.endswith(".txt")
        if not 1 <= self.validation_percent <= 99:
            raise ValueError(f"validation_percent must be from 1 to 99, but is {self.validation_percent}.")


@suggest_options
@dataclass
class PretrainConfig(TrainingArguments):
    """`TrainingArguments` with defaults for small models trained from scratch."""

    learning_rate: float = field(default=8e-3, metadata={"help": "Peak learning rate, of Muon and AdamW alike."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up; below 1: their share of the run."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows per process and step."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Rows per process at once in evaluation."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's decay of squared gradients."})
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})
    muon: bool = field(
        default=True, metadata={"help": "Muon for the hidden matrices and AdamW for the rest; false: `optim` for all."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Switch dropout off, whatever the model type's default."}
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Start in an output_dir that is not empty: its checkpoints are deleted, files replaced."},
    )


class PretrainingTrainer(SafeCheckpoints, Trainer):
    """`transformers.Trainer` with exact sums in evaluation, Muon on request, and safe folders.

    `evaluate` gives `eval_nll_per_token`, in nats; for rows that are whole texts also `eval_nll_per_text`; and with
    `entropy`, the exact nats per text of the validation data, their difference `eval_excess_nats`.

    Args: as `transformers.Trainer`, plus
        whole_texts: a row of `eval_dataset` is a text, not cut.
        entropy: -log p(text) under the true distribution, averaged over `eval_dataset`; None where it is unknown.

    Raises:
        ValueError: Muon with parameters that FSDP or DeepSpeed shards.
    """

    args: PretrainConfig

    def __init__(self, *args, whole_texts: bool = True, entropy: float | None = None, **kwargs):
        self.whole_texts, self.entropy = whole_texts, entropy
        super().__init__(*args, compute_metrics=self._totals, preprocess_logits_for_metrics=nll_and_tokens, **kwargs)
        if self.args.muon and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "Muon needs whole matrices, and FSDP and DeepSpeed shard them: set muon=False (`--muon false`)."
            )

    def _totals(self, prediction: EvalPrediction) -> dict[str, float]:
        nll_B, tokens_B = prediction.predictions.astype("float64").T
        metrics = {"nll_per_token": float(nll_B.sum() / tokens_B.sum())}
        if self.whole_texts:
            metrics["nll_per_text"] = float(nll_B.mean())
        if self.entropy is not None:
            metrics["excess_nats"] = metrics["nll_per_text"] - self.entropy
        return metrics

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.args.muon and self.optimizer is None:
            args = self.args
            self.optimizer = MuonAdamW(
                self.model,
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                weight_decay=args.weight_decay,
            )
        return super().create_optimizer(model)

    def process_state(self) -> dict:
        return {}

    def load_process_state(self, state: dict) -> None:
        assert not state


def nll_and_tokens(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """(B, 2): the summed negative log-likelihood of each row, in nats, and how many tokens it sums over."""
    targets_BT = labels_BT[:, 1:]
    logits_BVT = logits_BTV[:, :-1].float().transpose(1, 2)
    nll_BT = nn.functional.cross_entropy(logits_BVT, targets_BT, ignore_index=IGNORED_LABEL, reduction="none")
    return torch.stack([nll_BT.sum(1), (targets_BT != IGNORED_LABEL).sum(1)], dim=1)


# ---- from options to objects ----


def build_tokenizer(options: PretrainArguments, dataset: Dataset) -> PreTrainedTokenizerBase:
    """A tokenizer trained on the dataset's texts, or an existing one.

    Raises:
        ValueError: no tokenizer there, one without an EOS token, or chats to train one on.
    """
    closed = {"char": char_tokenizer, "word": word_tokenizer}
    if options.tokenizer in ("bpe", *closed):
        columns = ["text"] if "text" in dataset.column_names else ["prompt", "completion"]
        if not isinstance(dataset[0][columns[0]], str):
            raise ValueError("chats need a tokenizer with a chat template: set `tokenizer` to its path or id.")
        texts = [text for name in columns for text in dataset[name]]
        if options.tokenizer in closed:
            return closed[options.tokenizer](texts, options.max_length)
        return train_tokenizer(texts, options.vocab_size, options.max_length)
    try:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    except OSError as error:
        raise ValueError(
            f'no tokenizer {options.tokenizer!r}: it is not "bpe", "word", "char", a path or an id: {error}'
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_model(options: PretrainArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A causal model with random weights that fits the tokenizer.

    Raises:
        ValueError: an unknown type or option of its configuration; fewer positions than `max_length`.
    """
    kwargs = options.model_kwargs or {}
    check_options([options.model_type], [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "small_gpt"], "model_type")
    config_class = type(AutoConfig.for_model(options.model_type))
    check_options(kwargs, [f.name for f in fields(config_class)], config_class.__name__)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = config_class(vocab_size=len(tokenizer), **special, **kwargs)
    positions = getattr(config, "max_position_embeddings", options.max_length)
    if positions < options.max_length:
        raise ValueError(
            f"max_length={options.max_length} is beyond the model's {positions} positions: see model_kwargs."
        )
    return AutoModelForCausalLM.from_config(config)


def build_trainer(options: PretrainArguments, args: PretrainConfig) -> PretrainingTrainer:
    """Data, tokenizer and model, put together: the same on every process."""
    split = 100 - options.validation_percent
    train, validation = (
        load_text(options.data, part, num_stories=options.num_stories, seed=args.seed)
        for part in (f"train[:{split}%]", f"train[{split}%:]")
    )
    tokenizer = build_tokenizer(options, train)
    tokenize = tokenize_blocks if options.packing else tokenize_rows
    set_seed(args.seed)
    model = build_model(options, tokenizer)
    if args.disable_dropout:
        disable_dropout(model)
    train_rows, validation_rows = (tokenize(part, tokenizer, options.max_length) for part in (train, validation))
    whole = not options.packing and all(ids[-1] == tokenizer.eos_token_id for ids in validation_rows["input_ids"])
    entropy = None
    if options.data == "stories" and whole:
        entropy = -sum(map(stories.log_prob, validation["text"])) / len(validation)
    return PretrainingTrainer(
        model=model,
        args=args,
        data_collator=RightPadCollator(tokenizer.pad_token_id),
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        processing_class=tokenizer,
        whole_texts=whole,
        entropy=entropy,
    )


def pretrain(
    options: PretrainArguments, args: PretrainConfig, resume_from_checkpoint: bool | str | None = None
) -> tuple[Path, dict[str, float]]:
    """Train from scratch, evaluate, and save model, tokenizer and code.

    Args:
        resume_from_checkpoint: True for the newest whole checkpoint in `args.output_dir`, or a path.

    Returns:
        The model's folder, `output_dir/model`, and the metrics of the last evaluation.

    Raises:
        ValueError: an output_dir in use (see `SafeCheckpoints`), or options that don't fit the data or the model.
    """
    trainer = build_trainer(options, args)
    if trainer.is_world_process_zero():
        print(
            f"{trainer.model.num_parameters():,} parameters, {len(trainer.processing_class)} tokens in the vocabulary"
        )
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    metrics = trainer.evaluate()
    folder = Path(args.output_dir) / "model"
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()  # the first process writes; all may load
    return folder, metrics
