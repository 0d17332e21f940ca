"""Too little data: what adversarial and unified training get out of texts that maximum likelihood has used up.

    python recipes/benchmarks/little_data/run.py

A small GPT on 2,000 of the stories, of which it learns 1,700 and keeps 300 to stop early on. From there every method goes on
with the same 1,700 texts, and stops early on the same 300: maximum likelihood, a GAN, the unified objective. A temperature is
fitted on the 300 too. The stories' grammar gives log p of every text, so that on samples of the grammar and of the model

    KL(p || pi) = E_p[log p - log pi]
    JS = log 2 - (E_p[softplus(log pi - log p)] + E_pi[softplus(log p - log pi)]) / 2

are exact but for the noise of sampling: p = 0 outside the grammar, and for other tokens than the tokenizer's own of a text.

Every finished run is a line of OUTPUT/runs.jsonl, so an interrupted benchmark goes on where it stopped. Ends with
OUTPUT/table.md and a line of JSON.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_gdc import Discriminator, GANConfig, GANTrainer, Rollouts, UnifiedConfig, UnifiedTrainer, stories
from hf_gdc.actors import score_in_parts
from hf_gdc.adversarial.logit_networks import LogitNetwork
from hf_gdc.adversarial.real_text import RealTexts
from hf_gdc.checkpoints import run_once
from hf_gdc.data import load_text
from hf_gdc.sampling import TransformersSampler
from hf_gdc.scoring import Scorer
from hf_gdc.trainers.pretraining import PretrainArguments, PretrainConfig, build_trainer

TEXTS, HELD_OUT_PERCENT, LENGTH, BATCH = 2000, 15, 52, 500
JUDGED = 10_000  # samples of the grammar, and of each model
TEMPERATURES = [0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1]
STOPPING = {"eval_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "nll"}
STOPPING |= {"greater_is_better": False, "save_strategy": "steps", "save_total_limit": 1, "save_steps": 10}
GAME = STOPPING | {"max_steps": 60, "eval_steps": 10, "eval_samples": 300, "reference_samples": 512}
GAME |= {"per_device_train_batch_size": 256, "per_device_eval_batch_size": BATCH, "max_completion_length": LENGTH}
GAME |= {"lr_scheduler_type": "linear", "use_cpu": True, "report_to": "none", "logging_steps": 10, "overwrite": True}
# AdamW's default epsilon moves the parameters of rare tokens as fast as all others, though their gradients are noise.
PLAYERS = {"divergence": "js", "learning_rate": 1e-3, "adam_epsilon": 1e-3}
PLAYERS |= {"discriminator_warmup_steps": 20, "discriminator_steps": 8}
PLAYERS |= {"discriminator_learning_rate": 1e-2, "discriminator_weight_decay": 0.03}
METHODS = {
    "more maximum likelihood": {"mle_steps": 60, "learning_rate": 5e-4},
    "GAN": PLAYERS,
    "unified": PLAYERS | {"data_term": "nce", "data_weight": 4.0},
}
ROWS = ["start", "temperature", *METHODS]
MEASURES = {"kl": "KL(p, pi)", "js": "JS", "entropy": "entropy", "grammatical": "grammatical", "copied": "copied"}


# ---- the judge ----


@dataclass
class Judge:
    """Exact log-probabilities of texts, and distances between the grammar and a model.

    Args:
        tokenizer: of the models. known: the texts that they have seen. samples: of the grammar, and of each model.
    """

    tokenizer: PreTrainedTokenizerBase
    known: list[str]
    samples: int = JUDGED

    def __post_init__(self):
        self.sampler = TransformersSampler(self.tokenizer, LENGTH)
        texts = stories.sample(self.samples, 10**6)  # a seed of its own
        self.pool = self.rollouts(texts)
        self.log_p = torch.tensor([stories.log_prob(text) for text in texts], dtype=torch.float64)

    def rollouts(self, texts: list[str]) -> Rollouts:
        return RealTexts(self.sampler)([{"prompt": "", "completion": text} for text in texts], torch.device("cpu"))

    def log_pi(self, model: PreTrainedModel, rollouts: Rollouts) -> Tensor:
        return score_in_parts(Scorer(model.eval()), rollouts, BATCH, torch.device("cpu"))

    def sample(self, model: PreTrainedModel, seed: int) -> Rollouts:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return Rollouts.concatenate([self.sampler(model, [""] * BATCH) for _ in range(self.samples // BATCH)])

    def grammar(self, samples: Rollouts) -> Tensor:
        """(B,) log p of tokens: -inf where the text is not a story, was cut, or has other tokens than the tokenizer's."""
        own = self.rollouts(samples.texts).completion_ids()
        pairs = zip(samples.texts, own, samples.completion_ids(), strict=True)
        return torch.tensor([stories.log_prob(text) if a == b else -math.inf for text, a, b in pairs]).double()

    def __call__(self, model: PreTrainedModel, seed: int = 1) -> dict[str, float]:
        """Distances in nats with standard errors, the entropy of a text in nats, shares of samples."""
        log_pi, samples = self.log_pi(model, self.pool), self.sample(model, seed)
        log_p_own, log_pi_own = self.grammar(samples), samples.policy_logp_B
        inside = log_p_own > -math.inf
        kl, own = self.log_p - log_pi, -log_pi_own
        ours, theirs = softplus(log_pi - self.log_p), softplus(log_p_own - log_pi_own)
        found = {"kl": mean(kl), "entropy": mean(own), "grammatical": mean(inside.double())}
        found["js"] = (math.log(2) - float(ours.mean() + theirs.mean()) / 2, math.hypot(error(ours), error(theirs)) / 2)
        known = set(self.known)
        found["copied"] = mean(torch.tensor([float(text in known) for text in samples.texts]))
        found = {name: value for name, (value, _) in found.items()} | {
            f"{name}_stderr": spread for name, (_, spread) in found.items()
        }
        return found | {"samples": samples.texts[:5]}


