"""The multipliers lambda of the moment constraints, fitted on samples.

The target b(x) * exp(lambda . phi(x)) has the wanted means mu where the convex function

    L(lambda) = mean_c log Z_c(lambda) - lambda . mu,      Z_c(lambda) = sum_i w_i exp(lambda . phi_i) over prompt c

is smallest: its gradient is (weighted mean - mu), its Hessian the weighted covariance. Damped Newton in float64 finds it
in a few iterations on cached features (Khalifa et al. 2021, arXiv 2012.11635, section 3.2, with Newton in place of SGD).

A moment may have one lambda for each group of prompts. That is one column phi(x) * [c in g] for each group g, whose wanted
mean over all prompts is mu_g * (share of prompts in g), so L stays what it is. Since a prompt sees one column of every
moment, samples keep M features, and a table says which of the K lambdas each of them meets.

Left out: how the samples are made and weighed (`targets`), and when to fit again (`moment_window`).

Shapes: N samples, G prompts, M moments, K lambdas (K = M where no moment has groups).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class MomentFit:
    """The solution.

    Attributes:
        lam: (K,) the multipliers.
        mean: (K,) the weighted means reached, each over the prompts that it is for.
        ess: effective number of samples under the fitted target, summed over prompts.
        ess_K: (K,) the effective number of samples behind each lambda (see `ess_behind`).
    """

    lam: Tensor
    mean: Tensor
    ess: float
    ess_K: Tensor


def weighted_stats(
    lam: Tensor, phi: Tensor, log_w: Tensor, group: Tensor, groups: int, column: Tensor | None = None
) -> tuple[Tensor, ...]:
    """L's log Z part, its Hessian and the means it has at `lam`.

    Args:
        lam: (K,). phi: (N, M). log_w: (N,).
        group: (N,) prompt of each sample in [0, groups); every prompt needs a sample of positive weight.
        column: (N, M) index of the lambda that each feature meets, equal for all samples of a prompt; None: lambda m.

    Returns:
        mean over prompts of log Z; (K,) means, each over its own prompts (NaN: no prompt has this lambda); (K, K)
        Hessian of L; (G,) Kish's effective sample size of each prompt.
    """
    column_GM, prompts_K = _prompt_columns(phi, group, groups, column, len(lam))
    energy = log_w + (phi * lam[column_GM[group]]).sum(1)
    top = torch.full((groups,), -math.inf, dtype=energy.dtype).scatter_reduce(0, group, energy, "amax")
    weight = torch.exp(energy - top[group])
    total = torch.zeros(groups, dtype=energy.dtype).index_add(0, group, weight)
    share = weight / total[group]
    mean_GM = torch.zeros(groups, phi.shape[1], dtype=phi.dtype).index_add(0, group, share[:, None] * phi)
    mean_K = torch.zeros(len(lam), dtype=phi.dtype).index_add(0, column_GM.flatten(), mean_GM.flatten()) / prompts_K
    centred = phi - mean_GM[group]
    products = share[:, None, None] * centred[:, :, None] * centred[:, None, :]
    covariance_GMM = torch.zeros(groups, *products.shape[1:], dtype=phi.dtype).index_add(0, group, products)
    rows, columns = column_GM[:, :, None].expand_as(covariance_GMM), column_GM[:, None, :].expand_as(covariance_GMM)
    hessian = torch.zeros(len(lam), len(lam), dtype=phi.dtype)
    hessian = hessian.index_put((rows, columns), covariance_GMM / groups, accumulate=True)
    ess_G = 1.0 / torch.zeros(groups, dtype=energy.dtype).index_add(0, group, share**2)
    return (top + total.log()).mean(), mean_K, hessian, ess_G


def feature_range(
    phi: Tensor, group: Tensor, groups: int, column: Tensor | None = None, columns: int | None = None
) -> tuple[Tensor, Tensor]:
    """(K,) bounds, exclusive, of the means that a lambda can reach: the mean over its prompts of each prompt's extremes."""
    columns = phi.shape[1] if columns is None else columns
    column_GM, prompts_K = _prompt_columns(phi, group, groups, column, columns)
    index, bounds = group[:, None].expand_as(phi), []
    for start, reduce in ((math.inf, "amin"), (-math.inf, "amax")):
        extreme_GM = torch.full((groups, phi.shape[1]), start, dtype=phi.dtype).scatter_reduce(0, index, phi, reduce)
        total_K = torch.zeros(columns, dtype=phi.dtype).index_add(0, column_GM.flatten(), extreme_GM.flatten())
        bounds.append(total_K / prompts_K)
    return bounds[0], bounds[1]


def ess_behind(ess_G: Tensor, column_GM: Tensor, columns: int) -> Tensor:
    """(K,) 1 + sum over a lambda's prompts of (ESS - 1); 0 where it has no prompt.

    One effective sample of a prompt says nothing of lambda, since its weight is 1 whatever lambda is; with one prompt
    this is the ESS itself.
    """
    spare = (ess_G - 1)[:, None].expand_as(column_GM).flatten()
    used = torch.zeros(columns, dtype=torch.bool).index_fill(0, column_GM.flatten(), True)
    return used + torch.zeros(columns, dtype=ess_G.dtype).index_add(0, column_GM.flatten(), spare)


def _prompt_columns(phi: Tensor, group: Tensor, groups: int, column: Tensor | None, columns: int):
    """(G, M) which lambda each feature of a prompt meets, and (K,) how many prompts each lambda has."""
    if column is None:
        column_GM = torch.arange(phi.shape[1]).expand(groups, -1)
    else:
        column_GM = torch.zeros(groups, phi.shape[1], dtype=torch.int64)
        column_GM[group] = column
    prompts_K = torch.bincount(column_GM.flatten(), minlength=columns)
    return column_GM, prompts_K.to(phi.dtype)


