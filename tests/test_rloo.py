"""TRL's own RLOO and GRPO beside reverse-KL GDC, on the enumerable language: what each one minimises.

TRL's trainers compute their advantages and losses themselves; only sampling is replaced: they are handed every pair of strings
of a prompt, and the gradients of their losses are weighed by the pairs' probabilities. So expectations are exact, up to
TRL's log-probs, which are in float32. (In which order the two of a pair come makes no difference.)
"""

import itertools

import pytest
import tiny
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from hf_gdc import Reference, Reward
from hf_gdc.models import SmallGPTForCausalLM

BETA = 0.7
PAIRS = torch.tensor(list(itertools.combinations_with_replacement(range(len(tiny.strings())), 2)))
ORDERS = 2.0 - (PAIRS[:, 0] == PAIRS[:, 1]).double()
TRAINERS = {"rloo": (RLOOConfig, RLOOTrainer), "grpo": (GRPOConfig, GRPOTrainer)}
SPELT = {"": "E"}  # an empty prompt is E, which TRL wants to be told


def trl(method: str, folder, **options):
    """A trainer of TRL's whose reference is `tiny.model(0, 2.0)`, fed with all pairs of strings of each of its prompts."""
    tiny.model(0, 2.0).save_pretrained(folder / "reference")  # which TRL loads once more, from there
    policy = SmallGPTForCausalLM.from_pretrained(folder / "reference", dtype=torch.float64)
    config, trainer = TRAINERS[method]
    args = config(
        output_dir=str(folder),
        beta=BETA,
        num_generations=2,
        per_device_train_batch_size=2,
        max_completion_length=tiny.LENGTH,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        **options,
    )
    row = Dataset.from_dict({"prompt": ["E"]})
    trainer = trainer(policy, tiny.count_a, args=args, train_dataset=row, processing_class=tiny.tokenizer())
    trainer.current_gradient_accumulation_steps = 1  # which the training loop sets
    trainer.model.train()
    return trainer


def with_all_pairs(trainer, prompts) -> dict:
    """What TRL computes of its rollouts, where these are all pairs of strings of each prompt."""
    every = [tiny.strings()[n] for n in PAIRS.flatten().tolist()] * len(prompts)
    alone = isinstance(trainer, RLOOTrainer)  # GRPO's sampler also returns log-probs, which vLLM gives
    trainer._generate_single_turn = lambda *_, **__: every if alone else (every, None)
    rows = [{"prompt": SPELT.get(prompt, prompt)} for prompt in prompts for _ in range(2 * len(PAIRS))]
    return trainer._generate_and_score_completions(rows)


def expected_gradient(trainer, batch: dict, logp_GS: torch.Tensor) -> torch.Tensor:
    """Mean over prompts of the expected gradient of TRL's loss of a pair, from log-probs (prompts, strings) of the sampler."""
    weight = (ORDERS * logp_GS[:, PAIRS].sum(-1).exp()).flatten() / len(logp_GS)
    pairs = [
        {name: value[2 * n : 2 * n + 2] if value.dim() else value for name, value in batch.items()}
        for n in range(len(weight))
    ]
    losses = torch.stack([trainer._compute_loss(trainer.model, pair) for pair in pairs])
    return flat_gradient((weight * losses).sum(), trainer.model)


def flat_gradient(loss, lm) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(lm.parameters()))])


def gdc(folder, lm, prompts):
    """A reverse-KL trainer to a exp(r / beta) whose policy is `lm`, and all strings of the prompts, drawn from it."""
    target = Reference() * Reward(tiny.count_a, BETA)
    trainer = tiny.trainer(target, folder / "gdc", tiny.model(0, 2.0), divergence="reverse_kl")
    trainer.model.load_state_dict(lm.state_dict())
    rollouts = tiny.enumerated(trainer, prompts, sampler=trainer.model)
    rollouts.log_score_B = trainer.target.log_score(rollouts)
    rollouts.log_z_B = torch.zeros(len(rollouts), dtype=torch.float64)  # which reverse KL does not need
    rollouts.baseline_B = torch.zeros(len(rollouts), dtype=torch.float64)
    return trainer, rollouts


def gdc_gradient(trainer, rollouts, prompts) -> torch.Tensor:
    loss_B, _ = trainer.sample_losses(trainer.model, rollouts)
    return flat_gradient((rollouts.sampler_logp_B.exp() * loss_B).sum() / len(prompts), trainer.model)


def relative(difference: torch.Tensor, to: torch.Tensor) -> float:
    return float(difference.norm() / to.norm())


