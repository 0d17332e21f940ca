"""log Z, baselines and divergence estimates, against direct sums, naive loops, enumeration and simulation."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_gdc.divergences import available_divergences, get_divergence
from hf_gdc.evaluation import Scored, divergence_metrics, pooled_metrics
from hf_gdc.partition import (
    DivergenceEstimator,
    Partition,
    effective_sample_size,
    group_logsumexp,
    leave_one_out_baseline,
    prompt_key,
)

NAMES = sorted(set(available_divergences()) - {"alpha"})
log_weights = st.lists(
    st.tuples(st.integers(0, 3), st.one_of(st.floats(-900, 900), st.just(-math.inf))), min_size=1, max_size=30
)


def double(values):
    return torch.tensor(values, dtype=torch.float64)


# ---- log Z ----


def direct_log_z(keys, log_w, key):
    mine = log_w[keys == key]
    return float(torch.logsumexp(mine, 0) - math.log(len(mine)))


@settings(deadline=None)
@given(samples=log_weights, cuts=st.sets(st.integers(1, 29)))
def test_log_z_is_the_direct_one_however_samples_come(samples, cuts):
    keys = torch.tensor([7 * key - 10 for key, _ in samples])
    log_w = double([value for _, value in samples])
    partition, bounds = Partition(), [0, *sorted(cut for cut in cuts if cut < len(samples)), len(samples)]
    for start, stop in zip(bounds, bounds[1:], strict=False):
        partition.update(keys[start:stop], log_w[start:stop], version=0)
    assert partition.log_z(keys).tolist() == pytest.approx([direct_log_z(keys, log_w, key) for key in keys], abs=1e-9)
    assert partition.samples == len(samples)
    for key, stderr in zip(keys, partition.log_z_stderr(keys).tolist(), strict=True):
        mine = log_w[keys == key]
        if len(mine) == 1 or mine.max() == -math.inf:
            assert stderr == math.inf
        else:
            w = (mine - mine.max()).exp()  # sqrt(Var w / n) / mean w, Var with n - 1
            assert stderr == pytest.approx(float(w.std() / math.sqrt(len(w)) / w.mean()), rel=1e-6, abs=1e-6)


def test_a_new_version_starts_afresh_and_state_travels():
    keys, partition = torch.tensor([5, 5, 9]), Partition()
    partition.update(keys, double([1.0, 2.0, 3.0]), version=0)
    copy = Partition()
    copy.load_state_dict(partition.state_dict())
    for other in (partition, copy):
        other.update(keys[:1], double([4.0]), version=0)
        assert other.log_z(torch.tensor([9, 5])).tolist() == pytest.approx(
            [3.0, math.log((math.e + math.e**2 + math.e**4) / 3)]
        )
        other.update(keys[:2], double([0.0, math.log(3)]), version=1)
        assert other.samples == 2 and float(other.log_z(keys[:1])) == pytest.approx(math.log(2))


def test_a_prompt_with_z_zero():
    partition, key = Partition(), torch.tensor([3])
    partition.update(key.repeat(4), torch.full((4,), -math.inf), version=0)
    assert float(partition.log_z(key)) == -math.inf and float(partition.log_z_stderr(key)) == math.inf
    partition.update(key, double([2.0]), version=0)
    assert float(partition.log_z(key)) == pytest.approx(2 - math.log(5))  # the zeros count


def test_stderr_of_log_z_against_simulation():
    """2,000 runs of 400 samples: their sd is known to 1/sqrt(4000) = 1.6%, the delta method's bias is about 1/400."""
    log_w = torch.randn(2000, 400, generator=torch.Generator().manual_seed(0)).double()
    keys = torch.arange(2000).repeat_interleave(400)
    partition = Partition()
    partition.update(keys, log_w.flatten(), version=0)
    one_each = torch.arange(2000)
    reported = float(partition.log_z_stderr(one_each).square().mean().sqrt())
    assert float(partition.log_z(one_each).std()) == pytest.approx(reported, rel=4 * 0.016)


