# SPDX-License-Identifier: Apache-2.0
"""How well a causal model predicts text: nats per token, perplexity, accuracy. Zero-shot: nothing is trained.

Shapes: B rows, T tokens, V vocabulary, N texts.
"""

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import Rows
from .encoding import IGNORED_LABEL, RightPadCollator, tokenize_rows


def text_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Rows, max_length: int, batch_size: int = 64
) -> dict[str, float]:
    """Scores of the texts' tokens given those before them, EOS included; of completions alone where there are prompts.

    Args:
        texts: rows with `text`, or with `prompt` and `completion`.
        max_length: tokens of a row that are read.

    Returns:
        `nats_per_token` and its standard error over texts (of a ratio of means, by the delta method), `perplexity` with the
        95% interval `perplexity_low` to `perplexity_high`, `token_accuracy`, and how many `texts` and `tokens` there were.

    Raises:
        ValueError: fewer than two texts, from which no interval follows.
    """
    rows = tokenize_rows(texts, tokenizer, max_length)
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} text has no interval: give at least two, or cut the one into rows.")
    nats_N, hits_N, tokens_N = row_sums(model, tokenizer, rows, batch_size)
    mean = float(nats_N.sum() / tokens_N.sum())
    stderr = float((nats_N - mean * tokens_N).std() / len(nats_N) ** 0.5 / tokens_N.mean())
    return {
        "nats_per_token": mean,
        "nats_per_token_stderr": stderr,
        "perplexity": math.exp(mean),
        "perplexity_low": math.exp(mean - 1.96 * stderr),
        "perplexity_high": math.exp(mean + 1.96 * stderr),
        "token_accuracy": float(hits_N.sum() / tokens_N.sum()),
        "texts": len(nats_N),
        "tokens": int(tokens_N.sum()),
    }


@torch.no_grad()
def row_sums(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, batch_size: int) -> Tensor:
    """(3, N) float64 on the CPU, of rows from `tokenize_rows`: each row's nats, tokens predicted right, and tokens."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    collate = RightPadCollator(pad)
    parts = [
        _sums(model, {name: value.to(model.device) for name, value in collate(part).items()})
        for part in (
            rows.select(range(i, min(i + batch_size, len(rows)))).to_list() for i in range(0, len(rows), batch_size)
        )
    ]
    return torch.cat(parts, dim=1).double().cpu()


def _sums(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """(3, B): each row's nats, tokens predicted right, and tokens."""
    labels_BT = batch["labels"][:, 1:]
    counted_BT = labels_BT != IGNORED_LABEL
    logits_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    nats_BT = torch.nn.functional.cross_entropy(
        logits_BTV.transpose(1, 2), labels_BT, reduction="none", ignore_index=IGNORED_LABEL
    )
    hits_BT = (logits_BTV.argmax(-1) == labels_BT) & counted_BT
    return torch.stack((nats_BT.sum(-1), hits_BT.sum(-1), counted_BT.sum(-1)))
