"""PPO's gradient by enumeration, its pieces against formulas of their own, its critic through save, load and resume."""

import math
import runpy
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig

from hf_gdc import Moment, PPOConfig, PPOTrainer, Reference, Reward, Target

RECIPE = Path(__file__).parents[1] / "recipes" / "ppo" / "run.py"

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
        tiny.model(3, 0.2, torch.float32) if lm is None else lm,
        None if "target" in passed else reward_funcs,
        args=PPOConfig(output_dir=str(output_dir), **defaults | options),
        train_dataset=None if prompts is None else Dataset.from_dict({"prompt": list(prompts)}),
        processing_class=tiny.tokenizer(),
        **passed,
    )


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
    estimated = tiny.gradient((rollouts.sampler_logp_B.exp() * loss_B).sum() / len(prompts), trainer.model)
    analytic = beta * tiny.exact_gradient(trainer, rollouts, log_p, len(prompts))
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
    rollouts.sampler_logp_B = rollouts.policy_logp_B  # which generation recorded in float32
    torch.nn.init.normal_(trainer.model.critic.head.weight, std=0.1)  # the values have moved, and so has the policy
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
    # TRL's mean of each micro-batch's own mean is another number: there, tokens of short completions weigh more.
    per_token = torch.maximum(-ratio * advantages, -ratio.clamp(0.8, 1.2) * advantages)
    means = [per_token[part][mask[part]].mean() for part in torch.arange(32).split(8)]
    assert abs(float(sum(means) / 4 - pessimistic)) > 1e-3


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
    assert not torch.equal(ends[0]["lm_head.weight"], tiny.model(3, 0.2, torch.float32).lm_head.weight)


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
    torch.testing.assert_close(tokens.prod(-1, keepdim=True), weight, rtol=1e-5, atol=0)
    limited = ppo(tmp_path, tiny.model(0, 1.0), importance_clip=0.9, **options)._sampler_weight(rollouts)
    torch.testing.assert_close(limited, weight.clamp(max=0.9))
    plain = ppo(tmp_path, tiny.model(0, 1.0), prompts=None)
    ones = plain._sampler_weight(plain._make_rollouts([{"prompt": ""}] * 8))
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=0, atol=1e-5)


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


def test_the_users_reward_stays_as_it_is(tmp_path):
    reward = Reward(tiny.count_a, beta=0.05)
    for run in ("first", "second"):
        options = {"kl_target": 0.01, "kl_horizon": 320, "missing_eos_penalty": 1.0}
        trainer = ppo(tmp_path / run, target=Reference() * reward, **options)
        trainer.train()
        assert trainer.kl_coef != 0.05 and [f.name for f in trainer.reward.features] == ["count_a", "missing_eos"]
        assert reward.beta == 0.05 and [feature.name for feature in reward.features] == ["count_a"]


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_blocks_of_the_policy_take_turns_and_the_critic_always_moves(critic, tmp_path):
    lm = tiny.model(3, 0.2, torch.float32)
    trainer = ppo(tmp_path, lm, critic=critic, cycle_blocks=1, max_steps=2)
    trainer.parameter_blocks.count = 2  # a block that never comes
    trainer.parameter_blocks.block_of = dict.fromkeys(trainer.parameter_blocks.block_of, 1)
    trainer.parameter_blocks.steps = 100
    before = {name: value.clone() for name, value in lm.named_parameters()}
    trainer.train()
    moved = {name for name, value in lm.named_parameters() if not torch.equal(before[name], value)}
    assert moved and all(name.startswith("critic.") for name in moved)


