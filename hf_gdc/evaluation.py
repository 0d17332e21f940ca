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
    share = support_share(scored, group, len(keys))
    log_z_G = partition.log_z(keys)
    estimate = DivergenceEstimator(
        scored.log_score, scored.policy_logp, scored.sampler_logp, group, len(keys), share, log_z_G=log_z_G
    )
    metrics = divergence_metrics(estimate, stderr=False)
    known = log_z_G > -math.inf
    weight = torch.exp(scored.policy_logp - scored.sampler_logp)
    return metrics | {
        "kl_policy_reference": float((weight * (scored.policy_logp - scored.reference_logp)).mean()),
        "log_z": float(log_z_G[known].mean()),
        "log_z_stderr": float((partition.log_z_stderr(keys)[known] ** 2).sum().sqrt() / known.sum()),
        "ess": effective_sample_size((scored.log_score - scored.sampler_logp - log_z_N)[log_z_N > -math.inf]),
        "in_support": float(share.mean()),
        "prompts_without_support": float((~known).sum()),
    }


def support_share(scored: Scored, group: Tensor, groups: int) -> Tensor:
    """(G,) the policy's probability of P > 0, from samples of q with self-normalised weights pi/q."""
    log_ratio = scored.policy_logp - scored.sampler_logp
    weight = torch.exp(log_ratio - log_ratio.max())
    alive = (scored.log_score > -math.inf).double()
    return group_sum(weight * alive, group, groups) / group_sum(weight, group, groups).clamp_min(1e-300)


def pooled_metrics(policy: Scored, reference: Scored) -> dict[str, float]:
    """Divergences between policy and target, log Z and support, from both pools together.

    Every prompt of the reference's pool must be in the policy's, and the other way round. Samples outside of the target's
    support need no `policy_logp`.
    """
    keys, group = torch.unique(torch.cat([policy.prompt_key, reference.prompt_key]), return_inverse=True)
    groups, size = len(keys), len(policy.log_score)
    ones = torch.ones(len(group), dtype=torch.float64)
    share_policy = group_sum(ones[:size], group[:size], groups) / group_sum(ones, group, groups)

    def both(name: str) -> Tensor:
        return torch.cat([getattr(policy, name), getattr(reference, name)])

    # The first pool was drawn from q, which is the policy unless sampling was warped.
    drawn_from = torch.cat([policy.sampler_logp, reference.policy_logp])
    log_m = torch.logaddexp(
        share_policy[group].log() + drawn_from, torch.log1p(-share_policy[group]) + both("reference_logp")
    )
    share = support_share(policy, group[:size], groups)
    log_score = both("log_score")
    estimate = DivergenceEstimator(log_score, both("policy_logp"), log_m, group, groups, share)
    log_z, log_z_stderr = estimate.log_z()
    metrics = divergence_metrics(estimate, stderr=True)
    metrics |= {"log_z": log_z, "log_z_stderr": log_z_stderr, "in_support": float(share.mean())}
    total = estimate.w_B.sum()
    metrics["ess"] = float(total**2 / (estimate.w_B**2).sum()) if total > 0 else 0.0
    return metrics | {"prompts_without_support": float(estimate.unknown)}


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
