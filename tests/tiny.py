"""A language that can be enumerated: tokens E, a, b; completions up to length 3; E is BOS, EOS and padding at once.

A completion ends with its first E or is cut at 3 tokens: 1 + 2 + 4 + 8 = 15 strings. With float64 models every
expectation is a sum over them.
"""

import itertools
import math

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hf_gdc import GDCConfig, GDCTrainer, Moment, Pointwise, Reference, Reward, Rollouts
from hf_gdc.models import SmallGPTConfig, SmallGPTForCausalLM
from hf_gdc.partition import prompt_key

LENGTH = 3


def strings() -> list[list[int]]:
    found = []
    for n in range(LENGTH):
        found += [[*body, 0] for body in itertools.product([1, 2], repeat=n)]
    return found + [list(body) for body in itertools.product([1, 2], repeat=LENGTH)]


def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({"E": 0, "a": 1, "b": 2}, unk_token="E"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="E", pad_token="E")


def model(seed: int, scale: float = 1.0, dtype=torch.float64, hidden_size: int = 16) -> SmallGPTForCausalLM:
    """A random model; a larger scale makes it less uniform."""
    torch.manual_seed(seed)
    config = SmallGPTConfig(
        vocab_size=3,
        hidden_size=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    lm = SmallGPTForCausalLM(config).to(dtype)
    with torch.no_grad():
        lm.lm_head.weight.normal_(0, scale)
    return lm


def has_b(completion_ids, **_):
    return [float(2 in ids) for ids in completion_ids]


def count_a(completion_ids, **_):
    return [float(ids.count(1)) for ids in completion_ids]


SOFT = {"reward": lambda: Reference() * Reward(count_a, beta=1.0)}
HARD = {
    "pointwise": lambda: Reference() * Pointwise(has_b),
    "pointwise and moment": lambda: Reference() * Pointwise(has_b) * Moment(count_a, 0.8),
}


def trainer(target, output_dir, lm=None, prompts=None, **options) -> GDCTrainer:
    """A GDC trainer on the tiny language; `prompts` None is the empty prompt."""
    from datasets import Dataset

    defaults = {"max_completion_length": LENGTH, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    defaults |= {"max_steps": 1, "save_strategy": "no", "fit_samples": 256, "logging_steps": 1000}
    return GDCTrainer(
        model(0) if lm is None else lm,
        target,
        args=GDCConfig(output_dir=str(output_dir), **defaults | options),
        train_dataset=None if prompts is None else Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(),
    )


def enumerated(trainer: GDCTrainer, prompts=("",), sampler=None) -> Rollouts:
    """All strings after each prompt, as if drawn from `sampler` (a model; None: from the uniform distribution)."""
    tok, rows = tokenizer(), strings()
    ids = torch.zeros(len(rows), LENGTH, dtype=torch.long)
    mask = torch.zeros(len(rows), LENGTH, dtype=torch.bool)
    for n, row in enumerate(rows):
        ids[n, : len(row)], mask[n, : len(row)] = torch.tensor(row), True
    texts = [tok.decode([i for i in row if i]) for row in rows]
    parts = []
    for prompt in prompts:
        prompt_ids, prompt_mask, _ = trainer.actors.sampler.encode([prompt])
        key = prompt_key(prompt_ids[0][prompt_mask[0]].tolist())
        uniform = torch.full((len(rows),), -math.log(len(rows)), dtype=torch.float64)
        part = Rollouts(
            prompt_ids.expand(len(rows), -1),
            prompt_mask.expand(len(rows), -1),
            ids,
            mask,
            torch.full((len(rows),), key),
            uniform,
            uniform,
            prompts=[prompt] * len(rows),
            texts=texts,
        )
        if sampler is not None:
            part.sampler_logp_B = log_probs(trainer, sampler, part)
        part.policy_logp_B = log_probs(trainer, trainer.model, part)
        parts.append(part)
    return Rollouts.concatenate(parts)


@torch.no_grad()
def log_probs(trainer: GDCTrainer, lm, rollouts: Rollouts) -> Tensor:
    """(B,) log-probs under a model, from its plain forward pass."""
    ids = torch.cat([rollouts.prompt_ids_BP, rollouts.completion_ids_BT], 1)
    mask = torch.cat([rollouts.prompt_mask_BP, rollouts.completion_mask_BT], 1).long()
    logits = lm(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits
    logp = logits.log_softmax(-1)[:, rollouts.prompt_ids_BP.shape[1] - 1 : -1]
    token = logp.gather(-1, rollouts.completion_ids_BT[..., None]).squeeze(-1)
    return (token * rollouts.completion_mask_BT).sum(-1).double()


def exact_log_p(trainer: GDCTrainer, rollouts: Rollouts, prompts: int) -> Tensor:
    """(B,) log p of the enumerated strings: log P - log Z with Z summed over each prompt's strings."""
    log_score = trainer.target.log_score(rollouts).view(prompts, -1)
    return (log_score - log_score.logsumexp(1, keepdim=True)).flatten()


def exact_divergence(divergence, logp: Tensor, log_p: Tensor) -> Tensor:
    """D_f(pi || p) by its definition, differentiable in logp: one prompt's strings."""
    inside = log_p > -torch.inf
    regular = (log_p[inside].exp() * divergence.f((logp - log_p)[inside])).sum()
    outside = logp[~inside].exp().sum()
    return regular + (divergence.f_prime_inf * outside if len(logp[~inside]) else 0.0)


def gradient(loss: Tensor, lm) -> Tensor:
    """In the parameters that train, a critic's left out, as one vector."""
    named = lm.named_parameters()
    parameters = [p for name, p in named if p.requires_grad and not name.startswith("critic.")]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


def exact_gradient(trainer, rollouts: Rollouts, log_p: Tensor, prompts: int = 1) -> Tensor:
    """Of the mean over prompts of D_f(pi || p), from the definition; `log_p` of the enumerated strings (B,)."""
    logp = trainer.actors.scorer.rollouts(rollouts).logp_B
    pairs = zip(logp.view(prompts, -1), log_p.view(prompts, -1), strict=True)
    return gradient(sum(exact_divergence(trainer.divergence, *pair) for pair in pairs) / prompts, trainer.model)
