"""Incremental minimisation: only a part of the parameters moves, for good or in turns.

Block coordinate descent with exact gradients: for `cycle_steps` optimizer steps one block moves, then the next. The others
are bit-equal meanwhile, weight decay and momentum included, since an optimizer passes over parameters without a gradient.
Which block moves depends on the step's number alone, so a resumed run goes on exactly. (BAdam, Luo et al. 2024, arXiv
2404.02827, cycles blocks of layers to save memory; here gradients of all blocks are computed and those at rest dropped, before
they are clipped, which any wrapper of the model allows.)

Left out: saving the memory of the blocks at rest.
"""

import re
from collections.abc import Sequence

from torch import nn

LAYER = re.compile(r"(?:^|\.)(\d+)\.")  # model.layers.3.mlp.weight, transformer.h.3.attn.weight
WRAPPERS = re.compile(r"_(?:checkpoint|fsdp)_wrapped_module\.|_orig_mod\.")


def train_only(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze every parameter whose name matches none of the regular expressions; what was frozen stays frozen.

    Raises:
        ValueError: a pattern that is none, or matches no trainable parameter.
    """
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    wanted: set[str] = set()
    for pattern in patterns:
        try:
            found = {name for name in trainable if re.search(pattern, name)}
        except re.error as error:
            raise ValueError(f"trainable_modules: {pattern!r} is no regular expression ({error}).") from error
        if not found:
            some = ", ".join(trainable[:: max(1, len(trainable) // 6)])
            raise ValueError(
                f"trainable_modules: {pattern!r} matches no trainable parameter; there are such as {some}."
            )
        wanted |= found
    for name, parameter in model.named_parameters():
        if name in set(trainable) - wanted:
            parameter.requires_grad_(False)


class ParameterBlocks:
    """A model's trainable parameters in `count` blocks of consecutive layers, which move in turns.

    What comes before the layers (embeddings) belongs to the first block, what comes after (last norm, head) to the last.

    Args:
        count: how many blocks; 0 or 1 for all parameters at once.
        steps: optimizer steps that a block's turn takes.

    Raises:
        ValueError: more blocks than layers.
    """

    def __init__(self, model: nn.Module, count: int, steps: int):
        self.count, self.steps = max(1, count), steps
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        numbers = [None if found is None else int(found[1]) for found in map(LAYER.search, names)]
        layers = sorted({number for number in numbers if number is not None})
        if self.count > max(1, len(layers)):
            raise ValueError(
                f"cycle_blocks={count}, but the model has trainable parameters in {len(layers)} layers: there can be no more "
                "blocks than layers."
            )
        first = next((at for at, number in enumerate(numbers) if number is not None), 0)
        self.block_of: dict[str, int] = {}
        self.always: set[str] = set()  # names of parameters that belong to no block and always move
        for at, (name, number) in enumerate(zip(names, numbers, strict=True)):
            if number is None:
                self.block_of[name] = 0 if at < first else self.count - 1
            else:
                self.block_of[name] = layers.index(number) * self.count // len(layers)

    def current(self, step: int) -> int:
        """The block whose turn it is in the optimizer step after `step` finished ones."""
        return step // self.steps % self.count

    def drop_gradients(self, model: nn.Module, step: int) -> None:
        """Forget the gradients of all blocks but the current one; by name, since sharding makes new parameters.

        Raises:
            ValueError: a wrapper has merged parameters.
        """
        if self.count == 1:
            return
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            plain = WRAPPERS.sub("", name)
            block = self.block_of.get(plain)
            if plain in self.always:
                continue
            if block is None:
                raise ValueError(
                    f"cycle_blocks drops gradients by name, and {name!r} is no parameter of the model as it was loaded: FSDP "
                    "needs version 2, or use_orig_params=True."
                )
            if block != self.current(step):
                parameter.grad = None


class Incremental:
    """Mixin for `transformers.Trainer`s whose `args` have `cycle_blocks` and `cycle_steps`.

    Raises:
        ValueError: cycling under DeepSpeed, whose engine keeps the gradients to itself.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.cycle_blocks > 1 and self.is_deepspeed_enabled:
            raise ValueError(
                "cycle_blocks drops gradients, which DeepSpeed keeps to itself: use DDP or FSDP, or trainable_modules."
            )
        self.parameter_blocks = ParameterBlocks(self.model, self.args.cycle_blocks, self.args.cycle_steps)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.parameter_blocks.drop_gradients(self.model, self.state.global_step)
        return loss
