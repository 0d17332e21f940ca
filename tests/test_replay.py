"""Replay: its weights are those of the density it claims, prompt by prompt, and training with it reaches the target."""

import math

import pytest
import tiny
import torch

from hf_gdc import Pointwise, Reference
from hf_gdc.replay import Replay


def rare(completion_ids, **_):
    return [float(ids[:2] == [2, 2]) for ids in completion_ids]


def make(tmp_path, target=None, prompts=None, **options):
    options = {"per_device_train_batch_size": 4096, "fit_samples": 8192, "replay_samples": 2048} | options
    options |= {"per_device_eval_batch_size": 8192}
    target = Reference() * Pointwise(rare) if target is None else target
    return tiny.trainer(target, tmp_path, tiny.model(0, 1.0, torch.float32), prompts, **options)


def exact(trainer, prompts=("",)):
    """Enumerated strings and their exact log p, for each prompt."""
    every = tiny.enumerated(trainer, prompts)
    return every, tiny.exact_log_p(trainer, every, len(prompts))


def test_weights_are_unbiased_and_bounded(tmp_path):
    trainer = make(tmp_path)
    trainer._fit_on_reference()
    trainer.model.load_state_dict(tiny.model(1, 1.0, torch.float32).state_dict())  # the policy is not the reference
    rollouts = trainer.actors.sample_policy([{"prompt": ""}] * 4096)
    trainer.target.log_score(rollouts)
    trainer.actors.reference_logp(rollouts)
    both = trainer.replay.join(rollouts)
    assert len(both) == 4096 + 2048
    every = tiny.enumerated(trainer, sampler=trainer.model)
    policy_weight = torch.exp(both.policy_logp_B - both.sampler_logp_B)
    target_weight = torch.exp(trainer.target.log_score(both) - both.sampler_logp_B)
    *_, log_z = trainer.replay.weighted()
    z = float(trainer.target.log_score(every).exp().sum())
    assert policy_weight.max() <= 6144 / 4096 + 1e-9
    assert target_weight.max() <= log_z.exp() * 6144 / 2048 + 1e-9
    pool_error = 1 / math.sqrt(len(trainer.replay.weighted()[0]))
    for weight, mean in ((policy_weight, 1.0), (target_weight, z)):
        error = float(weight.std()) / math.sqrt(len(weight)) + pool_error * mean * 2048 / 6144
        assert abs(float(weight.mean()) - mean) < 4 * error
    count = torch.tensor(tiny.count_a(both.completion_ids())).double()
    mean = float(every.policy_logp_B.exp() @ torch.tensor(tiny.count_a(every.completion_ids())).double())
    assert float((policy_weight * count).mean()) == pytest.approx(mean, abs=4 * float(count.std()) / math.sqrt(4096))


@pytest.mark.parametrize("copies", [1, 3])
def test_shares_and_z_are_exact_for_each_prompt(tmp_path, copies):
    """From all strings the weighted set is p itself, however many equal batches it has."""
    trainer = make(tmp_path, tiny.HARD["pointwise and moment"](), ["a", "b"], num_generations=16)
    trainer.target.moments[0].lam = 0.3
    replay = Replay(trainer.target, trainer.actors, 8, 10**6)
    every, log_p = exact(trainer, ["a", "b"])
    for _ in range(copies):
        replay.add(every)
    samples, group, share, keys, log_z = replay.weighted()
    assert sorted(keys.tolist()) == sorted(set(every.prompt_key_B.tolist()))
    alive = log_p > -math.inf
    assert torch.allclose(share * copies, log_p[alive].exp().repeat(copies), rtol=1e-10)
    log_score = trainer.target.log_score(every).view(2, -1).logsumexp(1)
    order = [every.prompt_key_B.view(2, -1)[:, 0].tolist().index(key) for key in keys.tolist()]
    assert torch.allclose(log_z, log_score[order], rtol=1e-10)


def test_batches_are_weighed_by_their_effective_sizes(tmp_path):
    trainer = make(tmp_path, tiny.SOFT["reward"]())
    replay = Replay(trainer.target, trainer.actors, 8, 10**6)
    every, log_p = exact(trainer)
    good, poor = tiny.enumerated(trainer), tiny.enumerated(trainer)
    good.sampler_logp_B = log_p - math.log(2.0)  # drawn from p itself, which has Z = 2 in this batch
    replay.add(good)
    replay.add(poor)
    _, _, share, _, log_z = replay.weighted()
    ess = torch.tensor([15.0, 1 / float((log_p.exp() ** 2).sum())], dtype=torch.float64)  # poor's weights are p's own
    assert torch.allclose(share.view(2, -1).sum(1), ess / ess.sum(), rtol=1e-9)
    z = torch.stack([torch.exp(trainer.target.log_score(b) - b.sampler_logp_B).mean() for b in (good, poor)])
    assert float(log_z.exp()) == pytest.approx(float((ess * z).sum() / ess.sum()), rel=1e-9)


def test_the_first_batch_stays_and_the_window_moves(tmp_path):
    trainer = make(tmp_path, tiny.SOFT["reward"]())
    replay = Replay(trainer.target, trainer.actors, 8, window=30)
    for n in range(5):
        batch = tiny.enumerated(trainer)
        batch.texts = [f"batch {n}"] * len(batch)
        replay.add(batch, from_fit=n == 0)
    assert sorted(set(replay.weighted()[0].texts)) == ["batch 0", "batch 3", "batch 4"]


