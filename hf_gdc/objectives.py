"""Pure loss functions: tensors in, loss and metrics out.

Left out: models, sampling, targets and everything with state. Shapes: B samples, T completion tokens; a mask (B, T) is
True on a completion's real tokens, which come first.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def score_function_loss(
    logp_B: Tensor,
    sampler_logp_B: Tensor,
    reward_B: Tensor,
    baseline_B: Tensor,
    importance_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-sample surrogate whose gradient estimates grad D_f(pi || p) (Go et al. 2023, theorem 1, off-policy).

        grad = -E_q[(pi/q) * (r - B) * grad log pi],     r = -f'(pi/p)

    Two ratios meet here and are kept apart: pi/q corrects for the sampler, pi/p is inside the reward.

    Args:
        logp_B: log pi(x), with gradient.
        sampler_logp_B: log q(x) of what produced the samples.
        reward_B: pseudo-rewards -f'(pi/p), treated as constants.
        baseline_B: B, independent of each sample's own completion.
        importance_clip: upper limit on pi/q; None leaves the estimator unbiased.

    Returns:
        loss_B, to be averaged over the samples of the global batch, and metrics (detached, (B,)).
    """
    ratio_B = torch.exp(logp_B.detach() - sampler_logp_B)
    weight_B = ratio_B if importance_clip is None else ratio_B.clamp(max=importance_clip)
    advantage_B = (reward_B - baseline_B).detach()
    loss_B = -weight_B * advantage_B * logp_B
    return loss_B, {"sampling/importance_ratio": ratio_B, "pseudo_reward": reward_B.detach()}


# ---- PPO ----


def token_kl(logps_BT: Tensor, reference_logps_BT: Tensor, estimator: str = "k1") -> Tensor:
    """(B, T) estimates of KL(pi || a) at each sampled token, from one sample each (Schulman 2020, joschu.net/blog/kl-approx).

    With d = log pi - log a: k1 = d is unbiased, and as a reward it gives KL's exact gradient; k3 = exp(-d) - 1 + d is
    unbiased and never negative, but as a reward its gradient is not KL's.
    """
    difference_BT = logps_BT - reference_logps_BT
    if estimator == "k1":
        return difference_BT
    assert estimator == "k3", estimator
    return torch.expm1(-difference_BT) + difference_BT


