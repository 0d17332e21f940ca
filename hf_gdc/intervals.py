"""Confidence intervals of means and shares."""

import math
from statistics import NormalDist


def normal_quantile(confidence: float) -> float:
    """How many standard errors a two-sided normal interval reaches to each side: 1.96 for 0.95.

    Raises:
        ValueError: a confidence that is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, but must lie between 0 and 1; the usual value is 0.95.")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson_interval(share: float, samples: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share of `samples` independent yes-or-no draws; good for shares near 0 and 1,
    where the normal interval has width 0."""
    z = normal_quantile(confidence)
    return max(wilson_bound(share, samples, -z), 0.0), min(wilson_bound(share, samples, z), 1.0)


def wilson_bound(share: float, samples: float, z: float) -> float:
    """One bound of it at z standard errors: the upper for positive z, the lower for negative."""
    z2_n = z * z / samples
    half = z * math.sqrt(share * (1 - share) / samples + z2_n / samples / 4)
    return (share + z2_n / 2 + half) / (1 + z2_n)
