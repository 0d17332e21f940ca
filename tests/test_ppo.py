"""PPO's gradient by enumeration, its pieces against formulas of their own, its critic through save, load and resume."""

import math

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig

from hf_gdc import Moment, PPOConfig, PPOTrainer, Reference, Reward

PLAIN = {"cliprange": None, "cliprange_value": None, "whiten_advantages": False, "lam": 1.0, "gamma": 1.0}
PLAIN |= {"num_iterations": 1, "vf_coef": 0.0, "loss_reduction": "sequence"}


def lora(*modules: str) -> LoraConfig:
    return LoraConfig(r=4, target_modules=list(modules or ("q_proj", "v_proj")), task_type="CAUSAL_LM")


def ppo(output_dir, lm=None, prompts=("a", "b a"), reward_funcs=tiny.count_a, **options) -> PPOTrainer:
    """A PPO trainer on the tiny language; `target`, `peft_config` and `callbacks` go to it, the rest is options."""
    passed = {
        name: options.pop(name) for name in ("target", "peft_config", "callbacks", "optimizers") if name in options
    }
    defaults = {"max_completion_length": tiny.LENGTH, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    defaults |= {"max_steps": 1, "save_strategy": "no", "logging_steps": 1000, "learning_rate": 1e-2}
    defaults |= {"per_device_train_batch_size": 32, "num_generations": 16, "reference_samples": 64, "eval_samples": 64}
    return PPOTrainer(
        tiny.model(0, 0.5, torch.float32) if lm is None else lm,
        None if "target" in passed else reward_funcs,
        args=PPOConfig(output_dir=str(output_dir), **defaults | options),
        train_dataset=None if prompts is None else Dataset.from_dict({"prompt": list(prompts)}),
        processing_class=tiny.tokenizer(),
        **passed,
    )


def flat_gradient(loss, lm) -> torch.Tensor:
    parameters = [p for name, p in lm.named_parameters() if not name.startswith("critic.")]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


# ---- the gradient ----

TARGETS = {
    "reverse_kl to a reward": ("reverse_kl", lambda: Reference() * Reward(tiny.count_a, beta=0.7), 0.7),
    "reverse_kl to a moment": ("reverse_kl", lambda: Reference() * Moment(tiny.count_a, 0.8), 1.0),
    "js to a constraint": ("js", tiny.HARD["pointwise"], 1.0),
    "kl to a constraint and a moment": ("kl", tiny.HARD["pointwise and moment"], 1.0),
    "jeffreys to a reward": ("jeffreys", tiny.SOFT["reward"], 1.0),
}


@pytest.mark.parametrize("prompts", [("",), ("a", "b b a")], ids=["unconditional", "two prompts"])
@pytest.mark.parametrize("off_policy", [False, True], ids=["on-policy", "off-policy"])
@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("name", TARGETS)
def test_one_plain_epoch_is_the_score_function_gradient(name, critic, off_policy, prompts, tmp_path):
    """Without clipping and whitening, with gamma = lambda = 1 and any values: E_q[gradient] is that of D_f(pi || p)."""
    divergence, target, beta = TARGETS[name]
    trainer = ppo(
        tmp_path, tiny.model(0, 2.0), target=target(), divergence=divergence, critic=critic, fit_samples=16, **PLAIN
    )
    trainer.target.fit(tiny.enumerated(trainer, prompts))
    trainer.model.load_state_dict(tiny.model(1, 2.0).state_dict(), strict=False)
    torch.nn.init.normal_(trainer.model.critic.head.weight)  # values that are far from right
    sampler = tiny.model(2, 1.5) if off_policy else trainer.model
    rollouts = tiny.enumerated(trainer, prompts, sampler)
    log_p = tiny.exact_log_p(trainer, rollouts, len(prompts))
    trainer.score_tokens(rollouts)
    rollouts.log_score_B = trainer.target.log_score(rollouts)
    rollouts.log_z_B = rollouts.log_score_B.view(len(prompts), -1).logsumexp(1, keepdim=True).expand(-1, 15).flatten()
    rollouts.baseline_B = torch.zeros(len(rollouts))
    trainer.assign_credit(rollouts, trainer._gather_scored(rollouts))
    assert rollouts.values_BT.abs().max() > 0.1

    loss_B, out = trainer.sample_losses(trainer.model, rollouts)
    estimated = flat_gradient((rollouts.sampler_logp_B.exp() * loss_B).sum() / len(prompts), trainer.model)
    logp = trainer.actors.scorer.rollouts(rollouts).logp_B
    exact = sum(
        tiny.exact_divergence(trainer.divergence, *pair)
        for pair in zip(logp.view(len(prompts), -1), log_p.view(len(prompts), -1), strict=True)
    )
    analytic = beta * flat_gradient(exact / len(prompts), trainer.model)
    assert analytic.norm() > 1e-3
    assert (estimated - analytic).norm() / analytic.norm() < 1e-8


def weighed(trainer, size: int = 32):
    """A set of rollouts of the trainer, as its steps get them."""
    rows = [{"prompt": prompt} for prompt in ("a", "b a") for _ in range(size // 2)]
    return trainer._make_rollouts(rows)


def test_micro_batches_add_up_to_the_whole(tmp_path):
    """However a set of rollouts is cut, the mean of the parts' losses is the whole's, and tokens weigh the same."""
    trainer = ppo(tmp_path, tiny.model(0, 2.0))
    rollouts = weighed(trainer)
    torch.nn.init.normal_(trainer.model.critic.head.weight)  # the values have moved, and so has the policy
    trainer.model.lm_head.weight.data *= 1.3
    rollouts = rollouts.select(rollouts.lengths_B.sort().indices)  # short ones first: parts differ in tokens
    whole, out = trainer.sample_losses(trainer.model, rollouts)
    parts = [rollouts.select(part) for part in torch.arange(32).split(8)]
    losses = [trainer.sample_losses(trainer.model, part)[0].mean() for part in parts]
    torch.testing.assert_close(sum(losses) / 4, whole.mean())
    mask = rollouts.completion_mask_BT
    assert len({int(part.lengths_B.sum()) for part in parts}) > 1
    ratio = (out.logps_BT - rollouts.policy_logps_BT).exp()
    assert bool(((ratio - 1).abs() > 0.2)[mask].any())
    advantages = rollouts.advantages_BT
    assert abs(float(advantages[mask].mean())) < 1e-12 and float(advantages[mask].std()) == pytest.approx(1.0)
    pessimistic = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)[mask].mean()
    old, returns = rollouts.values_BT, rollouts.returns_BT
    near = old + (out.values_BT - old).clamp(-0.2, 0.2)
    value = 0.5 * torch.maximum((out.values_BT - returns) ** 2, (near - returns) ** 2)[mask].mean()
    torch.testing.assert_close(whole.mean(), pessimistic + 0.1 * value)


def test_training_reaches_the_target(tmp_path):
    """With TRL's defaults: four clipped epochs, whitening, lambda 0.95. KL(p || pi) is exact, by enumeration."""
    trainer = ppo(
        tmp_path,
        tiny.model(3, 0.2, torch.float32),
        prompts=None,
        target=Reference() * Reward(tiny.count_a, 1.0),
        max_steps=160,
        per_device_train_batch_size=256,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
    )

    def kl() -> float:
        rollouts = tiny.enumerated(trainer, sampler=trainer.model)
        log_p = tiny.exact_log_p(trainer, rollouts, 1)
        return float((log_p.exp() * (log_p - rollouts.policy_logp_B)).sum())

    start = kl()
    trainer.train()
    assert start > 0.2 and kl() < 2e-3
    logs = [row for row in trainer.state.log_history if "loss/value_avg" in row]
    assert trainer._last_rollouts.values_BT.abs().max() > 0.1
    assert all(math.isfinite(value) for row in logs for value in row.values() if isinstance(value, float))


def test_kl_coef_and_a_reward_factor_say_the_same(tmp_path):
    """reward_funcs with kl_coef is Reference() * Reward(beta = kl_coef), bit for bit."""
    ends = []
    given = {"reward_funcs": tiny.count_a, "kl_coef": 0.3}, {"target": Reference() * Reward(tiny.count_a, 0.3)}
    for n, options in enumerate(given):
        trainer = ppo(tmp_path / str(n), max_steps=3, **options)
        trainer.train()
        ends.append(trainer.model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not torch.equal(ends[0]["lm_head.weight"], tiny.model(0, 0.5, torch.float32).lm_head.weight)


def test_a_warped_sampler_is_corrected_for(tmp_path):
    """pi_old/q, of whole completions or token by token, with its limit."""
    options = {"temperature": 0.5, "prompts": None}
    trainer = ppo(tmp_path, tiny.model(0, 1.0), **options)
    rollouts = trainer._make_rollouts([{"prompt": ""}] * 64)
    logp = tiny.log_probs(trainer, trainer.model, rollouts)
    weight = trainer._sampler_weight(rollouts)
    torch.testing.assert_close(weight[:, 0], (logp - rollouts.sampler_logp_B).exp())
    assert weight.std() > 0.1
    by_token = ppo(tmp_path, tiny.model(0, 1.0), importance_sampling_level="token", **options)
    tokens = by_token._sampler_weight(rollouts)
    torch.testing.assert_close(tokens.prod(-1, keepdim=True), weight)
    limited = ppo(tmp_path, tiny.model(0, 1.0), importance_clip=0.9, **options)._sampler_weight(rollouts)
    torch.testing.assert_close(limited, weight.clamp(max=0.9))
    plain = ppo(tmp_path, tiny.model(0, 1.0), prompts=None)
    ones = plain._sampler_weight(plain._make_rollouts([{"prompt": ""}] * 8))
    torch.testing.assert_close(ones, torch.ones_like(ones))


def test_the_kl_coefficient_adapts(tmp_path):
    """Ziegler et al.: the coefficient rises while KL is above its target, and the reward's temperature is that."""
    trainer = ppo(tmp_path, tiny.model(0, 1.0), kl_coef=0.05, kl_target=0.01, kl_horizon=320, num_iterations=1)
    weighed(trainer)  # KL is 0 here: below the target
    assert trainer.kl_coef == trainer.reward.beta == pytest.approx(0.05 * (1 - 0.2 * 32 / 320))
    trainer.model.lm_head.weight.data *= 2.0
    before, version = trainer.kl_coef, trainer.target.version
    rollouts = weighed(trainer)
    assert trainer.kl_coef == pytest.approx(before * (1 + 0.2 * 32 / 320)) and trainer.target.version == version + 1
    counts = torch.tensor(tiny.count_a(rollouts.completion_ids())).double()
    reward = trainer.token_rewards(rollouts).sum(-1)  # with the coefficient as it is now
    kl = rollouts.policy_logp_B - rollouts.scores["reference_logp"]
    kept = rollouts.log_score_B - rollouts.scores["reference_logp"]
    torch.testing.assert_close(kept * before, counts)
    torch.testing.assert_close(reward, trainer.kl_coef * (counts / before - kl))


# ---- ends and padding ----


def test_eos_is_a_token_like_any_other_although_it_is_the_padding(tmp_path):
    """E is BOS, EOS and padding: the first one is scored, valued and rewarded; what follows it plays no part."""
    trainer = ppo(tmp_path, tiny.model(0, 1.0), missing_eos_penalty=1.5, kl_coef=0.2, vf_coef=1.0)
    torch.nn.init.normal_(trainer.model.critic.head.weight)
    rollouts = tiny.enumerated(trainer, ("b a", "a"), trainer.model)  # padded prompts
    trainer.score_tokens(rollouts)
    trainer.target.log_score(rollouts)
    trainer.weigh(rollouts)
    rewards, mask = trainer.token_rewards(rollouts), rollouts.completion_mask_BT
    ended = (rollouts.completion_ids_BT == 0).logical_and(mask).any(-1)
    assert int((~ended).sum()) == 16  # two prompts, eight strings cut at three tokens
    kl = (rollouts.policy_logps_BT - rollouts.reference_logps_BT).abs().max()
    assert kl < 1e-12  # so each reward stands alone, at the last token
    counts = torch.tensor(tiny.count_a(rollouts.completion_ids())).double()
    for row in range(len(rollouts)):
        length = int(rollouts.lengths_B[row])
        expected = torch.zeros(tiny.LENGTH, dtype=torch.float64)
        expected[length - 1] = counts[row] - 1.5 * float(not ended[row])
        torch.testing.assert_close(rewards[row], expected)
        prompt = rollouts.prompt_ids_BP[row][rollouts.prompt_mask_BP[row]]
        ids = torch.cat([prompt, rollouts.completion_ids_BT[row, :length]])[None]
        hidden = trainer.model.model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
        values = (hidden @ trainer.model.critic.head.weight.T).squeeze(-1)
        torch.testing.assert_close(rollouts.values_BT[row, :length], values.detach())
    assert float(rollouts.values_BT[~mask].abs().max()) == 0.0

    def gradient() -> torch.Tensor:
        trainer.assign_credit(rollouts, trainer._gather_scored(rollouts))
        return flat_gradient(trainer.sample_losses(trainer.model, rollouts)[0].mean(), trainer.model)

    clean = gradient()
    rollouts.completion_ids_BT = torch.where(mask, rollouts.completion_ids_BT, 2)  # other padding
    rollouts.values_BT = torch.where(mask, rollouts.values_BT, 99.0)
    torch.testing.assert_close(gradient(), clean)


def test_a_cut_completion_is_the_end(tmp_path):
    """No value is bootstrapped behind the maximum length: the return of its last token is its reward alone."""
    trainer = ppo(tmp_path, tiny.model(0, 1.0), whiten_advantages=False)
    torch.nn.init.normal_(trainer.model.critic.head.weight)
    rollouts = weighed(trainer, 64)
    cut = ~((rollouts.completion_ids_BT == 0) & rollouts.completion_mask_BT).any(-1)
    assert 0 < int(cut.sum()) < 64
    counts = torch.tensor(tiny.count_a(rollouts.completion_ids())).double()
    torch.testing.assert_close(rollouts.returns_BT[cut, -1], counts[cut])
