"""The defensive mixture: its weights are those of the density it claims, and training with it reaches the target."""

import math

import pytest
import tiny
import torch

from hf_gdc import Pointwise, Reference
from hf_gdc.mixture import DefensiveMixture


def rare(completion_ids, **_):
    return [float(ids[:2] == [2, 2]) for ids in completion_ids]


def make(tmp_path, feature=rare, **options):
    options = {"per_device_train_batch_size": 4096, "fit_samples": 8192, "reference_replay": 2048} | options
    options |= {"per_device_eval_batch_size": 8192}
    return tiny.trainer(Reference() * Pointwise(feature), tmp_path, tiny.model(0, 1.0, torch.float32), **options)


def test_weights_are_unbiased_and_bounded(tmp_path):
    trainer = make(tmp_path)
    trainer.model.load_state_dict(tiny.model(1, 1.0, torch.float32).state_dict())  # the policy is not the reference
    rollouts = trainer.actors.sample_policy([{"prompt": ""}] * 4096)
    in_support = trainer.target.log_score(rollouts) > -math.inf
    trainer.actors.reference_logp(rollouts)
    both = trainer._reference_mixture().join(rollouts, in_support)
    assert len(both) == 4096 + 2048
    every = tiny.enumerated(trainer, sampler=trainer.model)
    policy_weight = torch.exp(both.policy_logp_B - both.sampler_logp_B)
    target_weight = torch.exp(trainer.target.log_score(both) - both.sampler_logp_B)
    z = float(trainer.target.log_score(every).exp().sum())
    assert policy_weight.max() <= (4096 + 2048) / 4096 + 1e-9
    acceptance_error = 1 / math.sqrt(len(trainer._reference_mixture().accepted))  # relative, of the pool's own size
    for weight, exact in ((policy_weight, 1.0), (target_weight, z)):
        error = float(weight.std()) / math.sqrt(len(weight)) + acceptance_error * exact * 2048 / 6144
        assert abs(float(weight.mean()) - exact) < 4 * error
    # and a feature's mean under the policy, from all samples with weights
    count = torch.tensor(tiny.count_a(both.completion_ids())).double()
    exact = float(every.policy_logp_B.exp() @ torch.tensor(tiny.count_a(every.completion_ids())).double())
    assert float((policy_weight * count).mean()) == pytest.approx(exact, abs=4 * float(count.std()) / math.sqrt(4096))


def test_training_with_it_reaches_a_rare_target(tmp_path):
    """The target has 2% of the reference: KL(p || pi) below 1e-2 nats after 100 small steps."""
    options = {"divergence": "kl", "per_device_train_batch_size": 64, "reference_replay": 64, "learning_rate": 2e-2}
    trainer = make(tmp_path, **options, lr_scheduler_type="linear", max_steps=100)
    every = tiny.enumerated(trainer)
    assert 0.002 < float(trainer.target.log_score(every).exp().sum()) < 0.08
    trainer.train()
    every = tiny.enumerated(trainer, sampler=trainer.model)
    log_p = tiny.exact_log_p(trainer, every, 1)
    inside = log_p > -math.inf
    assert float((log_p[inside].exp() * (log_p - every.policy_logp_B)[inside]).sum()) < 1e-2


def test_an_empty_pool_changes_nothing(tmp_path):
    trainer = make(tmp_path)
    pool = trainer.actors.draw([{"prompt": ""}] * 64, from_reference=True)
    mixture = DefensiveMixture(pool, torch.zeros(64, dtype=torch.bool), 8, trainer.actors)
    assert mixture.join(pool, torch.ones(64, dtype=torch.bool)) is pool


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="neither temperature"):
        make(tmp_path, temperature=0.7)
    with pytest.raises(ValueError, match="for the empty prompt"):
        tiny.trainer(tiny.HARD["pointwise"](), tmp_path, prompts=["a"] * 8, reference_replay=4)
