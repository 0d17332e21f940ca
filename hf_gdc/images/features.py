"""Ready features of images, and their spelling: `f(images, **columns)` on images (B, C, H, W) in [0, 1].

    brightness                              the mean of an image's pixels
    image_class:path/to/classifier=3        a `LeNet`'s probability of class 3, or
    image_class:path/to/classifier=3>0.5    whether that is above a threshold, as a hard constraint needs it
    column:label=3                          whether the column `label` is 3: of real images alone

They are Tensors that keep their graph, so that a generator can be trained through them (but for thresholds and columns).
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from .classifier import LeNet, load_classifier

BATCH = 1000  # images at once


def brightness() -> Callable:
    """The mean of an image's pixels, in [0, 1]."""
    return lambda images, **_: images.flatten(1).mean(1)


def image_class(argument: str) -> Callable:
    """The probability that a classifier gives to a class: `folder-or-id=class`, `...=class>threshold`.

    Raises:
        ValueError: another spelling, no classifier there, or a class that it does not have.
    """
    found = re.fullmatch(r"(?P<model>.+)=(?P<label>\d+)(>(?P<threshold>[\d.]+))?", argument)
    if found is None:
        raise ValueError(
            f"feature 'image_class:{argument}' is not spelt image_class:path/to/classifier=3 or ...=3>0.5."
        )
    threshold = None if found["threshold"] is None else float(found["threshold"])
    return class_probability(load_classifier(found["model"]), int(found["label"]), threshold)


def class_probability(classifier: LeNet, label: int, threshold: float | None = None) -> Callable:
    """A feature: p(label | image), or with a threshold whether that is above it (0 or 1)."""
    if not 0 <= label < classifier.num_classes:
        raise ValueError(f"the classifier knows classes 0 to {classifier.num_classes - 1}, not {label}.")
    classifier.eval().requires_grad_(False)

    def probability(images: Tensor, **_) -> Tensor:
        parts = (images * 2 - 1).to(classifier.device).split(BATCH)
        values = torch.cat([classifier(part)["logits"].softmax(1)[:, label] for part in parts])
        return values if threshold is None else (values > threshold).to(values)

    probability.__name__ = f"class_{label}" if threshold is None else f"class_{label}>{threshold:g}"
    return probability


def column(argument: str) -> Callable:
    """Whether a column of the dataset has a value: `label=3`."""
    name, _, value = argument.partition("=")

    def equals(**columns) -> list[float]:
        if name not in columns:
            raise ValueError(f"feature 'column:{argument}' needs the column {name!r}, and generated images have none.")
        return [float(str(own) == value) for own in columns[name]]

    return equals
