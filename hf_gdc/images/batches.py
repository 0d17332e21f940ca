"""A batch of images as the factors of a target see it: what `Rollouts` are for text.

An image generator has no density, so log q is 0 by convention and a target is written relative to q, what the images come
from: `Policy() * Moment(is_three, 0.5)` on real images is p_data * exp(lambda phi), on generated ones q * exp(lambda phi).

Shapes: B images, C channels, H height, W width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class ImageBatch:
    """Images with their columns and what factors computed of them.

    Attributes:
        pixel_values: (B, C, H, W) in [-1, 1], as the models have them.
        columns: other columns of the dataset, B values each, such as `labels`.
        scores: features' values, (B,) float64 on the CPU, computed once.
        log_weight_B: log P - log q, where it was computed.
    """

    pixel_values: Tensor
    columns: dict[str, list] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    log_weight_B: Tensor | None = None

    @classmethod
    def of(cls, pixel_values: Tensor, inputs: dict[str, Tensor]) -> "ImageBatch":
        """Images with the columns of a collated batch."""
        return cls(pixel_values, {name: value.tolist() for name, value in inputs.items() if name != "pixel_values"})

    def __len__(self) -> int:
        return len(self.pixel_values)

    @property
    def sampler_logp_B(self) -> Tensor:
        return torch.zeros(len(self), dtype=torch.float64)

    @property
    def prompt_key_B(self) -> Tensor:
        """Images have no prompts: one key for all."""
        return torch.zeros(len(self), dtype=torch.int64)

    @property
    def differentiable(self) -> bool:
        """Whether features that are Tensors keep their graph."""
        return self.pixel_values.requires_grad

    def feature_arguments(self) -> dict:
        """What features are called with beside the columns: `images` (B, C, H, W) in [0, 1]."""
        return {"images": (self.pixel_values + 1) / 2}

    def describe(self, row: int) -> str:
        """A sample in a message."""
        return f"image {row}"


def no_density(_):
    """What a target's context gives for log a: an error."""
    raise ValueError(
        "a generator of images has no density, so Reference() can't be scored: write the target relative to what the images "
        "come from, Policy() * Moment(...), or leave Policy() out."
    )
