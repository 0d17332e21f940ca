"""Losses of discriminators: their optimum is log p/q, whatever the loss; the bound is f-GAN's; penalties by hand."""

import math

import pytest
import torch

from hf_gdc.discriminator_losses import (
    accuracy,
    bce_loss,
    bound_loss,
    log_normaliser,
    relativistic_loss,
    squared_gradient_norm,
)
from hf_gdc.divergences import available_divergences, get_divergence

P, Q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
COUNT = 20
REAL, FAKE = (torch.repeat_interleave(torch.arange(3), (share * COUNT).round().long()) for share in (P, Q))
NAMES = [name for name in available_divergences() if name not in ("tv", "alpha")]


def best_logits(loss) -> torch.Tensor:
    """The logits of the three points that minimise a loss on samples in their exact proportions."""
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(logits)
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach()


@pytest.mark.parametrize("name", ["bce", *NAMES])
def test_the_optimum_is_the_log_ratio(name):
    if name == "bce":
        found = best_logits(lambda logits: bce_loss(logits[REAL], logits[FAKE]))
    else:
        divergence = get_divergence(name)
        found = best_logits(lambda logits: bound_loss(logits[REAL], logits[FAKE], divergence.f, divergence.f_prime))
    torch.testing.assert_close(found, torch.log(P / Q), atol=2e-4, rtol=0)


def test_relativistic_logits_are_the_log_ratio_up_to_a_constant_that_the_normaliser_finds():
    pairs = torch.cartesian_prod(REAL, FAKE)
    found = best_logits(lambda logits: relativistic_loss(logits[pairs[:, 0]], logits[pairs[:, 1]])) + 3.0
    torch.testing.assert_close(found - log_normaliser(found[FAKE]), torch.log(P / Q), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_bound_is_the_divergence_at_the_optimum_with_the_autograd_of_its_formula(name):
    divergence = get_divergence(name)
    logits = torch.log(P / Q)
    exact = float((P * divergence.f(torch.log(Q / P))).sum())
    assert -float(bound_loss(logits[REAL], logits[FAKE], divergence.f, divergence.f_prime)) == pytest.approx(
        exact, rel=1e-9
    )
    logits = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    ours = torch.autograd.grad(bound_loss(logits[REAL], logits[FAKE], divergence.f, divergence.f_prime), logits)[0]
    t = torch.exp(-logits)
    plain = (
        -(P * (divergence.f(-logits) - t * divergence.f_prime(-logits))).sum() - (Q * divergence.f_prime(-logits)).sum()
    )
    torch.testing.assert_close(ours, torch.autograd.grad(plain, logits)[0], rtol=1e-8, atol=1e-10)


# Nowozin et al. 2016, tables 1, 2 and 6, of f(p/q): the critic T = g(v), the conjugate f*(T), v of the logit.
TABLE = {
    "kl": (lambda v: v, lambda t: torch.exp(t - 1), lambda logit: logit + 1),
    "hellinger": (lambda v: 1 - torch.exp(-v), lambda t: t / (1 - t), lambda logit: logit / 2),
    "js": (
        lambda v: math.log(2) - torch.nn.functional.softplus(-v),
        lambda t: -torch.log(2 - t.exp()),
        lambda logit: logit,
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_bound_is_f_gans(name):
    """E_P[T] - E_Q[f*(T)] with T their activation of a v that is a function of the logit."""
    activation, conjugate, v_of = TABLE[name]
    divergence = get_divergence(name)
    logits = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64)
    critic = activation(v_of(logits))
    theirs = critic[REAL].mean() - conjugate(critic)[FAKE].mean()
    ours = -bound_loss(logits[REAL], logits[FAKE], divergence.f, divergence.f_prime)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-9)


def test_weights_stand_for_repeated_samples():
    logits = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    every, weights = torch.arange(3), 3 * P
    js = get_divergence("js")
    for loss in (bce_loss, lambda r, f, w=None: bound_loss(r, f, js.f, js.f_prime, w)):
        torch.testing.assert_close(loss(logits[every], logits[FAKE], weights), loss(logits[REAL], logits[FAKE]))


def test_accuracy():
    assert float(accuracy(torch.tensor([1.0, 2.0, -1.0]), torch.tensor([-1.0, 1.0, 1.0]))) == pytest.approx(0.5)
    assert float(accuracy(torch.ones(4), -torch.ones(4))) == 1.0


def test_squared_gradient_norm_is_that_of_each_row_and_differentiable():
    weight = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    norms = squared_gradient_norm((inputs * weight).sum(1) ** 2, inputs)
    expected = (2 * (inputs * weight).sum(1)[:, None] * weight).square().sum(1)
    torch.testing.assert_close(norms, expected)
    torch.testing.assert_close(
        torch.autograd.grad(norms.sum(), weight, retain_graph=True)[0], torch.autograd.grad(expected.sum(), weight)[0]
    )
