"""Metrics of generated images as metrics of `evaluate`: what the modules of `modules/` have in common.

Left out: the functions (`images`), the classifier and its training.
"""

from typing import ClassVar

import datasets
import evaluate
import torch
from torch import Tensor

from ..images.classifier import Judged, LeNet, judge, load_classifier
from ..images.data import check_pixel_values
from .images import check_counts

IMAGES = datasets.List(datasets.List(datasets.List(datasets.Value("float32"))))
USAGE = """

Args:
    predictions: generated images (N, C, H, W) in [-1, 1].
    references: as many real ones that the generator never saw, if the metric compares.
    classifier: a `LeNet`, its folder or Hub id.
    floor: as many real training images; then the result has what these score, too.

Returns:
    The numbers, those of the floor as NAME_floor, the number of `images` and the `classifier` by its hash: compare with
    results of the same classifier and as many images alone.
"""


class ImageMetric(evaluate.Metric):
    """Judges images by a classifier and gives the numbers of `measure`."""

    description: str
    source: str
    inputs: ClassVar[tuple[str, ...]] = ("predictions", "references")

    @staticmethod
    def measure(generated: Judged, real: Judged | None) -> dict[str, float]:
        raise NotImplementedError

    def _info(self):
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.source,
            inputs_description=USAGE,
            features=datasets.Features(dict.fromkeys(self.inputs, IMAGES)),
        )

    def _compute(self, predictions, references=None, *, classifier: LeNet | str, floor: Tensor | None = None):
        classifier = load_classifier(classifier) if isinstance(classifier, str) else classifier
        generated, real, train = (
            None if images is None else _judged(classifier, images) for images in (predictions, references, floor)
        )
        numbers = self.measure(generated, real)
        if train is not None:
            check_counts(len(floor), len(predictions))
            numbers |= {f"{name}_floor": value for name, value in self.measure(train, real).items()}
        return numbers | {"images": len(predictions), "classifier": classifier.fingerprint()}


def _judged(classifier: LeNet, images: list | Tensor) -> Judged:
    pixel_values = torch.as_tensor(images)
    check_pixel_values(pixel_values)
    return judge(classifier, pixel_values)
