"""PPO's gradient by enumeration, its pieces against formulas of their own, its critic through save, load and resume."""

import json
import math
import warnings

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_gdc import Moment, Pointwise, PPOConfig, PPOTrainer, Reference, Reward, get_divergence

PLAIN = {"cliprange": None, "cliprange_value": None, "whiten_advantages": False, "lam": 1.0, "gamma": 1.0}
PLAIN |= {"num_iterations": 1, "vf_coef": 0.0, "loss_reduction": "sequence"}


def lora(*modules: str) -> LoraConfig:
    return LoraConfig(r=4, target_modules=list(modules or ("q_proj", "v_proj")), task_type="CAUSAL_LM")


def ppo(output_dir, lm=None, prompts=("a", "b a"), reward_funcs=tiny.count_a, **options) -> PPOTrainer:
    """A PPO trainer on the tiny language; `target`, `peft_config` and `callbacks` go to it, the rest is options."""
    passed = {name: options.pop(name) for name in ("target", "peft_config", "callbacks", "optimizers") if name in options}
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
