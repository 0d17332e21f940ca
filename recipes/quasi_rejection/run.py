"""Certified sampling (quasi-rejection): what a trained model still lacks of its target, and samples that don't lack it.

    accelerate launch recipes/quasi_rejection/run.py --config recipes/quasi_rejection/config.yaml

Prints acceptance rate, TV and KL over a grid of beta, samples, and writes a folder for
`model.generate(..., custom_generate=OUTPUT_DIR/certified, trust_remote_code=True)`.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState

from hf_gdc import QuasiRejectionSampler, Target
from hf_gdc.cli import parse_options
from hf_gdc.data import load_prompts


@dataclass
class RunArguments:
    """The policy, its target, and how closely the samples shall follow it."""

    model_name_or_path: str = field(metadata={"help": "The policy with its tokenizer: a path or an id of the Hub."})
    output_dir: str = field(metadata={"help": "Where the report and the folder `certified` go."})
    reference_name_or_path: str | None = field(
        default=None, metadata={"help": "The model before training; the policy itself for sampling without training."}
    )
    target: str | None = field(
        default=None, metadata={"help": "Folder with target.json; default: the one beside the policy."}
    )
    data: str | None = field(default=None, metadata={"help": "Prompts, as in recipes/gdc. Default: the empty prompt."})
    beta: float | None = field(default=None, metadata={"help": "Threshold of P/q, for all prompts; or"})
    tv: float | None = field(default=None, metadata={"help": "wanted upper bound of TV(p, p_beta); or"})
    acceptance_rate: float | None = field(default=None, metadata={"help": "wanted lower bound of the acceptance rate."})
    guaranteed: bool = field(default=False, metadata={"help": "Check the hard constraints again before returning."})
    pool_samples: int = field(default=20480, metadata={"help": "Samples of each prompt's pool, half of the reference."})
    num_samples: int = field(default=1000, metadata={"help": "Samples to draw and measure for each prompt."})
    max_completion_length: int = field(default=256, metadata={"help": "Tokens of a completion, as in training."})
    batch_size: int = field(default=64, metadata={"help": "Completions drawn and scored at once."})
    save_reference: bool = field(default=False, metadata={"help": "Write the reference's weights into the folder too."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the models."})
    seed: int = field(default=42, metadata={"help": "Seed of everything random."})


def show(sampler: QuasiRejectionSampler, prompt) -> list[dict]:
    """Print the estimates over a grid of beta, and the chosen one."""
    pool = sampler.pool_of(prompt)
    chosen = pool.at(sampler.log_beta(prompt))
    print(f"{prompt!r}: log Z = {pool.log_z:.3f}, {pool.size} samples, worth {pool.ess:.0f} of the target")
    print(f"{'beta / Z':>12} {'acceptance':>18} {'TV(p, p_beta)':>18} {'KL(p || p_beta)':>18}")
    for row in [*sampler.estimates(prompt=prompt), chosen]:
        print(
            f"{row.beta_over_z:12.4g} {row.acceptance_rate:9.4f} +- {row.acceptance_rate_stderr:.4f} "
            f"{row.tv:9.4f} +- {row.tv_stderr:.4f} {row.kl:9.4f} +- {row.kl_stderr:.4f}{'  <- used' * (row is chosen)}"
        )
    print(f"KL(p || policy) = {chosen.kl_target_policy:.4f} +- {chosen.kl_target_policy_stderr:.4f} nats")
    return [row.to_dict() for row in [*sampler.estimates(prompt=prompt), chosen]]


def main(argv: list[str] | None = None) -> None:
    (run,) = parse_options(RunArguments, argv=argv)
    sampler = QuasiRejectionSampler(
        Target.from_pretrained(run.target or run.model_name_or_path),
        run.model_name_or_path,
        beta=run.beta,
        tv=run.tv,
        acceptance_rate=run.acceptance_rate,
        guaranteed=run.guaranteed,
        reference=run.reference_name_or_path,
        max_completion_length=run.max_completion_length,
        batch_size=run.batch_size,
        pool_samples=run.pool_samples,
        model_init_kwargs={"trust_remote_code": True} if run.trust_remote_code else None,
        seed=run.seed,
    )
    print(sampler.target)
    prompts = [""] if run.data is None else [row["prompt"] for row in load_prompts(run.data)]
    start = time.monotonic()
    sampler.pool(prompts)
    print(f"pool: {time.monotonic() - start:.0f} s")
    report = {
        "formula": sampler.target.formula(),
        "estimates": {repr(prompt): show(sampler, prompt) for prompt in prompts},
    }
    start = time.monotonic()
    samples = sampler.sample(run.num_samples, prompts)
    report["seconds_sampling"] = time.monotonic() - start
    features = {f.name: f for factor, _ in sampler.target.terms for f in factor.features}
    report["features"] = {name: float(f(samples, allow_none=True).nanmean()) for name, f in features.items()}
    for name, mean in report["features"].items():
        print(f"{name}: {mean:.4f} of {len(samples)} accepted samples, in {report['seconds_sampling']:.0f} s")
    folder = Path(run.output_dir) / "certified"
    sampler.save_pretrained(folder, save_reference=run.save_reference)
    (Path(run.output_dir) / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    print(f"for example: {samples.texts[0]}")
    print(f"saved {folder}")


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