def test_prompt_keys_agree_between_processes():
    rows = [[], [0], [0, 0], [1, 2, 3], [3, 2, 1], list(range(500)), [50_000]]
    code = f"from hf_gdc.partition import prompt_key; print([prompt_key(row) for row in {rows}])"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    keys = [prompt_key(row) for row in rows]
    assert eval(other.stdout) == keys and len(set(keys)) == len(rows) and all(0 <= key < 2**63 for key in keys)


@settings(deadline=None)
@given(log_w=st.lists(st.one_of(st.floats(-300, 300), st.just(-math.inf)), min_size=1, max_size=20))
def test_effective_sample_size(log_w):
    w = torch.exp(double(log_w) - max(max(log_w), -1e300))
    expected = float(w.sum() ** 2 / (w**2).sum()) if max(log_w) > -math.inf else 0.0
    assert effective_sample_size(double(log_w)) == pytest.approx(expected, rel=1e-9)
    totals = group_logsumexp(double(log_w), torch.zeros(len(log_w), dtype=torch.long), 2)
    torch.testing.assert_close(totals, torch.stack([torch.logsumexp(double(log_w), 0), double(-math.inf)]))


# ---- the baseline ----


def naive_baseline(reward, log_ratio, group):
    values = []
    for i in range(len(reward)):
        others = [j for j in range(len(reward)) if j != i and group[j] == group[i]]
        weights = [math.exp(log_ratio[j]) for j in others]
        values.append(sum(w * reward[j] for w, j in zip(weights, others, strict=True)) / sum(weights) if others else 0)
    return values


@settings(deadline=None)
@given(
    samples=st.lists(st.tuples(st.floats(-20, 20), st.floats(-5, 5), st.integers(0, 3)), min_size=1, max_size=16),
    shift=st.floats(-1e6, 1e6),
)
def test_baseline_is_the_weighted_mean_of_the_others(samples, shift):
    reward, log_ratio, group = zip(*samples, strict=True)
    arguments = double(log_ratio), torch.tensor(group), 4
    baseline = leave_one_out_baseline(double(reward), *arguments)
    assert baseline.tolist() == pytest.approx(naive_baseline(reward, log_ratio, group), abs=1e-9)
    scaled = leave_one_out_baseline(double(reward), double(log_ratio) + 500.0, *arguments[1:])
    torch.testing.assert_close(scaled, baseline, rtol=0, atol=1e-9)  # weights count up to a factor
    shifted = leave_one_out_baseline(double(reward) + shift, *arguments)
    alone = double([group.count(own) == 1 for own in group])
    torch.testing.assert_close(shifted, baseline + shift * (1 - alone), rtol=1e-12, atol=1e-8)


def test_others_without_weight_give_no_baseline():
    baseline = leave_one_out_baseline(double([1.0, 2.0]), double([0.0, -math.inf]), torch.tensor([0, 0]), 1)
    assert baseline.tolist() == [0.0, 1.0]


# ---- divergences ----


def distributions(seed, size=12, forbidden=0):
    """log pi, log a, and an unnormalised log P whose first points are 0."""
    generator = torch.Generator().manual_seed(seed)
    logp, log_a, log_p = (1.2 * torch.randn(3, size, dtype=torch.float64, generator=generator)).unbind()
    log_p = log_a.log_softmax(-1) + log_p + 2.0
    log_p[:forbidden] = -math.inf
    return logp.log_softmax(-1), log_a.log_softmax(-1), log_p


def exact(name, logp, log_p):
    """The divergence from its definition; where it is infinite, that of the policy restricted to the support."""
    divergence, alive = get_divergence(name), log_p > -math.inf
    log_t = (logp - log_p.log_softmax(-1))[alive]
    off = float(logp[~alive].exp().sum())
    singular = divergence.f_prime_inf * off
    if math.isinf(divergence.f_prime_inf):
        log_t, singular = log_t - math.log1p(-off), 0.0
    return float((log_p.softmax(-1)[alive] * divergence.f(log_t)).sum()) + singular