def test_a_users_optimizer_and_scheduler_take_the_critic(tmp_path):
    lm = tiny.model(3, 0.2, torch.float32)
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = ppo(tmp_path / "both", lm, optimizers=(optimizer, schedule), max_steps=2)
    trainer.train()
    assert trainer.model.critic.head.weight.abs().sum().item() > 0
    alone = torch.optim.SGD(lm.parameters(), lr=0.1)
    ppo(tmp_path / "alone", lm, optimizers=(alone, None), critic_learning_rate=0.5)
    assert [group["lr"] for group in alone.param_groups] == [0.1, 0.5]
    with pytest.raises(ValueError, match="a scheduler of your own knows no group for the critic"):
        ppo(tmp_path / "no", lm, optimizers=(optimizer, schedule), critic_learning_rate=0.5)


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
        return tiny.gradient(trainer.sample_losses(trainer.model, rollouts)[0].mean(), trainer.model)

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


# ---- what a user may do, and be told ----


def test_chat_prompts_and_evaluation(tmp_path):
    """Chat and text prompts, several weighted reward functions, a None, and every number that the page promises."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    chats = [[{"role": "user", "content": text}] for text in ("b", "a b")]
    seen = []

    def answered(completions, topic, **_):
        seen.append(({type(c) for c in completions}, set(topic)))
        return [None if name == "none" else 1.0 for name in topic]

    trainer = PPOTrainer(
        tiny.model(3, 0.2, torch.float32),
        [tiny.count_a, answered],
        PPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            logging_steps=1,
            per_device_train_batch_size=32,
            num_generations=16,
            max_completion_length=3,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            eval_samples=64,
            reference_samples=64,
        ),
        reward_weights=[1.0, 0.5],
        train_dataset=Dataset.from_dict({"prompt": chats, "topic": ["none", "some"]}),
        processing_class=tokenizer,
    )
    trainer.train()
    assert seen and all(kinds == {list} for kinds, _ in seen)
    log = next(row for row in trainer.state.log_history if "loss/value_avg" in row)
    page = (RECIPE.with_name("README.md")).read_text()
    promised = [name for line in page.split("## What is logged")[1].splitlines() for name in _names(line)]
    assert len(promised) > 12 and not [name for name in promised if name not in log]
    assert log["objective/rlhf_reward"] == pytest.approx(log["objective/scores"] - 0.05 * log["objective/kl"])
    scores = log["features/count_a"] + 0.5 * 0.5  # half of the prompts have the second reward
    assert log["objective/scores"] == pytest.approx(scores, rel=1e-4)
    metrics = trainer.evaluate()
    assert metrics["eval_kl_policy_target"] >= -0.5 and "eval_js" in metrics


def _names(line: str) -> list[str]:
    """The metrics that a row of the page's table explains."""
    first = line.split("|")[1] if line.startswith("| `") else ""
    return [name for name in first.replace("`", "").replace(",", " ").split() if "/" in name]


def test_rewards_that_are_all_equal_are_a_warning(tmp_path):
    def constant(completions, **_):
        return [0.7] * len(completions)

    trainer = ppo(tmp_path, reward_funcs=constant)
    with pytest.warns(UserWarning, match="all 32 completions of a set of rollouts got the same reward, 0.7"):
        weighed(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        weighed(ppo(tmp_path, reward_funcs=tiny.count_a))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda n: [float("nan")] * n, "feature 'bad' returned nan for sample 0"),
        (lambda n: [1.0] * (n - 1), "feature 'bad' returned 31 values for 32 samples"),
        (lambda n: [float("inf")] * n, "feature 'bad' returned inf for sample 0"),
    ],
)
def test_bad_rewards_are_refused(values, message, tmp_path):
    def bad(completions, **_):
        return values(len(completions))

    with pytest.raises(ValueError, match=message):
        weighed(ppo(tmp_path, reward_funcs=bad))


