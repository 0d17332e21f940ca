"""PPO's terms against formulas written down again, against TRL 1.12's own lines where TRL has them, and where the two differ.

TRL's PPO (`trl.experimental.ppo`, removed in 1.13) is right on completions that fill the whole length, in one process and
one micro-batch, sampled at temperature 1, with padding that is not EOS. There every term must be equal.
"""

import inspect
import textwrap
from types import SimpleNamespace

import pytest
import torch

from hf_gdc.objectives import (
    adapted_kl_coef,
    clipped_policy_loss,
    clipped_value_loss,
    generalized_advantages,
    masked_moments,
    token_kl,
    whiten,
)
from hf_gdc.rollouts import completion_mask

SIZE, LENGTH, BETA, GAMMA, LAM, CLIP = 5, 7, 0.3, 0.97, 0.9, 0.2
FULL = [LENGTH] * SIZE
SHORT = [7, 3, 1, 5, 6]


def rollouts(lengths, seed=0):
    """Random float64 numbers per token, 0 behind the lengths; scores per completion."""
    torch.manual_seed(seed)
    mask = torch.arange(LENGTH)[None] < torch.tensor(lengths)[:, None]
    names = ("logps", "reference", "values", "new_logps", "new_values")
    tokens = {name: torch.randn(SIZE, LENGTH).double() * mask for name in names}
    return SimpleNamespace(mask=mask, scores=torch.randn(SIZE).double(), **tokens)


def ours(r, estimator="k1", whiten_rewards=False, lam=LAM, gamma=GAMMA, whitened=True):
    """Per-token rewards, advantages and returns, as `PPOTrainer` makes them."""
    last = r.mask & (r.mask.cumsum(-1) == r.mask.sum(-1, keepdim=True))
    rewards = torch.where(r.mask, -BETA * token_kl(r.logps, r.reference, estimator), 0.0) + last * r.scores[:, None]
    if whiten_rewards:
        rewards = whiten(rewards, r.mask, *masked_moments(rewards, r.mask)[1:], shift_mean=False)
    advantages, returns = generalized_advantages(rewards, r.values, r.mask, gamma, lam)
    if whitened:
        advantages = whiten(advantages, r.mask, *masked_moments(advantages, r.mask)[1:])
    return rewards, advantages, returns


def losses(r, advantages, returns):
    """Means over tokens of the policy's and the values' losses."""
    policy, clipped = clipped_policy_loss(r.new_logps, r.logps, advantages, CLIP)
    value, held = clipped_value_loss(r.new_values, r.values, returns, CLIP)
    return [float(x[r.mask].double().mean()) for x in (policy, value, clipped, held)]


# ---- the formulas, one number at a time ----


@pytest.mark.parametrize("lengths", [FULL, SHORT], ids=["full", "short"])
def test_advantages_are_sums_of_discounted_temporal_differences(lengths):
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, by loops, up to each completion's own end."""
    r = rollouts(lengths)
    rewards, advantages, returns = ours(r, whitened=False)
    for row, length in enumerate(lengths):
        value = [float(v) for v in r.values[row, :length]] + [0.0]
        reward = [-BETA * float(r.logps[row, t] - r.reference[row, t]) for t in range(length)]
        reward[-1] += float(r.scores[row])
        delta = [reward[t] + GAMMA * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            wanted = sum((GAMMA * LAM) ** (k - t) * delta[k] for k in range(t, length))
            assert float(advantages[row, t]) == pytest.approx(wanted, abs=1e-12)
            assert float(returns[row, t]) == pytest.approx(wanted + value[t], abs=1e-12)
        assert not advantages[row, length:].any() and not returns[row, length:].any()


def test_the_limits_of_lambda():
    """lambda = 1: what is still to come, less the value; lambda = 0: one temporal difference."""
    r = rollouts(SHORT)
    rewards, advantages, returns = ours(r, lam=1.0, gamma=1.0, whitened=False)
    torch.testing.assert_close(returns, rewards.flip(-1).cumsum(-1).flip(-1) * r.mask)
    rewards, advantages, _ = ours(r, lam=0.0, gamma=1.0, whitened=False)
    following = torch.cat([r.values[:, 1:], torch.zeros(SIZE, 1)], 1)
    torch.testing.assert_close(advantages, (rewards + following - r.values) * r.mask)


def test_kl_estimators():
    """Over a whole vocabulary both have KL as their mean; k3 is never negative."""
    torch.manual_seed(1)
    pi, a = torch.randn(2, 1, 50).double().log_softmax(-1).unbind()
    kl = (pi.exp() * (pi - a)).sum()
    for estimator in ("k1", "k3"):
        assert float((pi.exp() * token_kl(pi, a, estimator)).sum()) == pytest.approx(float(kl), abs=1e-12)
    assert token_kl(pi, a, "k3").min() >= 0 > token_kl(pi, a, "k1").min()


def test_clipping_keeps_the_worse_term_and_its_gradient():
    old, advantage = torch.zeros(1, 6).double(), torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0, -1.0]]).double()
    ratio = torch.tensor([[0.5, 1.1, 1.5, 0.5, 1.1, 1.5]]).double()
    logps = ratio.log().requires_grad_()
    loss, clipped = clipped_policy_loss(logps, old, advantage, CLIP)
    torch.testing.assert_close(loss.detach(), torch.tensor([[-0.5, -1.1, -1.2, 0.8, 1.1, 1.5]]).double())
    assert clipped.tolist() == [[False, False, True, True, False, False]]
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, -1.1, 0.0, 0.0, 1.1, 1.5]]).double())
    values = torch.tensor([[0.9, 0.9, -0.9]]).double().requires_grad_()
    loss, held = clipped_value_loss(values, torch.zeros(1, 3).double(), torch.tensor([[1.0, -1.0, 0.5]]).double(), CLIP)
    torch.testing.assert_close(loss.detach(), torch.tensor([[0.32, 1.805, 0.98]]).double())  # 0.8, 1.9 and 1.4, squared
    assert held.tolist() == [[True, False, False]]
    unlimited, none = clipped_value_loss(values, torch.zeros(1, 3), torch.zeros(1, 3), None)
    torch.testing.assert_close(unlimited, 0.5 * values**2)
    assert not none.any()


