"""What a discriminator learns from: pure functions from logits to one number.

A logit l is an estimate of log p(x)/q(x), p being the real distribution and q what made the fake samples; every loss here has
that as its optimum where both sides weigh the same (the relativistic one up to a constant). Real samples may carry weights
with mean 1, which turn p into another distribution: the target p * exp(lambda . phi) / Z of a constraint, for one.

Left out: models, penalties on gradients. Shapes: B samples a side.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

Elementwise = Callable[[Tensor], Tensor]


def weighted_mean(values_B: Tensor, weights_B: Tensor | None) -> Tensor:
    """The mean of weighted values; weights have mean 1 over the distribution, so they are not normalised again."""
    return values_B.mean() if weights_B is None else (weights_B.to(values_B) * values_B).mean()


def bce_loss(logits_real_B: Tensor, logits_fake_B: Tensor, weights_real_B: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, E_p[softplus(-l)] + E_q[softplus(l)] (Goodfellow et al. 2014, arXiv 1406.2661)."""
    return weighted_mean(softplus(-logits_real_B), weights_real_B) + softplus(logits_fake_B).mean()


def relativistic_loss(logits_real_B: Tensor, logits_fake_B: Tensor, weights_real_B: Tensor | None = None) -> Tensor:
    """E[softplus(-(l_real - l_fake))] over pairs, a Bradley-Terry likelihood (Jolicoeur-Martineau 2019, arXiv 1807.00734).

    It fixes l up to a constant (of each prompt, where pairs share it): see `log_normaliser`.
    """
    return weighted_mean(softplus(logits_fake_B - logits_real_B), weights_real_B)


def bound_loss(
    logits_real_B: Tensor,
    logits_fake_B: Tensor,
    f: Elementwise,
    f_prime: Elementwise,
    weights_real_B: Tensor | None = None,
) -> Tensor:
    """Minus the variational bound of an f-divergence, with no conjugate of f:

        D_f(q || p) >= E_p[f(t) - t f'(t)] + E_q[f'(t)],     t = e^-l,     tight at l = log p/q

    It is f-GAN's bound (Nowozin et al. 2016, arXiv 1606.00709, equation 4) with the critic T = f'(t), since
    f*(f'(t)) = t f'(t) - f(t). The value is computed in float64; the gradient of its first part is -t times that of f'(t),
    which cancels nothing.

    Args:
        f, f_prime: of log t, as a `Divergence` has them; f' must have a gradient in log t (TV's has none).
    """
    log_t_real_B, log_t_fake_B = -logits_real_B, -logits_fake_B
    log_t = log_t_real_B.detach().double()
    t_B = torch.exp(log_t)
    value_B = (f(log_t) - t_B * f_prime(log_t)).to(logits_real_B.dtype)
    slope_B = -t_B.to(logits_real_B.dtype) * f_prime(log_t_real_B)
    real_B = value_B + slope_B - slope_B.detach()
    return -(weighted_mean(real_B, weights_real_B) + f_prime(log_t_fake_B).mean())


def log_normaliser(logits_fake_B: Tensor) -> Tensor:
    """The constant c with E_q[exp(l - c)] = 1, for logits that were learned up to one; a number without gradient.

    Pass the logits of the whole batch, over all processes.
    """
    logits_B = logits_fake_B.detach().double()
    return (torch.logsumexp(logits_B, 0) - torch.log(torch.tensor(float(len(logits_B))))).to(logits_fake_B.dtype)


def accuracy(logits_real_B: Tensor, logits_fake_B: Tensor) -> Tensor:
    """Share of samples on the right side of 0; 1/2 where the discriminator knows nothing."""
    return ((logits_real_B > 0).float().mean() + (logits_fake_B < 0).float().mean()) / 2


def squared_gradient_norm(logits_B: Tensor, inputs: Tensor) -> Tensor:
    """(B,) ||grad_x l(x)||^2, differentiable: the penalty R1 on real and R2 on fake inputs (Mescheder et al. 2018, 1801.04406).

    Args:
        inputs: (B, ...) with `requires_grad`, from which `logits_B` was computed, each logit from its own row.
    """
    (gradient,) = torch.autograd.grad(logits_B.sum(), inputs, create_graph=True)
    return gradient.flatten(1).square().sum(1)
