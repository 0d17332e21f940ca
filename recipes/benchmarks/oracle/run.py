"""SeqGAN's synthetic oracle: adversarial training and the unified objective against maximum likelihood and a temperature.

    python recipes/benchmarks/oracle/run.py --oracle seqgan_oracle.safetensors --workers 2

10,000 sequences of the oracle are all that a method sees, 500 of them to stop it early; other sequences judge it. Each method
is a frontier over inverse temperatures, for several seeds of its own. `--oracle 7` draws a fresh oracle from seed 7, and
`--generator gpt` takes a small GPT in place of the LSTM.

Every finished part, a method with a seed, is OUTPUT/seedN/METHOD/part.json beside its model, so an interrupted benchmark goes
on where it stopped. Ends with OUTPUT/table.md, OUTPUT/figure.png and a line of JSON, also in OUTPUT/oracle.json.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import report
import torch
import transformers
from frontier import ALPHAS, best, frontier
from language import load_oracle, nll, sample, seeded_oracle
from methods import METHODS, load_generator
from safetensors.torch import load_file, save_file

TRAIN, VALIDATION, HELD_OUT = 9500, 500, 3000


@dataclass
class Benchmark:
    """What all parts share; sequences are (B, T) words."""

    oracle: transformers.PreTrainedModel
    train: torch.Tensor
    validation: torch.Tensor
    held_out: torch.Tensor
    generator: str
    samples: int
    output: Path

    @property
    def entropy(self) -> float:
        """Of the oracle, in nats per word, as the held-out sequences show it."""
        return float(nll(self.oracle, self.held_out).mean())

    @property
    def sequences(self) -> torch.Tensor:
        """All 10,000, for methods that don't stop early."""
        return torch.cat([self.train, self.validation])

    def folder(self, seed: int, method: str) -> Path:
        return self.output / f"seed{seed}" / method

    def part(self, seed: int, method: str) -> dict:
        """A method with a seed, computed unless that has been done."""
        file = self.folder(seed, method) / "part.json"
        if file.is_file():
            return json.loads(file.read_text())
        model, seconds = self.trained(seed, method)
        rows = frontier(model, self.oracle, self.held_out, self.samples, seed=10_000 + seed)
        found = {"method": method, "seed": seed, "seconds": seconds, "best": best(rows), "frontier": rows}
        file.write_text(json.dumps(found, indent=2) + "\n")
        print(json.dumps({name: found[name] for name in ("method", "seed", "seconds", "best")}), flush=True)
        return found

    def trained(self, seed: int, method: str) -> tuple[transformers.PreTrainedModel, float]:
        """The generator that a method makes, and the seconds that it took; trained once."""
        folder, chosen = self.folder(seed, method), METHODS[method]
        done = folder / "seconds.json"  # written last
        if done.is_file():
            return load_generator(folder / "model"), json.loads(done.read_text())
        if chosen.start is not None:
            self.trained(seed, chosen.start)
        start = time.perf_counter()
        model = chosen.train(self, seed, folder)
        seconds = time.perf_counter() - start
        model.save_pretrained(folder / "model")
        done.write_text(json.dumps(seconds))
        return model, seconds


def prepare(options: argparse.Namespace) -> Benchmark:
    """The oracle and its sequences, drawn once for an output folder.

    Raises:
        ValueError: the folder has parts of another oracle or generator.
    """
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    drawn = options.oracle.isdigit()
    oracle = seeded_oracle(int(options.oracle)) if drawn else load_oracle(options.oracle)
    name = f"seed {options.oracle}" if drawn else Path(options.oracle).name
    about, file = {"oracle": name, "generator": options.generator}, output / "about.json"
    if file.is_file() and json.loads(file.read_text()) != about:
        raise ValueError(
            f"{output} has parts of {json.loads(file.read_text())}, not of {about}: give another --output."
        )
    file.write_text(json.dumps(about) + "\n")
    cache = output / "sequences.safetensors"
    if not cache.is_file():
        parts = {"train": sample(oracle, TRAIN + VALIDATION, seed=0), "held_out": sample(oracle, HELD_OUT, seed=1)}
        save_file(parts, fresh := cache.with_suffix(f".{os.getpid()}"))
        fresh.replace(cache)  # whole or not there, whoever else draws it
    words = load_file(cache)
    train, validation = words["train"].split([TRAIN, VALIDATION])
    return Benchmark(oracle, train, validation, words["held_out"], options.generator, options.samples, output)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracle", default="0", help="a safetensors file, or a seed")
    parser.add_argument("--generator", default="lstm", choices=("lstm", "gpt"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of the methods")
    parser.add_argument("--samples", type=int, default=2048, help="for each NLL_oracle")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each, which share the seeds")
    parser.add_argument("--output", default="outputs/benchmarks/oracle")
    return parser.parse_args(argv)


def share(options: argparse.Namespace) -> None:
    """The seeds, on processes of one thread each."""
    command = [sys.executable, __file__, "--oracle", options.oracle, "--generator", options.generator]
    command += ["--samples", str(options.samples), "--output", options.output, "--methods", *options.methods]
    groups = [options.seeds[n :: options.workers] for n in range(options.workers)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([*command, "--seeds", *map(str, seeds)], env=environment) for seeds in groups if seeds]
    if any([process.wait() for process in started]):
        raise SystemExit("a worker failed: see above. Run the same command again to go on.")


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    benchmark = prepare(options)
    if options.workers > 1:
        share(options)
    parts = {method: {seed: benchmark.part(seed, method) for seed in options.seeds} for method in options.methods}
    baseline = next(iter(METHODS)) if next(iter(METHODS)) in parts else next(iter(parts))
    found = report.summarise(parts, benchmark.entropy, baseline)
    report.write_table(found, benchmark.output / "table.md")
    report.plot(parts, benchmark.entropy, benchmark.output / "figure.png")
    result = {"entropy": benchmark.entropy, "alphas": ALPHAS, "methods": found}
    (benchmark.output / "oracle.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
