"""exp(r(x) / beta): a reward as a factor.

Reverse KL to a(x) * exp(r(x) / beta) is RLHF's objective E[r] - beta * KL(pi || a), up to scale and a constant
(Korbak et al. 2022, arXiv 2206.00761, section 3).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..features import READY, Feature
from ..reward_models import RewardAdapter, reward_model
from ..rollouts import Rollouts
from .base import Context, Factor


class Reward(Factor):
    """exp(sum_k weight_k * r_k(x) / beta), also a soft constraint.

    Args:
        reward_funcs: one reward function, or several, as TRL takes them: a function (it may return None for "not
            applicable"), a feature as text, or a reward model, by its Hub id, its path or as a model (see
            `hf_gdc.reward_models`).
        beta: the temperature, > 0, as in TRL: small beta weighs the reward more against staying near the reference.
        reward_weights: a weight for each function; default 1.
        names: what the functions are called in logs; default their own names.
        reward_processing_classes: for each function that is a reward model its own tokenizer, else None; default those
            beside the models. One function needs no list.

    Raises:
        ValueError: beta <= 0; weights, names or tokenizers that don't match the functions; a model that is no reward model.
    """

    def __init__(
        self,
        reward_funcs: "str | Callable | PreTrainedModel | Sequence[str | Callable | PreTrainedModel]",
        beta: float,
        reward_weights: Sequence[float] | None = None,
        names: Sequence[str] | None = None,
        reward_processing_classes: "PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase | None] | None" = None,
    ):
        listed, tokenizers = _as_list(reward_funcs), _as_list(reward_processing_classes)
        if reward_processing_classes is None:
            tokenizers = [None] * len(listed)
        if len(tokenizers) != len(listed):
            raise ValueError(
                f"{len(listed)} reward functions need as many reward_processing_classes, not {len(tokenizers)}: None for those "
                "that are no reward models."
            )
        listed = [_function(source, tokenizer) for source, tokenizer in zip(listed, tokenizers, strict=True)]
        if names is not None and len(names) != len(listed):
            raise ValueError(f"{len(listed)} reward functions need as many names, not {len(names)}.")
        named = zip(listed, names or [None] * len(listed), strict=True)
        self.features, self.beta = [Feature(function, name) for function, name in named], float(beta)
        self.weights = [1.0] * len(listed) if reward_weights is None else [float(w) for w in reward_weights]
        if not self.beta > 0:
            raise ValueError(
                f"Reward's beta must be positive, but is {beta!r}: at 0, exp(reward / beta) times the reference is no "
                "distribution, whatever the divergence. Use a small one, such as 0.01, for a reward that matters more than it."
            )
        if not listed or len(self.weights) != len(listed):
            raise ValueError(f"{len(listed)} reward functions need as many reward_weights, not {len(self.weights)}.")

    def bind(self, context: Context) -> None:
        for feature in self.features:
            if isinstance(feature.function, RewardAdapter):
                feature.function.bind(context.policy)

    def rewards(self, rollouts: Rollouts) -> Tensor:
        """(B,) weighted sum of the rewards; a function that says None of a sample counts 0 there."""
        values_BK = torch.stack([feature(rollouts, allow_none=True) for feature in self.features], 1)
        return torch.nan_to_num(values_BK, nan=0.0) @ torch.tensor(self.weights, dtype=torch.float64)

    def log_score(self, rollouts: Rollouts) -> Tensor:
        return self.rewards(rollouts) / self.beta

    def formula(self) -> str:
        terms = [
            feature.name if weight == 1.0 else f"{weight:g} {feature.name}"
            for feature, weight in zip(self.features, self.weights, strict=True)
        ]
        return f"exp(({' + '.join(terms)}) / {self.beta:g})"

    def to_dict(self) -> dict:
        missing = [feature.name for feature in self.features if feature.spec is None]
        if missing:
            raise ValueError(
                f"rewards {', '.join(missing)} can't be saved: give them as 'my_rewards.py:function' or from a module."
            )
        specs = [feature.spec for feature in self.features]
        names = [feature.name for feature in self.features]  # files move when a target is saved, names stay
        return {"reward_funcs": specs, "beta": self.beta, "reward_weights": self.weights, "names": names}


def _as_list(value) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _function(source, tokenizer: PreTrainedTokenizerBase | None) -> "str | Callable":
    """A feature as it is; a reward model, given as a model or by a name without a colon, as a function."""
    if isinstance(source, PreTrainedModel) or isinstance(source, str) and ":" not in source and source not in READY:
        return reward_model(source, tokenizer)
    if isinstance(source, str) and source.startswith("reward_model:") and tokenizer is not None:
        return reward_model(source.partition(":")[2], tokenizer)
    if tokenizer is not None:
        raise ValueError(
            f"reward_processing_classes are for reward models, and {source!r} is a function: give None there."
        )
    return source
