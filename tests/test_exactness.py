"""The gradient is the gradient of D_f, and training reaches the optimum: by enumeration, for every divergence."""

import itertools

import pytest
import tiny
import torch

from hf_gdc import Reference, Reward, available_divergences, get_divergence
from hf_gdc.partition import leave_one_out_baseline

DIVERGENCES = [{"divergence": name} for name in available_divergences() if name != "alpha"]
DIVERGENCES += [{"divergence": "alpha", "divergence_kwargs": {"alpha": alpha}} for alpha in (0.25, 2.5)]
NAMES = [d["divergence"] + str(d.get("divergence_kwargs", {}).get("alpha", "")) for d in DIVERGENCES]


def admissible(options: dict, target: str) -> bool:
    divergence = get_divergence(options["divergence"], **options.get("divergence_kwargs", {}))
    return target in tiny.SOFT or divergence.admits_hard_constraints


CASES = [
    pytest.param(options, target, id=f"{name}-{target}")
    for (options, name), target in itertools.product(zip(DIVERGENCES, NAMES, strict=True), tiny.SOFT | tiny.HARD)
    if admissible(options, target)
]


@pytest.mark.parametrize("prompts", [("",), ("a", "b b a")], ids=["unconditional", "two prompts"])
@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("options,target", CASES)
def test_gradient_is_that_of_the_divergence(options, target, off_policy, prompts, tmp_path):
    lm = tiny.model(1, scale=2.0)
    trainer = tiny.trainer((tiny.SOFT | tiny.HARD)[target](), tmp_path, tiny.model(0, scale=2.0), **options)
    trainer.target.fit(tiny.enumerated(trainer, prompts))  # lambda: exact, from all strings
    trainer.model.load_state_dict(lm.state_dict())  # the policy has moved away from the reference
    sampler = tiny.model(2, scale=1.5) if off_policy else trainer.model
    rollouts = tiny.enumerated(trainer, prompts, sampler)
    log_p = tiny.exact_log_p(trainer, rollouts, len(prompts))
    rollouts.log_score_B = trainer.target.log_score(rollouts)
    rollouts.log_z_B = (rollouts.log_score_B.view(len(prompts), -1).logsumexp(1, keepdim=True)).expand(-1, 15).flatten()
    # Any baseline that doesn't depend on the sample leaves the expectation alone; each prompt gets its own.
    rollouts.baseline_B = torch.tensor([0.37, -1.1])[: len(prompts)].repeat_interleave(15).double()

    loss_B, out = trainer.sample_losses(trainer.model, rollouts)
    estimated = tiny.gradient((rollouts.sampler_logp_B.exp() * loss_B).sum() / len(prompts), trainer.model)
    analytic = tiny.exact_gradient(trainer, rollouts, log_p, len(prompts))
    assert analytic.norm() > 1e-3
    assert (estimated - analytic).norm() / analytic.norm() < 1e-8


