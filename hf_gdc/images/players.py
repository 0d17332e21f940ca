"""What both players of an image GAN need: that they fit together, norms over processes, averages, spectral norm.

Left out: the players' learning (`image_adversary`, `trainers.image_gan`).
"""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import PreTrainedModel


def check_players(generator: PreTrainedModel, discriminator: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """Raise a ValueError where generator, discriminator and data don't fit together."""
    for name in ("image_size", "num_channels", "num_classes"):
        ours, theirs = getattr(generator.config, name), getattr(discriminator.config, name)
        if ours != theirs:
            raise ValueError(f"the generator has {name}={ours} and the discriminator {theirs}: give both one of them.")
    channels, size, classes = (
        getattr(generator.config, name) for name in ("num_channels", "image_size", "num_classes")
    )
    shape = tuple(batch["pixel_values"].shape[1:])
    if shape != (channels, size, size):
        raise ValueError(
            f"the data's images are {shape} and the generator makes {(channels, size, size)}: load them with image_size={size} "
            f"and num_channels={channels}, or build the models for theirs."
        )
    if classes and "labels" not in batch:
        raise ValueError(
            f"the generator is conditioned on {classes} classes, but the data has no labels: give it a column `label`, or "
            "build the models with num_classes=0."
        )


def moving_average(decay: float) -> Callable:
    """An exponential average that forgets faster in its first steps: weight 1 - min(decay, (1 + n) / (10 + n)) of the new."""

    @torch.no_grad()
    def update(averages: list[Tensor], weights: list[Tensor], updates: Tensor) -> None:
        count = int(updates)
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + count) / (10 + count)))

    return update


def apply_spectral_norm(model: nn.Module) -> None:
    """Divide the weights of all layers by their largest singular value (Miyato et al. 2018, arXiv 1802.05957)."""
    for module in list(model.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            parametrizations.spectral_norm(module)


def synchronise_batch_norms(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Batch norms over the batch of all processes, so that their number changes nothing.

    Raises:
        ValueError: on several processes without GPUs, where torch can't.
    """
    if accelerator.num_processes == 1 or not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    if accelerator.device.type != "cuda":
        raise ValueError(
            f"batch norm would see the images of one of {accelerator.num_processes} processes, and torch synchronises it on "
            'GPUs alone: set generator_norm and discriminator_norm to "group" (or "none"), or take one process.'
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
