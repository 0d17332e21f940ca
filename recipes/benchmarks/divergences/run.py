"""Which divergence? Alignment against diversity, every divergence judged under every divergence.

    python recipes/benchmarks/divergences/run.py [--workers 2]

A small GPT on the stories is moved to three targets by each divergence from equal budgets: a rare word (a soft constraint, so
that every divergence is finite), a balance of protagonists, and a graded reward. Each divergence takes the best learning rate
and baseline of one grid, chosen on one seed by the divergence that it minimises itself; then come the seeds. Judged by
`evaluate`: pools of the reference and of the policy.

Every finished run is a line of OUTPUT/runs.jsonl, so an interrupted benchmark goes on where it stopped. Ends with
OUTPUT/figure.png, OUTPUT/table.md and a line of JSON.
"""

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

DIVERGENCES = {"kl": {}, "reverse_kl": {}, "js": {}, "tv": {}, "alpha": {"alpha": 0.5}}
JUDGES = ["kl_target_policy", "kl_policy_target", "js", "tv", "hellinger"]
OWN = dict(zip(DIVERGENCES, JUDGES, strict=True))  # alpha = 1/2 is twice squared Hellinger
TARGETS = ["rare word", "balance", "reward"]
RATES, BASELINES = [1e-3, 3e-3], ["leave_one_out", "gauge"]
STEPS, SAMPLES, SEEDS = 60, 128, 5
T_975 = 2.776  # Student's t for SEEDS - 1 degrees of freedom


def make_target(name: str):
    from hf_gdc import Moment, Reference, Reward

    if name == "rare word":
        return Reference() * Reward("contains:dragon", beta=0.1)  # 1% under a, 99% under p
    if name == "balance":
        return Reference() * Moment("contains:she", 0.5) * Moment("contains:friends", 0.3)
    return Reference() * Reward("count:the", beta=1.0)


def make_base(folder: Path) -> Path:
    """A GPT of 32 x 1 on 20,000 stories."""
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    from hf_gdc.trainers.pretraining import PretrainArguments, PretrainConfig, pretrain

    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    model, metrics = pretrain(
        PretrainArguments(num_stories=20_000, tokenizer="word", max_length=48, model_kwargs=size),
        PretrainConfig(
            output_dir=str(folder),
            learning_rate=1.5e-2,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            overwrite=True,
        ),
    )
    print(f"base: {metrics['eval_excess_nats']:.2f} nats per story above the grammar's entropy", flush=True)
    return model


def work(base: str, output: str, jobs: list[dict]) -> None:
    """Runs in a process of its own, on one thread."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    pools = None
    for job in jobs:
        result, pools = one_run(base, f"{output}/run{os.getpid()}", job, pools)
        with open(f"{output}/runs.jsonl", "a") as file:
            file.write(json.dumps(job | result) + "\n")
        print(job, f"KL(p||pi) {result['kl_target_policy']:.3f}", flush=True)


def one_run(base: str, folder: str, job: dict, pools) -> tuple[dict, object]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_gdc import GDCConfig, GDCTrainer
    from hf_gdc.metrics import distinct_n

    args = GDCConfig(
        output_dir=folder,
        overwrite=True,
        use_cpu=True,
        divergence=job["divergence"],
        divergence_kwargs=DIVERGENCES[job["divergence"]] or None,
        learning_rate=job["learning_rate"],
        lr_scheduler_type="linear",
        warmup_steps=5,
        max_steps=STEPS,
        per_device_train_batch_size=SAMPLES,
        per_device_eval_batch_size=1024,
        max_completion_length=47,
        fit_samples=8192,
        reference_samples=20480,
        eval_samples=2048,
        seed=job["seed"],
        logging_steps=STEPS,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(base)
    trainer = GDCTrainer(
        model, make_target(job["target"]), args=args, processing_class=AutoTokenizer.from_pretrained(base)
    )
    if pools is not None:
        trainer.reference_pools.share(pools)  # the same in all runs: drawn once
    # "gauge": f'(1) = 0 and nothing else, which for kl is the exact baseline of GDC++
    trainer.divergence.baseline_is_zero = job["baseline"] == "gauge"
    trainer.train()
    metrics = trainer.evaluate()
    samples = trainer.evaluation_samples
    result = {name: metrics.get(f"eval_{name}", math.inf) for name in [*JUDGES, "kl_policy_reference", "entropy"]}
    features = {name.removeprefix("eval_features/"): v for name, v in metrics.items() if "features/" in name}
    entropy = -float(samples.policy_logp_B.mean())
    result |= {"features": features, "sequence_entropy": entropy, "distinct_2": distinct_n(samples.texts, 2)}
    return {
        k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in result.items()
    }, trainer.reference_pools


def key(job: dict) -> tuple:
    return tuple(job[name] for name in ("target", "divergence", "learning_rate", "baseline", "seed"))


def finished(output: Path) -> dict[tuple, dict]:
    file = output / "runs.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {key(row): row for row in rows}


def run_all(jobs: list[dict], base: Path, output: Path, workers: int) -> dict[tuple, dict]:
    """Every job that has no result yet, on so many processes of one thread each."""
    missing = [job for job in jobs if key(job) not in finished(output)]
    started = []
    for n in range(workers):
        if share := missing[n::workers]:
            file = output / f"jobs{n}.json"
            file.write_text(json.dumps(share))
            command = [sys.executable, __file__, "--base", str(base), "--output", str(output), "--jobs", str(file)]
            started.append(subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}))
    if any([process.wait() for process in started]):
        raise SystemExit("a worker failed: see above. Run the same command again to go on.")
    return finished(output)


def choose(done: dict[tuple, dict], target: str, divergence: str) -> dict:
    """The grid's cell whose final D_f(pi || p) is smallest, f being the run's own."""
    cells = [row for row in done.values() if (row["target"], row["divergence"], row["seed"]) == (target, divergence, 0)]
    best = min(cells, key=lambda row: math.inf if row[OWN[divergence]] is None else row[OWN[divergence]])
    return {name: best[name] for name in ("target", "divergence", "learning_rate", "baseline")}


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95% confidence interval (Student's t)."""
    values = [math.inf if value is None else value for value in values]
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), T_975 * statistics.stdev(values) / len(values) ** 0.5


