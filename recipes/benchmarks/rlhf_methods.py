"""RLHF on the stories: PPO and GDC beside TRL's RLOO and GRPO, from equally many samples, judged by the known optimum.

    OMP_NUM_THREADS=1 python recipes/benchmarks/rlhf_methods.py [--trl .trl-1.12] [--workers 2]

The reward counts a word; with a KL penalty of beta its optimum is p = a exp(r / beta) / Z, about 1 nat from the base a. Every
method draws STEPS sets of SAMPLES stories and nothing more (log Z, where a method needs it, comes from those), with Adam, 5
steps of warm-up and linear decay; at its best learning rate of --rates, chosen by KL(pi || p), what RLHF minimises, on a seed
that is not judged. With --trl, a folder that has TRL 1.12, its PPO joins. recipes/trl/README.md says what each minimises.

The judge draws --pool samples of the base, which tell log Z, and fresh ones of each model; both KLs come from the two pools
together (`hf_gdc.evaluation.pooled_metrics`). Every run has a process of its own, so that its peak memory is its own: what
was resident beyond the imports when training ended. Samples per second are those of the whole training.

Every finished run is a line of OUTPUT/runs.jsonl, so an interrupted benchmark goes on where it stopped. Ends with
OUTPUT/table.md and a line of JSON, also written to OUTPUT/rlhf_methods.json.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASE = "outputs/benchmarks/base/pretrain/model"  # quickstart_problem's, made there if absent
REWARD, BETA = "count:was", 0.9
STEPS, SAMPLES, LENGTH = 60, 128, 47
RATES, GRID_SEED, SEEDS = [3e-4, 1e-3, 3e-3, 1e-2], 0, [1, 2, 3]
T_975 = 4.303  # Student's t for 2 degrees of freedom

METHODS = {  # of each, what differs from the common options
    "gdc reverse_kl": {"divergence": "reverse_kl", "fit_samples": 0},
    "gdc js": {"divergence": "js", "fit_samples": 0},
    "ppo": {"kl_coef": BETA, "num_iterations": 4},
    "rloo": {"beta": BETA, "num_generations": SAMPLES},
    "grpo": {"beta": BETA, "num_generations": SAMPLES, "scale_rewards": "none"},
    "trl ppo": {"kl_coef": BETA, "num_ppo_epochs": 4},
}
JUDGED = {  # the table's columns
    "kl_target_policy": "KL(p, pi)",
    "kl_policy_target": "KL(pi, p)",
    "reward": "reward",
    "kl_policy_reference": "KL(pi, a)",
    "entropy": "entropy of a story",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "samples_per_second": "samples/s",
    "peak_mib": "peak MiB",
}


# ---- one run, in a process of its own ----


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def make_target():
    from hf_gdc import Reference, Reward

    return Reference() * Reward(REWARD, beta=BETA)


def make_trainer(job: dict, base: str, folder: str):
    """The trainer of a job: ours, or TRL's through its recipe."""
    common = {
        "output_dir": folder,
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "linear",
        "warmup_steps": 5,
        "per_device_train_batch_size": SAMPLES,
        "seed": job["seed"],
        "use_cpu": True,
        "bf16": False,
        "logging_steps": STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    method, own = job["method"], METHODS[job["method"]]
    if method in ("rloo", "grpo", "trl ppo"):
        from recipes.trl.run import make_trainer as make_trl
        from recipes.trl.run import trl_classes

        name = method.removeprefix("trl ")
        common |= {"gradient_checkpointing": False}
        if name == "ppo":
            common |= {"response_length": LENGTH, "stop_token": "eos", "temperature": 1.0, "num_sample_generations": 0}
            common |= {"total_episodes": STEPS * SAMPLES, "local_rollout_forward_batch_size": SAMPLES}
        else:
            common |= {"max_steps": STEPS, "max_completion_length": LENGTH}
        config, _ = trl_classes(name)
        return make_trl(name, base, [REWARD], config(**common | own))
    from hf_gdc import GDCConfig, GDCTrainer, PPOConfig, PPOTrainer

    config, trainer = (PPOConfig, PPOTrainer) if method == "ppo" else (GDCConfig, GDCTrainer)
    common |= {"max_steps": STEPS * own.get("num_iterations", 1), "max_completion_length": LENGTH, "overwrite": True}
    return trainer(base, target=make_target(), args=config(**common | own))


def work(job: dict, base: str, output: Path, samples: int) -> None:
    """Train, judge, and write a line of runs.jsonl."""
    sys.path.insert(0, str(ROOT))
    import torch
    import transformers
    from quickstart_problem import Judge, load_base
    from transformers import PrinterCallback

    from hf_gdc import Rollouts
    from hf_gdc.metrics import distinct_n

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if job["method"] in ("rloo", "grpo", "trl ppo"):
        from recipes.trl.run import trl_classes

        trl_classes(job["method"].removeprefix("trl "))
    imported = peak_mib()
    trainer = make_trainer(job, base, f"{output}/trainers/{job['method'].replace(' ', '_')}{os.getpid()}")
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    result = {"seconds": seconds, "samples_per_second": STEPS * SAMPLES / seconds, "peak_mib": peak_mib() - imported}
    policy = trainer.model.policy if job["method"] == "trl ppo" else trainer.model
    _, tokenizer = load_base(base)
    judged = load_base(base)[0]
    judged.load_state_dict(policy.state_dict(), strict=False)  # without TRL's patches, or a critic
    pool = Rollouts(**torch.load(output / "pool.pt", weights_only=False))
    judge = Judge(load_base(base)[0], tokenizer, LENGTH, pool, samples, target=make_target())
    metrics, drawn = judge.measure(judged, 1 + job["seed"])
    result |= {name: value for name, value in metrics.items() if math.isfinite(value)}
    result |= {"reward": float(drawn.scores[REWARD].mean()), "entropy": -float(drawn.policy_logp_B.mean())}
    result |= {f"distinct_{n}": distinct_n(drawn.texts, n) for n in (1, 2)}
    with open(output / "runs.jsonl", "a") as file:
        file.write(json.dumps(job | result) + "\n")
    kls = ", ".join(f"{name} {result[name]:.3f}" for name in ("kl_target_policy", "kl_policy_target"))
    print(f"{job}: {kls}, reward {result['reward']:.2f}, {result['samples_per_second']:.0f} samples/s", flush=True)


# ---- all runs ----


def make_pool(base: str, output: Path, number: int) -> dict[str, float]:
    """Draw the judge's pool once; what it says of p."""
    import torch
    from quickstart_problem import Judge, load_base

    from hf_gdc import Rollouts

    model, tokenizer = load_base(base)
    file = output / "pool.pt"
    pool = Rollouts(**torch.load(file, weights_only=False)) if file.is_file() else number
    judge = Judge(model, tokenizer, LENGTH, pool, number, target=make_target())
    if not file.is_file():
        torch.save(judge.pool.state_dict(), output / "pool.part")
        (output / "pool.part").rename(file)
    log_w = judge.pool_score - judge.pool.policy_logp_B
    share, reward = torch.softmax(log_w, 0), judge.pool.scores[REWARD]
    optimum = {"log_z": judge.log_z, "reward": float(share @ reward), "base_reward": float(reward.mean())}
    optimum |= {"kl_policy_reference": float(share @ log_w) - judge.log_z, "ess": float(1 / (share**2).sum())}
    optimum |= {"entropy": -float(share @ (judge.pool_score - judge.log_z)), "pool": len(judge.pool)}
    optimum |= {"base_entropy": -float(judge.pool.policy_logp_B.mean())}
    error = float(((share - 1 / len(share)) ** 2).sum().sqrt())  # of log Z, by the delta method
    return optimum | {"log_z_stderr": error}


def key(job: dict) -> tuple:
    return tuple(job[name] for name in ("method", "learning_rate", "seed"))


def finished(output: Path) -> dict[tuple, dict]:
    file = output / "runs.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {key(row): row for row in rows}


def run_all(jobs: list[dict], options) -> dict[tuple, dict]:
    """Every job that has no result yet, so many at a time."""
    done = finished(options.output)

    def start(job: dict) -> int:
        command = [sys.executable, __file__, "--base", options.base, "--output", str(options.output)]
        command += ["--judge_samples", str(options.judge_samples), "--job", json.dumps(job)]
        paths = ([options.trl] if job["method"] == "trl ppo" else []) + [os.environ.get("PYTHONPATH", "")]
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "TRL_EXPERIMENTAL_SILENCE": "1"}
        return subprocess.run(command, env=os.environ | environment).returncode

    with ThreadPoolExecutor(options.workers) as threads:
        failed = any(list(threads.map(start, [job for job in jobs if key(job) not in done])))
    if failed:
        raise SystemExit("a run failed: see above. The same command goes on from here.")
    return finished(options.output)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half of its 95% confidence interval over the seeds."""
    return statistics.fmean(values), T_975 * statistics.stdev(values) / len(values) ** 0.5


def summarise(rows: list[dict]) -> dict:
    summary = {name: interval([row[name] for row in rows]) for name in JUDGED}
    for name in ("kl_target_policy", "kl_policy_target"):  # of one estimate, beside the spread of the seeds
        summary[f"{name}_stderr"] = statistics.fmean(row[f"{name}_stderr"] for row in rows)
    return summary | {"learning_rate": rows[0]["learning_rate"]}


def write_table(found: dict[str, dict], optimum: dict, path: Path) -> None:
    lines = [
        f"Reward {REWARD}, beta {BETA}; {STEPS * SAMPLES} samples; mean of {len(SEEDS)} seeds with its 95% interval. The "
        f"optimum: reward {optimum['reward']:.2f} (base: {optimum['base_reward']:.2f}), KL(p, a) "
        f"{optimum['kl_policy_reference']:.2f}, entropy {optimum['entropy']:.2f} (base: {optimum['base_entropy']:.2f}), log Z "
        f"{optimum['log_z']:.4f} ± {optimum['log_z_stderr']:.4f} from {optimum['pool']} samples of the base.",
        "",
        "| method | learning rate | " + " | ".join(JUDGED.values()) + " |",
        "|" + "---|" * (2 + len(JUDGED)),
    ]
    for method, row in found.items():
        cells = [f"{mean:.3g} ± {half:.2g}" for mean, half in (row[name] for name in JUDGED)]
        lines.append(f"| {method} | {row['learning_rate']:g} | {' | '.join(cells)} |")
    path.write_text("\n".join([*lines, ""]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=BASE, help="folder of the base model")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/rlhf_methods"))
    parser.add_argument("--trl", help="folder that has TRL 1.12, for its PPO")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="a part of them")
    parser.add_argument("--rates", nargs="+", type=float, default=RATES, help="the grid of learning rates")
    parser.add_argument("--pool", type=int, default=51_200, help="the judge's samples of the base")
    parser.add_argument("--judge_samples", type=int, default=4096, help="of each model")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time; more than 1 share memory's bandwidth")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)  # what a run's process does
    options = parser.parse_args()
    if options.methods is None:
        options.methods = [method for method in METHODS if method != "trl ppo" or options.trl]
    if "trl ppo" in options.methods and not options.trl:
        raise ValueError("'trl ppo' needs --trl, a folder that has TRL 1.12: `make test-trl-ppo` makes .trl-1.12.")
    options.trl = options.trl and str(Path(options.trl).resolve())
    return options


def main() -> None:
    options = parse()
    if options.job:
        return work(options.job, options.base, options.output, options.judge_samples)
    options.output.mkdir(parents=True, exist_ok=True)
    optimum = make_pool(options.base, options.output, options.pool)
    print(f"p: {make_target()}, {optimum}", flush=True)
    grid = [
        {"method": method, "learning_rate": rate, "seed": GRID_SEED}
        for method in options.methods
        for rate in options.rates
    ]
    done = run_all(grid, options)
    best = {}
    for method in options.methods:
        rows = [done[method, rate, GRID_SEED] for rate in options.rates]
        best[method] = min(rows, key=lambda row: row["kl_policy_target"])["learning_rate"]
    seeds = [{"method": m, "learning_rate": best[m], "seed": seed} for m in options.methods for seed in SEEDS]
    done = run_all(seeds, options)
    found = {m: summarise([done[m, best[m], seed] for seed in SEEDS]) for m in options.methods}
    write_table(found, optimum, options.output / "table.md")
    line = json.dumps(
        {"optimum": optimum, "methods": found, "reward": REWARD, "beta": BETA, "samples": STEPS * SAMPLES}
    )
    (options.output / "rlhf_methods.json").write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
