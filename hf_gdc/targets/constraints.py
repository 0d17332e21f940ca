"""The two kinds of constraint of distributional control: for every sample, and on average.

Khalifa, Elsahar & Dymetman 2021 (arXiv 2012.11635): among all distributions that satisfy the constraints, the one closest
to the reference in KL is a(x) * b(x) * exp(lambda . phi(x)) / Z.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..features import Feature
from ..rollouts import Rollouts
from .base import Factor


class Pointwise(Factor):
    """b(x) in {0, 1}: every sample must have the feature.

    Args:
        feature: a function or text (see `hf_gdc.features`) that gives 0 or 1.
        name: its name in logs.

    Raises:
        ValueError: when scored, if the feature gives anything but 0 and 1.
    """

    hard = True

    def __init__(self, feature: "str | Callable | Feature", name: str | None = None):
        self.feature = Feature(feature, name)
        self.features = [self.feature]

    def log_score(self, rollouts: Rollouts) -> Tensor:
        value = self.feature(rollouts)
        wrong = (value != 0) & (value != 1)
        if bool(wrong.any()):
            raise ValueError(
                f"Pointwise feature {self.feature.name!r} must be 0 or 1 but gave {float(value[wrong][0]):g}. "
                "Threshold it, or use Moment or Reward for graded features."
            )
        return torch.where(value == 1, 0.0, -math.inf)

    def formula(self) -> str:
        return f"[{self.feature.name}]"

    def to_dict(self) -> dict:
        return {"feature": _spelling(self.feature), "name": self.feature.name}


class Moment(Factor):
    """exp(lambda * phi(x)) with lambda such that E_p[phi] = mean.

    Args:
        feature: a function or text (see `hf_gdc.features`).
        mean: the wanted mean under the target.
        name: its name in logs.

    `lam` is solved for by the target, jointly for all moments and given all other factors.
    """

    log_linear = True

    def __init__(self, feature: "str | Callable | Feature", mean: float, name: str | None = None):
        self.feature, self.mean, self.lam = Feature(feature, name), float(mean), 0.0
        self.features = [self.feature]
        if not math.isfinite(self.mean):
            raise ValueError(f"the wanted mean of {self.feature.name!r} must be a number, not {mean!r}.")

    def log_score(self, rollouts: Rollouts) -> Tensor:
        return self.lam * self.feature(rollouts)

    def formula(self) -> str:
        return f"exp({self.lam:.3g} * {self.feature.name})"

    def to_dict(self) -> dict:
        return {"feature": _spelling(self.feature), "mean": self.mean, "name": self.feature.name}

    def state_dict(self) -> dict:
        return {"lam": self.lam}

    def load_state_dict(self, state: dict) -> None:
        self.lam = state["lam"]


def _spelling(feature: Feature) -> str:
    if feature.spec is None:
        raise ValueError(
            f"feature {feature.name!r} can't be saved: it is a lambda or belongs to a script. Put it into a file and give "
            "it as 'my_features.py:function'."
        )
    return feature.spec
