"""What a run shows while it trains: averaged metrics between logging steps, and samples.

Left out: divergences (`evaluation`) and model cards.
"""

import math
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from .arguments import PolicyGradientConfig
from .rollouts import Rollouts
from .tracking import track_table


class Averages:
    """Means of what was added since the last `pop`; non-finite values are left out, as JSON has none."""

    def __init__(self):
        self._sums: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        self._samples, self._start = 0, time.monotonic()

    def add(self, metrics: dict[str, float], samples: int = 0) -> None:
        """Add values by name; `samples` completions were made for them."""
        for name, value in metrics.items():
            if math.isfinite(value):
                total, count = self._sums[name]
                self._sums[name] = (total + value, count + 1)
        self._samples += samples

    def pop(self) -> dict[str, float]:
        means = {name: total / count for name, (total, count) in self._sums.items()}
        now = time.monotonic()
        if self._samples:
            means["samples_per_second"] = self._samples / max(now - self._start, 1e-9)
        self._sums.clear()
        self._samples, self._start = 0, now
        return means


def length_metrics(rollouts: Rollouts, eos_ids: list[int]) -> dict[str, float]:
    """Completion lengths in tokens (EOS included) and the share cut at the maximum, named as in TRL's GRPO."""
    lengths = rollouts.lengths_B.double()
    ended = (rollouts.completion_mask_BT & _is_eos(rollouts, eos_ids)).any(-1).double()
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": 1.0 - float(ended.mean()),
    }


def _is_eos(rollouts: Rollouts, eos_ids: list[int]):
    ids = rollouts.completion_ids_BT
    return sum((ids == eos for eos in eos_ids), start=ids < 0)


def log_samples(
    rollouts: Rollouts, args: PolicyGradientConfig, step: int, callbacks: Iterable[TrainerCallback] = ()
) -> None:
    """Write all completions with what is known of them to completions/completions_STEP.parquet; print and track some."""
    table = {
        "step": [step] * len(rollouts),
        "prompt": [str(prompt) for prompt in rollouts.prompts],
        "completion": rollouts.texts,
        "log_prob": rollouts.policy_logp_B.tolist(),
        **{name: values.tolist() for name, values in rollouts.scores.items()},
    }
    track_table(callbacks, "completions", table, step)
    to_print = args.num_completions_to_print
    folder = Path(args.output_dir) / "completions"
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(table).to_parquet(str(folder / f"completions_{step:05d}.parquet"))
    for row in range(min(len(rollouts), len(rollouts) if to_print is None else to_print)):
        values = ", ".join(f"{name} {values[row]:.3g}" for name, values in rollouts.scores.items())
        prompt = f"{rollouts.prompts[row]} -> " if rollouts.prompts[row] else ""
        print(f"[{step}] {prompt}{rollouts.texts[row].strip()}  ({values})")


def warn_if_alike(rewards_N: Tensor) -> None:
    """Say that there is nothing to learn where all completions of a set of rollouts earned the same; -inf is no reward."""
    alike = len(rewards_N) > 1 and bool(rewards_N.isfinite().all())
    if alike and float(rewards_N.max() - rewards_N.min()) <= 1e-9 * max(1.0, float(rewards_N.abs().max())):
        warnings.warn(
            f"all {len(rewards_N)} completions of a set of rollouts got the same reward, {float(rewards_N[0]):.4g}: there is "
            "nothing to learn but the way back to the reference. Check the reward function on texts of your own, raise "
            "num_generations, or start from a model that earns it sometimes.",
            stacklevel=3,
        )
