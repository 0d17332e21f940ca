"""How well a causal model does a task, zero-shot or trained: accuracy, exact match and F1, BLEU, ROUGE, perplexity.

Labels are chosen by their log-likelihood after the prompt; answers are written greedily, up to the end of a line.

Left out: examples in the prompt (few-shot), which a template can hold. Shapes: N rows, K labels.
"""

from collections.abc import Sequence

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .encoding import tokenize_rows
from .intervals import wilson_interval
from .metrics.overlap import answer_f1, bleu, chrf, exact_match, rouge
from .sampling import TransformersSampler
from .tasks import Task, fitting_rows, task_rows
from .text_scores import row_sums, text_scores


def task_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    task: Task,
    labels: Sequence[str] | None = None,
    length_normalised: bool = False,
    max_length: int = 512,
    max_new_tokens: int = 64,
    batch_size: int = 64,
) -> dict[str, float]:
    """The scores that fit the task, on rows with the columns that its templates name.

    Args:
        labels: of a classification, as they stand in the column; default: those of the dataset.
        length_normalised: choose the label by its log-likelihood per token, not as a whole, so that long labels have a chance.
        max_length: the most tokens of prompt and completion; rows that need more are left out, and counted.
        max_new_tokens: the most tokens of an answer.

    Returns:
        As `text_scores`, of the right completions. `accuracy` (0 to 1) with its 95% interval and the most frequent label's
        share, `majority`; `exact_match` and `f1` (0 to 1); `bleu` and `chrf`, `rouge1`, `rouge2` and `rougeL` (0 to 100).
        And `left_out`, rows that are too long.

    Raises:
        ValueError: columns that are missing, no row that is short enough, fewer than two rows, or a label that is not among
            `labels`.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", max_length)
    max_length = min(max_length, context)
    writes = task.scores != ("accuracy",)
    all_rows = task_rows(dataset, task, tokenizer)
    rows = fitting_rows(all_rows, tokenizer, max_length, max_new_tokens if writes else 0)
    found = text_scores(model, tokenizer, rows, max_length, batch_size) | {"left_out": len(all_rows) - len(rows)}
    if "accuracy" in task.scores:
        texts = None if labels is None else [task.completion.format(**_only_field(task, label)) for label in labels]
        found |= label_scores(model, tokenizer, rows, texts, length_normalised, batch_size)
    if writes:
        found |= overlap_scores(answers(model, tokenizer, rows, max_new_tokens, batch_size), rows["references"], task)
    return found


def _only_field(task: Task, label: str) -> dict[str, str]:
    name = task.completion.partition("{")[2].partition("}")[0]
    return {name: label}


def label_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    labels: Sequence[str] | None = None,
    length_normalised: bool = False,
    batch_size: int = 64,
) -> dict[str, float]:
    """Accuracy of the likeliest label after each prompt, see `task_scores`; `labels` are completions, default all in `rows`."""
    right = list(rows["completion"])
    labels = sorted(set(right)) if labels is None else list(labels)
    unknown = set(right) - set(labels)
    if unknown:
        raise ValueError(f"the label {min(unknown)!r} of the data is not among the candidates {labels}: name them all.")
    scores_NK = label_logps(model, tokenizer, rows["prompt"], labels, length_normalised, batch_size)
    at_N = torch.tensor([labels.index(label) for label in right])
    hits = float((scores_NK.argmax(1) == at_N).double().mean())
    low, high = wilson_interval(hits, len(rows))
    majority = float(at_N.bincount().max()) / len(rows)
    return {"accuracy": hits, "accuracy_low": low, "accuracy_high": high, "majority": majority}


def label_logps(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence,
    labels: Sequence[str],
    length_normalised: bool = False,
    batch_size: int = 64,
) -> Tensor:
    """(N, K) log-probability in nats of each label, EOS included, after each prompt; per token if `length_normalised`."""
    pairs = [{"prompt": prompt, "completion": label} for prompt in prompts for label in labels]
    pairs = tokenize_rows(Dataset.from_list(pairs), tokenizer, max_length=10**9)
    nats, _, tokens = row_sums(model, tokenizer, pairs, batch_size)
    return -(nats / tokens if length_normalised else nats).view(-1, len(labels))


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, max_new_tokens: int, batch_size: int = 64
) -> list[str]:
    """What the model writes greedily after each prompt, up to EOS or the end of its first line."""
    sampler = TransformersSampler(tokenizer, max_new_tokens, top_k=1)
    prompts = list(rows["prompt"])
    order = sorted(range(len(prompts)), key=lambda n: len(str(prompts[n])))  # little padding
    texts = [""] * len(prompts)
    for part in (order[at : at + batch_size] for at in range(0, len(order), batch_size)):
        for n, text in zip(part, sampler(model, [prompts[n] for n in part]).texts, strict=True):
            texts[n] = text.strip().partition("\n")[0].strip()
    return texts


def overlap_scores(texts: Sequence[str], references: Sequence[Sequence[str]], task: Task) -> dict[str, float]:
    """The scores of written answers that the task names."""
    found: dict[str, float] = {}
    if "answers" in task.scores:
        found |= {"exact_match": exact_match(texts, references), "f1": answer_f1(texts, references)}
    if "bleu" in task.scores:
        found |= {"bleu": bleu(texts, references), "chrf": chrf(texts, references)}
    if "rouge" in task.scores:
        found |= rouge(texts, references)
    return found