def test_two_prompts_have_different_z(tmp_path):
    trainer = tiny.trainer(tiny.HARD["pointwise"](), tmp_path, tiny.model(0, scale=2.0))
    rollouts = tiny.enumerated(trainer, ("a", "b b a"))  # uniform: the plain mean over strings is exact
    trainer.weigh(rollouts)
    exact = trainer.target.log_score(rollouts).view(2, 15).logsumexp(1)
    assert abs(exact[0] - exact[1]) > 0.2
    torch.testing.assert_close(rollouts.log_z_B.view(2, 15)[:, 0], exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
def test_leave_one_out_baseline_is_unbiased(off_policy, tmp_path):
    """The expected gradient over all ordered triples of independent samples is exact, self-normalised weights and all."""
    trainer = tiny.trainer(tiny.SOFT["reward"](), tmp_path, tiny.model(0), divergence="js")
    trainer.model.load_state_dict(tiny.model(1, scale=1.0).state_dict())
    every = tiny.enumerated(trainer, sampler=tiny.model(2) if off_policy else trainer.model)
    log_z = trainer.target.log_score(every).logsumexp(0)
    triples = torch.tensor(list(itertools.product(range(15), repeat=3)))
    log_q = every.sampler_logp_B
    reward = trainer.pseudo_reward(every.policy_logp_B - trainer.target.log_score(every) + log_z)
    group = torch.arange(len(triples)).repeat_interleave(3)
    flat = triples.flatten()
    baseline = leave_one_out_baseline(reward[flat], (every.policy_logp_B - log_q)[flat], group, len(triples))
    # Mean over triples of sum_i q-weighted loss: the loss is linear in the baseline, so average it per string first.
    weight = log_q[triples].sum(1).exp().repeat_interleave(3) / 3
    share = torch.zeros(15, dtype=torch.float64).index_add(0, flat, weight)
    mean_baseline = torch.zeros(15, dtype=torch.float64).index_add(0, flat, weight * baseline) / share
    torch.testing.assert_close(share, log_q.exp())
    every.log_score_B, every.log_z_B = trainer.target.log_score(every), log_z.expand(15)
    every.baseline_B = mean_baseline
    loss_B, out = trainer.sample_losses(trainer.model, every)
    estimated = tiny.gradient((log_q.exp() * loss_B).sum(), trainer.model)
    analytic = tiny.exact_gradient(trainer, every, tiny.exact_log_p(trainer, every, 1))
    assert (estimated - analytic).norm() / analytic.norm() < 1e-8


def test_reverse_kl_to_a_reward_is_rlhf(tmp_path):
    """-beta * grad KL(pi || a exp(r/beta)/Z) = grad (E[r] - beta KL(pi || a))."""
    beta = 0.7
    trainer = tiny.trainer(Reference() * Reward(tiny.count_a, beta), tmp_path, tiny.model(0), divergence="reverse_kl")
    trainer.model.load_state_dict(tiny.model(1, scale=1.0).state_dict())
    rollouts = tiny.enumerated(trainer, sampler=trainer.model)
    rollouts.log_score_B = trainer.target.log_score(rollouts)
    rollouts.log_z_B = rollouts.log_score_B.logsumexp(0).expand(15)
    rollouts.baseline_B = torch.zeros(15, dtype=torch.float64)
    loss_B, _ = trainer.sample_losses(trainer.model, rollouts)
    ours = tiny.gradient((rollouts.sampler_logp_B.exp() * loss_B).sum(), trainer.model)
    logp = trainer.actors.scorer.rollouts(rollouts).logp_B
    reward = torch.tensor(tiny.count_a(rollouts.completion_ids())).double()
    reference = trainer.actors.reference_logp(rollouts)
    objective = (logp.exp() * (reward - beta * (logp - reference))).sum()
    torch.testing.assert_close(-beta * ours, tiny.gradient(objective, trainer.model), rtol=1e-8, atol=1e-10)


def training_options(name: str, target: str) -> dict:
    """A hard constraint's last mass leaves slowly; TV's pseudo-reward is noise at the optimum, to be averaged away."""
    if target in tiny.SOFT:
        return {"max_steps": 120, "per_device_train_batch_size": 256, "learning_rate": 5e-3}
    if name == "tv":
        long = {"max_steps": 1000, "per_device_train_batch_size": 128, "adam_beta1": 0.97}
        return long | {"learning_rate": 2e-2}
    return {"max_steps": 180, "per_device_train_batch_size": 256, "learning_rate": 2e-2}


@pytest.mark.parametrize(
    "options,target",
    [
        pytest.param(*case.values, id=case.id, marks=pytest.mark.slow if case.id == "tv-pointwise" else ())
        for case in CASES
        if "moment" not in case.id
    ],
)
def test_training_reaches_the_target(options, target, tmp_path):
    """By sampling alone, KL(p || pi) falls below 1e-3 nats (exact, by enumeration)."""
    trainer = tiny.trainer(
        (tiny.SOFT | tiny.HARD)[target](),
        tmp_path,
        tiny.model(3, scale=0.2, dtype=torch.float32),
        lr_scheduler_type="linear",
        adam_beta2=0.95,
        fit_samples=1024,
        **training_options(options["divergence"], target),
        **options,
    )

    def kl() -> float:
        rollouts = tiny.enumerated(trainer, sampler=trainer.model)
        log_p = tiny.exact_log_p(trainer, rollouts, 1)
        inside = log_p > -torch.inf
        return float((log_p[inside].exp() * (log_p - rollouts.policy_logp_B)[inside]).sum())

    start = kl()
    trainer.train()
    assert start > 0.2
    assert kl() < 1e-3


CONDITIONAL = ("b a", "a b")  # without a start token, "a" and "a a" look alike to a model with rotary positions


@pytest.mark.parametrize("name,target", [("js", "pointwise"), ("kl", "reward")])
def test_every_prompt_reaches_its_own_target(name, target, tmp_path):
    """One model, two prompts with different Z: following the expected gradient leads to both exact optima."""
    lm = tiny.model(3, 0.2, hidden_size=32)
    trainer = tiny.trainer((tiny.SOFT | tiny.HARD)[target](), tmp_path, lm, CONDITIONAL, divergence=name)
    rollouts = tiny.enumerated(trainer, CONDITIONAL)
    trainer.weigh(rollouts)
    rollouts.baseline_B = torch.zeros(30)  # weigh's are each string's own, for independent samples
    log_p = tiny.exact_log_p(trainer, rollouts, 2)
    inside = log_p > -torch.inf

    def kl() -> torch.Tensor:
        log_t = torch.where(inside, tiny.log_probs(trainer, trainer.model, rollouts) - log_p, 0.0)
        return -(log_p.exp() * log_t).view(2, 15).sum(1)

    assert float(kl().min()) > 0.1
    optimizer = torch.optim.Adam(trainer.model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, 400, pct_start=0.1)
    for _ in range(400):
        rollouts.sampler_logp_B = tiny.log_probs(trainer, trainer.model, rollouts)
        loss_B, _ = trainer.sample_losses(trainer.model, rollouts)
        optimizer.zero_grad()
        (rollouts.sampler_logp_B.exp() * loss_B).sum().div(2).backward()
        optimizer.step()
        schedule.step()
    assert float(kl().max()) < 1e-3
