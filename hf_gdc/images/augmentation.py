"""Differentiable augmentation of what a discriminator sees, real and generated (DiffAugment, Zhao et al. 2020, 2006.10738).

Few images let a discriminator learn them by heart. One that only ever sees T(x), T random, compares the distributions of
T(x), and the generator learns through T. Left out: rotations and flips, which turn digits into others.

Shapes: B images, C channels, H height, W width.
"""

import torch
from torch import Tensor
from torch.nn import functional


def translate(images_BCHW: Tensor, ratio: float = 0.125) -> Tensor:
    """Shift each image by whole pixels, up to `ratio` of its size and at least 1; its border fills the rim."""
    batch, _, height, width = images_BCHW.shape
    reach = max(1, round(ratio * height))
    padded = functional.pad(images_BCHW, (reach,) * 4, mode="replicate")
    rows = _random_integers(batch, 2 * reach + 1, images_BCHW)[:, None] + torch.arange(height, device=padded.device)
    columns = _random_integers(batch, 2 * reach + 1, images_BCHW)[:, None] + torch.arange(width, device=padded.device)
    image = torch.arange(batch, device=padded.device)[:, None, None]
    return padded.movedim(1, -1)[image, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def cutout(images_BCHW: Tensor, ratio: float = 0.375) -> Tensor:
    """Blank (to the mid-grey 0) a square of `ratio` of the side, at a random place of each image."""
    batch, _, height, width = images_BCHW.shape
    side = max(1, round(ratio * height))

    def inside(length: int) -> Tensor:
        start = _random_integers(batch, length - side + 1, images_BCHW)[:, None]
        position = torch.arange(length, device=images_BCHW.device)
        return (position >= start) & (position < start + side)

    blank = inside(height)[:, None, :, None] & inside(width)[:, None, None, :]
    return images_BCHW.masked_fill(blank, 0.0)


def brightness(images_BCHW: Tensor, reach: float = 0.2) -> Tensor:
    """Add one random number in [-reach, reach] to all pixels of an image."""
    shift = torch.rand(len(images_BCHW)).to(images_BCHW) * 2 - 1
    return images_BCHW + reach * shift[:, None, None, None]


AUGMENTATIONS = {"translate": translate, "cutout": cutout, "brightness": brightness}


def augment(images_BCHW: Tensor, names: list[str]) -> Tensor:
    """The named augmentations, one after another."""
    for name in names:
        images_BCHW = AUGMENTATIONS[name](images_BCHW)
    return images_BCHW


def _random_integers(count: int, end: int, like: Tensor) -> Tensor:
    """Drawn on the CPU, whose random numbers a checkpoint keeps for every process."""
    return torch.randint(end, (count,)).to(like.device)
