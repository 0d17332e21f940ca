"""Pure loss functions: tensors in, loss and metrics out.

Left out: models, sampling, targets and everything with state. Shapes: B samples.
"""

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