def generalized_advantages(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """GAE (Schulman et al. 2016, arXiv 1506.02438, equations 11 and 16) and the returns that values are fitted to.

        delta_t = r_t + gamma V_{t+1} - V_t,     A_t = delta_t + gamma lambda A_{t+1},     R_t = A_t + V_t

    `values_BT[t]` is the value before token t. Every completion ends after its last real token, where the value is 0,
    whether that is EOS or the last one that the maximum length allows.

    Returns:
        advantages_BT, returns_BT: 0 outside of the mask.
    """
    rewards_BT, values_BT = torch.where(mask_BT, rewards_BT, 0.0), torch.where(mask_BT, values_BT, 0.0)
    next_BT = torch.nn.functional.pad(values_BT[:, 1:], (0, 1))
    delta_BT = rewards_BT + gamma * next_BT - values_BT
    advantages_BT, following_B = torch.zeros_like(delta_BT), torch.zeros_like(delta_BT[:, 0])
    for t in reversed(range(delta_BT.shape[1])):
        following_B = advantages_BT[:, t] = delta_BT[:, t] + gamma * lam * following_B
    return advantages_BT, advantages_BT + values_BT


def clipped_policy_loss(
    logps_BT: Tensor, old_logps_BT: Tensor, advantages_BT: Tensor, cliprange: float | None
) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic surrogate per token (Schulman et al. 2017, arXiv 1707.06347, equation 7).

        L = -min(rho A, clip(rho, 1 - c, 1 + c) A),     rho = pi / pi_old

    Args:
        logps_BT: log pi, with gradient.
        old_logps_BT, advantages_BT: of the policy that the rollouts are from; constants.
        cliprange: c; None leaves the surrogate unclipped.

    Returns:
        losses (B, T) and where the clipped term was the larger one (bool).
    """
    ratio_BT = torch.exp(logps_BT - old_logps_BT)
    plain_BT = -advantages_BT * ratio_BT
    if cliprange is None:
        return plain_BT, torch.zeros_like(plain_BT, dtype=torch.bool)
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(plain_BT, clipped_BT), clipped_BT > plain_BT


def clipped_value_loss(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, cliprange: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error of the values, which may leave the old ones by `cliprange` (as in OpenAI's PPO and TRL's).

    Returns:
        losses (B, T) and where the clipped term was the larger one (bool).
    """
    plain_BT = 0.5 * (values_BT - returns_BT) ** 2
    if cliprange is None:
        return plain_BT, torch.zeros_like(plain_BT, dtype=torch.bool)
    near_BT = torch.clamp(values_BT, old_values_BT - cliprange, old_values_BT + cliprange)
    clipped_BT = 0.5 * (near_BT - returns_BT) ** 2
    return torch.maximum(plain_BT, clipped_BT), clipped_BT > plain_BT


def masked_moments(x_BT: Tensor, mask_BT: Tensor, gather=lambda sums: sums) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance (with Bessel's correction) of what the mask keeps, in float64 on the CPU.

    Args:
        gather: joins a CPU tensor (1, 3) of every process along the first dimension.
    """
    kept = x_BT[mask_BT].double().cpu()
    count = torch.tensor(float(len(kept)), dtype=torch.float64)
    mean = kept.sum() / count.clamp_min(1)
    counts, means, squares = gather(torch.stack([count, mean, ((kept - mean) ** 2).sum()])[None]).unbind(1)
    total = counts.sum()
    mean = (counts * means).sum() / total.clamp_min(1)
    # Squared deviations from each process's own mean, and of those means (Chan et al. 1983): sums of squares lose digits.
    squares = (squares + counts * (means - mean) ** 2).sum()
    return total, mean, squares / (total - 1).clamp_min(1)


def whiten(x_BT: Tensor, mask_BT: Tensor, mean: Tensor, variance: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean) / std where the mask is True, 0 elsewhere; with `shift_mean` False the mean is put back, as TRL does."""
    whitened_BT = (x_BT - mean.to(x_BT)) * torch.rsqrt(variance + 1e-8).to(x_BT)
    return torch.where(mask_BT, whitened_BT if shift_mean else whitened_BT + mean.to(x_BT), 0.0)


def adapted_kl_coef(kl_coef: float, kl: float, kl_target: float, samples: int, horizon: float) -> float:
    """Moves the KL coefficient so that KL comes to its target (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    e = clip(KL / target - 1, -0.2, 0.2),     coefficient *= 1 + e * min(samples / horizon, 1)

    The minimum is ours: with more samples than horizon the coefficient could change its sign.
    """
    error = min(max(kl / kl_target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * min(samples / horizon, 1.0))


# ---- images: through the sample ----


def pathwise(log_t_B: Tensor, f_prime: Callable[[Tensor], Tensor]) -> Tensor:
    """Per-sample loss whose gradient is that of D_f(pi || p), for samples x = G(z) that are differentiable in the generator:

        grad D_f(pi || p) = E_z[grad f'(t(G(z)))],     t = pi/p as a fixed function of x

    since sum_x f'(t) grad pi(x) is the gradient of E_pi of a fixed function. With log t = -l, l the discriminator's logit,
    JS gives the minimax loss of a GAN, f' = log(1 + t) the non-saturating one and reverse KL gives -l (Nowozin et al. 2016,
    arXiv 1606.00709).

    Args:
        log_t_B: log pi(x)/p(x) of generated samples, with the gradient through x alone: nothing that estimates t may be
            trained by this loss.
        f_prime: of log t, as a `Divergence` has it. TV's has no gradient: sign(t - 1)/2 is flat.
    """
    return f_prime(log_t_B)