def test_adapted_kl_coef_moves_by_a_fifth_at_most():
    assert adapted_kl_coef(0.1, 6.6, 6.0, 256, 1000) == pytest.approx(0.1 * (1 + 0.1 * 0.256))
    assert adapted_kl_coef(0.1, 60.0, 6.0, 256, 1000) == pytest.approx(0.1 * (1 + 0.2 * 0.256))
    assert adapted_kl_coef(0.1, 0.0, 6.0, 256, 1000) == pytest.approx(0.1 * (1 - 0.2 * 0.256))


# ---- TRL's own lines ----


def lines_of_trl(ppo_trainer, first: str, last: str) -> str:
    """TRL's source between two markers, to be run on our rollouts."""
    source = inspect.getsource(ppo_trainer.PPOTrainer.train)
    start = source.rindex("\n", 0, source.index(first)) + 1
    end = source.index("\n", source.index(last, start))
    return textwrap.dedent(source[start:end])


def trl(r, lengths, estimator, whiten_rewards):
    """TRL's rewards, whitened advantages, returns and losses of these rollouts."""
    ppo_trainer = pytest.importorskip("trl.experimental.ppo.ppo_trainer", reason="TRL 1.13 has no PPO any more")
    sequence_lengths = torch.tensor(lengths) - 1
    index = torch.arange(LENGTH).repeat(SIZE, 1)
    space = dict(vars(ppo_trainer))
    space |= {"args": SimpleNamespace(kl_estimator=estimator, kl_coef=BETA, whiten_rewards=whiten_rewards)}
    vars(space["args"]).update(gamma=GAMMA, lam=LAM, cliprange=CLIP, cliprange_value=CLIP, vf_coef=0.1)
    space |= {"logprobs": r.logps, "ref_logprobs": r.reference, "scores": r.scores, "values": r.values}
    space |= {"sequence_lengths": sequence_lengths, "sequence_lengths_p1": sequence_lengths + 1, "responses": r.mask}
    space |= {
        "padding_mask": index > sequence_lengths[:, None],
        "padding_mask_p1": index > sequence_lengths[:, None] + 1,
    }
    exec(lines_of_trl(ppo_trainer, "logr = ref_logprobs", "advantages = torch.masked_fill"), space)
    rows = torch.arange(SIZE)
    space |= {"micro_batch_inds": rows, "vpred": r.new_values, "mb_values": r.values, "mb_return": space["returns"]}
    space |= {"new_logprobs": r.new_logps, "mb_logprobs": r.logps, "mb_advantage": space["advantages"]}
    exec(lines_of_trl(ppo_trainer, "vpredclipped = torch.clamp", "loss = pg_loss + args.vf_coef"), space)
    exec(lines_of_trl(ppo_trainer, "pg_clipfrac = masked_mean(", "                                )"), space)
    return space


@pytest.mark.parametrize("whiten_rewards", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_every_term_is_that_of_trl(estimator, whiten_rewards):
    r = rollouts(FULL, seed=2)
    theirs = trl(r, FULL, estimator, whiten_rewards)
    rewards, advantages, returns = ours(r, estimator, whiten_rewards)
    for name, value in (("rewards", rewards), ("advantages", advantages), ("returns", returns)):
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-6)  # its Bessel correction is in float32
    policy, value, clipped, held = losses(r, advantages, returns)
    assert policy == pytest.approx(float(theirs["pg_loss"]), rel=1e-5)
    assert value == pytest.approx(float(theirs["vf_loss"]), rel=1e-5)
    assert clipped == pytest.approx(float(theirs["pg_clipfrac"]), rel=1e-6)
    assert held == pytest.approx(float(theirs["vf_clipfrac"]), rel=1e-6)


