"""How far the policy is from the target, measured honestly.

Estimated from the policy's own samples, KL(p || pi) reads 0 where a mode was dropped. So the policy's samples are pooled
with many cached ones of the reference, each weighed by the density of the whole pool (the balance heuristic).

Left out: sampling. Shapes: A reference samples, B policy samples, of all processes; G prompts.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from .divergences import available_divergences, get_divergence
from .partition import DivergenceEstimator, Partition, effective_sample_size, group_sum

# KL(p || pi) and KL(pi || p) are logged by what they say; the others by their names.
LOG_NAMES = {"kl": "kl_target_policy", "reverse_kl": "kl_policy_target"}


@dataclass
class Scored:
    """Samples with their log-densities, each (B,) on the CPU in float64: log P, log a, log pi, log q and prompt keys."""

    log_score: Tensor
    reference_logp: Tensor | None
    policy_logp: Tensor
    sampler_logp: Tensor
    prompt_key: Tensor


def divergence_metrics(estimate: DivergenceEstimator, stderr: bool) -> dict[str, float]:
    """Every divergence of the table, by its name in logs, with `_stderr` beside it if asked."""
    metrics = {}
    for name in available_divergences():
        if name == "alpha":
            continue
        value, error = estimate.divergence(get_divergence(name))
        metrics[LOG_NAMES.get(name, name)] = value
        if stderr:
            metrics[f"{LOG_NAMES.get(name, name)}_stderr"] = error
    return metrics


def rollout_metrics(scored: Scored, log_z_N: Tensor, partition: Partition) -> dict[str, float]:
    """What one set of rollouts says of the policy and the target, given the running log Z; cheap, but blind to modes that
    the policy dropped (see `pooled_metrics`)."""
    keys, group = torch.unique(scored.prompt_key, return_inverse=True)
    log_z_G = partition.log_z(keys)
    log_ratio = scored.policy_logp - scored.sampler_logp
    own = torch.exp(log_ratio - log_ratio.max())
    estimate = DivergenceEstimator(
        scored.log_score, scored.policy_logp, scored.sampler_logp, group, len(keys), own, log_z_G=log_z_G
    )
    metrics = divergence_metrics(estimate, stderr=False)
    known = log_z_G > -math.inf
    return metrics | {
        "kl_policy_reference": float((log_ratio.exp() * (scored.policy_logp - scored.reference_logp)).mean()),
        "log_z": float(log_z_G[known].mean()),
        "log_z_stderr": float((partition.log_z_stderr(keys)[known] ** 2).sum().sqrt() / known.sum()),
        "ess": effective_sample_size((scored.log_score - scored.sampler_logp - log_z_N)[log_z_N > -math.inf]),
        "in_support": float(estimate.in_support_G.mean()),
        "prompts_without_support": float((~known).sum()),
    }


def pooled_metrics(policy: Scored, reference: Scored) -> dict[str, float]:
    """Divergences between policy and target, log Z and support, from both pools together.

    Both pools are drawn without warping, for the same prompts. Reference samples outside of the target's support need no
    `policy_logp`.
    """
    keys, group = torch.unique(torch.cat([policy.prompt_key, reference.prompt_key]), return_inverse=True)
    own = torch.cat([torch.ones_like(policy.log_score), torch.zeros_like(reference.log_score)])
    share_G = group_sum(own, group, len(keys)) / group_sum(torch.ones_like(own), group, len(keys))

    def both(name: str) -> Tensor:
        return torch.cat([getattr(policy, name), getattr(reference, name)])

    log_m = torch.logaddexp(
        share_G[group].log() + both("policy_logp"), torch.log1p(-share_G[group]) + both("reference_logp")
    )
    estimate = DivergenceEstimator(both("log_score"), both("policy_logp"), log_m, group, len(keys), own)
    log_z, log_z_stderr = estimate.log_z()
    return divergence_metrics(estimate, stderr=True) | {
        "log_z": log_z,
        "log_z_stderr": log_z_stderr,
        "in_support": float(estimate.in_support_G.mean()),
        "ess": estimate.ess,
        "prompts_without_support": float(estimate.unknown),
    }


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Without what is not a finite number: JSON has no NaN or Infinity."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def repeated(rows: Sequence, total: int) -> list:
    """Each row as often as makes at least `total` of them together, copies side by side."""
    return [row for row in rows for _ in range(math.ceil(total / len(rows)))]


def first_rows(dataset: Iterable[dict], most: int) -> list[dict]:
    """Up to `most` first rows of a dataset or stream.

    Raises:
        ValueError: it is empty or has no `prompt` column.
    """
    rows = list(islice(iter(dataset), most))
    if not rows:
        raise ValueError("the dataset is empty: it needs at least one row with a `prompt`.")
    if "prompt" not in rows[0]:
        raise ValueError(
            f"the dataset needs a column `prompt`; it has {', '.join(f'`{name}`' for name in rows[0])}. "
            "Use dataset.rename_column."
        )
    return rows
