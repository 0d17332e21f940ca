"""Pretraining of a causal language model from scratch: the model that everything else starts from.

A text is one row, BOS text EOS; with `packing` the texts are one stream, cut into blocks. On the embedded stories the
validation loss has a known floor, and what is above it is KL(grammar || model).

Left out: several languages in one run, anything but next-token prediction.
"""

from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    get_scheduler,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .. import stories
from ..arguments import check_options
from ..checkpoints import SafeCheckpoints
from ..data import Rows, char_tokenizer, load_text, train_tokenizer, word_tokenizer
from ..encoding import IGNORED_LABEL, RightPadCollator, tokenize_blocks, tokenize_rows
from ..loading import disable_dropout
from ..muon import MuonAdamW
from ..pretrain_arguments import PretrainArguments, PretrainConfig
from ..schedules import constant_with_drops, steps_of
from ..searching import Searchable


class PretrainingTrainer(Searchable, SafeCheckpoints, Trainer):
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
    searchable = ("muon", "decay_steps")

    def __init__(self, *args, whole_texts: bool = True, entropy: float | None = None, **kwargs):
        self.whole_texts, self.entropy = whole_texts, entropy
        super().__init__(*args, compute_metrics=self._totals, preprocess_logits_for_metrics=nll_and_tokens, **kwargs)
        if self.args.muon and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "Muon needs whole matrices, and FSDP and DeepSpeed shard them: set muon=False (`--muon false`)."
            )
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))

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

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        args = self.args
        own = args.lr_drops is not None or args.lr_scheduler_type == "warmup_stable_decay"
        if own and self.lr_scheduler is None:
            warmup = args.get_warmup_steps(num_training_steps) if args.lr_scheduler_type != "constant" else 0
            times = {"num_warmup_steps": warmup, "num_training_steps": num_training_steps}
            optimizer = self.optimizer if optimizer is None else optimizer
            if args.lr_drops is not None:
                self.lr_scheduler = constant_with_drops(optimizer, drops=args.lr_drops, **times)
            else:
                more = {"num_decay_steps": steps_of(args.decay_steps, num_training_steps)} | (
                    args.lr_scheduler_kwargs or {}
                )
                self.lr_scheduler = get_scheduler(
                    args.lr_scheduler_type, optimizer, scheduler_specific_kwargs=more, **times
                )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def search_metric(self) -> str:
        return "nll_per_token"

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


def load_parts(options: PretrainArguments, args: PretrainConfig) -> tuple[Rows, Dataset, Dataset]:
    """-> (training rows, or a stream of them; validation rows; rows to train a tokenizer on).

    Raises:
        ValueError: a stream without `max_steps`, or too short to hold something out.
    """
    load = partial(
        load_text, options.data, num_stories=options.num_stories, seed=args.seed, sample_by=options.sample_by
    )
    if not options.streaming:
        split = 100 - options.validation_percent
        train, validation = load(f"train[:{split}%]"), load(f"train[{split}%:]")
        return train, validation, train
    if args.max_steps < 1:
        raise ValueError("a stream has no known end: set max_steps (`--max_steps 1000`).")
    stream = load("train", streaming=True)
    train = stream.skip(options.validation_rows)
    validation, first = (
        Dataset.from_list(list(part))
        for part in (stream.take(options.validation_rows), train.take(options.tokenizer_rows))
    )
    if not len(first):
        raise ValueError(f"{options.data!r} has but {len(validation)} rows, all held out: lower validation_rows.")
    return train.shuffle(seed=args.seed, buffer_size=options.shuffle_buffer), validation, first


def build_trainer(options: PretrainArguments, args: PretrainConfig) -> PretrainingTrainer:
    """Data, tokenizer and model, put together: the same on every process."""
    train, validation, first = load_parts(options, args)
    tokenizer = build_tokenizer(options, first)
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
