"""Which stabiliser of adversarial training helps? Each switch alone, beside the plain game, judged by exact divergences.

    python recipes/benchmarks/gan_ablation.py

A language of 5 tokens and length 4 has 341 completions, so KL(p_true || pi), KL(pi || p_true) and JS are sums. p_true is a
random model; the policy is another one and sees 2,000 samples of p_true. Every run takes the same 60 steps of 256 samples,
those of its warm-up among them. Means over seeds (the start of both players, texts, samples) with standard errors.

Every finished run is a line of OUTPUT/runs.jsonl, so an interrupted benchmark goes on where it stopped. Ends with
OUTPUT/table.md and a line of JSON.
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path

import torch
import transformers
from conditional import LENGTH, WORDS, completions, log_probs, make_tokenizer
from datasets import Dataset
from torch import Tensor

from hf_gdc import Discriminator, GANConfig, GANTrainer, SmallGPTConfig, SmallGPTForCausalLM
from hf_gdc.models.modeling_small_gpt import SmallGPTForSequenceClassification, SmallGPTForTokenClassification

TEXTS = 2000
PLAIN = {"max_steps": 60, "learning_rate": 5e-3, "discriminator_learning_rate": 1e-2, "discriminator_steps": 4}
TWICE = {"num_iterations": 2, "max_steps": 120, "learning_rate": 2.5e-3}  # as many samples
# What each row changes; dense, logit_clip and baseline are not options of GANConfig.
ROWS = {
    "plain": {},
    "one learning rate": {"discriminator_learning_rate": 5e-3},
    "one discriminator step": {"discriminator_steps": 1},
    "eight discriminator steps": {"discriminator_steps": 8},
    "warm-up of the discriminator": {"discriminator_warmup_steps": 10},
    "warm-up of both": {"mle_steps": 10, "discriminator_warmup_steps": 10},
    "replay": {"discriminator_replay_samples": 256},
    "demonstrations": {"demonstrations": 64},
    "label smoothing": {"discriminator_label_smoothing": 0.1},
    "spectral norm": {"spectral_norm": True},
    "R1": {"r1": 0.1},
    "R1 and R2": {"r1": 0.1, "r2": 0.1},
    "logit clip": {"logit_clip": 3.0},
    "no baseline": {"baseline": False},
    "credit for tokens": {"dense": True},
    "two passes over the samples": TWICE,
    "two passes, clipped steps": TWICE | {"cliprange": 0.2},
    "warm-up of both, replay, demonstrations": {
        "mle_steps": 10,
        "discriminator_warmup_steps": 10,
        "discriminator_replay_samples": 256,
        "demonstrations": 64,
    },
}
MEASURES = {"kl": "KL(p, pi)", "reverse_kl": "KL(pi, p)", "js": "JS", "entropy": "entropy of pi"}


def random_config(scale: float = 0.02) -> SmallGPTConfig:
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    ids |= {"tie_word_embeddings": False, "num_labels": 1, "initializer_range": scale}
    return SmallGPTConfig(vocab_size=len(WORDS), **size, **ids)


def random_model(seed: int, scale: float) -> SmallGPTForCausalLM:
    torch.manual_seed(seed)
    model = SmallGPTForCausalLM(random_config())
    with torch.no_grad():
        model.lm_head.weight.normal_(0, scale)
    return model


def real_texts(log_p: Tensor, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    texts = [" ".join(WORDS[n] for n in row if n) for row in completions()]
    drawn = torch.multinomial(log_p.exp(), TEXTS, True, generator=generator)
    return Dataset.from_dict({"text": [texts[n] for n in drawn.tolist()]})


def judge(log_p: Tensor, log_pi: Tensor) -> dict[str, float]:
    """Exact divergences in nats, from the log-probabilities of all completions."""
    log_m = torch.logaddexp(log_p, log_pi) - math.log(2)
    kl, reverse = ((a.exp() * (a - b)).sum() for a, b in ((log_p, log_pi), (log_pi, log_p)))
    js = sum((a.exp() * (a - log_m)).sum() / 2 for a in (log_p, log_pi))
    entropy = -(log_pi.exp() * log_pi).sum()
    return {name: float(value) for name, value in zip(MEASURES, (kl, reverse, js, entropy), strict=True)}


def one_run(changes: dict, seed: int) -> dict[str, float]:
    changes = PLAIN | changes
    dense, clip = changes.pop("dense", False), changes.pop("logit_clip", None)
    baseline = changes.pop("baseline", True)
    log_p = log_probs(random_model(7, 0.2), [0])  # BOS is EOS
    policy = random_model(100 + seed, 0.1)
    before = judge(log_p, log_probs(policy, [0]))
    torch.manual_seed(200 + seed)
    network = (SmallGPTForTokenClassification if dense else SmallGPTForSequenceClassification)(random_config(0.1))
    with tempfile.TemporaryDirectory() as folder:
        args = GANConfig(
            output_dir=folder,
            lr_scheduler_type="linear",
            per_device_train_batch_size=256,
            per_device_eval_batch_size=1024,
            max_completion_length=LENGTH,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1000,
            **changes,
        )
        trainer = GANTrainer(
            policy,
            Discriminator(network, logit_clip=clip, batch_size=1024),
            args=args,
            train_dataset=real_texts(log_p, seed),
            processing_class=make_tokenizer(),
        )
        trainer.divergence.baseline_is_zero = not baseline
        trainer.train()
    return judge(log_p, log_probs(policy, [0])) | {f"{name}_before": value for name, value in before.items()}


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def table(results: dict[tuple, dict], seeds: list[int]) -> list[str]:
    lines = ["| switch | " + " | ".join(MEASURES.values()) + " |", "|" + "---|" * (1 + len(MEASURES))]
    shown = {"start": [{m: results["plain", s][f"{m}_before"] for m in MEASURES} for s in seeds]}
    shown |= {name: [results[name, seed] for seed in seeds] for name in ROWS}
    for name, runs in shown.items():
        columns = [[run[measure] for run in runs] for measure in MEASURES]
        cells = [f"{statistics.fmean(column):.3f} ± {standard_error(column):.3f}" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--most_runs", type=int, default=1000, help="stop after so many, to go on another time")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/gan_ablation"))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    options.output.mkdir(parents=True, exist_ok=True)
    file, seeds = options.output / "runs.jsonl", list(range(options.seeds))
    lines = file.read_text().splitlines() if file.is_file() else []
    results = {(row["row"], row["seed"]): row for row in map(json.loads, lines)}
    todo = [(name, seed) for seed in seeds for name in ROWS if (name, seed) not in results]
    for name, seed in todo[: options.most_runs]:
        row = {"row": name, "seed": seed, "changes": ROWS[name]} | one_run(ROWS[name], seed)
        results[name, seed] = row
        with file.open("a") as log:
            log.write(json.dumps(row) + "\n")
        print(f"{name}, seed {seed}: KL(p, pi) {row['kl']:.4f}, JS {row['js']:.4f}", flush=True)
    if len(todo) > options.most_runs:
        return print(f"{len(todo) - options.most_runs} runs are left: start again to go on")
    (options.output / "table.md").write_text("\n".join(table(results, seeds)) + "\n")
    print("\n".join(table(results, seeds)))
    print(json.dumps({"seeds": options.seeds, "runs": list(results.values())}))


if __name__ == "__main__":
    main()
