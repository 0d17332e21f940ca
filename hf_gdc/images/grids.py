"""Grids of images: as one picture, as a PNG, and in the experiment trackers that a Trainer reports to."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback


def make_grid(pixel_values: Tensor, columns: int | None = None, pixels: int = 32, gap: int = 2) -> Image.Image:
    """One picture of images (N, C, H, W) in [-1, 1], row by row, each enlarged by a whole factor to at least `pixels` a side.

    Args:
        columns: images in a row; default: about as many as rows.
    """
    count, channels, height, width = pixel_values.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    rows, factor = math.ceil(count / columns), max(1, math.ceil(pixels / height))
    images = ((pixel_values.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    side, across = height * factor + gap, width * factor + gap
    grid = torch.full((channels, rows * side + gap, columns * across + gap), 128, dtype=torch.uint8)
    for number, image in enumerate(images):
        top, left = gap + number // columns * side, gap + number % columns * across
        grid[:, top : top + side - gap, left : left + across - gap] = image
    array = grid.permute(1, 2, 0).numpy()
    return Image.fromarray(array.squeeze(-1) if channels == 1 else array)


def save_grid(pixel_values: Tensor, path: "str | Path", columns: int | None = None) -> Image.Image:
    """Write the grid as a PNG, making its folder, and return it."""
    picture = make_grid(pixel_values, columns)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return picture


def track_image(callbacks: Iterable[TrainerCallback], name: str, picture: Image.Image, step: int) -> None:
    """Send a picture to the trackers among a Trainer's callbacks that take pictures: TensorBoard and W&B."""
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            channels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
            pixels = channels.view(picture.height, picture.width, 3)
            callback.tb_writer.add_image(name, pixels, step, dataformats="HWC")
        elif isinstance(callback, WandbCallback):
            callback._wandb.log({name: callback._wandb.Image(picture), "train/global_step": step})