@pytest.mark.parametrize("forbidden", [0, 5])
@pytest.mark.parametrize("copies", ["once", "counted"])
def test_estimates_are_exact_on_an_enumerated_space(forbidden, copies):
    """Points with the mixture that their counts are samples of: every mean over samples is then an exact expectation."""
    counts = {"once": [1] * 12, "counted": [1, 4, 2, 1, 3, 1, 7, 2, 1, 1, 5, 2]}[copies]
    points = torch.arange(12).repeat_interleave(torch.tensor(counts))
    log_m = (double(counts) / sum(counts)).log()[points]
    prompts = [distributions(seed, forbidden=forbidden) for seed in (1, 2, 3)]
    dead = distributions(4, forbidden=12)  # left out, and counted
    rows = [(log_p[points], logp[points], log_m) for logp, _, log_p in [*prompts, dead]]
    group = torch.arange(4).repeat_interleave(len(points))
    log_p_B, logp_B, log_m_B = map(torch.cat, zip(*rows, strict=True))
    own_B = (logp_B - log_m_B).exp()  # every point counts for the policy's share as much as pi says
    estimate = DivergenceEstimator(log_p_B, logp_B, log_m_B, group, 4, own_B)
    for name in NAMES:
        wanted = sum(exact(name, logp, log_p) for logp, _, log_p in prompts) / 3
        assert estimate.divergence(get_divergence(name))[0] == pytest.approx(wanted, rel=1e-10)
    assert estimate.log_z()[0] == pytest.approx(sum(float(log_p.logsumexp(0)) for _, _, log_p in prompts) / 3)
    assert estimate.unknown == 1


def test_no_prompt_with_support():
    nothing = DivergenceEstimator(
        torch.full((4,), -math.inf), torch.zeros(4), torch.zeros(4), torch.zeros(4, dtype=torch.long), 1, torch.ones(4)
    )
    assert math.isnan(nothing.divergence(get_divergence("js"))[0]) and nothing.log_z() == (-math.inf, math.inf)


def scored(points, sampler, logp, log_a, log_p):
    return Scored(log_p[points], log_a[points], logp[points], sampler[points], torch.zeros_like(points))


def draw(logp, size, seed):
    return torch.multinomial(logp.exp(), size, replacement=True, generator=torch.Generator().manual_seed(seed))


def test_standard_errors_are_calibrated():
    """200 samples of 2,000 points of a mixture of pi and a. The sd of 200 values is known to 1/sqrt(400) = 5%."""
    logp, log_a, log_p = distributions(5, size=30)
    log_m = torch.logaddexp(logp + math.log(0.2), log_a + math.log(0.8))
    runs = []
    for seed in range(200):
        points = draw(log_m, 2000, seed)
        zeros = torch.zeros_like(points)
        estimate = DivergenceEstimator(log_p[points], logp[points], log_m[points], zeros, 1, torch.ones(2000))
        runs.append([estimate.divergence(get_divergence(name)) for name in NAMES] + [estimate.log_z()])
    values, errors = torch.tensor(runs, dtype=torch.float64).unbind(-1)
    truth = double([exact(name, logp, log_p) for name in NAMES] + [float(log_p.logsumexp(0))])
    ratio = values.std(0) / errors.square().mean(0).sqrt()
    assert ((ratio - 1).abs() < 0.25).all(), dict(zip(NAMES, ratio.tolist(), strict=False))
    # 4 standard errors of the mean, and the bias of a self-normalised estimate: about stderr^2 relative
    assert ((values.mean(0) - truth).abs() < 4 * values.std(0) / math.sqrt(200) + 5 * errors.mean(0) ** 2).all()


