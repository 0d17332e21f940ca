"""How good generated images are, on a small classifier's features and probabilities.

FID, KID and the inception score are torchmetrics'; with another network than Inception behind them they compare with numbers
of the same classifier alone ("FID-LeNet"), and at equal numbers of images alone, because FID and IS are biased in theirs. So
both sets must be of one size, and real training images are always judged beside the generated ones: the floor.

Left out: the classifier (`image_classifier`). Shapes: N images a side, F features, K classes.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..images.classifier import Judged

CONFIDENT = 0.9


def frechet_distance(generated_NF: Tensor, real_NF: Tensor) -> float:
    """||m_1 - m_2||^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)) of two sets of features (FID, Heusel et al. 2017, 1706.08500)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(generated_NF.shape[1])).set_dtype(torch.float64)
    metric.update(real_NF, real=True)
    metric.update(generated_NF, real=False)
    return float(metric.compute())


def kernel_distance(generated_NF: Tensor, real_NF: Tensor, subsets: int = 100, seed: int = 0) -> float:
    """KID, the unbiased squared MMD with the kernel (x . y / F + 1)^3 (Binkowski et al. 2018, arXiv 1801.01401).

    Args:
        subsets: of 1,000 images, over which it is averaged; up to 1,000 images are one subset.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(1000, len(generated_NF))
    subsets = 1 if size == len(generated_NF) else subsets  # each would hold them all
    with _quietly(seed):
        metric = KernelInceptionDistance(feature=_Given(generated_NF.shape[1]), subsets=subsets, subset_size=size)
        metric.update(real_NF, real=True)
        metric.update(generated_NF, real=False)
        return float(metric.compute()[0])


def inception_score(logps_NK: Tensor) -> float:
    """exp(E KL(p(y | x) || p(y))), from 1 to K (Salimans et al. 2016, arXiv 1606.03498), of all images together."""
    from torchmetrics.image.inception import InceptionScore

    with _quietly():
        metric = InceptionScore(feature=_Given(logps_NK.shape[1]), splits=1)
        metric.update(logps_NK)
        return float(metric.compute()[0])


@contextmanager
def _quietly(seed: int = 0) -> Iterator[None]:
    """With random numbers of its own, for subsets and shuffles; without warnings about buffers and the spread of one split."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.manual_seed(seed)
        yield


def precision_recall(generated_NF: Tensor, real_NF: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Share of generated images inside of the real manifold, and of real ones inside of the generated (Kynkaanniemi et al.
    2019, arXiv 1904.06991): a point is inside if it is nearer to some point of the set than that is to its k-th neighbour."""
    return _share_inside(generated_NF, real_NF, neighbours), _share_inside(real_NF, generated_NF, neighbours)


def _share_inside(points: Tensor, manifold: Tensor, neighbours: int, rows: int = 1000) -> float:
    parts = manifold.split(rows)
    radius = torch.cat(
        [torch.cdist(part, manifold).kthvalue(neighbours + 1, 1).values for part in parts]
    )  # 1st: itself
    return float(
        torch.cat([(torch.cdist(part, manifold) <= radius).any(1) for part in points.split(rows)]).double().mean()
    )


def image_metrics(generated: Judged, real: Judged) -> dict[str, float]:
    """All of them, for as many generated as real images: `fid`, `kid`, `inception_score`, `precision`, `recall`, `confident`
    (share classified with probability 0.9 or more), `least_class` and `most_class` (the classes' shares over the real ones').

    Raises:
        ValueError: sets of different sizes.
    """
    check_counts(len(generated.features_BF), len(real.features_BF))
    precision, recall = precision_recall(generated.features_BF, real.features_BF)
    ratio = class_shares(generated) / class_shares(real)
    return {
        "fid": frechet_distance(generated.features_BF, real.features_BF),
        "kid": kernel_distance(generated.features_BF, real.features_BF),
        "inception_score": inception_score(generated.logps_BK),
        "precision": precision,
        "recall": recall,
        "confident": float((generated.confidence_B >= CONFIDENT).double().mean()),
        "least_class": float(ratio.min()),
        "most_class": float(ratio.max()),
    }


def check_counts(generated: int, real: int) -> None:
    """Raise a ValueError where numbers of images differ."""
    if generated != real:
        raise ValueError(
            f"FID and the inception score depend on the number of images: {generated} generated against {real} real ones "
            "can't be compared. Take as many of each."
        )


def class_shares(judged: Judged) -> Tensor:
    """(K,) share of images of each class, as classified."""
    return torch.bincount(judged.labels_B, minlength=judged.logps_BK.shape[1]).double() / len(judged.labels_B)


class _Given(nn.Module):
    """What torchmetrics takes for a network: the features are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
