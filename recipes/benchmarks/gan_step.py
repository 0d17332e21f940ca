"""A GAN's step by `GANTrainer` against a bare loop that does the same work, and against SeqGAN's roll-outs.

    python recipes/benchmarks/gan_step.py

Trainer and bare loop: sample with `generate`, one AdamW step of a dense discriminator on samples and real texts, rewards of
all prefixes from it, one AdamW step of the policy; 0.9 M parameters on either side, 20 tokens, 256 sequences a step, of which
64 are scored at a time. The bare loop watches nothing: no reference, no accuracy on fresh samples, no divergences, no logs.
SeqGAN's estimator (Yu et al. 2017, arXiv 1609.05473, equation 4) takes the same step with the reward of each prefix averaged
over 16 completions of it by the policy, each scored by the discriminator. All alternate in one process; the last line is
JSON, also written to outputs/benchmarks/gan_step.json. Shapes: B sequences, T tokens.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from datasets import Dataset
from gdc_step import LENGTH, SAMPLES, STEPS, Clock, make_model
from torch import Tensor
from torch.nn.functional import softplus
from transformers import GPT2Config, GPT2ForTokenClassification

from hf_gdc import Discriminator, GANConfig, GANTrainer, data, stories

ROLLOUTS, ROLLOUT_SAMPLES = 16, 16  # of a prefix, and sequences of the step that makes them
SCORED = 64  # at a time without gradients: faster than all at once, as it stays in the caches


def make_discriminator(vocab_size: int) -> GPT2ForTokenClassification:
    torch.manual_seed(1)
    size = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 64}
    return GPT2ForTokenClassification(GPT2Config(vocab_size=vocab_size, num_labels=1, **size))


class BareLoop:
    """The work itself, on real texts (R, 1 + T) that begin with the start token."""

    def __init__(self, policy, discriminator, real: Tensor):
        self.policy, self.discriminator, self.real = policy, discriminator, real
        self.optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-4) for model in (policy, discriminator)]

    def step(self, samples: int, rollouts: int = 0) -> None:
        """One step of both players; `rollouts` 0 takes rewards from the prefixes' own logits."""
        ids = self.complete(torch.zeros(samples, 1, dtype=torch.long))
        real = self.real[torch.randint(len(self.real), (samples,))]
        self.discriminator.train()
        loss = softplus(-self.logits(real)).mean() + softplus(self.logits(ids)).mean()
        self.update(1, loss)
        self.discriminator.eval()
        with torch.no_grad():
            rewards_BT = self.rolled_out(ids, rollouts) if rollouts else self.scored(ids).sigmoid()
        credit_BT = rewards_BT.flip(1).cumsum(1).flip(1) if not rollouts else rewards_BT
        logp = self.policy.train()(input_ids=ids[:, :-1]).logits.log_softmax(-1)
        logp_BT = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)
        self.update(0, -((credit_BT - credit_BT.mean(0)) * logp_BT).sum(1).mean())

    @torch.no_grad()
    def complete(self, ids: Tensor) -> Tensor:
        """Sequences of T tokens that begin with these."""
        new = LENGTH + 1 - ids.shape[1]
        return self.policy.eval().generate(ids, do_sample=True, top_k=0, max_new_tokens=new, min_new_tokens=new)

    def rolled_out(self, ids: Tensor, rollouts: int) -> Tensor:
        """(B, T) mean reward of completions of each prefix."""
        rewards = []
        for length in range(1, LENGTH):
            whole = self.complete(ids[:, : length + 1].repeat_interleave(rollouts, 0))
            rewards.append(self.scored(whole)[:, -1].sigmoid().view(-1, rollouts).mean(1))
        return torch.stack([*rewards, self.scored(ids)[:, -1].sigmoid()], 1)

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T) of the prefixes."""
        return self.discriminator(input_ids=ids).logits.squeeze(-1)[:, 1:]

    def scored(self, ids: Tensor) -> Tensor:
        """`logits`, some sequences at a time."""
        return torch.cat([self.logits(part) for part in ids.split(SCORED)])

    def update(self, player: int, loss: Tensor) -> None:
        self.optimizers[player].zero_grad()
        loss.backward()
        self.optimizers[player].step()


def bare_rate(policy, discriminator, real: Tensor, steps: int, samples: int, rollouts: int = 0) -> float:
    """Sequences per second."""
    loop, start = BareLoop(policy, discriminator, real), time.perf_counter()
    for _ in range(steps):
        loop.step(samples, rollouts)
    return steps * samples / (time.perf_counter() - start)


def trainer_rate(policy, discriminator, texts: Dataset, tokenizer, folder: Path) -> float:
    """Sequences per second of `GANTrainer`, with all its estimates and logs."""
    args = GANConfig(
        output_dir=str(folder),
        overwrite=True,
        max_steps=STEPS,
        per_device_train_batch_size=SAMPLES,
        per_device_eval_batch_size=SCORED,
        max_completion_length=LENGTH,
        learning_rate=1e-4,
        divergence="seqgan",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    clock, critic = Clock(), Discriminator(discriminator, dense=True, batch_size=SCORED)
    trainer = GANTrainer(policy, critic, args=args, train_dataset=texts, processing_class=tokenizer, callbacks=[clock])
    trainer.train()
    return STEPS * SAMPLES / clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="alternated runs of each side")
    parser.add_argument("--output", default="outputs/benchmarks", help="folder of the JSON file")
    options = parser.parse_args()
    folder, texts = Path(options.output), stories.sample(2000, 0)
    tokenizer = data.train_tokenizer(texts)
    players = make_model(len(tokenizer)), make_discriminator(len(tokenizer))
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    real = torch.tensor([[0, *row[:LENGTH]] for row in ids if len(row) >= LENGTH])
    dataset = Dataset.from_dict({"text": texts})
    bare, ours, rolled = [], [], []
    for run in range(options.runs + 1):  # the first one warms up
        found = [
            bare_rate(*copy.deepcopy(players), real, STEPS, SAMPLES),
            trainer_rate(*copy.deepcopy(players), dataset, tokenizer, folder / "gan_step"),
            bare_rate(*copy.deepcopy(players), real, 1, ROLLOUT_SAMPLES, ROLLOUTS),
        ]
        if run:
            for rates, rate in zip((bare, ours, rolled), found, strict=True):
                rates.append(rate)
    result = {
        "bare_sequences_per_second": statistics.median(bare),
        "trainer_sequences_per_second": statistics.median(ours),
        "rollout_sequences_per_second": statistics.median(rolled),
        "ratio_to_bare": statistics.median(a / b for a, b in zip(ours, bare, strict=True)),
        "ratio_to_rollouts": statistics.median(a / b for a, b in zip(ours, rolled, strict=True)),
        "parameters": [player.num_parameters() for player in players],
        "threads": torch.get_num_threads(),
        "runs": options.runs,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gan_step.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
