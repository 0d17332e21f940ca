"""The fit of lambda against closed forms, finite differences and the means that were asked for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gdc.moments import fit_moments, weighted_stats


def sample(seed, size, features, groups=1):
    """Binary and graded features, weights (a fifth of them 0) and prompts of random samples."""
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(size, features, dtype=torch.float64, generator=generator)
    phi[:, 0] = (phi[:, 0] > 0.5).double()
    log_w = 2 * torch.randn(size, dtype=torch.float64, generator=generator)
    log_w[torch.rand(size, generator=generator) < 0.2] = -math.inf
    return phi, log_w, torch.arange(size) % groups


def fit(phi, log_w, wanted, group=None, start=None):
    group = torch.zeros(len(phi), dtype=torch.long) if group is None else group
    start = torch.zeros(phi.shape[1]) if start is None else start
    names = [f"feature{k}" for k in range(phi.shape[1])]
    return fit_moments(phi, log_w, torch.as_tensor(wanted, dtype=torch.float64), group, start, names)


def naive_means(lam, phi, log_w, group):
    """Means over prompts of the self-normalised weighted mean, prompt by prompt; prompts without weight left out."""
    rows = []
    for prompt in group.unique():
        w = torch.exp(log_w + phi @ lam)[group == prompt]
        if w.sum() > 0:
            rows.append((w[:, None] * phi[group == prompt]).sum(0) / w.sum())
    return torch.stack(rows).mean(0)


def logit(x):
    return math.log(x) - math.log1p(-x)


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), mean=st.floats(0.02, 0.98), start=st.floats(-3, 3))
def test_closed_form_of_one_binary_feature(seed, mean, start):
    """lambda = logit(mu) - logit(mu0), mu0 the mean under the other factors: their weights, not the samples' counts."""
    phi, log_w, _ = sample(seed, 200, 1)
    w = log_w.exp()
    under_others = float((w * phi[:, 0]).sum() / w.sum())
    result = fit(phi, log_w, [mean], start=torch.tensor([start]))
    assert float(result.lam) == pytest.approx(logit(mean) - logit(under_others), abs=1e-6)
    assert abs(under_others - float(phi.mean())) > 1e-6  # the plain mean would be told apart


@pytest.mark.parametrize("groups", [1, 5])
def test_three_moments_jointly(groups):
    phi, log_w, group = sample(1, 400, 3, groups)
    wanted = torch.tensor([0.6, -0.4, 0.7], dtype=torch.float64)
    result = fit(phi, log_w, wanted, group)
    torch.testing.assert_close(naive_means(result.lam, phi, log_w, group), wanted, rtol=0, atol=1e-7)
    torch.testing.assert_close(result.mean, wanted, rtol=0, atol=1e-7)
    alone = fit(phi[:, :1], log_w, wanted[:1], group)
    assert abs(float(alone.lam - result.lam[0])) > 1e-3  # fitted one by one they would miss


def test_weights_count_up_to_a_constant_per_prompt():
    phi, log_w, group = sample(2, 300, 2, 3)
    shifted = log_w + torch.tensor([5.0, -300.0, 300.0], dtype=torch.float64)[group]
    torch.testing.assert_close(fit(phi, log_w, [0.5, 0.2], group).lam, fit(phi, shifted, [0.5, 0.2], group).lam)


def test_a_prompt_without_weight_is_left_out():
    phi, log_w, group = sample(3, 300, 2, 3)
    log_w[group == 1] = -math.inf
    kept = group != 1
    torch.testing.assert_close(
        fit(phi, log_w, [0.5, 0.2], group).lam, fit(phi[kept], log_w[kept], [0.5, 0.2], group[kept]).lam
    )


def test_gradient_and_hessian_by_finite_differences():
    phi, log_w, group = sample(4, 120, 3, 4)
    alive = log_w > -math.inf
    phi, log_w, group = phi[alive], log_w[alive], group[alive]
    lam, step = torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64), 1e-5
    log_z, mean, covariance, _ = weighted_stats(lam, phi, log_w, group, 4)
    prompts = [torch.logsumexp((log_w + phi @ lam)[group == prompt], 0) for prompt in range(4)]
    assert float(log_z) == pytest.approx(float(sum(prompts)) / 4)
    for k, direction in enumerate(torch.eye(3, dtype=torch.float64)):
        up = weighted_stats(lam + step * direction, phi, log_w, group, 4)
        down = weighted_stats(lam - step * direction, phi, log_w, group, 4)
        assert float(mean[k]) == pytest.approx(float(up[0] - down[0]) / (2 * step), abs=1e-8)
        torch.testing.assert_close(covariance[k], (up[1] - down[1]) / (2 * step), rtol=0, atol=1e-8)


