"""Divergences of next-token distributions, summed over the vocabulary, and their gradient through a sampled sequence.

    J = sum_t E_{x_<t ~ pi}[ D_f(pi(. | x_<t) || p(. | x_<t)) ]

    grad J = E_pi[ sum_t grad D_t  +  sum_s (sum_{t > s} D_t) grad log pi(x_s | x_<s) ]

The second part is the score of the prefixes, each token's reward being the divergence still to come. Leaving it out is the
usual stop-gradient through what was sampled (GKD, Agarwal et al. 2023, arXiv 2306.13649); with it the gradient is exact
(for reverse KL that of the whole sequence's divergence; MiniLLM, Gu et al. 2023, arXiv 2306.08543, splits it in the same way).
Off-policy every term is weighed by pi/q of its own prefix.

Left out: models. Shapes: B samples, T completion tokens, N real tokens, V vocabulary, K kept tokens of it.
"""

import math

import torch
from torch import Tensor


def token_divergence(logp_NV: Tensor, log_p_NV: Tensor, divergence, top_k: int = 0) -> Tensor:
    """(N,) D_f(pi_t || p_t) with its exact gradient in `logp_NV`, sum_v f'(pi_v / p_v) grad pi_v.

    Args:
        logp_NV: log pi of every token of the vocabulary, with gradient.
        log_p_NV: log p, without.
        divergence: a `Divergence`.
        top_k: keep the k likeliest tokens of p alone, renormalised, so that work beyond the softmax falls to N x k; all
            other tokens then have p = 0. The optimum is the truncated p: the part of p that is cut off is lost, which is
            KL(p_k || p) = -log(p of the k tokens) per token.

    Computed in float64 where the device has it: p f(pi/p) may be a product of e^-90 and e^90.
    """
    exact = torch.float32 if logp_NV.device.type == "mps" else torch.float64
    logp_NK, log_p_NK = logp_NV.to(exact), log_p_NV.to(exact)
    truncated = 0 < top_k < log_p_NV.shape[-1]
    if truncated:
        log_p_NK, ids_NK = log_p_NK.topk(top_k, -1)
        log_p_NK, logp_NK = log_p_NK.log_softmax(-1), logp_NK.gather(-1, ids_NK)
    pi_NK, at_inf = logp_NK.exp(), divergence.f_prime_inf
    with torch.no_grad():
        least = -torch.inf if math.isinf(at_inf) else math.log(torch.finfo(exact).tiny)
        inside = log_p_NK > least  # below, p is no number of this type: as good as 0, where that is finite
        log_t = torch.where(inside, logp_NK - log_p_NK, 0.0)
        value_NK = torch.where(inside, log_p_NK.exp() * divergence.f(log_t), _product(pi_NK, at_inf))
        slope_NK = torch.where(inside, divergence.f_prime(log_t), at_inf)
        value_N = value_NK.sum(-1)
        if truncated:
            value_N = value_N + at_inf * (1 - pi_NK.sum(-1)).clamp_min(0)
            slope_NK = slope_NK - at_inf  # what the kept tokens gain, the others lose
        slope_NK = torch.where(pi_NK > 0, slope_NK, 0.0)
        if math.isinf(at_inf) and not truncated and not bool(value_N.isfinite().all()):
            token = int((~value_NK[~value_N.isfinite()][0].isfinite()).nonzero()[0])
            raise ValueError(
                f"{divergence.name} is infinite: the target's next-token probability of token {token} is 0, or below the "
                "smallest number, where the policy's is not. Use js, kl, tv, hellinger or alpha below 1."
            )
    return _with_gradient(value_N, (pi_NK * slope_NK).sum(-1))


def dense_loss(
    divergence_BT: Tensor,
    logps_BT: Tensor,
    sampler_logps_BT: Tensor,
    prefix_term: bool,
    group_B: Tensor | None = None,
    importance_clip: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Per-sample loss whose mean over samples of q has the gradient of J, or without the prefix term its first part.

    Args:
        divergence_BT: from `token_divergence`, 0 where there is no token.
        logps_BT: log pi of the sampled tokens, with gradient, 0 where there is none.
        sampler_logps_BT: log q of them.
        prefix_term: whether to add the score of the prefixes.
        group_B: samples of one prompt have one number below B; each sample's baseline is the mean divergence still to come
            of the others in its group. None: no baseline.
        importance_clip: upper limit on pi/q of a prefix.

    Returns:
        loss_B, whose value is sum_t D_t (weighed by pi/q), and metrics (detached, (B,)).
    """
    log_ratio_BT = logps_BT.detach() - sampler_logps_BT
    ratio_BT = log_ratio_BT.cumsum(-1).exp()  # of the prefix with its last token
    before_BT = (log_ratio_BT.cumsum(-1) - log_ratio_BT).exp()
    if importance_clip is not None:
        ratio_BT, before_BT = ratio_BT.clamp(max=importance_clip), before_BT.clamp(max=importance_clip)
    weighed_BT = before_BT * divergence_BT
    loss_B = weighed_BT.sum(-1)
    metrics = {
        "divergence_per_completion": divergence_BT.detach().sum(-1),
        "sampling/importance_ratio": ratio_BT[:, -1],
    }
    if prefix_term:
        own_BT = weighed_BT.detach()
        to_come_BT = own_BT.flip(-1).cumsum(-1).flip(-1) - own_BT
        baseline_BT = torch.zeros_like(to_come_BT) if group_B is None else mean_of_others(to_come_BT, group_B)
        score_B = ((to_come_BT - ratio_BT * baseline_BT) * logps_BT).sum(-1)
        loss_B = loss_B + _with_gradient(torch.zeros_like(score_B), score_B)
    return loss_B, metrics


def mean_of_others(x_BT: Tensor, group_B: Tensor) -> Tensor:
    """(B, T) mean over the other samples of each sample's group; 0 for one that is alone."""
    sums_GT = torch.zeros_like(x_BT).index_add(0, group_B, x_BT)
    size_B = torch.bincount(group_B, minlength=len(x_BT))[group_B].to(x_BT.dtype)
    return (sums_GT[group_B] - x_BT) / (size_B - 1).clamp_min(1)[:, None] * (size_B > 1)[:, None]


def _with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    return torch.where(value.isinf(), value, value + (surrogate - surrogate.detach()))  # no inf - inf


def _product(probability: Tensor, limit: float) -> Tensor:
    """probability * limit, 0 where the probability is, even if the limit is infinite."""
    return torch.where(probability > 0, probability * limit, 0.0)
