"""A model that reads texts: its own tokenizer, its device, and batches of texts of like length.

Left out: what is made of its outputs (`scorers`, `reward_models`).
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from itertools import groupby

import torch
from accelerate.state import AcceleratorState, is_initialized
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

LONGEST = 10**6  # tokens; tokenizers that know no limit have 10**30


class TextModel:
    """Reads texts, whatever their length and number; padding, order and batches leave no trace.

    Args:
        model: Hub id, path or model. One given by name goes to the accelerator's device when it is first used.
        load: makes the model from a name.
        processing_class: its own tokenizer; default the one beside it.
        batch_size: texts in a forward pass.
        kind: what the model is called in messages.
        truncation_side: which end is cut from texts longer than the model can read.

    Raises:
        ValueError: there is no tokenizer, or one with ids that the model does not have.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        load: Callable[[str], PreTrainedModel],
        processing_class: PreTrainedTokenizerBase | None,
        batch_size: int,
        kind: str,
        truncation_side: str = "right",
    ):
        named = isinstance(model, str)
        self.path, self.batch_size = model if named else model.config._name_or_path, batch_size
        self.can_be_spelt = bool(self.path) and processing_class is None
        if processing_class is None:
            if not self.path:
                raise ValueError(f"this {kind} was not loaded from anywhere: pass its tokenizer as processing_class.")
            processing_class = AutoTokenizer.from_pretrained(self.path)
        self.tokenizer = copy.deepcopy(processing_class)  # its padding and cutting are set below
        self.tokenizer.truncation_side = truncation_side
        self._placed = not named
        self.model = load(model) if named else model
        self.model.eval()
        self._check_tokens(kind)

    def _check_tokens(self, kind: str) -> None:
        """How texts are cut, padded, and written where they have no token at all."""
        tokenizer, config = self.tokenizer, self.model.config
        rows, top = self.model.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values())
        if top >= rows:
            raise ValueError(
                f"the tokenizer of the {kind} {self.path or type(self.model).__name__} has ids up to {top}, but the model has "
                f"embeddings for {rows} tokens, so it belongs to another model: pass the {kind}'s own as processing_class "
                "(reward_processing_classes in a Reward)."
            )
        self.limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or LONGEST)
        # Decoders read out the last token that is not config.pad_token_id. Without one nothing may be padded.
        self.pads = getattr(config, "pad_token_id", None) is not None
        if self.pads:
            tokenizer.pad_token_id = config.pad_token_id
        elif tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.blank = "" if tokenizer("")["input_ids"] else tokenizer.bos_token or tokenizer.eos_token

    @torch.no_grad()
    def per_text(self, texts: Sequence[str], value: Callable, special_tokens: bool = True) -> Tensor:
        """`value(outputs, attention_mask)` of every text, (B, ...) in float64 on the CPU.

        Args:
            value: gives one row per text of a batch.
            special_tokens: let the tokenizer add its own (a chat template has written them already).
        """
        if not texts:
            return torch.zeros(0, dtype=torch.float64)
        texts = [text if text.strip() else self.blank for text in texts]
        if not self._placed:
            self.model.to(default_device())
            self._placed = True
        ids = self.tokenizer(texts, truncation=True, max_length=self.limit, add_special_tokens=special_tokens)[
            "input_ids"
        ]
        rows: list[Tensor] = [torch.zeros(0)] * len(texts)
        for part in self._batches([len(row) for row in ids]):
            inputs = self.tokenizer.pad(
                {"input_ids": [ids[n] for n in part]}, padding_side="right", return_tensors="pt"
            ).to(self.model.device)
            with _reads_the_last_token(self.model.config, not self.pads):
                values = value(self.model(**inputs), inputs["attention_mask"]).cpu().double()
            for n, row in zip(part, values, strict=True):
                rows[n] = row
        return torch.stack(rows)

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        """Positions of texts of like length, or of equal length where nothing may be padded."""
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        groups = [order] if self.pads else [list(same) for _, same in groupby(order, lengths.__getitem__)]
        return [group[at : at + self.batch_size] for group in groups for at in range(0, len(group), self.batch_size)]


@contextmanager
def _reads_the_last_token(config, wanted: bool):
    """A decoder without a padding token refuses batches: give it one that no text has."""
    if wanted:
        config.pad_token_id = -1
    try:
        yield
    finally:
        if wanted:
            config.pad_token_id = None


def default_device() -> torch.device:
    """The accelerator's device where a trainer has set one up (it may have been told to use the CPU), else the best."""
    if is_initialized():
        return AcceleratorState().device
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