def test_a_value_loss_that_explodes_is_limited(tmp_path):
    """To ten times that of predicting 0, with a warning; its gradient shrinks with it. Not finite: an error."""
    trainer = ppo(tmp_path, tiny.model(0, 1.0), cliprange_value=None, vf_coef=1.0, whiten_advantages=False)
    rollouts = weighed(trainer)
    small, _ = trainer.sample_losses(trainer.model, rollouts)
    trainer.model.critic.head.bias.data.fill_(1000.0)
    with pytest.warns(UserWarning, match="more than 10 times that of predicting 0, and was limited"):
        large, out = trainer.sample_losses(trainer.model, rollouts)
    mask, returns = rollouts.completion_mask_BT, rollouts.returns_BT
    usual = max(float((returns**2)[mask].mean()), 1.0)
    limit = 10 * 0.5 * float((returns**2).clamp_min(usual)[mask].mean())
    policy = small.mean() - 0.5 * (returns**2)[mask].mean()  # the values were 0
    assert float((large.mean() - policy).detach()) == pytest.approx(limit, rel=1e-4)
    (gradient,) = torch.autograd.grad(large.mean(), trainer.model.critic.head.bias)
    assert float(gradient) == pytest.approx(2 * limit / 1000, rel=0.01)  # of (1000 - R)^2, scaled to the limit
    trainer.model.critic.head.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the value loss is not finite: the critic has diverged"):
        trainer.sample_losses(trainer.model, rollouts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_funcs": None}, "give either reward_funcs"),
        ({"target": tiny.HARD["pointwise"]()}, "reverse_kl is infinite where a hard constraint forbids"),
        (
            {"target": Reference() * Moment(tiny.count_a, 0.8), "kl_target": 1.0},
            "kl_target changes the target's reward",
        ),
        (
            {"target": Reference() * Reward(tiny.count_a, 1.0) * Moment(tiny.has_b, 0.8), "kl_target": 1.0},
            "kl_target moves the target at every set",
        ),
        ({"kl_target": 1.0, "divergence": "js"}, "kl_target moves the target at every set"),
        ({"kl_coef": 0.0}, r"kl_coef must be positive, but is 0.0: a\(x\) exp.* is no target, so use a small one"),
        ({"cliprange": -0.2}, "cliprange must be positive, but is -0.2"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty must be positive"),
        ({"lam": 1.5}, "lam must be between 0 and 1, but is 1.5"),
        ({"vf_coef": -0.1}, "vf_coef can't be negative"),
        ({"kl_estimator": "k2"}, "kl_estimator must be 'k1' or 'k3', but is 'k2'"),
        ({"replay_samples": 8, "fit_samples": 64}, "replay_samples mixes in samples without values"),
        ({"num_ppo_epoch": 4}, "PPOConfig has no option `num_ppo_epoch`"),
    ],
)
def test_what_cannot_work_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ppo(tmp_path, **options)


def test_the_recipe(tmp_path):
    """A reward and a penalty for cut completions, LoRA and a critic adapter; what it saves is whole."""
    tiny.model(3, 0.2, torch.float32).save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    options = {"config": RECIPE.with_name("config.yaml"), "model_name_or_path": tmp_path / "base"}
    options |= {"output_dir": tmp_path / "o", "reward": "count:a", "missing_eos_penalty": 0.5, "max_steps": 2}
    options |= {"max_completion_length": 3, "per_device_train_batch_size": 32, "reference_samples": 128}
    options |= {"eval_samples": 64, "use_peft": "true", "lora_r": 2, "lora_target_modules": "q_proj v_proj"}
    options |= {"critic": "adapter", "use_cpu": "true", "disable_tqdm": "true"}
    words = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
    runpy.run_path(str(RECIPE))["main"](words)
    folder = tmp_path / "o" / "model"
    target = Target.from_pretrained(folder)
    reward = target.terms[1][0]
    assert [feature.name for feature in reward.features] == ["count:a", "missing_eos"]
    assert reward.beta == 0.5 and reward.weights == [1.0, -0.5]
    assert {"adapter_model.safetensors", "README.md"} <= {path.name for path in folder.iterdir()}
    saved = {path.name for path in (folder / "critic").iterdir()}
    assert {"critic.safetensors", "adapter_model.safetensors"} <= saved
    assert "count:a" in (folder / "README.md").read_text()