def error(numbers: Tensor) -> float:
    return float(numbers.std()) / math.sqrt(len(numbers))


def mean(numbers: Tensor) -> tuple[float, float]:
    return float(numbers.mean()), error(numbers)


# ---- the methods ----


class BagOfWords(LogitNetwork):
    """A logit from which tokens a text has, by one hidden layer: what a causal model forgets by the end of its story."""

    name = "bag of words"

    def __init__(self, vocabulary: int, hidden: int = 64, dropout: float = 0.4):
        super().__init__(logit_clip=10.0, batch_size=JUDGED)
        self.vocabulary = vocabulary
        self.layers = nn.Sequential(nn.Linear(vocabulary, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1))

    def forward(self, rollouts: Rollouts) -> Tensor:
        ids_BT, mask_BT = rollouts.completion_ids_BT, rollouts.completion_mask_BT
        present_BV = torch.zeros(len(ids_BT), self.vocabulary, device=ids_BT.device)
        return self.layers(present_BV.scatter_reduce(1, ids_BT, mask_BT.to(present_BV), "amax"))


def real_texts(seed: int) -> tuple:
    """Those to learn and those held out, as pretraining takes them."""
    split = 100 - HELD_OUT_PERCENT
    return tuple(
        load_text("stories", part, num_stories=TEXTS, seed=seed) for part in (f"train[:{split}%]", f"train[{split}%:]")
    )


def pretrain(folder: Path, seed: int) -> None:
    """Maximum likelihood, stopped early on the held-out texts."""
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {"max_position_embeddings": 64, "residual_dropout": 0.1, "embedding_dropout": 0.1}
    options = PretrainArguments(
        num_stories=TEXTS, validation_percent=HELD_OUT_PERCENT, vocab_size=768, max_length=64, model_kwargs=size
    )
    args = PretrainConfig(
        output_dir=str(folder),
        num_train_epochs=12,
        learning_rate=8e-3,
        weight_decay=0.1,
        disable_dropout=False,
        lr_scheduler_type="linear",
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="nll_per_text",
        greater_is_better=False,
        seed=seed,
        use_cpu=True,
        report_to="none",
        overwrite=True,
    )
    trainer = build_trainer(options, args)
    trainer.train()
    trainer.save_model(str(folder / "model"))


