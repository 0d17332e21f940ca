"""One Z per prompt against one Z for all, where Z_c is spread over two decades.

    python recipes/benchmarks/conditional.py

A language of 5 tokens and length 4 has 341 completions, so KL(p_c || pi_c) is exact. A completion must hold the first token
of its prompt, as a summary must name what its text is about; eight prompts are picked whose Z_c lie evenly (in log) between
the largest and a hundredth of it. Both sides train alike but for the partition (Korbak et al. 2021, arXiv 2112.00791, compare
the same), each at its best learning rate of one grid, chosen on a seed that is not judged. The last line is JSON, also written
to outputs/benchmarks/conditional.json.
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_gdc import GDCConfig, GDCTrainer, Pointwise, Reference, SmallGPTConfig, SmallGPTForCausalLM
from hf_gdc.partition import Partition

WORDS, LENGTH, PROMPTS = "Eabcd", 4, 8
CHOOSING_SEED = 1000


class GlobalPartition(Partition):
    """One Z, whatever the prompt."""

    def update(self, key_B, log_w_B, version):
        super().update(torch.zeros_like(key_B), log_w_B, version)

    def log_z(self, key_B):
        return super().log_z(torch.zeros_like(key_B))

    def log_z_stderr(self, key_B):
        return super().log_z_stderr(torch.zeros_like(key_B))


def names_the_first(prompts, completion_ids, **_) -> list[float]:
    first = [WORDS.index(prompt.split()[0]) for prompt in prompts]
    return [float(token in ids) for token, ids in zip(first, completion_ids, strict=True)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="E"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="E", pad_token="E")


def make_model() -> SmallGPTForCausalLM:
    torch.manual_seed(3)  # with Z of some prompts near 1, of others near 0.001
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    model = SmallGPTForCausalLM(SmallGPTConfig(vocab_size=5, tie_word_embeddings=False, **size, **ids))
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.6)  # far from uniform
    return model


def completions() -> list[list[int]]:
    ended = [[*body, 0] for n in range(LENGTH) for body in itertools.product(range(1, 5), repeat=n)]
    return ended + [list(body) for body in itertools.product(range(1, 5), repeat=LENGTH)]


def inside(prompt: Sequence[int]) -> torch.Tensor:
    """(341,) which completions satisfy the constraint of this prompt."""
    return torch.tensor([prompt[0] in row for row in completions()])


@torch.no_grad()
def log_probs(model, prompt: Sequence[int]) -> torch.Tensor:
    """(341,) log-probability of every completion of a prompt, in float64."""
    rows = completions()
    ids = torch.tensor([[*prompt, *row] + [0] * (LENGTH - len(row)) for row in rows])
    mask = torch.tensor([[n < len(row) for n in range(LENGTH)] for row in rows])
    logp = model(input_ids=ids).logits.double().log_softmax(-1)[:, len(prompt) - 1 : -1]
    return (logp.gather(-1, ids[:, len(prompt) :, None]).squeeze(-1) * mask).sum(-1)


def pick_prompts(model) -> tuple[list[str], list[float]]:
    """Prompts of three tokens whose log Z are nearest to an even spread over two decades below the largest."""
    every = itertools.product(range(1, 5), repeat=3)
    z = {ids: float(log_probs(model, ids).exp()[inside(ids)].sum()) for ids in every}
    wanted = [math.log(max(z.values())) - math.log(100) * n / (PROMPTS - 1) for n in range(PROMPTS)]
    chosen = []
    for log_z in wanted:
        chosen.append(min((ids for ids in z if ids not in chosen), key=lambda ids: abs(math.log(z[ids]) - log_z)))
    return [" ".join(WORDS[n] for n in ids) for ids in chosen], [z[ids] for ids in chosen]


def mean_kl(model, reference, prompts: list[str]) -> float:
    """Exact mean over prompts of KL(p_c || pi_c)."""
    total = 0.0
    for prompt in prompts:
        ids = [WORDS.index(word) for word in prompt.split()]
        log_p = log_probs(reference, ids)[inside(ids)]
        log_p = log_p - log_p.logsumexp(0)
        total += float((log_p.exp() * (log_p - log_probs(model, ids)[inside(ids)])).sum())
    return total / len(prompts)


def train(
    divergence: str, one_z: bool, prompts: list[str], seed: int, learning_rate: float, options: argparse.Namespace
) -> float:
    model, reference = make_model(), make_model()
    with tempfile.TemporaryDirectory() as folder:
        args = GDCConfig(
            output_dir=folder,
            divergence=divergence,
            max_steps=options.steps,
            learning_rate=learning_rate,
            lr_scheduler_type="linear",
            per_device_train_batch_size=PROMPTS * options.num_generations,
            num_generations=options.num_generations,
            max_completion_length=LENGTH,
            fit_samples=PROMPTS * 256,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=options.steps,
        )
        dataset = Dataset.from_dict({"prompt": prompts * 4})
        target = Reference() * Pointwise(names_the_first)
        trainer = GDCTrainer(model, target, args=args, train_dataset=dataset, processing_class=make_tokenizer())
        if one_z:
            trainer.partition = GlobalPartition()
        trainer.train()
    return mean_kl(model, reference, prompts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--divergences", nargs="+", default=["kl", "js"])
    parser.add_argument("--num_generations", type=int, default=32)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    prompts, z = pick_prompts(make_model())
    print("Z of the prompts: " + ", ".join(f"{value:.4f}" for value in z), flush=True)
    assert max(z) / min(z) >= 90, "the prompts don't span two decades"
    result = {"prompts": prompts, "z": z, "before": mean_kl(make_model(), make_model(), prompts), **vars(options)}
    for divergence in options.divergences:
        runs, rates = {"per_prompt": [], "global": []}, {}
        for side in runs:
            tried = {rate: math.inf for rate in options.learning_rates}
            for rate in tried if len(tried) > 1 else ():
                tried[rate] = train(divergence, side == "global", prompts, CHOOSING_SEED, rate, options)
            rates[side] = min(tried, key=tried.get)
            print(f"{divergence} {side}, learning rates: {tried}", flush=True)
        for seed in range(options.seeds):
            for side, values in runs.items():  # in turn, the same seed for both
                values.append(train(divergence, side == "global", prompts, seed, rates[side], options))
                print(f"{divergence} seed {seed} {side}: {values[-1]:.4f}", flush=True)
        means = {side: statistics.fmean(values) for side, values in runs.items()}
        ratio = means["per_prompt"] / means["global"]
        result[divergence] = runs | {"learning_rates": rates, "means": means, "ratio": ratio}
    folder = Path("outputs/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "conditional.json").write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
