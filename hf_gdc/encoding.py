"""Token ids of prompts, completions and rows for language-model training.

A row of text is an empty prompt and a completion, so text, prompt-and-completion and chat share one path:
`tokenize_prompts` gives where generation starts, `tokenize_completions` what follows, up to EOS.

Left out: attention masks between packed texts (a block is one stream, as in GPT-2's training) and cutting of prompts
(the context length is the trainer's concern).
"""

from dataclasses import dataclass

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .data import Messages, Rows

IGNORED_LABEL = -100  # what the cross-entropy of torch and transformers skips


def tokenize_prompts(
    prompts: list[str] | list[Messages],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict | None = None,
) -> list[list[int]]:
    """Token ids of prompts, all of them text or all of them chats, ready for generation.

    Text gets the special tokens that the tokenizer adds by default, less a trailing EOS, which would say that
    the text is over. An empty prompt becomes BOS, or EOS where there is no BOS (as with GPT-2).

    Raises:
        ValueError: for an empty prompt where the tokenizer has neither BOS nor EOS.
    """
    if not prompts:
        return []
    if isinstance(prompts[0], str):
        rows = tokenizer(prompts, verbose=False)["input_ids"]
        for ids in rows:
            while ids and ids[-1] == tokenizer.eos_token_id:
                ids.pop()
    else:
        rows = [_chat_ids(chat, tokenizer, chat_template_kwargs, add_generation_prompt=True) for chat in prompts]
    return [ids or [_start_id(tokenizer)] for ids in rows]


def tokenize_completions(
    prompts: list[str] | list[Messages],
    completions: list[str] | list[Messages],
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: dict | None = None,
) -> list[list[int]]:
    """Token ids that continue those of `tokenize_prompts`, with EOS once, at the end.

    Chat completions are what the chat template writes after the prompt, up to its first EOS.

    Raises:
        ValueError: where the tokenizer has no EOS, or its chat template rewrites the prompt in a longer chat.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token, so completions have no end: set `tokenizer.eos_token`")
    if not completions:
        return []
    if isinstance(completions[0], str):
        rows = tokenizer(completions, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        rows = []
        starts = tokenize_prompts(prompts, tokenizer, chat_template_kwargs)
        for prompt, completion, start in zip(prompts, completions, starts, strict=True):
            ids = _chat_ids(prompt + completion, tokenizer, chat_template_kwargs, add_generation_prompt=False)
            if ids[: len(start)] != start:
                raise ValueError(
                    "the chat template writes a prompt differently once it is answered: change the template"
                )
            rows.append(ids[len(start) :])
    return [(ids[: ids.index(eos)] if eos in ids else ids) + [eos] for ids in rows]


def _chat_ids(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, kwargs: dict | None, add_generation_prompt: bool
) -> list[int]:
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, return_dict=True, **(kwargs or {})
    )["input_ids"]


def _start_id(tokenizer: PreTrainedTokenizerBase) -> int:
    ids = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    if not ids:
        raise ValueError("an empty prompt needs a BOS or EOS token to start from: set `tokenizer.bos_token`")
    return ids[0]


def tokenize_rows(dataset: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Rows:
    """One row per text: `input_ids` = BOS text EOS (or prompt completion EOS), `labels` -100 on the prompt.

    A row longer than `max_length` tokens is cut as it stands, without EOS: it is an element of the space of
    sequences of at most that length.
    """

    def rows(batch: dict) -> dict:
        completions = batch["text"] if "text" in batch else batch["completion"]
        prompts = batch["prompt"] if "text" not in batch else [""] * len(completions)
        starts = tokenize_prompts(prompts, tokenizer)
        ends = tokenize_completions(prompts, completions, tokenizer)
        return {
            "input_ids": [(start + end)[:max_length] for start, end in zip(starts, ends, strict=True)],
            "labels": [
                ([IGNORED_LABEL] * len(start) + end)[:max_length] for start, end in zip(starts, ends, strict=True)
            ],
        }

    return dataset.map(rows, batched=True, remove_columns=list(next(iter(dataset))))


def tokenize_blocks(dataset: Rows, tokenizer: PreTrainedTokenizerBase, block_size: int) -> Rows:
    """Rows of exactly `block_size` tokens, cut from the texts written one after another: BOS text EOS BOS ...

    Where BOS and EOS are one token it stands once between texts. Each 1,000 texts (or the one long text) lose
    their last incomplete block. To hold out a part, load it by itself: `load_text(f, split="train[90%:]")`.

    Raises:
        ValueError: for a map-style dataset with fewer tokens than one block.
    """
    start, eos = _start_id(tokenizer), tokenizer.eos_token_id

    def blocks(batch: dict) -> dict:
        texts = tokenize_completions([], batch["text"], tokenizer)
        stream = [i for ids in texts for i in (ids if start == eos else [start, *ids])]
        rows = [stream[i : i + block_size] for i in range(0, len(stream) - block_size + 1, block_size)]
        return {"input_ids": rows, "labels": rows}

    blocks_ = dataset.map(blocks, batched=True, remove_columns=list(next(iter(dataset))))
    if isinstance(blocks_, Dataset) and not len(blocks_):
        raise ValueError(f"the text has fewer tokens than one block of {block_size}: use a smaller block_size")
    return blocks_


@dataclass
class RightPadCollator:
    """Rows of `input_ids` and `labels` to tensors, padded on the right to the longest.

    Padding is known by length, never by the id, so a tokenizer may use one id for EOS and padding.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Returns `input_ids`, `attention_mask` and `labels`, each (rows, longest) and int64."""
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [torch.tensor(row["labels"]) for row in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
        }