@pytest.mark.parametrize("prompts", [("",), ("a", "b b a")], ids=["unconditional", "two prompts"])
def test_rloo_with_kl_in_the_reward_is_reverse_kl_gdc(prompts, tmp_path):
    """The same expected gradient up to the factor beta: RLOO's loss is beta KL(pi || a exp(r/beta) / Z) and a constant."""
    lm = tiny.model(1, 1.0)
    theirs = trl("rloo", tmp_path)
    theirs.model.load_state_dict(lm.state_dict())
    ours, rollouts = gdc(tmp_path, lm, prompts)
    batch = with_all_pairs(theirs, prompts)
    gradient = expected_gradient(theirs, batch, rollouts.policy_logp_B.view(len(prompts), -1))
    wanted = BETA * gdc_gradient(ours, rollouts, prompts)
    assert wanted.norm() > 0.05
    assert relative(gradient - wanted, wanted) < 1e-5


def test_difference_rloo_keeps_the_kl_of_the_policy_that_sampled(tmp_path):
    """In further steps on one set of rollouts (ratio clip inactive) GDC's gradient stays that of KL(pi || p); RLOO's reward
    still has the log-ratio of the policy that sampled, which leaves beta grad [KL(pi || p) - KL(pi || pi_old)]."""
    old, lm = tiny.model(2, 1.0), tiny.model(1, 1.0)
    theirs = trl("rloo", tmp_path, epsilon=1e6)
    theirs.model.load_state_dict(old.state_dict())
    batch = with_all_pairs(theirs, ("",))
    theirs.model.load_state_dict(lm.state_dict())
    ours, rollouts = gdc(tmp_path, lm, ("",))
    exact = gdc_gradient(ours, rollouts, ("",))
    rollouts.sampler_logp_B = old_logp = tiny.log_probs(ours, old, rollouts)
    assert relative(gdc_gradient(ours, rollouts, ("",)) - exact, exact) < 1e-8

    gradient = expected_gradient(theirs, batch, old_logp[None])
    logp_B = ours.actors.scorer.rollouts(rollouts).logp_B
    moved = flat_gradient((logp_B.exp() * (logp_B - old_logp)).sum(), ours.model)
    assert relative(gradient - BETA * (exact - moved), BETA * exact) < 1e-5
    assert relative(BETA * moved, BETA * exact) > 0.1


def next_token_kl(lm, reference, rollouts, backwards: bool) -> torch.Tensor:
    """KL(a || pi) of the next token, or KL(pi || a), after each prefix, summed over each string, (B,), with gradient."""
    ids = torch.cat([rollouts.prompt_ids_BP, rollouts.completion_ids_BT], 1)
    start, mask = rollouts.prompt_ids_BP.shape[1] - 1, rollouts.completion_mask_BT
    pi, a = (model(input_ids=ids).logits[:, start:-1].log_softmax(-1) for model in (lm, reference))
    first, second = (pi, a) if backwards else (a, pi)
    return ((first.exp() * (first - second)).sum(-1) * mask).sum(-1)


@pytest.mark.parametrize("corrected", [True, False], ids=["default", "use_bias_correction_kl off"])
def test_difference_grpo_pulls_by_a_kl_of_next_tokens(corrected, tmp_path):
    """GRPO has its KL in the loss, k3 at each sampled token. The expected gradient is that of KL(pi || a) of the next token
    with the prefix held fixed: that a token changes what follows does not count. Without `use_bias_correction_kl` it is
    that of KL(a || pi), the other direction. So a exp(r/beta) is not where it comes to rest.

    Its own group's mean is the baseline, which scales the reward's part by (G - 1) / G; `dr_grpo` divides by the length.
    """
    lm = tiny.model(1, 1.0)
    options = {"loss_type": "dr_grpo", "scale_rewards": "none", "use_bias_correction_kl": corrected}
    theirs = trl("grpo", tmp_path, **options)
    theirs.model.load_state_dict(lm.state_dict())
    ours, rollouts = gdc(tmp_path, lm, ("",))
    gradient = tiny.LENGTH * expected_gradient(theirs, with_all_pairs(theirs, ("",)), rollouts.policy_logp_B[None])

    pi_B = rollouts.policy_logp_B.exp()
    rewards_B = torch.tensor(tiny.count_a(rollouts.completion_ids())).double()
    logp_B = ours.actors.scorer.rollouts(rollouts).logp_B
    earned = flat_gradient((logp_B.exp() * rewards_B).sum(), ours.model)
    kl_B = next_token_kl(ours.model, tiny.model(0, 2.0), rollouts, backwards=corrected)
    held = BETA * flat_gradient((pi_B * kl_B).sum(), ours.model)
    assert relative(gradient - (held - earned / 2), held - earned / 2) < 1e-5
    exact = BETA * gdc_gradient(ours, rollouts, ("",))
    assert relative(held - earned - exact, exact) > 0.1
