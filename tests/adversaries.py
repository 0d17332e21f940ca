"""Discriminators, real data and exact distances for the tests of adversarial training, on the language of `tiny`."""

import math

import tiny
import torch
from datasets import Dataset
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2ForTokenClassification, TrainerCallback

from hf_gdc import Discriminator, GANConfig, GANTrainer, Reward, UnifiedConfig, UnifiedTrainer
from hf_gdc.adversarial.logit_networks import LogitNetwork
from hf_gdc.targets.base import BEFORE_JOINING

DEFAULTS = {"max_completion_length": tiny.LENGTH, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
DEFAULTS |= {"max_steps": 1, "save_strategy": "no", "logging_steps": 1000, "learning_rate": 1e-2}
DEFAULTS |= {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 1024, "eval_samples": 64}
DEFAULTS |= {"reference_samples": 256}


def classifier(seed: int = 0, dense: bool = False, dtype=torch.float32, hidden_size: int = 16, scale: float = 0.02):
    """A small causal classifier with one label, of sequences or, dense, of tokens; its end, start and padding are one id."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=3,
        n_embd=hidden_size,
        n_layer=1,
        n_head=2,
        n_positions=16,
        num_labels=1,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        classifier_dropout=0.0,
        initializer_range=scale,
    )
    return (GPT2ForTokenClassification if dense else GPT2ForSequenceClassification)(config).to(dtype)


def gan(output_dir, discriminator=None, texts=None, lm=None, **options) -> GANTrainer:
    """A GAN on the tiny language; `target`, `peft_config` and `callbacks` go to it, the rest is options."""
    return _trainer(GANTrainer, GANConfig, output_dir, discriminator, texts, lm, options)


def unified(output_dir, discriminator=None, texts=None, lm=None, **options) -> UnifiedTrainer:
    return _trainer(UnifiedTrainer, UnifiedConfig, output_dir, discriminator, texts, lm, options)


def _trainer(kind, config, output_dir, discriminator, texts, lm, options):
    names = ("target", "peft_config", "callbacks", "eval_dataset", "critic", "processing_class")
    passed = {name: options.pop(name) for name in names if name in options}
    return kind(
        tiny.model(0, 0.5, torch.float32) if lm is None else lm,
        Discriminator(classifier(), batch_size=1024) if discriminator is None else discriminator,
        args=config(output_dir=str(output_dir), **DEFAULTS | options),
        train_dataset=real_texts(goal()) if texts is None else texts,
        **{"processing_class": tiny.tokenizer()} | passed,
    )


def texts_of_strings() -> list[str]:
    return [" ".join("Eab"[i] for i in row if i) for row in tiny.strings()]


def goal(seed: int = 5, scale: float = 0.8) -> Tensor:
    """(15,) log p_true of the strings, in the order of `tiny.strings`."""
    lm = tiny.model(seed, scale)
    ids = torch.zeros(15, tiny.LENGTH + 1, dtype=torch.long)  # the first is the start
    mask = torch.zeros(15, tiny.LENGTH, dtype=torch.bool)
    for n, row in enumerate(tiny.strings()):
        ids[n, 1 : len(row) + 1], mask[n, : len(row)] = torch.tensor(row), True
    with torch.no_grad():
        logp = lm(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    return (logp * mask).sum(1)


def real_texts(log_p: Tensor, count: int = 20_000, seed: int = 0) -> Dataset:
    """Rows with `text`, drawn from p_true."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(log_p.exp(), count, True, generator=generator)
    texts = texts_of_strings()
    return Dataset.from_dict({"text": [texts[n] for n in drawn.tolist()]})


def distances(trainer, log_p: Tensor) -> tuple[float, float]:
    """Exact KL(p_true || pi) and Jensen-Shannon divergence, in nats."""
    logp = tiny.enumerated(trainer, sampler=trainer.model).sampler_logp_B
    log_m = torch.logaddexp(log_p, logp) - math.log(2)
    kl = (log_p.exp() * (log_p - logp)).sum()
    js = (log_p.exp() * (log_p - log_m)).sum() / 2 + (logp.exp() * (logp - log_m)).sum() / 2
    return float(kl), float(js)


class Optimal(LogitNetwork):
    """The optimal discriminator, log p_true/q of what sampled: nothing to learn.

    Args:
        log_p: (15,) of the strings.
        dense: logits of prefixes too: log of the sums of p_true and of q over the completions that begin like this.
    """

    name = "optimal"

    def __init__(self, log_p: Tensor, dense: bool = False, error: float = 0.0):
        super().__init__()
        self.log_p, self.dense, self.error = log_p, dense, error
        self.table = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.q = None  # a model whose samples the prefixes are compared with
        self.strings = {tuple(row): n for n, row in enumerate(tiny.strings())}

    def score(self, rollouts):  # q may differ between rollouts with the same tokens
        return self(rollouts).detach()

    def forward(self, rollouts):
        index = torch.tensor([self.strings[tuple(row)] for row in rollouts.completion_ids()])
        if not self.dense:
            log_q = rollouts.scores.get(BEFORE_JOINING, rollouts.sampler_logp_B)
            logits_B1 = (self.log_p[index] - log_q)[:, None]
            return (logits_B1 + self.error).nan_to_num(0.0) + 0 * self.table
        rows = tiny.strings()
        logits_BT = torch.zeros(rollouts.completion_ids_BT.shape, dtype=torch.float64)
        log_q_BT = rollouts.sampler_logps_BT.double().cumsum(1)
        for n, row in enumerate(rollouts.completion_ids()):
            for t in range(len(row)):
                same = torch.tensor([other[: t + 1] == row[: t + 1] for other in rows])
                logits_BT[n, t] = self.log_p[same].logsumexp(0) - log_q_BT[n, t]
        return logits_BT + self.error + 0 * self.table


def reward_of_a():
    """exp(number of a's), a further factor."""
    return Reward(tiny.count_a, beta=1.0)


class Callback(TrainerCallback):
    """A callback to be filled in."""


def stop_after(step: int) -> TrainerCallback:
    """Ends the run after this step, as if it had been cut there."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop |= state.global_step == step

    return Stop()


class OptimalAgainst(Optimal):
    """As `Optimal`, against the policy as it is now: real texts too have a logit."""

    def __init__(self, log_p: Tensor, trainer):
        super().__init__(log_p)
        self._trainer = trainer

    def forward(self, rollouts):
        index = torch.tensor([self.strings[tuple(row)] for row in rollouts.completion_ids()])
        return (self.log_p[index] - self._trainer().actors.policy_logp(rollouts))[:, None] + 0 * self.table
