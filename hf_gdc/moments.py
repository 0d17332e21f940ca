"""The multipliers lambda of the moment constraints, fitted on samples.

The target b(x) * exp(lambda . phi(x)) has the wanted means mu where the convex function

    L(lambda) = mean_c log Z_c(lambda) - lambda . mu,      Z_c(lambda) = sum_i w_i exp(lambda . phi_i) over prompt c

is smallest: its gradient is (weighted mean - mu), its Hessian the weighted covariance. Damped Newton in float64 finds it
in a few iterations on cached features (Khalifa et al. 2021, arXiv 2012.11635, section 3.2, with Newton in place of SGD).

Left out: how the samples are made and weighed (`targets`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class MomentFit:
    """lambda (K,), the weighted means reached (K,), and the effective number of samples under the fitted target."""

    lam: Tensor
    mean: Tensor
    ess: float


def weighted_stats(lam: Tensor, phi: Tensor, log_w: Tensor, group: Tensor, groups: int) -> tuple[Tensor, ...]:
    """Objective's log Z part, mean (K,), covariance (K, K), each averaged over groups, and the total ESS.

    `phi` (N, K), `log_w` (N,) and `group` (N,) in [0, groups); every group needs a sample of positive weight.
    """
    energy = log_w + phi @ lam
    top = torch.full((groups,), -math.inf, dtype=energy.dtype).scatter_reduce(0, group, energy, "amax")
    weight = torch.exp(energy - top[group])
    total = torch.zeros(groups, dtype=energy.dtype).index_add(0, group, weight)
    share = weight / total[group]
    mean_GK = torch.zeros(groups, phi.shape[1], dtype=phi.dtype).index_add(0, group, share[:, None] * phi)
    centred = phi - mean_GK[group]
    covariance = (share[:, None] * centred).T @ centred / groups
    ess_G = 1.0 / torch.zeros(groups, dtype=energy.dtype).index_add(0, group, share**2)
    return (top + total.log()).mean(), mean_GK.mean(0), covariance, ess_G.sum()


def fit_moments(
    phi: Tensor, log_w: Tensor, wanted: Tensor, group: Tensor, start: Tensor, names: Sequence[str]
) -> MomentFit:
    """Solve for the lambda that gives the wanted means, jointly for all moments.

    Args:
        phi: (N, K) features of the samples.
        log_w: (N,) log weights of the samples under the other factors (-inf: forbidden), up to a constant per group.
        wanted: (K,) wanted means.
        group: (N,) prompt of each sample, as an index.
        start: (K,) lambda to start from.
        names: (K,) names of the features, for messages.

    Raises:
        ValueError: no sample has positive weight, or a wanted mean lies outside of what the samples span.
    """
    alive = log_w > -math.inf
    if not bool(alive.any()):
        raise ValueError(
            f"none of the {len(log_w)} samples satisfies the hard constraints, so the moments "
            f"{', '.join(names)} can't be fitted. Draw more samples (fit_samples) or relax the constraints."
        )
    phi, log_w = phi[alive].double(), log_w[alive].double()
    groups, group = torch.unique(group[alive], return_inverse=True)
    wanted, lam = wanted.double(), start.double().clone()
    _check_range(phi, group, len(groups), wanted, names)

    def objective(lam: Tensor):
        log_z, mean, covariance, ess = weighted_stats(lam, phi, log_w, group, len(groups))
        return log_z - lam @ wanted, mean, covariance, ess

    scale = phi.std(0).clamp_min(1e-12) if len(phi) > 1 else torch.ones_like(wanted)
    value, mean, covariance, ess = objective(lam)
    for _ in range(100):
        gradient = mean - wanted
        if bool((gradient.abs() <= 1e-9 * scale).all()):
            break
        ridge = 1e-10 * torch.diag(scale**2)
        step = torch.linalg.solve(covariance + ridge, gradient)
        size = 1.0
        while size > 1e-10:  # halve the step until the objective falls enough (Armijo)
            trial = objective(lam - size * step)
            if bool(trial[0] <= value - 1e-4 * size * (gradient @ step)):
                break
            size /= 2
        else:
            break  # no further descent in float64: the optimum to rounding
        lam = lam - size * step
        value, mean, covariance, ess = trial
    missed = (mean - wanted).abs() > 1e-3 * scale
    if bool(missed.any()):
        rows = [f"{names[k]}: wanted {wanted[k]:.4g}, reached {mean[k]:.4g}" for k in missed.nonzero().flatten()]
        raise ValueError(
            f"the moments can't be met together on {len(phi)} samples ({'; '.join(rows)}). Each may be feasible alone: "
            "check that they don't contradict each other, or draw more samples (fit_samples)."
        )
    return MomentFit(lam, mean, float(ess))


def _check_range(phi: Tensor, group: Tensor, groups: int, wanted: Tensor, names: Sequence[str]) -> None:
    """With one shared lambda the mean over prompts can reach the mean of each prompt's extremes, exclusive."""
    index = group[:, None].expand_as(phi)
    low = torch.full((groups, phi.shape[1]), math.inf, dtype=phi.dtype).scatter_reduce(0, index, phi, "amin").mean(0)
    high = torch.full((groups, phi.shape[1]), -math.inf, dtype=phi.dtype).scatter_reduce(0, index, phi, "amax").mean(0)
    for name, mu, lo, hi in zip(names, wanted.tolist(), low.tolist(), high.tolist(), strict=True):
        if not lo < mu < hi:
            raise ValueError(
                f"the wanted mean {mu:g} of {name!r} lies outside of what the {len(phi)} samples that satisfy the "
                f"hard constraints span, ({lo:g}, {hi:g}). Ask for a mean inside, draw more samples (fit_samples), or "
                "use Pointwise where every sample must have the feature."
            )