def train(method: str, start: Path, folder: Path, seed: int) -> PreTrainedModel:
    """The model after further training from `start`, at its best on the held-out texts."""
    texts, held_out = real_texts(seed)
    kind, config = (UnifiedTrainer, UnifiedConfig) if method == "unified" else (GANTrainer, GANConfig)
    trainer = kind(
        str(start),
        Discriminator(BagOfWords(AutoModelForCausalLM.from_pretrained(start).config.vocab_size)),
        args=config(output_dir=str(folder), seed=seed, **GAME | METHODS[method]),
        train_dataset=texts,
        eval_dataset=held_out,
    )
    trainer.train()
    return trainer.model


def tempered(model: PreTrainedModel, temperature: float) -> PreTrainedModel:
    """The model with its logits divided by the temperature: they are linear in the last norm's weight."""
    with torch.no_grad():
        model.model.norm.weight /= temperature
    return model


def best_temperature(start: Path, judge: Judge, held_out: list[str]) -> float:
    rollouts = judge.rollouts(held_out)

    def nll(temperature: float) -> float:
        model = tempered(AutoModelForCausalLM.from_pretrained(start), temperature)
        return -float(judge.log_pi(model, rollouts).mean())

    return min(TEMPERATURES, key=nll)


def one_run(row: str, seed: int, output: Path) -> dict:
    folder = output / f"seed{seed}"
    run_once(folder / "start", {"texts": TEXTS}, lambda: pretrain(folder / "start", seed))
    start, clock = folder / "start" / "model", time.monotonic()
    texts, held_out = (rows["text"] for rows in real_texts(seed))
    judge, found = Judge(AutoTokenizer.from_pretrained(start), texts), {}
    if row in METHODS:
        model = train(row, start, folder / row.replace(" ", "_"), seed)
    else:
        model = AutoModelForCausalLM.from_pretrained(start)
    if row == "temperature":
        found["temperature"] = best_temperature(start, judge, held_out)
        tempered(model, found["temperature"])
    found["seconds"] = time.monotonic() - clock
    found["held_out_nll"] = -float(judge.log_pi(model, judge.rollouts(held_out)).mean())
    return found | judge(model)


def table(results: dict[tuple, dict], seeds: list[int]) -> list[str]:
    lines = ["| model | " + " | ".join(MEASURES.values()) + " |", "|" + "---|" * (1 + len(MEASURES))]
    for row in ROWS:
        cells = []
        for measure in MEASURES:
            values = [results[row, seed][measure] for seed in seeds]
            spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
            cells.append(f"{statistics.fmean(values):.3f} ± {spread:.3f}")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--most_runs", type=int, default=1000, help="stop after so many, to go on another time")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/little_data"))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    options.output.mkdir(parents=True, exist_ok=True)
    file, seeds = options.output / "runs.jsonl", list(range(options.seeds))
    lines = file.read_text().splitlines() if file.is_file() else []
    results = {(row["row"], row["seed"]): row for row in map(json.loads, lines)}
    todo = [(row, seed) for seed in seeds for row in ROWS if (row, seed) not in results]
    for row, seed in todo[: options.most_runs]:
        results[row, seed] = {"row": row, "seed": seed} | one_run(row, seed, options.output)
        with file.open("a") as log:
            log.write(json.dumps(results[row, seed]) + "\n")
        shown = ", ".join(f"{name} {results[row, seed][name]:.3f}" for name in (*MEASURES, "held_out_nll", "seconds"))
        print(f"{row}, seed {seed}: {shown}", flush=True)
    if len(todo) > options.most_runs:
        return print(f"{len(todo) - options.most_runs} runs are left: start again to go on")
    lines = table(results, seeds)
    (options.output / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines) + f"\nentropy of the grammar {stories.entropy():.3f}")
    print(json.dumps({"seeds": options.seeds, "entropy": stories.entropy(), "runs": list(results.values())}))


if __name__ == "__main__":
    main()
