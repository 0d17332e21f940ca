"""Options of pretraining: what to learn from, what to build, and how to train it.

Left out: what they mean in code (`trainers/pretraining.py`).
"""

import json
from dataclasses import dataclass, field

from transformers import TrainingArguments

from .arguments import suggest_options

DROPPING = ("constant", "constant_with_warmup")


@suggest_options
@dataclass
class PretrainArguments:
    """What to learn from and what to build."""

    data: str = field(
        default="stories",
        metadata={"help": 'Text: "stories", a .txt or .jsonl file, a folder, or a dataset of the Hub.'},
    )
    sample_by: str = field(
        default="document",
        metadata={"help": "What is one text of a .txt file: the document, a paragraph, or a line."},
    )
    num_stories: int = field(default=20_000, metadata={"help": 'How many stories to sample if data is "stories".'})
    validation_percent: int = field(default=5, metadata={"help": "The last so many percent are held out."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the data as a stream, shuffled in a buffer; needs max_steps."},
    )
    validation_rows: int = field(default=1000, metadata={"help": "The first so many rows of a stream are held out."})
    tokenizer_rows: int = field(
        default=10_000, metadata={"help": "A tokenizer is trained on so many rows of a stream, after those held out."}
    )
    shuffle_buffer: int = field(default=10_000, metadata={"help": "Rows of a stream from which the next is drawn."})
    tokenizer: str = field(
        default="bpe",
        metadata={"help": '"bpe", "word" or "char", trained on the data, or the path or id of a tokenizer.'},
    )
    vocab_size: int = field(default=768, metadata={"help": 'Most tokens of a "bpe" tokenizer.'})
    max_length: int = field(default=48, metadata={"help": "Tokens of a row: longer texts are cut, blocks are as long."})
    packing: bool | None = field(
        default=None,
        metadata={"help": "Cut the stream of all texts into blocks. Default: for a .txt file that is one text."},
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
            self.packing = self.data.endswith(".txt") and self.sample_by == "document"
        if not 1 <= self.validation_percent <= 99:
            raise ValueError(f"validation_percent must be from 1 to 99, but is {self.validation_percent}.")
        for name in ("validation_rows", "tokenizer_rows", "shuffle_buffer"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, but is {getattr(self, name)}.")
        if self.streaming and self.data.endswith(".txt"):
            raise ValueError(
                "a .txt file is read whole, not as a stream: streaming=False, or a .jsonl file of many rows."
            )


@suggest_options
@dataclass
class PretrainConfig(TrainingArguments):
    """`TrainingArguments` with defaults for small models trained from scratch.

    The schedule is `lr_scheduler_type`: constant, linear, cosine, warmup_stable_decay (with `decay_steps`) and
    transformers' others; constant ones take `lr_drops`.
    """

    learning_rate: float = field(default=8e-3, metadata={"help": "Peak learning rate, of Muon and AdamW alike."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up; below 1: their share of the run."})
    decay_steps: float = field(
        default=0.2,
        metadata={"help": "Last steps of warmup_stable_decay, which decay; below 1: their share of the run."},
    )
    lr_drops: list[float] | None = field(
        default=None,
        metadata={
            "help": "Shares of the run at which a constant learning rate falls to a tenth: 0.5 is at half time. With "
            "lr_scheduler_type constant or constant_with_warmup."
        },
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows per process and step."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Rows per process at once in evaluation."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's decay of squared gradients."})
    logging_steps: float = field(default=50, metadata={"help": "Log every so many steps."})
    muon: bool = field(
        default=True, metadata={"help": "Muon for the hidden matrices and AdamW for the rest; false: `optim` for all."}
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations without a better held-out loss. Needs eval_strategy."},
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Switch dropout off, whatever the model type's default."}
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Start in an output_dir that is not empty: its checkpoints are deleted, files replaced."},
    )

    def __post_init__(self):
        stops = self.early_stopping_patience is not None
        if stops and self.metric_for_best_model is None:
            self.metric_for_best_model, self.greater_is_better = "nll_per_token", False
        super().__post_init__()
        if stops and self.eval_strategy == "no":
            raise ValueError(
                'early_stopping_patience needs evaluations: set eval_strategy="steps" and eval_steps, or "epoch".'
            )
        if stops and self.early_stopping_patience < 1:
            raise ValueError(f"early_stopping_patience must be 1 or more, but is {self.early_stopping_patience}.")
        if self.decay_steps <= 0:
            raise ValueError(f"decay_steps must be above 0, but is {self.decay_steps}.")
        if self.lr_drops is not None and self.lr_scheduler_type not in DROPPING:
            raise ValueError(
                f"lr_drops are of a constant learning rate, and lr_scheduler_type is {self.lr_scheduler_type.value!r}: set it "
                f"to one of {', '.join(map(repr, DROPPING))}."
            )
        if not all(0 < drop < 1 for drop in self.lr_drops or []):
            raise ValueError(f"lr_drops are shares of the run, between 0 and 1, but are {self.lr_drops}.")
