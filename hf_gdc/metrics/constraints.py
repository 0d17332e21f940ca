"""How well texts keep constraints: the share that has a feature, or a feature's mean.

Samples count as independent; where several share a prompt, the intervals are too narrow. Shapes: B completions.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..features import Feature
from ..intervals import normal_quantile, wilson_interval
from ..ready_features import text_of

INTERVALS = ("wilson", "normal")


@dataclass
class _Texts:
    """What a `Feature` reads of rollouts."""

    completions: list
    prompts: list
    ids: list | None
    columns: dict[str, list]
    scores: dict = field(default_factory=dict)
    differentiable = False

    def __len__(self) -> int:
        return len(self.completions)

    def feature_arguments(self) -> dict:
        return {"prompts": self.prompts, "completions": self.completions, "completion_ids": self.ids}

    def describe(self, row: int) -> str:
        return f"sample {row}: {text_of(self.completions[row])[:80]!r}"


def constraint_rates(
    completions: Sequence,
    features: "str | Callable | Feature | Sequence[str | Callable | Feature]",
    prompts: Sequence | None = None,
    completion_ids: Sequence[Sequence[int]] | None = None,
    columns: dict[str, list] | None = None,
    interval: str = "wilson",
    confidence: float = 0.95,
) -> dict[str, float]:
    """Each feature's mean with its standard error and confidence interval.

    A feature whose values are all 0 or 1 gets a share with Wilson's or the normal interval, any other one a mean, in the
    feature's unit, with the normal interval.

    Args:
        completions: B texts (or chat messages).
        features: one or several, spelt as in `hf_gdc.features` ("contains:dragon"), or functions with that signature.
        prompts, completion_ids, columns: B each, for features that use them; prompts are empty by default.
        interval: "wilson" or "normal", of shares.
        confidence: of the interval.

    Returns:
        For each feature, under its name NAME: `NAME`, `NAME_stderr` (inf for the mean of one value), `NAME_low` and
        `NAME_high`.

    Raises:
        ValueError: no completions, an unknown feature or interval, or a feature that needs `completion_ids` without them.
    """
    if isinstance(completions, str) or not len(completions):
        raise ValueError(f"completions must be a list with at least one text, not {completions!r}.")
    if interval not in INTERVALS:
        raise ValueError(f"unknown interval {interval!r}; say one of {', '.join(map(repr, INTERVALS))}.")
    prompts = [""] * len(completions) if prompts is None else list(prompts)
    for name, values in {"prompts": prompts, "completion_ids": completion_ids, **(columns or {})}.items():
        if values is not None and len(values) != len(completions):
            raise ValueError(f"{name} has {len(values)} rows for {len(completions)} completions; give one for each.")
    texts = _Texts(list(completions), prompts, completion_ids, columns or {})
    result = {}
    for source in [features] if isinstance(features, str) or callable(features) else features:
        feature = Feature(source)
        if completion_ids is None and "completion_ids" in inspect.signature(feature.function).parameters:
            raise ValueError(
                f"feature {feature.name!r} reads token ids: pass completion_ids, one list of ids per text."
            )
        mean, stderr, low, high = _estimate(feature(texts), interval, confidence)
        result |= {feature.name: mean, f"{feature.name}_stderr": stderr}
        result |= {f"{feature.name}_low": low, f"{feature.name}_high": high}
    return result


def _estimate(value_B, interval: str, confidence: float) -> tuple[float, float, float, float]:
    """Mean, standard error and the interval's ends of float64 values (B,)."""
    samples, mean, z = len(value_B), float(value_B.mean()), normal_quantile(confidence)
    yes_or_no = bool(((value_B == 0) | (value_B == 1)).all())
    if yes_or_no:
        stderr = math.sqrt(mean * (1 - mean) / samples)
    else:
        stderr = float(value_B.std()) / math.sqrt(samples) if samples > 1 else math.inf
    low, high = mean - z * stderr, mean + z * stderr
    if yes_or_no:
        wilson = interval == "wilson"
        low, high = wilson_interval(mean, samples, confidence) if wilson else (max(low, 0.0), min(high, 1.0))
    return mean, stderr, low, high
