"""What a discriminator of text learns from: pure functions from logits to terms of a loss.

A logit l estimates log p(x)/q(x): p is the distribution of the real texts, q of what sampled the others. Terms come one for
each logit, so that a caller may weigh them (samples of an older policy, tokens of a dense discriminator) and sum over
micro-batches.

Left out: networks, penalties and weights (`discriminator_training`). Shapes: R real and F sampled logits.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

Elementwise = Callable[[Tensor], Tensor]


def binary_terms(real_R: Tensor, fake_F: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy, E_p[softplus(-l)] + E_q[softplus(l)] (Goodfellow et al. 2014, arXiv 1406.2661).

    Args:
        smoothing: s, the probability with which a real text counts as sampled (one-sided label smoothing, Salimans et al.
            2016, arXiv 1606.03498): the optimum sigmoid(l) is then (1 - s) p / (p + q), so that l stays below log((1 - s)/s).
    """
    real_R = (1 - smoothing) * softplus(-real_R) + smoothing * softplus(real_R) if smoothing else softplus(-real_R)
    return real_R, softplus(fake_F)


def pair_terms(real_R: Tensor, fake_F: Tensor) -> Tensor:
    """(R, F) terms softplus(-(l_real - l_fake)): the likelihood that the real one of two texts is preferred.

    Over pairs of one prompt it is Bradley and Terry's (GAD, Ye et al. 2025, arXiv 2511.10643), over all pairs the
    relativistic loss (Jolicoeur-Martineau 2019, arXiv 1807.00734; R3GAN). They leave l free up to a constant of each
    prompt, or of all: the partition function takes it out.
    """
    return softplus(fake_F[None] - real_R[:, None])


def bound_terms(real_R: Tensor, fake_F: Tensor, f: Elementwise, f_prime: Elementwise) -> tuple[Tensor, Tensor]:
    """Minus the variational bound of an f-divergence, from f and f' alone:

        D_f(q || p) >= E_p[f(t) - t f'(t)] + E_q[f'(t)],     t = e^-l,     tight at l = log p/q

    the bound of f-GAN (Nowozin et al. 2016, arXiv 1606.00709, equation 4) at the critic f'(t).

    Args:
        f, f_prime: of log t, as a `Divergence` has them; f' must have a gradient (`has_bound`).
    """
    log_t_R = -real_R
    slope_R = -torch.exp(log_t_R.detach()) * f_prime(log_t_R)  # has the gradient of f - t f', without its cancellations
    value_R = dual(log_t_R.detach(), f, f_prime).to(real_R.dtype)
    return -(value_R + slope_R - slope_R.detach()), -f_prime(-fake_F)


def dual(log_t: Tensor, f: Elementwise, f_prime: Elementwise) -> Tensor:
    """f(t) - t f'(t) in float64, which is -f*(f'(t)); 0 at t = 1 and falling in t."""
    log_t = log_t.double()
    return f(log_t) - torch.exp(log_t) * f_prime(log_t)


def has_bound(f_prime: Elementwise) -> bool:
    """Whether f' moves with log t, so that its bound has a gradient; total variation's does not."""
    log_t = torch.tensor([-0.7, 0.7], dtype=torch.float64, requires_grad=True)
    slopes = f_prime(log_t)
    if not slopes.requires_grad:
        return False
    return bool((torch.autograd.grad(slopes.sum(), log_t)[0] > 0).all())


def calibration(fake_F: Tensor) -> float:
    """log E_q[e^l], which is 0 for a calibrated discriminator: q e^l is then a probability."""
    return float(torch.logsumexp(fake_F.double(), 0)) - math.log(len(fake_F))
