"""The main job, end to end: pretrain a small GPT on stories, then match it to a target distribution.

    make quickstart

Every story shall have a dragon, and half of the protagonists shall be female, from a base of 1% and 20%: the target is
a(x) * [dragon] * exp(lambda * she). Writes report.json, report.png and the model with its card into OUTPUT_DIR.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gdc import GDCConfig, GDCTrainer, Moment, Pointwise, Reference, Target
from hf_gdc.checkpoints import claim_output_dir
from hf_gdc.cli import parse_options
from hf_gdc.hub import write_model_card
from hf_gdc.metrics import distinct_n
from hf_gdc.trainers.pretraining import PretrainArguments, PretrainConfig, pretrain

COMMAND = "accelerate launch recipes/quickstart/run.py --config recipes/quickstart/config.yaml"


@dataclass
class QuickstartArguments:
    """Lengths of the two parts; everything else of GDC is GDCConfig's."""

    num_stories: int = field(default=20_000, metadata={"help": "Stories to pretrain on, each seen once."})
    pretrain_learning_rate: float = field(default=8e-3, metadata={"help": "Peak learning rate of the pretraining."})
    pretrain_batch_size: int = field(default=64, metadata={"help": "Stories in a step of it, over all processes."})
    hidden_size: int = field(default=64, metadata={"help": "Width of the small GPT."})
    num_hidden_layers: int = field(default=2, metadata={"help": "Its depth."})


def make_target() -> Target:
    return Reference() * Pointwise("contains:dragon", name="dragon") * Moment("contains:she", 0.5, name="she")


def pretrain_base(options: QuickstartArguments, args: GDCConfig) -> Path:
    folder, metrics = pretrain(
        PretrainArguments(
            num_stories=options.num_stories,
            tokenizer="word",
            max_length=args.max_completion_length + 1,  # BOS is the prompt
            model_kwargs={
                "hidden_size": options.hidden_size,
                "num_hidden_layers": options.num_hidden_layers,
                "num_attention_heads": 4,
                "max_position_embeddings": 64,
                "tie_word_embeddings": False,
            },
        ),
        PretrainConfig(
            output_dir=f"{args.output_dir}/pretrain",
            learning_rate=options.pretrain_learning_rate,
            per_device_train_batch_size=options.pretrain_batch_size // args.world_size,
            use_cpu=args.use_cpu,
            seed=args.seed,
            save_strategy="no",
            report_to="none",
            overwrite=args.overwrite,
        ),
    )
    if args.process_index == 0:
        print(f"pretrained: {metrics['eval_excess_nats']:.2f} nats per story above the grammar's entropy")
    return folder


def measure(trainer: GDCTrainer) -> dict:
    """What the report says of the policy as it is now, from fresh samples."""
    metrics = trainer.evaluate()
    samples = trainer.evaluation_samples
    return {
        "moments": {name: metrics[f"eval_features/{name}"] for name in ("dragon", "she")},
        "kl_target_policy": metrics["eval_kl_target_policy"],
        "kl_target_policy_stderr": metrics["eval_kl_target_policy_stderr"],
        "kl_policy_reference": metrics["eval_kl_policy_reference"],
        "distinct_2": distinct_n(samples.texts, 2),
        "samples": [text.strip() for text in samples.texts[:5]],
        "number_of_samples": len(samples) * trainer.args.world_size,
        "in_support": metrics["eval_in_support"],
    }


def print_table(report: dict) -> None:
    before, after = report["before"], report["after"]
    error = {which: report[which]["kl_target_policy_stderr"] for which in ("before", "after")}
    rows = [
        ("stories with a dragon", f"{before['moments']['dragon']:.3f}", f"{after['moments']['dragon']:.3f}", "1"),
        ("stories with 'she'", f"{before['moments']['she']:.3f}", f"{after['moments']['she']:.3f}", "0.5"),
        (
            "KL(p||pi), nats",
            f"{before['kl_target_policy']:.2f} +- {error['before']:.2f}",
            f"{after['kl_target_policy']:.3f} +- {error['after']:.3f}",
            "0",
        ),
        ("KL(pi||a), nats", f"{before['kl_policy_reference']:.2f}", f"{after['kl_policy_reference']:.2f}", ""),
        ("distinct-2", f"{before['distinct_2']:.4f}", f"{after['distinct_2']:.4f}", ""),
    ]
    print(f"\n{'':24}{'before':>18}{'after':>18}{'wanted':>10}")
    for name, first, second, wanted in rows:
        print(f"{name:24}{first:>18}{second:>18}{wanted:>10}")
    for which in ("before", "after"):
        print(f"\n{which}:")
        for text in report[which]["samples"]:
            print(f"  - {text}")


def plot(history: list[dict], path: Path) -> None:
    """Moments and divergences over training, from each step's samples."""
    rows = [row for row in history if "features/dragon" in row]
    steps = [row["step"] for row in rows]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, wanted, colour in (("dragon", 1.0, "C3"), ("she", 0.5, "C0")):
        left.plot(steps, [row[f"features/{name}"] for row in rows], colour, label=name)
        left.axhline(wanted, color=colour, linestyle=":")
    left.set(xlabel="step", ylabel="share of stories", ylim=(0, 1.03), title="constraints (dotted: wanted)")
    left.legend()
    for name, label in (("kl_target_policy", "KL(p||pi)"), ("kl_policy_reference", "KL(pi||a)"), ("js", "2 JS")):
        found = [row for row in rows if name in row]
        right.plot([row["step"] for row in found], [row[name] for row in found], label=label)
    right.set(xlabel="step", ylabel="nats", ylim=(0, 7), title="divergences, from each step's samples")
    right.legend()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(argv: list[str] | None = None) -> None:
    options, args = parse_options(QuickstartArguments, GDCConfig, argv=argv)
    start = time.monotonic()
    output = Path(args.output_dir)
    claim_output_dir(args.output_dir, args.overwrite)
    base = pretrain_base(options, args)
    pretrained = time.monotonic()
    args.output_dir = str(output / "gdc")
    trainer = GDCTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        make_target(),
        args=args,
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    before = measure(trainer)
    trainer.train()
    trained = time.monotonic()
    report = {"before": before, "after": measure(trainer)}
    trainer.save_model(str(output / "model"))
    if not trainer.is_world_process_zero():
        return
    report["seconds"] = time.monotonic() - start
    report["seconds_pretraining"] = pretrained - start
    report["seconds_gdc"] = trained - pretrained
    trainer.target.save_pretrained(output / "model")
    results = {
        f"{which}: {name}": report[which][name]
        for which in ("before", "after")
        for name in before
        if _is_number(before[name])
    }
    results |= {
        f"{which}: share with {n}": report[which]["moments"][n]
        for which in ("before", "after")
        for n in ("dragon", "she")
    }
    write_model_card(
        output / "model",
        "A small GPT whose stories all have a dragon",
        trainer.target.formula(),
        COMMAND,
        results,
        "the embedded stories of hf_gdc",
        divergence=trainer.args.divergence,
    )
    (output / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    plot(trainer.state.log_history, output / "report.png")
    print_table(report)
    print(f"\n{report['seconds']:.0f} seconds; wrote {output}/report.json, report.png and model/")


def _is_number(value) -> bool:
    return isinstance(value, (int, float))


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
