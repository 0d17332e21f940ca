"""A pretrained chat model with LoRA: whole sentences, and three answers in five that speak to "you".

    accelerate launch --config_file recipes/accelerate/cpu.yaml recipes/smollm2/run.py --config recipes/smollm2/config.yaml

The reference is the same weights with the adapter off. Samples before and after, tests whether each feature moved, and
writes report.json and the adapter with its card into OUTPUT_DIR. For jobs of your own take recipes/gdc/run.py.
"""

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_gdc import GDCConfig, GDCTrainer, Moment
from hf_gdc.cli import TargetArguments, build_target, parse_options
from hf_gdc.data import load_prompts
from hf_gdc.hub import write_model_card
from hf_gdc.loading import adapter_config
from hf_gdc.trl_compat import ModelConfig

COMMAND = "accelerate launch recipes/smollm2/run.py --config recipes/smollm2/config.yaml"


@dataclass
class PromptArguments:
    """The prompts; the rest is TRL's ModelConfig, the target's and GDCConfig's."""

    data: str = field(
        default=str(Path(__file__).parent / "prompts.jsonl"),
        metadata={"help": "Prompts: a .jsonl file or a Hub dataset with a column `prompt`."},
    )


def z_test(first: Tensor, second: Tensor) -> float:
    """Two-sided p-value of the two-sample z-test that both have one mean."""
    error = math.sqrt(float(first.var()) / len(first) + float(second.var()) / len(second))
    difference = abs(float(second.mean() - first.mean()))
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return math.erfc(difference / error / math.sqrt(2))


def number_of_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def wanted_means(trainer: GDCTrainer) -> dict[str, float]:
    """Each constrained feature's mean under the target: 1 for a pointwise one."""
    factors = [factor for factor, _ in trainer.target.terms if factor.features]
    return {f.features[0].name: f.mean if isinstance(f, Moment) else 1.0 for f in factors}


def measure(trainer: GDCTrainer) -> tuple[dict, dict[str, Tensor]]:
    """What the report says of the policy as it is now, from fresh samples; and the features of each sample."""
    metrics = trainer.evaluate()
    samples = trainer.evaluation_samples
    kept = ("kl_target_policy", "kl_target_policy_stderr", "kl_policy_reference", "entropy")
    report = {name: metrics[f"eval_{name}"] for name in kept if f"eval_{name}" in metrics}
    report["samples"] = {}
    for prompt, text in zip(samples.prompts, samples.texts, strict=True):
        shown = report["samples"].setdefault(prompt if isinstance(prompt, str) else prompt[-1]["content"], [])
        if len(shown) < 4:
            shown.append(text.strip())
    return report, {name: trainer.actors.gather(samples.scores[name]) for name in wanted_means(trainer)}


def compare(wanted: dict[str, float], before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, dict]:
    """Each feature's mean before and after, with the p-value of their difference."""
    return {
        name: {
            "before": float(before[name].mean()),
            "after": float(after[name].mean()),
            "wanted": mean,
            "p_value": z_test(before[name], after[name]),
            "samples": [len(before[name]), len(after[name])],
        }
        for name, mean in wanted.items()
    }


def print_report(report: dict) -> None:
    print(f"\n{'':28}{'before':>10}{'after':>10}{'wanted':>10}{'p':>12}")
    for name, row in report["features"].items():
        print(f"{name:28}{row['before']:>10.3f}{row['after']:>10.3f}{row['wanted']:>10.3g}{row['p_value']:>12.1e}")
    for name, label in (("kl_target_policy", "KL(p||pi), nats"), ("kl_policy_reference", "KL(pi||a), nats")):
        print(f"{label:28}" + "".join(f"{report[which].get(name, math.nan):>10.3f}" for which in ("before", "after")))
    print(f"memory of policy and reference over the model's: {report['memory_ratio']:.3f}")
    for question in report["before"]["samples"]:
        print(f"\n{question}")
        for which in ("before", "after"):
            for text in report[which]["samples"][question][:2]:
                print(f"  {which + ':':8}{text}")


def main(argv: list[str] | None = None) -> None:
    options, peft, factors, args = parse_options(PromptArguments, ModelConfig, TargetArguments, GDCConfig, argv=argv)
    start = time.monotonic()
    model = AutoModelForCausalLM.from_pretrained(peft.model_name_or_path, dtype=peft.dtype)
    alone = number_of_bytes([*model.parameters(), *model.buffers()])
    trainer = GDCTrainer(
        model,
        build_target(factors),
        args=args,
        train_dataset=load_prompts(options.data),
        peft_config=adapter_config(peft),
    )
    ratio = number_of_bytes(trainer.actors.tensors()) / alone
    before, features_before = measure(trainer)
    begun = time.monotonic()
    trainer.train()
    trained = time.monotonic()
    after, features_after = measure(trainer)
    folder = Path(args.output_dir) / "model"
    trainer.save_model(str(folder))
    report = {
        "features": compare(wanted_means(trainer), features_before, features_after),
        "memory_ratio": ratio,
        "before": before,
        "after": after,
        "steps": trainer.state.global_step,
        "seconds": time.monotonic() - start,
        "seconds_training": trained - begun,
        "threads": torch.get_num_threads(),
    }
    if not trainer.is_world_process_zero():
        return
    trainer.target.save_pretrained(folder)
    results = {f"{which}: {n}": row[which] for n, row in report["features"].items() for which in ("before", "after")}
    results |= {f"{which}: {n}": report[which][n] for which in ("before", "after") for n in before if n != "samples"}
    title = f"{Path(peft.model_name_or_path).name} with an adapter, aimed at a target"
    formula, data = trainer.target.formula(), f"prompts of {options.data}"
    base, f = peft.model_name_or_path, trainer.args.divergence
    write_model_card(folder, title, formula, COMMAND, results, data, base, divergence=f)
    (folder.parent / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    print_report(report)
    print(f"\n{report['seconds']:.0f} seconds; wrote {folder.parent}/report.json and model/")


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