@pytest.mark.parametrize("lengths", [FULL, SHORT], ids=["full", "short"])
def test_every_term_is_that_of_trls_formulas(lengths):
    """The same without TRL: whitening with Bessel's correction and 1e-8, pessimistic maxima, means over all tokens."""
    r = rollouts(lengths, seed=3)
    raw, plain, _ = ours(r, whitened=False)
    rewards, advantages, returns = ours(r, whiten_rewards=True)
    kept = raw[r.mask]
    torch.testing.assert_close(
        rewards[r.mask], (kept - kept.mean()) / (kept.var(unbiased=True) + 1e-8).sqrt() + kept.mean()
    )
    _, advantages, returns = ours(r)
    kept = plain[r.mask]
    white = (kept - kept.mean()) / (kept.var(unbiased=True) + 1e-8).sqrt()
    torch.testing.assert_close(advantages[r.mask], white)
    ratio = (r.new_logps - r.logps).exp()[r.mask]
    policy = torch.maximum(-white * ratio, -white * ratio.clamp(1 - CLIP, 1 + CLIP))
    near = torch.minimum(torch.maximum(r.new_values, r.values - CLIP), r.values + CLIP)
    value = 0.5 * torch.maximum((r.new_values - returns) ** 2, (near - returns) ** 2)[r.mask]
    ours_policy, ours_value, _, _ = losses(r, advantages, returns)
    assert ours_policy == pytest.approx(float(policy.mean()), rel=1e-12)
    assert ours_value == pytest.approx(float(value.mean()), rel=1e-12)


# ---- where we differ, and why ----


def test_difference_the_reward_comes_with_eos_and_not_behind_it():
    """TRL puts the score one position behind EOS, on padding, and trains a value there: a state that does not exist."""
    r = rollouts(SHORT)
    rewards, advantages, _ = ours(r, lam=1.0, gamma=1.0, whitened=False)
    index, end = torch.arange(LENGTH)[None], torch.tensor(SHORT)[:, None]
    behind = torch.where(index == end.clamp(max=LENGTH - 1), r.scores[:, None], 0.0)
    theirs = torch.where(r.mask, -BETA * (r.logps - r.reference), 0.0) + behind
    torch.testing.assert_close(rewards.sum(-1), theirs.sum(-1))  # the same sums
    row = SHORT.index(3)
    assert float(rewards[row, 2] - theirs[row, 2]) == pytest.approx(float(r.scores[row])) and theirs[row, 3] != 0
    # With lambda = gamma = 1 that changes no advantage of a real token; with lambda below 1 the phantom's value enters.
    phantom = torch.where(index == end, 5.0, r.values)
    everything = torch.ones_like(r.mask)
    same, _ = generalized_advantages(theirs, phantom, everything, 1.0, 1.0)
    torch.testing.assert_close(same[r.mask], advantages[r.mask])
    other, _ = generalized_advantages(theirs, phantom, everything, 1.0, LAM)
    assert (other - ours(r, gamma=1.0, whitened=False)[1])[row, 2].abs() > 0.1


def test_difference_eos_is_scored_although_it_is_the_padding():
    """TRL takes the first padding id for the end: where that is EOS, EOS itself has no loss, and padding gets values."""
    ids, eos = torch.tensor([[4, 5, 0, 0, 0], [4, 5, 6, 7, 8]]), 0
    assert completion_mask(ids, [eos]).sum(-1).tolist() == [3, 5]
    first_padding = (ids == eos).int().argmax(-1)[0]
    assert int(first_padding) == 2  # TRL: tokens 0 and 1 alone


@pytest.mark.parametrize("parts", [[2, 3], [1, 4], [5]])
def test_difference_whitening_is_over_all_processes(parts):
    """Moments put together from each process's own are those of all tokens; a process's own are others."""
    r = rollouts(SHORT)
    x = r.values + 100.0
    whole = masked_moments(x, r.mask)
    pieces = list(zip(x.split(parts), r.mask.split(parts), strict=True))
    sums = []
    for values, mask in pieces:
        masked_moments(values, mask, lambda own: sums.append(own) or own)
    for values, mask in pieces:
        joined = masked_moments(values, mask, lambda own: torch.cat(sums))
        for value, wanted in zip(joined, whole, strict=True):
            torch.testing.assert_close(value, wanted)
    white = whiten(x, r.mask, *whole[1:])[r.mask]
    assert abs(float(white.mean())) < 1e-12 and float(white.var()) == pytest.approx(1.0, abs=1e-6)
    assert float(whole[1]) == pytest.approx(float(x[r.mask].mean()))
    assert float(whole[2]) == pytest.approx(float(x[r.mask].var()))


def test_the_kl_coefficient_keeps_its_sign_however_many_samples():
    assert adapted_kl_coef(0.05, 0.0, 1.0, samples=1024, horizon=100) == pytest.approx(0.04)
    assert adapted_kl_coef(0.05, 9.0, 1.0, samples=1024, horizon=100) == pytest.approx(0.06)