def fit_moments(
    phi: Tensor,
    log_w: Tensor,
    wanted: Tensor,
    group: Tensor,
    start: Tensor,
    names: Sequence[str],
    column: Tensor | None = None,
    free: Tensor | None = None,
) -> MomentFit:
    """Solve for the lambda that gives the wanted means, jointly for all moments.

    Args:
        phi: (N, M) features of the samples.
        log_w: (N,) log weights of the samples under the other factors (-inf: forbidden), up to a constant per prompt.
        wanted: (K,) wanted means, each over the prompts that the lambda is for.
        group: (N,) prompt of each sample, as any integer.
        start: (K,) lambda to start from.
        names: (K,) names of the features, for messages.
        column: (N, M) index of the lambda that each feature meets; None: lambda m for feature m.
        free: (K,) bool: which lambdas to solve for; the others stay at `start`. None: all.

    Raises:
        ValueError: no sample has positive weight, a prompt's samples have different columns, or wanted means can't be
            reached, alone or together.
    """
    alive = log_w > -math.inf
    if not bool(alive.any()):
        raise ValueError(
            f"none of the {len(log_w)} samples satisfies the hard constraints, so the moments "
            f"{', '.join(names)} can't be fitted. Draw more samples (fit_samples) or relax the constraints."
        )
    phi, log_w = phi[alive].double(), log_w[alive].double()
    prompts, group = torch.unique(group[alive], return_inverse=True)
    wanted, lam = wanted.double(), start.double().clone()
    column = None if column is None else column[alive]
    free = torch.arange(len(lam)) if free is None else free.nonzero().flatten()
    column_GM, prompts_K = _prompt_columns(phi, group, len(prompts), column, len(lam))
    if column is not None and not torch.equal(column_GM[group], column):
        raise ValueError(
            "a prompt has samples in two groups of a moment, so it has no target of its own: give each prompt one value "
            "of the column that the moment's `per` names."
        )
    _check_range(phi, group, len(prompts), column, wanted, free, names)

    def stats(lam: Tensor) -> tuple[Tensor, ...]:
        return weighted_stats(lam, phi, log_w, group, len(prompts), column)

    scale, share = _spread(phi, column_GM[group], len(lam)), prompts_K / len(prompts)
    lam, mean, ess_G = _newton(stats, lam, wanted, share, scale, free)
    missed = free[(mean - wanted).abs()[free] > 1e-3 * scale[free]]
    if len(missed):
        rows = [f"{names[k]}: wanted {wanted[k]:.4g}, reached {mean[k]:.4g}" for k in missed]
        raise ValueError(
            f"the moments can't be met together on {len(phi)} samples ({'; '.join(rows)}). Each may be feasible alone: "
            "check that they don't contradict each other, or draw more samples (fit_samples)."
        )
    return MomentFit(lam, mean, float(ess_G.sum()), ess_behind(ess_G, column_GM, len(lam)))


def _newton(stats, lam: Tensor, wanted: Tensor, share: Tensor, scale: Tensor, free: Tensor) -> tuple[Tensor, ...]:
    """Minimise L over the free lambdas; returns lambda, the means reached and each prompt's ESS.

    `share` (K,) of all prompts that a lambda is for, `scale` (K,) of its feature.
    """
    weighted = (share * wanted)[free]

    def objective(lam: Tensor) -> tuple[Tensor, ...]:
        log_z, mean, hessian, ess_G = stats(lam)
        return log_z - lam[free] @ weighted, mean, hessian[free][:, free], ess_G

    ridge = 1e-10 * torch.diag((share * scale**2)[free])
    value, mean, hessian, ess_G = objective(lam)
    for _ in range(100):
        missing = (mean - wanted)[free]
        if bool((missing.abs() <= 1e-9 * scale[free]).all()):
            break
        gradient = share[free] * missing
        step = torch.zeros_like(lam)
        step[free] = torch.linalg.solve(hessian + ridge, gradient)
        size = 1.0
        while size > 1e-10:  # halve the step until the objective falls enough (Armijo)
            trial = objective(lam - size * step)
            if bool(trial[0] <= value - 1e-4 * size * (gradient @ step[free])):
                break
            size /= 2
        else:
            break  # no further descent in float64: the optimum to rounding
        lam = lam - size * step
        value, mean, hessian, ess_G = trial
    return lam, mean, ess_G


def _spread(phi: Tensor, column: Tensor, columns: int) -> Tensor:
    """(K,) standard deviations of the features among the samples that each lambda is for; 1e-12 at least."""

    def total(values: Tensor) -> Tensor:
        return torch.zeros(columns, dtype=phi.dtype).index_add(0, column.flatten(), values.flatten())

    count = total(torch.ones_like(phi)).clamp_min(1)
    centred = phi - (total(phi) / count)[column]
    return (total(centred**2) / count).sqrt().clamp_min(1e-12)


def _check_range(phi, group, groups: int, column, wanted: Tensor, free: Tensor, names: Sequence[str]) -> None:
    low, high = feature_range(phi, group, groups, column, len(wanted))
    for k in free.tolist():
        mu, lo, hi = float(wanted[k]), float(low[k]), float(high[k])
        if lo < mu < hi:
            continue
        why = ""
        if lo == hi:
            why = f"every one of them has the value {lo:g}, so either another constraint contradicts this one, or it is rare. "
        elif math.isnan(lo):
            why = "there is none of this group. "
        raise ValueError(
            f"the wanted mean {mu:g} of {names[k]!r} lies outside of what the {len(phi)} samples that satisfy the "
            f"hard constraints span, ({lo:g}, {hi:g}). {why}Ask for a mean inside, draw more samples (fit_samples), or "
            "use Pointwise where every sample must have the feature."
        )
