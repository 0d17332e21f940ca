"""A small classifier of images, whose features and probabilities the metrics of generated images are computed on.

LeNet-5 (LeCun et al. 1998) with rectifiers and max pooling, for any size from 8 to 64. A number that is computed on its
features compares with others of the same classifier alone, so it is saved and known by a hash of its weights.

Left out: its training (`classifier_training`), the metrics (`metrics.images`).

Shapes: B images, C channels, H height, W width, K classes, F features.
"""

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import HFValidationError
from torch import Tensor, nn

FEATURES = 84


class LeNet(nn.Module, PyTorchModelHubMixin):
    """Two convolutions and three dense layers; `from_pretrained` takes a folder or an id of the Hub.

    Args:
        image_size: pixels a side, a multiple of 4 or 7 * 2^n.
        num_channels: of the images. num_classes: K.
    """

    def __init__(self, image_size: int = 28, num_channels: int = 1, num_classes: int = 10):
        super().__init__()
        self.image_size, self.num_channels, self.num_classes = image_size, num_channels, num_classes
        side = image_size // 2 // 2
        self.layers = nn.Sequential(
            *(nn.Conv2d(num_channels, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * side**2, 120), nn.ReLU()),
            *(nn.Linear(120, FEATURES), nn.ReLU()),
        )
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """`logits` (B, K) and `features` (B, 84) of pixel values in [-1, 1]; with labels the cross-entropy as `loss`."""
        channels, size = self.num_channels, self.image_size
        if tuple(pixel_values.shape[1:]) != (channels, size, size):
            raise ValueError(
                f"this classifier takes images (B, {channels}, {size}, {size}), not {tuple(pixel_values.shape)}."
            )
        features = self.layers(pixel_values)
        logits = self.head(features)
        output = {"logits": logits, "features": features}
        return output if labels is None else {"loss": nn.functional.cross_entropy(logits, labels), **output}

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def fingerprint(self) -> str:
        """12 hexadecimal digits of the SHA-256 of the weights, by which numbers are comparable."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
        return digest.hexdigest()[:12]


@functools.lru_cache(maxsize=4)
def load_classifier(name: str) -> LeNet:
    """The one in a folder or of an id of the Hub, shared by all who ask for it.

    Raises:
        ValueError: there is none.
    """
    try:
        return LeNet.from_pretrained(name)
    except (OSError, HFValidationError) as error:  # the latter for what is no folder and can't be an id
        raise ValueError(f"there is no classifier {name!r}: {error}") from error


@dataclass
class Judged:
    """What a classifier says of images: log-probabilities (B, K) and features (B, F), float64 on the CPU."""

    logps_BK: Tensor
    features_BF: Tensor

    @property
    def labels_B(self) -> Tensor:
        return self.logps_BK.argmax(1)

    @property
    def confidence_B(self) -> Tensor:
        return self.logps_BK.amax(1).exp()


@torch.no_grad()
def judge(classifier: LeNet, pixel_values: Tensor, batch_size: int = 1000) -> Judged:
    """One pass over images (B, C, H, W) in [-1, 1]."""
    with evaluating(classifier):
        outputs = [classifier(part.to(classifier.device)) for part in pixel_values.split(batch_size)]
    logits, features = (
        torch.cat([output[name] for output in outputs]).cpu().double() for name in ("logits", "features")
    )
    return Judged(logits.log_softmax(1), features)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    yield
    model.train(training)
