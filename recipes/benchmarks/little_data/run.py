"""Too little data: what adversarial and unified training get out of texts beside maximum likelihood.

    python recipes/benchmarks/little_data/run.py

A small GPT on 2,000 of the stories, of which it learns 1,700 and keeps 300 to stop early on: the start, a, from which more
maximum likelihood gains nothing. Every method goes on with the same texts, in two runs of `GANTrainer` or of `UnifiedTrainer`:

- the policy stands still, and the discriminator (or energy) learns real texts against samples of the start. What is best on the
  held-out texts makes "the target", a e^l / Z, an energy-based model;
- both move, from the start and that discriminator. What is best on the held-out texts is "the policy".

The grammar judges (`judge`), and is used for nothing else.

Every finished row is a line of OUTPUT/rows.jsonl, so an interrupted benchmark goes on where it stopped. Ends with
OUTPUT/table.md and a line of JSON.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from datasets import Dataset, concatenate_datasets
from judge import BATCH, LENGTH, Judge
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer

from hf_gdc import Discriminator, GANConfig, GANTrainer, Rollouts, UnifiedConfig, UnifiedTrainer, stories
from hf_gdc.adversarial.logit_networks import LogitNetwork
from hf_gdc.checkpoints import run_once
from hf_gdc.data import load_text
from hf_gdc.encoding import RightPadCollator, tokenize_rows
from hf_gdc.trainers.adversarial import DISCRIMINATOR_FILE
from hf_gdc.trainers.pretraining import PretrainArguments, PretrainConfig, PretrainingTrainer, build_trainer

TEXTS, HELD_OUT_PERCENT = 2000, 15
TEMPERATURES = [0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2]
POOL = 20_000  # samples of the start that a target weighs
SHARED = {"lr_scheduler_type": "linear", "use_cpu": True, "report_to": "none", "overwrite": True, "save_total_limit": 1}
SHARED |= {"disable_tqdm": True, "per_device_eval_batch_size": BATCH}
PLAYERS = {"per_device_train_batch_size": 512, "max_completion_length": LENGTH, "divergence": "kl"}
PLAYERS |= {"reference_samples": 512, "num_generations": 1}
# First the policy stands still: six sets of 1,536 samples, ten steps of the discriminator on each.
WARM_UP = {"max_steps": 18, "steps_per_generation": 3, "save_steps": 3, "save_total_limit": None}
WARM_UP |= {"discriminator_warmup_steps": 18, "discriminator_steps": 10, "discriminator_learning_rate": 3e-3}
# Then both move: four sets of 6,144 samples, twelve steps of the policy on each.
GAME = {"max_steps": 48, "steps_per_generation": 12, "eval_steps": 12, "eval_samples": 300}
GAME |= {"eval_strategy": "steps", "save_steps": 12, "load_best_model_at_end": True}
GAME |= {"metric_for_best_model": "nll", "greater_is_better": False}
TRAINERS = {"GAN": (GANTrainer, GANConfig), "unified": (UnifiedTrainer, UnifiedConfig)}
METHODS = {"GAN": {}, "unified": {"data_term": "nce", "data_weight": 10.0}}
# The GAN's target moves with the policy, so its discriminator must keep up; the energy's stands nearly still.
GAMES = {
    "GAN": {"learning_rate": 4e-4, "discriminator_steps": 15, "discriminator_learning_rate": 1e-2},
    "unified": {"learning_rate": 1e-3, "discriminator_steps": 2, "discriminator_learning_rate": 1e-3},
}
GAMES["GAN"]["discriminator_weight_decay"] = 1.0  # 1,700 texts would be learned by heart
ROWS = ["start", "start, its best temperature", "more maximum likelihood"]
ROWS += [f"{method}: {what}" for method in METHODS for what in ("the target", "the policy")]


class BagOfWords(LogitNetwork):
    """A logit from which tokens a text has, by one hidden layer: what a causal model forgets by the end of its story."""

    name = "bag of words"

    def __init__(self, vocabulary: int, hidden: int = 64, dropout: float = 0.4):
        super().__init__(logit_clip=10.0, batch_size=BATCH)
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
    size |= {"max_position_embeddings": 64, "residual_dropout": 0.15, "embedding_dropout": 0.15}
    options = PretrainArguments(
        num_stories=TEXTS, validation_percent=HELD_OUT_PERCENT, vocab_size=768, max_length=64, model_kwargs=size
    )
    trainer = build_trainer(options, likelihood(folder, seed, num_train_epochs=50, learning_rate=4e-3))
    trainer.train()
    trainer.save_model(str(folder / "model"))


def likelihood(folder: Path, seed: int, **options) -> PretrainConfig:
    return PretrainConfig(
        output_dir=str(folder),
        weight_decay=0.1,
        disable_dropout=False,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="nll_per_text",
        greater_is_better=False,
        seed=seed,
        **SHARED | options,
    )


def play(method: str, network: LogitNetwork, start: Path, options: dict, texts: Dataset, held_out: Dataset) -> Trainer:
    """`GANTrainer` or `UnifiedTrainer` from the start; its policy is the best one, by the options, on the held-out texts."""
    kind, config = TRAINERS[method]
    trainer = kind(
        str(start),
        Discriminator(network),
        args=config(**SHARED | PLAYERS | METHODS[method] | options),
        train_dataset=texts,
        eval_dataset=held_out,
    )
    trainer.train()
    return trainer


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


def kept(file: Path, make: Callable[[], object]):
    """What `make` gives, made once."""
    if not file.is_file():
        torch.save(make(), file.with_suffix(".new"))
        os.replace(file.with_suffix(".new"), file)  # whole or not at all
    return torch.load(file, weights_only=True)


class Seed:
    """The models of one seed, each made once, and their measurements by the row of the table."""

    def __init__(self, seed: int, folder: Path):
        self.seed, self.folder, self.start = seed, folder, folder / "start" / "model"
        run_once(folder / "start", {"texts": TEXTS}, lambda: pretrain(folder / "start", seed))
        self.texts, self.held_out = real_texts(seed)
        self.judge = Judge(AutoTokenizer.from_pretrained(self.start), self.texts["text"])
        base = AutoModelForCausalLM.from_pretrained(self.start)
        self.pool = Rollouts(**kept(folder / "pool.pt", lambda: self.judge.sample(base, 1, POOL).state_dict()))
        self.log_a = kept(folder / "log_a.pt", lambda: self.judge.log_pi(base, self.judge.stories))

    def measure(self, row: str) -> dict[str, float]:
        method, _, what = row.partition(": ")
        if row == "start":
            return self.judge.distances(self.log_a, self.pool, self.pool.policy_logp_B)
        if row == "start, its best temperature":
            temperature = best_temperature(self.start, self.judge, self.held_out["text"])
            model = tempered(AutoModelForCausalLM.from_pretrained(self.start), temperature)
            return self.judge.model(model) | {"temperature": temperature}
        if row == "more maximum likelihood":
            return self.judge.model(self.model("more", self.further))
        if what == "the policy":
            return self.judge.model(self.model(f"{method}_policy", lambda folder: self.game(method, folder)))
        network = self.discriminator(method)
        logits = network.whole_scores(self.pool)
        log_z = float(logits.logsumexp(0)) - math.log(POOL)
        log_pi = self.log_a + network.whole_scores(self.judge.stories) - log_z
        own = self.pool.policy_logp_B + logits - log_z
        return self.judge.distances(log_pi, self.pool, own, logits.exp()) | {"log_z": log_z}

    def model(self, name: str, train: Callable[[Path], PreTrainedModel]) -> PreTrainedModel:
        """What `train` gives for a folder, trained once."""
        folder = self.folder / name
        run_once(folder, {}, lambda: train(folder / "run").save_pretrained(folder / "model"))
        return AutoModelForCausalLM.from_pretrained(folder / "model")

    def further(self, folder: Path) -> PreTrainedModel:
        """Maximum likelihood from the start on, stopped early on the held-out texts."""
        tokenizer = AutoTokenizer.from_pretrained(self.start)
        trainer = PretrainingTrainer(
            model=AutoModelForCausalLM.from_pretrained(self.start),
            args=likelihood(folder, self.seed, num_train_epochs=8, learning_rate=2e-3),
            data_collator=RightPadCollator(tokenizer.pad_token_id),
            train_dataset=tokenize_rows(self.texts, tokenizer, 64),
            eval_dataset=tokenize_rows(self.held_out, tokenizer, 64),
            processing_class=tokenizer,
        )
        trainer.train()
        return trainer.model

    def discriminator(self, method: str) -> LogitNetwork:
        """l or d against samples of the start, at its best on the held-out texts."""
        torch.manual_seed(self.seed)
        network, held_out = BagOfWords(len(AutoTokenizer.from_pretrained(self.start))), self.held_out["text"]

        def gain(state: dict) -> float:
            """KL(p, a) - KL(p, a e^l / Z), without knowing p."""
            network.load_own_state(state)
            log_z = float(network.whole_scores(self.pool).logsumexp(0)) - math.log(POOL)
            return float(network.whole_scores(self.judge.rollouts(held_out)).mean()) - log_z

        def train() -> dict:
            folder = self.folder / f"{method}_warm_up"
            self.play(method, network, folder, WARM_UP)
            found = [torch.load(file, weights_only=True) for file in folder.glob(f"checkpoint-*/{DISCRIMINATOR_FILE}")]
            return max((state["network"] for state in found), key=gain)

        network.load_own_state(kept(self.folder / f"{method}.pt", train))
        return network

    def game(self, method: str, folder: Path) -> PreTrainedModel:
        return self.play(method, self.discriminator(method), folder, GAME | GAMES[method]).model

    def play(self, method: str, network: LogitNetwork, folder: Path, options: dict) -> Trainer:
        options = options | {"output_dir": str(folder), "seed": self.seed, "logging_steps": options["save_steps"]}
        size = PLAYERS["per_device_train_batch_size"] * options["steps_per_generation"]
        texts = concatenate_datasets([self.texts] * math.ceil(size / len(self.texts)))  # a set takes as many as samples
        return play(method, network, self.start, options, texts, self.held_out)


def summary(values: list[float], digits: int = 3) -> str:
    """Mean and, of several seeds, its standard error."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def table(results: dict[tuple, dict], seeds: list[int]) -> list[str]:
    """Means over seeds with standard errors; differences are paired: each seed's row less its start."""

    def values(row: str, measure: str) -> list[float]:
        return [results[row, seed][measure] for seed in seeds]

    def less_start(row: str, measure: str) -> str:
        pairs = zip(values(row, measure), values("start", measure), strict=True)
        return "" if row == "start" else summary([value - start for value, start in pairs])

    names = ["model", "KL(p, pi)", "less the start's", "JS", "less the start's", "entropy", "against the start's"]
    names += ["against the grammar's", "grammatical", "copies of a text learned"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in ROWS:
        cells = [row]
        for measure in ("kl", "js"):
            cells += [summary(values(row, measure)), less_start(row, measure)]
        entropy = statistics.fmean(values(row, "entropy"))
        cells.append(summary(values(row, "entropy"), 2))
        for other in (statistics.fmean(values("start", "entropy")), stories.entropy()):
            cells.append(f"{entropy / other - 1:+.1%}")
        cells += [summary(values(row, "grammatical")), f"{statistics.fmean(values(row, 'copied')):.2%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=ROWS, help="measure these alone, the table another time"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/little_data"))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "rows.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    results = {(found["row"], found["seed"]): found for found in map(json.loads, lines)}
    todo = [(row, seed) for seed in options.seeds for row in options.rows if (row, seed) not in results]
    for row, seed in todo:
        began = time.time()
        found = {"row": row, "seed": seed} | Seed(seed, options.output / f"seed{seed}").measure(row)
        found["seconds"] = time.time() - began
        results[row, seed] = found
        with file.open("a") as log:
            log.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)
    if any((row, seed) not in results for row in ROWS for seed in options.seeds):
        return print("other rows are left: start again without --rows")
    lines = table(results, options.seeds)
    (options.output / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines) + f"\nentropy of the grammar {stories.entropy():.3f}")
    print(json.dumps({"entropy": stories.entropy(), "rows": list(results.values())}))


if __name__ == "__main__":
    main()
