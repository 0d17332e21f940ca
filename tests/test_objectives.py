"""The score-function loss against the exact gradient, by enumerating a categorical distribution."""

import math

import pytest
import torch

from hf_gdc.divergences import available_divergences, get_divergence
from hf_gdc.objectives import score_function_loss

SIZE = 6


def distributions(seed):
    """Policy logits with gradient, target log p and sampler log q, all over SIZE points."""
    logits, log_p, log_q = torch.randn(3, SIZE, generator=torch.Generator().manual_seed(seed)).double().unbind()
    return logits.requires_grad_(), log_p.log_softmax(-1), log_q.log_softmax(-1)


def expected_gradient(logits, log_p, log_q, f_prime, baseline=0.0, clip=None):
    """Gradient of E_q[loss], each point weighed by q."""
    logp = logits.log_softmax(-1)
    reward = -f_prime(logp.detach() - log_p)
    loss, _ = score_function_loss(logp, log_q, reward, torch.full_like(reward, baseline), clip)
    return torch.autograd.grad((log_q.exp() * loss).sum(), logits)[0]


@pytest.mark.parametrize("baseline", [0.0, -1.7])
@pytest.mark.parametrize("name", sorted(set(available_divergences()) - {"alpha"}))
def test_gradient_is_that_of_the_divergence(name, baseline):
    divergence = get_divergence(name)
    for seed in range(3):
        logits, log_p, log_q = distributions(seed)
        logp = logits.log_softmax(-1)
        (exact,) = torch.autograd.grad((log_p.exp() * divergence.f(logp - log_p)).sum(), logits)
        on_policy = expected_gradient(logits, log_p, logp.detach(), divergence.f_prime, baseline)
        off_policy = expected_gradient(logits, log_p, log_q, divergence.f_prime, baseline)
        torch.testing.assert_close(on_policy, exact, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(off_policy, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["kl", "js", "tv", "chi2", "hellinger"])
def test_gradient_where_the_target_forbids_points(name):
    """There the divergence is E_p f + f'(inf) pi(p = 0)."""
    divergence = get_divergence(name)
    logits, log_p, log_q = distributions(9)
    log_p = torch.cat([log_p[:4].log_softmax(-1), torch.full((2,), -math.inf, dtype=torch.float64)])
    logp = logits.log_softmax(-1)
    inside = (log_p[:4].exp() * divergence.f(logp[:4] - log_p[:4])).sum()
    (exact,) = torch.autograd.grad(inside + divergence.f_prime_inf * logp[4:].exp().sum(), logits)
    torch.testing.assert_close(
        expected_gradient(logits, log_p, log_q, divergence.f_prime), exact, rtol=1e-10, atol=1e-12
    )


def test_clip_limits_the_correction_and_nothing_else():
    logits, log_p, log_q = distributions(4)
    f_prime = get_divergence("js").f_prime
    ratio = (logits.detach().log_softmax(-1) - log_q).exp()
    clip = float(ratio.sort().values[SIZE // 2])
    # Limiting pi/q to c is the gradient under the smaller weights min(pi, c q).
    logp = logits.log_softmax(-1)
    kept = torch.minimum(logp.detach().exp(), clip * log_q.exp())
    wanted = torch.autograd.grad((kept * f_prime(logp.detach() - log_p) * logp).sum(), logits)[0]
    torch.testing.assert_close(expected_gradient(logits, log_p, log_q, f_prime, clip=clip), wanted)
    assert not torch.allclose(wanted, expected_gradient(logits, log_p, log_q, f_prime))
    generous = expected_gradient(logits, log_p, log_q, f_prime, clip=float(ratio.max()))
    torch.testing.assert_close(generous, expected_gradient(logits, log_p, log_q, f_prime))


def test_metrics_and_constants():
    """The ratio is reported before clipping, and reward and baseline get no gradient."""
    logits, log_p, log_q = distributions(5)
    logp = logits.log_softmax(-1)
    reward, baseline = log_p.clone().requires_grad_(), torch.zeros(SIZE).requires_grad_()
    loss, metrics = score_function_loss(logp, log_q, reward, baseline, importance_clip=0.1)
    torch.testing.assert_close(metrics["sampling/importance_ratio"], (logp - log_q).exp().detach())
    torch.testing.assert_close(metrics["pseudo_reward"], log_p)
    gradients = torch.autograd.grad(loss.sum(), [logits, reward, baseline], allow_unused=True)
    assert gradients[0].abs().sum() > 0 and gradients[1:] == (None, None)
