"""Losses of discriminators: their optima and bounds on distributions whose ratio is known, and the game's diagnostics."""

import math

import pytest
import torch

from hf_gdc import available_divergences, get_divergence
from hf_gdc.adversarial.game import accuracy, area_under_curve, copies
from hf_gdc.adversarial.losses import binary_terms, bound_terms, calibration, dual, has_bound, pair_terms

NAMES = sorted(set(available_divergences()) - {"alpha", "tv"})


def pair(seed: int = 0):
    """Two distributions over 6 points."""
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(2, 6, dtype=torch.float64, generator=generator), 1).unbind()


def gradient(loss, at):
    at = at.clone().requires_grad_()
    return torch.autograd.grad(loss(at), at)[0]


def weighted(p, q, terms):
    return (p * terms[0]).sum() + (q * terms[1]).sum()


def test_cross_entropy_has_the_log_ratio_as_its_optimum():
    p, q = pair()
    optimum = p.log() - q.log()
    assert gradient(lambda logits: weighted(p, q, binary_terms(logits, logits)), optimum).abs().max() < 1e-15
    away = gradient(lambda logits: weighted(p, q, binary_terms(logits, logits)), optimum + 0.1)
    assert (away > 1e-4).all()


def test_label_smoothing_moves_the_optimum_as_it_says():
    p, q = pair()
    share = 0.8 * p / (p + q)
    assert (
        gradient(lambda logits: weighted(p, q, binary_terms(logits, logits, 0.2)), torch.logit(share)).abs().max()
        < 1e-15
    )
    assert torch.logit(share).max() < math.log(4)


@pytest.mark.parametrize("shift", [0.0, 1.7])
def test_pairs_have_the_log_ratio_up_to_a_constant(shift):
    p, q = pair()
    optimum = p.log() - q.log() + shift

    def loss(logits):
        return (p[:, None] * q[None] * pair_terms(logits, logits)).sum()

    assert gradient(loss, optimum).abs().max() < 1e-15
    assert gradient(loss, optimum + torch.tensor([0.5, 0, 0, 0, 0, 0])).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_bounds_are_tight_and_stationary_at_the_log_ratio(name):
    p, q = pair()
    divergence = get_divergence(name)

    def loss(logits):
        return weighted(p, q, bound_terms(logits, logits, divergence.f, divergence.f_prime))

    optimum = p.log() - q.log()
    exact = (p * divergence.f(-optimum)).sum()
    torch.testing.assert_close(-loss(optimum), exact)
    assert gradient(loss, optimum).abs().max() < 1e-12
    for seed in range(5):
        assert -loss(optimum + torch.randn(6, generator=torch.Generator().manual_seed(seed))) < exact
    numeric = [(loss(optimum + 0.3 + h) - loss(optimum + 0.3 - h)) / 2e-6 for h in 1e-6 * torch.eye(6).double()]
    analytic = gradient(loss, optimum + 0.3)
    torch.testing.assert_close(analytic, torch.stack(numeric), rtol=1e-5, atol=1e-8)


def test_only_total_variation_has_no_bound_to_climb():
    assert [
        name for name in available_divergences() if name != "alpha" and not has_bound(get_divergence(name).f_prime)
    ] == ["tv"]


@pytest.mark.parametrize("name", [*NAMES, "tv"])
def test_the_dual_falls_from_zero_at_one(name):
    divergence = get_divergence(name)
    log_t = torch.linspace(-5, 5, 41).double()
    values = dual(log_t, divergence.f, divergence.f_prime)
    assert values[20] == 0 and (values.diff() <= 1e-12).all()


# ---- diagnostics ----


def test_area_under_curve_counts_pairs():
    real, fake = torch.tensor([0.3, 1.0, 1.0, 2.0]).double(), torch.tensor([1.0, 0.0, 0.5]).double()
    pairs = [(r > f) + 0.5 * (r == f) for r in real.tolist() for f in fake.tolist()]
    assert area_under_curve(real, fake) == pytest.approx(sum(pairs) / len(pairs))
    assert area_under_curve(fake, real) == pytest.approx(1 - sum(pairs) / len(pairs))


def test_accuracy_is_of_both_sides_alike():
    real, fake = torch.tensor([1.0, -1.0, 2.0, 3.0]).double(), torch.tensor([-1.0, 0.0]).double()
    assert accuracy(real, fake) == pytest.approx((0.75 + 0.75) / 2)


def test_calibration_is_zero_where_the_logit_is_a_ratio():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.5, 0.25])
    logits = (p / q).log().double()
    assert calibration(logits[[0, 1, 1, 2]]) == pytest.approx(0.0, abs=1e-7)
    assert calibration(logits[[0, 1, 1, 2]] + 2) == pytest.approx(2.0, abs=1e-7)


def test_copies_are_counted_for_each_prompt():
    keys, prompts = torch.tensor([5, 5, 5, 6, 6]), torch.tensor([1, 1, 2, 1, 2])
    assert copies(keys, prompts) == pytest.approx(1 / 5)