@pytest.mark.parametrize("forbidden", [0, 10])
def test_pooled_metrics(forbidden):
    """From the policy's and the reference's samples together, each estimate is within 4 of its standard errors."""
    logp, log_a, log_p = distributions(6, size=30, forbidden=forbidden)
    policy = scored(draw(logp, 4000, 0), logp, logp, log_a, log_p)
    metrics = pooled_metrics(policy, scored(draw(log_a, 20_000, 1), log_a, logp, log_a, log_p))
    share = float(logp[forbidden:].exp().sum())
    spread = math.sqrt(share * (1 - share) / 4000)
    for name in NAMES:
        log_name = {"kl": "kl_target_policy", "reverse_kl": "kl_policy_target"}.get(name, name)
        error = metrics[f"{log_name}_stderr"]
        assert abs(metrics[log_name] - exact(name, logp, log_p)) < 4 * error, name
        assert 0 < error < 0.1 * exact(name, logp, log_p) + 0.05
    assert abs(metrics["in_support"] - share) <= 4 * spread
    assert abs(metrics["log_z"] - float(log_p.logsumexp(0))) < 4 * metrics["log_z_stderr"]


def test_share_in_support_of_a_warped_sampler():
    """q is not pi, so the share is reweighed by pi/q; here q visits forbidden points e times as often for their size."""
    logp, log_a, log_p = distributions(7, size=30, forbidden=10)
    warped = (logp + (log_p == -math.inf).double()).log_softmax(-1)
    policy = scored(draw(warped, 8000, 0), warped, logp, log_a, log_p)
    share, error = float(logp[10:].exp().sum()), math.sqrt(0.25 / 8000) * math.e  # weights differ by at most e
    own = (policy.policy_logp - policy.sampler_logp).exp()
    args = policy.log_score, policy.policy_logp, policy.sampler_logp, torch.zeros(8000, dtype=torch.long), 1, own
    found = DivergenceEstimator(*args).in_support_G
    assert abs(float(found) - share) < 4 * error < abs(share - float(warped[10:].exp().sum()))


def test_a_dropped_mode_is_seen_by_the_pool_alone():
    """The policy keeps 1e-5 of one of two modes: its own samples never show it, the reference's do."""
    log_a = double([0.25] * 4).log()
    log_p = double([0.3, 0.2, 0.3, 0.2]).log()
    logp = double([0.6 - 3e-6, 0.4 - 7e-6, 6e-6, 4e-6]).log()
    truth = exact("kl", logp, log_p)
    points = draw(logp, 2000, 0)
    zeros = torch.zeros_like(points)
    alone = DivergenceEstimator(log_p[points], logp[points], logp[points], zeros, 1, torch.ones(2000))
    assert divergence_metrics(alone, stderr=False)["kl_target_policy"] < 0.01 < truth - 4.5
    policy = scored(points, logp, logp, log_a, log_p)
    pooled = pooled_metrics(policy, scored(draw(log_a, 20_000, 1), log_a, logp, log_a, log_p))
    assert abs(pooled["kl_target_policy"] - truth) < 4 * pooled["kl_target_policy_stderr"] < 0.05 * truth


def test_a_prompt_whose_policy_has_left_the_support_does_not_spoil_the_others():
    """Restricted divergences are over the prompts where the policy has a sample in the support."""
    log_p = torch.tensor([0.0, 0.0, 0.0, 0.0, -math.inf], dtype=torch.float64)
    logp = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64).log()
    own = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0], dtype=torch.float64)  # prompt 1: only the reference is in the support
    group = torch.tensor([0, 0, 1, 1, 1])
    estimate = DivergenceEstimator(log_p, logp, logp, group, 2, own)
    assert estimate.divergence(get_divergence("reverse_kl"))[0] == pytest.approx(0.0, abs=1e-12)
    assert estimate.divergence(get_divergence("js"))[0] > 0.1
