"""Real texts as rollouts: the same tokenizer, the same end, the same maximal length as what the policy samples.

A real text ends with EOS, which belongs to it; one that is longer than a completion may be is cut, as a sample is. So neither
the end nor the tokens say which side a text is from.

Left out: sampling (`sampling`), the order of rows (`prompt_order`). Shapes: B texts, P prompt, T completion tokens.
"""

from collections.abc import Sequence

import torch
from datasets import Dataset, IterableDataset
from torch.nn.utils.rnn import pad_sequence

from ..data import Rows
from ..encoding import tokenize_completions
from ..rollouts import Rollouts, completion_mask
from ..sampling import TransformersSampler


def with_completions(dataset: Rows) -> Rows:
    """The dataset with columns `prompt` and `completion`; a column `text` is a completion of the empty prompt.

    Raises:
        ValueError: it is empty, or has neither `text` nor `completion`.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("the dataset is empty: it needs real texts.")
    if "completion" not in first and "text" not in first:
        have = ", ".join(f"`{name}`" for name in first)
        hint = "Use dataset.rename_column."
        if "input_ids" in first:
            hint = "Give text rather than ids: it must get the ids that the policy's own tokenizer makes."
        raise ValueError(
            f"real data need a column `text`, or `prompt` and `completion`; the dataset has {have}. {hint}"
        )
    if "completion" not in first:
        dataset = dataset.rename_column("text", "completion")
    if "prompt" in first:
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.map(lambda row: {"prompt": ""})
    return dataset.add_column("prompt", [""] * len(dataset))


def is_unconditional(dataset: Rows) -> bool:
    """Whether the first row's prompt is empty: then texts are samples of one distribution, each of them another."""
    return not next(iter(dataset))["prompt"]


def check_size(dataset: Rows, texts_per_batch: int) -> None:
    """Raise a ValueError for fewer texts than a set of rollouts takes."""
    if isinstance(dataset, Dataset) and len(dataset) < texts_per_batch:
        raise ValueError(
            f"there are {len(dataset)} real texts, and one set of rollouts takes {texts_per_batch} (over all processes): give "
            "more texts (of a .txt file: see sample_by), or make per_device_train_batch_size or steps_per_generation smaller."
        )


class RealTexts:
    """Makes rollouts of rows with `prompt` and `completion`.

    Args:
        sampler: of the policy, whose tokenizer, EOS ids and maximal length apply.

    `sampler_logp_B` and `policy_logp_B` are NaN: nobody knows the density of real texts.

    Raises:
        ValueError: when called, for texts that the tokenizer does not know.
    """

    def __init__(self, sampler: TransformersSampler):
        self.sampler = sampler

    def __call__(self, rows: Sequence[dict], device: torch.device) -> Rollouts:
        sampler, prompts = self.sampler, [row["prompt"] for row in rows]
        prompt_ids, prompt_mask, keys = sampler.encode(prompts)
        completions = [row["completion"] for row in rows]
        ids = tokenize_completions(prompts, completions, sampler.tokenizer, sampler.chat_template_kwargs)
        self._check_known(ids, completions)
        ids = [torch.tensor(row[: sampler.max_completion_length]) for row in ids]
        lengths = torch.tensor([len(row) for row in ids])
        padded = pad_sequence(ids, batch_first=True, padding_value=sampler.eos_ids[0])
        mask = completion_mask(padded, sampler.eos_ids) & (torch.arange(padded.shape[1]) < lengths[:, None])
        unknown = torch.full((len(ids),), torch.nan, dtype=torch.float64)
        return Rollouts(
            prompt_ids.to(device),
            prompt_mask.to(device),
            padded.to(device),
            mask.to(device),
            keys,
            sampler_logp_B=unknown,
            policy_logp_B=unknown,
            prompts=prompts,
            texts=sampler.decode(padded, mask),
            columns={name: [row[name] for row in rows] for name in rows[0] if name != "prompt"},
        )

    def _check_known(self, ids: list[list[int]], completions: list) -> None:
        unknown, total = self.sampler.tokenizer.unk_token_id, sum(map(len, ids))
        for row, text in zip(ids, completions, strict=True):
            if len(row) == 1 and text and not str(text).isspace():
                raise ValueError(
                    f"the policy's tokenizer makes nothing but the end of the real text {str(text)[:80]!r}: it does not know "
                    "its words. Give the tokenizer that the policy was trained with, or real texts in its language."
                )
        if (
            unknown is not None
            and unknown not in self.sampler.eos_ids
            and 2 * sum(r.count(unknown) for r in ids) > total
        ):
            raise ValueError(
                "more than half of the tokens of the real texts are unknown to the policy's tokenizer, so a discriminator "
                "would see nothing else: give the tokenizer that the policy was trained with, or real texts in its language."
            )
