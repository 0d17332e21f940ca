"""A constraint that 1 of 10,000 samples of the base satisfies: a sleepy dragon and a heroine.

    python recipes/benchmarks/rare.py --pool     2.4 million samples of the base, once: 200 that satisfy it judge the result
    accelerate launch --config_file recipes/accelerate/cpu_two_processes.yaml recipes/benchmarks/rare.py
                                                 filter, train, judge; --help shows what can be compared

The base is that of `quickstart_problem.py`, made if it is missing. The pool goes on where it stopped. Training draws from the
base until `fit_support` samples satisfy the constraint and then trains on mixtures of fresh samples and replayed ones
(`hf_gdc.replay`): no sample of the pool is used. Its samples that satisfy the constraint are exact ones of p, so KL(p || pi)
is the mean of log p - log pi over them, with a standard error. The last line is JSON, also written to
outputs/benchmarks/rare/rare.json.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from quickstart_problem import BASE, load_base
from tqdm.auto import tqdm

from hf_gdc import GDCConfig, GDCTrainer, Pointwise, Reference, Rollouts, Target
from hf_gdc.metrics import distinct_n
from hf_gdc.sampling import TransformersSampler

LENGTH = 47


def make_target() -> Target:
    return Reference() * Pointwise("contains:dragon") * Pointwise("contains:sleepy") * Pointwise("contains:she")


def accepted(target: Target, rollouts: Rollouts) -> torch.Tensor:
    """Positions of the samples that satisfy all hard constraints."""
    ok = [factor.log_score(rollouts) == 0 for factor, _ in target.terms if factor.hard]
    return torch.stack(ok).all(0).nonzero().flatten()


def fill_pool(model, tokenizer, file: Path, total: int, batch: int) -> None:
    """Samples of the base that satisfy the constraint, and of how many; each batch has its own seed."""
    sampler, target = TransformersSampler(tokenizer, LENGTH, max_context=64), make_target()
    drawn, kept = load_pool(file) if file.is_file() else (0, None)
    with tqdm(total=total, initial=drawn, desc="pool") as bar:
        while drawn < total:
            torch.manual_seed(10**6 + drawn // batch)
            rollouts = sampler(model, [""] * batch)
            found = rollouts.select(accepted(target, rollouts))
            found.scores, found.sampler_logps_BT = {}, None
            kept = found if kept is None else Rollouts.concatenate([part for part in (kept, found) if len(part)])
            drawn += batch
            bar.update(batch)
            if drawn // batch % 20 == 0 or drawn >= total:
                torch.save((drawn, kept.state_dict()), file.with_suffix(".new"))
                os.replace(file.with_suffix(".new"), file)  # whole or not at all
    print(f"{len(kept)} of {drawn} samples: base rate {len(kept) / drawn:.2e}")


def load_pool(file: Path) -> tuple[int, Rollouts]:
    drawn, state = torch.load(file, weights_only=True)
    return drawn, Rollouts(**state)


def judge(trainer: GDCTrainer, file: Path) -> dict:
    """KL(p || pi) on the pool, its standard error (of the mean, and of the base rate), and the policy's own samples."""
    drawn, pool = load_pool(file)
    rate = len(pool) / drawn
    difference = pool.policy_logp_B - math.log(rate) - trainer.actors.policy_logp(pool)
    error = math.sqrt(float(difference.var()) / len(pool) + (1 - rate) / len(pool))
    samples = trainer.actors.draw([{"prompt": ""}] * 4096, from_reference=False, salt=1)
    ok = torch.zeros(len(samples)).index_fill(0, accepted(trainer.target, samples), 1.0)
    satisfied = float(trainer.actors.gather(ok).mean())
    result = {"base_rate": rate, "pool": drawn, "target_samples": len(pool), "satisfied": satisfied}
    result |= {"kl_target_policy": float(difference.mean()), "kl_target_policy_stderr": error}
    both = [distinct_n(texts[: len(pool)], 2) for texts in (samples.texts, pool.texts)]
    return (
        result | dict(zip(("distinct_2", "distinct_2_of_target"), both, strict=True)) | {"samples": samples.texts[:5]}
    )


def make_config(options: argparse.Namespace) -> GDCConfig:
    processes = PartialState().num_processes
    return GDCConfig(
        output_dir=str(options.output / "run"),
        overwrite=True,
        use_cpu=True,
        divergence=options.divergence,
        fit_samples=20_480,
        fit_support=options.fit_support,
        max_fit_samples=2_000_000,
        replay_samples=options.replay_samples // processes,
        replay_window=options.replay_window // processes,
        num_iterations=options.num_iterations,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch // processes,
        per_device_eval_batch_size=2048,
        max_completion_length=LENGTH,
        learning_rate=options.learning_rate,
        adam_epsilon=options.adam_epsilon,
        lr_scheduler_type="linear",
        warmup_steps=6,
        logging_steps=15,
        seed=options.seed,
        save_strategy="no",
        report_to="none",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=BASE, help="a model of the stories")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/rare"))
    parser.add_argument("--pool", action="store_true", help="fill the pool and stop")
    parser.add_argument("--pool_samples", type=int, default=2_400_000)
    parser.add_argument("--pool_batch", type=int, default=2048)
    parser.add_argument("--divergence", default="kl")
    parser.add_argument("--fit_support", type=int, default=28, help="samples that satisfy it before training starts")
    parser.add_argument("--replay_samples", type=int, default=256)
    parser.add_argument("--replay_window", type=int, default=4096)
    parser.add_argument("--num_iterations", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=256, help="fresh samples, of all processes")
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    parser.add_argument("--adam_epsilon", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "pool.pt"
    model, tokenizer = load_base(options.base)
    if options.pool:
        return fill_pool(model, tokenizer, file, options.pool_samples, options.pool_batch)
    if not file.is_file():
        raise SystemExit(f"{file} is missing: run with --pool first.")
    args = make_config(options)
    start = time.monotonic()
    trainer = GDCTrainer(model, make_target(), args=args, processing_class=tokenizer)
    trainer.train()
    seconds = time.monotonic() - start
    result = {"seconds": seconds, "processes": args.world_size, "threads": torch.get_num_threads()}
    result |= judge(trainer, file) | {"options": {k: str(v) for k, v in vars(options).items()}}
    if trainer.is_world_process_zero():
        (options.output / "rare.json").write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result))


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