def test_effective_sample_size():
    """Kish's, per prompt, summed: equal weights count each, a dominating one counts alone."""
    phi = torch.tensor([[0.0], [1.0]] * 4, dtype=torch.float64)
    group = torch.tensor([0] * 4 + [1] * 4)
    assert fit(phi, torch.zeros(8), [0.5], group).ess == pytest.approx(8)
    log_w = torch.tensor([0.0] * 4 + [60.0, 60.0, 0.0, 0.0])
    assert fit(phi, log_w, [0.5], group).ess == pytest.approx(4 + 2)
    result = fit(phi, torch.zeros(8), [0.9])
    w = torch.tensor([1.0, 9.0] * 4)  # odds of 9 to 1
    assert result.ess == pytest.approx(float(w.sum() ** 2 / (w**2).sum()))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_scale_of_a_feature_doesnt_matter(scale):
    phi, log_w, _ = sample(5, 300, 2)
    unit = torch.tensor([1.0, scale], dtype=torch.float64)
    wanted = torch.tensor([0.5, 0.8], dtype=torch.float64)
    torch.testing.assert_close(
        fit(phi * unit, log_w, wanted * unit).lam * unit, fit(phi, log_w, wanted).lam, rtol=1e-5, atol=1e-7
    )


def test_a_mean_near_the_edge_from_a_far_start():
    """Newton's full steps would overshoot here; damping has to find it."""
    phi = torch.tensor([[0.0]] * 999 + [[1.0]], dtype=torch.float64)
    result = fit(phi, torch.zeros(1000), [0.999], start=torch.tensor([-30.0]))
    assert float(result.lam) == pytest.approx(logit(0.999) - logit(0.001), abs=1e-6)


@pytest.mark.parametrize("mean", [0.0, 1.0, 1.5, -0.1])
def test_infeasible_mean(mean):
    phi, log_w, _ = sample(6, 100, 1)
    alive = int((log_w > -math.inf).sum())
    with pytest.raises(ValueError, match=rf"mean {mean:g} of 'feature0' .* the {alive} samples .* \(0, 1\)\. Ask"):
        fit(phi, log_w, [mean])


