"""The order of prompts in group sampling, for datasets and streams.

Left out: sharding over processes, which is accelerate's.
"""

from collections.abc import Iterator
from itertools import islice

import torch
from datasets import IterableDataset


class EmptyPrompts(torch.utils.data.Dataset):
    """`num_rows` empty prompts: unconditional generation."""

    def __init__(self, num_rows: int):
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, str]:
        if not 0 <= index < self.num_rows:
            raise IndexError(index)
        return {"prompt": ""}


def _groups(chunk: list, repeats_per_prompt: int, batch_repeats: int) -> Iterator:
    for _ in range(batch_repeats):
        for item in chunk:
            yield from [item] * repeats_per_prompt


def _too_few(num_rows: int, prompts_per_batch: int) -> ValueError:
    return ValueError(
        f"the dataset has {num_rows} prompts, and one batch of rollouts takes {prompts_per_batch}: add"
        " prompts, make the batch smaller, or raise num_generations"
    )


class PromptSampler(torch.utils.data.Sampler):
    """Indices of prompts for group sampling: a b c -> a a b b c c, a a b b c c.

    Every chunk of `prompts_per_batch` distinct prompts has each of them `repeats_per_prompt` times in a row,
    and comes `batch_repeats` times; an incomplete last chunk is dropped. Seed and epoch fix the order.
    """

    def __init__(
        self,
        num_rows: int,
        prompts_per_batch: int,
        repeats_per_prompt: int = 1,
        batch_repeats: int = 1,
        shuffle: bool = True,
        seed: int = 0,
    ):
        if num_rows < prompts_per_batch:
            raise _too_few(num_rows, prompts_per_batch)
        self.num_rows, self.prompts_per_batch = num_rows, prompts_per_batch
        self.repeats_per_prompt, self.batch_repeats = repeats_per_prompt, batch_repeats
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's dataloader at the start of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        chunks = self.num_rows // self.prompts_per_batch
        return chunks * self.prompts_per_batch * self.repeats_per_prompt * self.batch_repeats

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.num_rows))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.num_rows, generator=generator).tolist()
        for start in range(0, self.num_rows - self.prompts_per_batch + 1, self.prompts_per_batch):
            chunk = order[start : start + self.prompts_per_batch]
            yield from _groups(chunk, self.repeats_per_prompt, self.batch_repeats)


class PromptStream(torch.utils.data.IterableDataset):
    """The rows of a stream in `PromptSampler`'s pattern. Use no dataloader workers: they would copy it.

    Shuffle the stream itself (`dataset.shuffle(buffer_size=..., seed=...)`); `set_epoch` reshuffles it.
    """

    def __init__(
        self,
        rows: IterableDataset,
        prompts_per_batch: int,
        repeats_per_prompt: int = 1,
        batch_repeats: int = 1,
    ):
        self.rows, self.prompts_per_batch = rows, prompts_per_batch
        self.repeats_per_prompt, self.batch_repeats = repeats_per_prompt, batch_repeats

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's dataloader at the start of an epoch."""
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        rows = iter(self.rows)
        chunk = list(islice(rows, self.prompts_per_batch))
        if len(chunk) < self.prompts_per_batch:
            raise _too_few(len(chunk), self.prompts_per_batch)
        while len(chunk) == self.prompts_per_batch:
            yield from _groups(chunk, self.repeats_per_prompt, self.batch_repeats)
            chunk = list(islice(rows, self.prompts_per_batch))