def summarise(rows: list[dict]) -> dict:
    names = [*JUDGES, "kl_policy_reference", "sequence_entropy", "distinct_2"]
    summary = {name: interval([row[name] for row in rows]) for name in names}
    features = {name: interval([row["features"][name] for row in rows]) for name in rows[0]["features"]}
    return summary | {"features": features, "learning_rate": rows[0]["learning_rate"], "baseline": rows[0]["baseline"]}


def write_table(found: dict, path: Path) -> None:
    lines = []
    for target in TARGETS:
        features = list(next(iter(found[target].values()))["features"])
        lines += [
            f"**{target}**",
            "",
            "| trained by | "
            + " | ".join(
                ["learning rate", "baseline", "KL(p, pi)", "KL(pi, p)", "2 JS", "TV", "Hellinger^2", "KL(pi, a)"]
                + ["entropy of a story", "distinct-2", *features]
            )
            + " |",
            "|" + "---|" * (11 + len(features)),
        ]
        for name, row in found[target].items():
            cells = [row[judge] for judge in [*JUDGES, "kl_policy_reference", "sequence_entropy", "distinct_2"]]
            cells += [row["features"][feature] for feature in features]
            shown = " | ".join(f"{mean:.3g} ± {half:.2g}" for mean, half in cells)
            lines.append(f"| {name} | {row['learning_rate']:g} | {row['baseline']} | {shown} |")
        lines.append("")
    path.write_text("\n".join(lines))


def plot(found: dict, path: Path) -> None:
    """Above: every divergence judged by every divergence; below: alignment against diversity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(TARGETS), figsize=(13, 7.5), layout="constrained")
    labels = ["KL(p||π)", "KL(π||p)", "2 JS", "TV", "Hellinger²"]
    for column, target in enumerate(TARGETS):
        top, bottom = axes[:, column]
        for n, (name, row) in enumerate(found[target].items()):
            means, halves = zip(*(row[judge] for judge in JUDGES), strict=True)
            places = [place + 0.14 * (n - 2) for place in range(len(JUDGES))]
            top.errorbar(places, means, halves, fmt="o", color=f"C{n}", label=name, markersize=4)
            (x, dx), (y, dy) = row["kl_policy_target"], row["sequence_entropy"]
            bottom.errorbar(x, y, dy, dx, fmt="o", color=f"C{n}", label=name)
        top.set(title=target, yscale="log", xticks=range(len(JUDGES)), xticklabels=labels)
        bottom.set(xlabel="KL(π||p), nats (alignment: left is better)")
    axes[0, 0].set_ylabel("divergence after training")
    axes[1, 0].set_ylabel("entropy of a story, nats (diversity)")
    axes[0, -1].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/divergences"))
    parser.add_argument("--base", type=Path, help="folder of the base model; default: make one")
    parser.add_argument(
        "--divergences", nargs="+", choices=DIVERGENCES, default=list(DIVERGENCES), help="a part of them"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--jobs", type=Path, help=argparse.SUPPRESS)  # what a worker does
    options = parser.parse_args()
    if options.jobs:
        return work(str(options.base), str(options.output), json.loads(options.jobs.read_text()))
    options.output.mkdir(parents=True, exist_ok=True)
    base = options.base or make_base(options.output / "base")
    pairs = list(itertools.product(TARGETS, options.divergences))
    cell = ("target", "divergence", "learning_rate", "baseline", "seed")
    grid = [
        dict(zip(cell, (*pair, rate, baseline, 0), strict=True))
        for pair, rate, baseline in itertools.product(pairs, RATES, BASELINES)
    ]
    done = run_all(grid, base, options.output, options.workers)
    best = {pair: choose(done, *pair) for pair in pairs}
    # the seed that chose the cell is not judged: it was picked for its luck too
    seeds = [best[pair] | {"seed": seed} for pair in pairs for seed in range(1, SEEDS + 1)]
    done = run_all(seeds, base, options.output, options.workers)
    found = {target: {} for target in TARGETS}
    for target, name in pairs:
        chosen = best[target, name]
        found[target][name] = summarise([done[key(chosen | {"seed": seed})] for seed in range(1, SEEDS + 1)])
    write_table(found, options.output / "table.md")
    plot(found, options.output / "figure.png")
    line = json.dumps(found).replace("NaN", "null").replace("Infinity", "null")
    (options.output / "divergences.json").write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