def test_infeasible_under_the_hard_constraints_alone():
    """Without the forbidden samples 0.5 is out of reach, though the samples as a whole span it."""
    phi = torch.tensor([[0.0], [0.0], [1.0], [1.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"mean 0\.5 of 'feature0' .* the 2 samples .* \(0, 0\)"):
        fit(phi, torch.tensor([0.0, 0.0, -math.inf, -math.inf]), [0.5])


def test_the_range_of_a_shared_lambda_is_the_mean_of_the_prompts_ranges():
    phi = torch.tensor([[0.0], [1.0], [0.0], [0.0]], dtype=torch.float64)
    group = torch.tensor([0, 0, 1, 1])
    assert float(fit(phi, torch.zeros(4), [0.4], group).lam) == pytest.approx(logit(0.8))
    with pytest.raises(ValueError, match=r"\(0, 0\.5\)"):
        fit(phi, torch.zeros(4), [0.6], group)


def test_contradictory_moments():
    phi, log_w, _ = sample(7, 200, 1)
    twice = torch.cat([phi, phi], 1)
    with pytest.raises(ValueError, match=r"can't be met together .*feature0: wanted 0\.2, reached .*; feature1: want"):
        fit(twice, log_w, [0.2, 0.8])
    exclusive = torch.cat([phi, 1 - phi], 1)
    with pytest.raises(ValueError, match="can't be met together"):
        fit(exclusive, log_w, [0.7, 0.7])
    both = fit(exclusive, log_w, [0.7, 0.3])  # redundant, yet consistent
    torch.testing.assert_close(both.mean, torch.tensor([0.7, 0.3], dtype=torch.float64), rtol=0, atol=1e-6)


def test_no_sample_in_the_support():
    with pytest.raises(ValueError, match="none of the 3 samples satisfies .* the moments feature0 can't be fitted"):
        fit(torch.ones(3, 1), torch.full((3,), -math.inf), [0.5])


# ---- a lambda for each group of prompts ----


def grouped(phi, log_w, wanted, group, column, **options):
    names = [f"lambda{k}" for k in range(len(wanted))]
    wanted = torch.tensor(wanted, dtype=torch.float64)
    return fit_moments(phi, log_w, wanted, group, torch.zeros(len(wanted)), names, column, **options)


def test_groups_of_prompts_are_fitted_as_if_alone():
    """Without a shared moment the problem falls apart, whatever the groups' sizes."""
    phi, log_w, prompt = sample(8, 600, 2, 6)
    of_prompt = torch.tensor([0, 0, 0, 0, 1, 1])
    column = torch.stack([of_prompt[prompt], 2 + of_prompt[prompt]], 1)
    result = grouped(phi, log_w, [0.5, 0.3, -0.2, 0.4], prompt, column)
    for part, (lambdas, wanted) in enumerate([([0, 2], [0.5, -0.2]), ([1, 3], [0.3, 0.4])]):
        mine = of_prompt[prompt] == part
        alone = fit(phi[mine], log_w[mine], wanted, prompt[mine])
        torch.testing.assert_close(result.lam[lambdas], alone.lam, rtol=0, atol=1e-6)
        torch.testing.assert_close(result.mean[lambdas], torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-7)
        torch.testing.assert_close(result.ess_K[lambdas], alone.ess_K)


def test_a_shared_moment_and_one_with_groups_jointly():
    phi, log_w, prompt = sample(9, 600, 2, 4)
    of_prompt = torch.tensor([0, 0, 0, 1])
    column = torch.stack([torch.zeros_like(prompt), 1 + of_prompt[prompt]], 1)
    result = grouped(phi, log_w, [0.5, -0.2, 0.4], prompt, column)
    tilted = log_w + phi[:, 0] * result.lam[0] + phi[:, 1] * result.lam[1 + of_prompt[prompt]]
    assert float(naive_means(torch.zeros(2).double(), phi, tilted, prompt)[0]) == pytest.approx(0.5, abs=1e-7)
    for part, wanted in enumerate([-0.2, 0.4]):
        mine = of_prompt[prompt] == part
        mean = naive_means(torch.zeros(2).double(), phi[mine], tilted[mine], prompt[mine])[1]
        assert float(mean) == pytest.approx(wanted, abs=1e-7)


def test_the_hessian_with_groups_by_finite_differences():
    phi, log_w, prompt = sample(10, 200, 2, 4)
    alive = log_w > -math.inf
    phi, log_w, prompt = phi[alive], log_w[alive], prompt[alive]
    column = torch.stack([torch.zeros_like(prompt), 1 + prompt // 2], 1)
    lam, step = torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64), 1e-5
    _, mean, hessian, _ = weighted_stats(lam, phi, log_w, prompt, 4, column)
    share = torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64)  # of the prompts
    for k, direction in enumerate(torch.eye(3, dtype=torch.float64)):
        up = weighted_stats(lam + step * direction, phi, log_w, prompt, 4, column)
        down = weighted_stats(lam - step * direction, phi, log_w, prompt, 4, column)
        assert float(share[k] * mean[k]) == pytest.approx(float(up[0] - down[0]) / (2 * step), abs=1e-8)
        torch.testing.assert_close(hessian[k], share * (up[1] - down[1]) / (2 * step), rtol=0, atol=1e-8)


def test_what_is_not_free_stays():
    phi, log_w, prompt = sample(11, 300, 2, 3)
    column = torch.stack([torch.zeros_like(prompt), 1 + prompt], 1)
    free = torch.tensor([True, True, False, True, False])  # the last has no prompt at all
    result = grouped(phi, log_w, [0.5, 0.1, 9.0, 0.1, 9.0], prompt, column, free=free)
    assert result.lam[[2, 4]].tolist() == [0, 0] and float(result.ess_K[4]) == 0
    torch.testing.assert_close(result.mean[[0, 1, 3]], torch.tensor([0.5, 0.1, 0.1]).double(), rtol=0, atol=1e-6)


def test_mistakes_with_groups():
    phi = torch.tensor([[0.0], [1.0], [0.0], [0.0]], dtype=torch.float64)
    prompt = torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"of 'lambda1' .*\(0, 0\)\. every one of them has the value 0"):
        grouped(phi, torch.zeros(4), [0.5, 0.5], prompt, prompt[:, None])
    with pytest.raises(ValueError, match=r"of 'lambda2' .*\(nan, nan\)\. there is none of this group"):
        grouped(
            phi[:2],
            torch.zeros(2),
            [0.5, 0.5, 0.5],
            prompt[:2],
            prompt[:2, None],
            free=torch.tensor([True, False, True]),
        )
    with pytest.raises(ValueError, match="a prompt has samples in two groups of a moment"):
        grouped(phi, torch.zeros(4), [0.5, 0.5], prompt, torch.tensor([[0], [1], [1], [1]]))


def test_effective_samples_behind_a_lambda():
    """A prompt with one effective sample says nothing of lambda."""
    phi = torch.tensor([[0.0], [1.0], [1.0], [0.0], [1.0]], dtype=torch.float64)
    prompt = torch.tensor([0, 0, 1, 2, 2])
    result = grouped(
        phi,
        torch.zeros(5),
        [0.5, 0.5],
        prompt,
        torch.tensor([[0], [0], [0], [1], [1]]),
        free=torch.tensor([False, True]),
    )
    assert result.ess == pytest.approx(5) and result.ess_K.tolist() == pytest.approx([2, 2])