def test_prompts_without_a_sample_get_copies_of_no_weight(tmp_path):
    trainer = make(tmp_path, prompts=["a", "b"] * 8, num_generations=8, per_device_train_batch_size=16)
    replay = Replay(trainer.target, trainer.actors, 8, 0)
    replay.add(tiny.enumerated(trainer, ["a"]), from_fit=True)
    fresh = trainer.actors.sample_policy([{"prompt": p} for p in ["a"] * 8 + ["b"] * 8])
    trainer.target.log_score(fresh)
    trainer.actors.reference_logp(fresh)
    both = replay.join(fresh)
    assert both.prompts == ["a"] * 8 + ["b"] * 8 + ["a"] * 4 + ["b"] * 4
    of_b = torch.tensor([prompt == "b" for prompt in both.prompts])
    weight = torch.exp(both.policy_logp_B - both.sampler_logp_B)[of_b]
    assert weight.tolist() == pytest.approx([1.5] * 8 + [0.0] * 4)  # their mean over 12 is 1
    trainer.weigh(both)
    losses, _ = trainer.sample_losses(trainer.model, both)
    assert torch.isfinite(losses).all() and not losses[-4:].any()


def test_nothing_to_replay_changes_nothing(tmp_path):
    trainer = make(tmp_path)
    pool = trainer.actors.draw([{"prompt": ""}] * 64, from_reference=True)
    assert trainer.replay.join(pool) is pool


@pytest.mark.parametrize("prompts, most", [(None, 1e-2), (["a", "b"] * 16, 0.1)], ids=["empty prompt", "two prompts"])
def test_training_with_it_reaches_a_rare_target(tmp_path, prompts, most):
    """The target has 2% of the reference (after one of the prompts); 50 small sets of rollouts, two steps on each.

    Without replay the same runs lose the rarer string of each prompt: 0.47 and 0.65 nats with two prompts.
    """
    options = {"divergence": "kl", "per_device_train_batch_size": 64, "replay_samples": 64, "learning_rate": 2e-2}
    options |= {"num_iterations": 2, "replay_window": 1024, "num_generations": 32, "max_steps": 100}
    trainer = make(tmp_path, prompts=prompts, **options, lr_scheduler_type="linear")
    distinct = [""] if prompts is None else ["a", "b"]
    every = tiny.enumerated(trainer, distinct)
    assert 0.002 < float(trainer.target.log_score(every).exp().view(len(distinct), -1).sum(1).min()) < 0.08
    trainer.train()
    every = tiny.enumerated(trainer, distinct, sampler=trainer.model)
    log_p = tiny.exact_log_p(trainer, every, len(distinct))
    inside = log_p > -math.inf
    kl = float((log_p[inside].exp() * (log_p - every.policy_logp_B)[inside]).sum()) / len(distinct)
    assert kl < most


def test_the_reference_is_sampled_until_enough_satisfy_the_constraint(tmp_path):
    options = {"fit_samples": 64, "fit_support": 20, "replay_samples": 8}
    trainer = make(tmp_path, **options)
    trainer._fit_on_reference()
    found = len(trainer.replay.weighted()[0])
    assert 20 <= found <= 20 + 64 and trainer.partition.samples % 64 == 0 and trainer.partition.samples > 5 * 64
    capped = make(tmp_path / "capped", **options | {"max_fit_samples": 128})
    capped._fit_on_reference()
    assert capped.partition.samples == 128


def test_what_judges_is_not_what_was_trained_on(tmp_path, monkeypatch):
    """No draw of the reference for the fit, replay included, has the random numbers of one for `evaluate`."""
    trainer = make(tmp_path, fit_samples=64, fit_support=20, reference_samples=64, eval_samples=64)
    seen, draw = [], trainer.actors.draw

    def watched(rows, from_reference, salt=0):
        seen.append((from_reference, salt))
        return draw(rows, from_reference, salt)

    monkeypatch.setattr(trainer.actors, "draw", watched)
    trainer._fit_on_reference()
    fitting = set(seen)
    seen.clear()
    trainer.evaluate()
    assert fitting and seen and not fitting & set(seen)


def test_without_a_window_the_policys_samples_are_not_kept(tmp_path):
    trainer = make(tmp_path, tiny.SOFT["reward"]())
    replay = Replay(trainer.target, trainer.actors, 8, window=0)
    replay.add(tiny.enumerated(trainer))
    assert replay.join(every := tiny.enumerated(trainer)) is every


@pytest.mark.parametrize("name", ["fit_samples", "fit_support", "replay_samples", "replay_window"])
def test_negative_sizes_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"{name} can't be negative, but is -1"):
        make(tmp_path, **{name: -1})


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="neither temperature"):
        make(tmp_path, temperature=0.7)
    with pytest.raises(ValueError, match="replay_samples = 3 must be a multiple of the 2 prompts"):
        make(tmp_path, prompts=["a"] * 8, replay_samples=3, num_generations=8, per_device_train_batch_size=16)
