"""The order of prompts in group sampling, for datasets and streams.

Left out: sharding over processes, which is accelerate's.
"""

from collections.abc import Iterator
from itertools import islice

import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader

from .arguments import PolicyGradientConfig
from .evaluation import first_rows


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


def empty_prompts(args: PolicyGradientConfig) -> EmptyPrompts:
    """As many empty prompts as the run takes, so that it is one epoch."""
    if args.max_steps <= 0:
        raise ValueError("without a train_dataset the prompts are empty and the run has no length: set max_steps.")
    sets = -(-args.max_steps * args.gradient_accumulation_steps // (args.steps_per_generation * args.num_iterations))
    return EmptyPrompts(sets * args.generation_batch_size * args.world_size)


def check_groups(args: PolicyGradientConfig, train_dataset) -> None:
    """Raise a ValueError for a dataset without prompts, or sizes that would split a prompt's group."""
    first_rows(train_dataset, 1)  # refuses an empty dataset and one without prompts
    if args.generation_batch_size % args.num_generations:
        raise ValueError(
            f"per_device_train_batch_size * steps_per_generation = {args.generation_batch_size} must be a multiple of "
            f"num_generations = {args.num_generations}, so that no prompt's group is split over processes."
        )
    prompts = args.generation_batch_size // args.num_generations
    if args.replay_samples % prompts:
        raise ValueError(
            f"replay_samples = {args.replay_samples} must be a multiple of the {prompts} prompts in a process's set "
            "of rollouts (per_device_train_batch_size * steps_per_generation / num_generations)."
        )


def prompt_loader(dataset, args: PolicyGradientConfig) -> DataLoader:
    """Batches of the rows of a whole set of rollouts, each as often as it has micro-steps; not yet sharded."""
    batch = args.generation_batch_size
    pattern = {"batch_repeats": args.steps_per_generation * args.num_iterations}
    if isinstance(dataset, EmptyPrompts):
        pattern |= {"prompts_per_batch": batch * args.world_size, "shuffle": False}
    else:
        pattern |= {
            "prompts_per_batch": batch // args.num_generations * args.world_size,
            "repeats_per_prompt": args.num_generations,
        }
    if isinstance(dataset, IterableDataset):
        return DataLoader(PromptStream(dataset, **pattern), batch, collate_fn=list, drop_last=True)
    seed = args.seed if args.data_seed is None else args.data_seed
    sampler = PromptSampler(len(dataset), **{"shuffle": args.shuffle_dataset, "seed": seed} | pattern)
    return DataLoader(dataset, batch, sampler=sampler, collate_fn=list, drop_last=True)
