"""A larger GPT teaches a smaller one on the embedded stories, in several ways on one budget.

    accelerate launch recipes/distillation/run.py --config recipes/distillation/config.yaml

Every way starts from the same student and takes `max_steps` steps on `per_device_train_batch_size` completions:
`fine-tuning` is maximum likelihood on samples of the teacher (sequence-level distillation, Kim & Rush 2016, arXiv
1606.07947), fresh in every step; a divergence's name is `DistillationTrainer` with it, on the student's own samples; a
`+prefix` behind it adds the score of the prefixes. Each takes the learning rate that suits it best. Writes report.json and
the best student into OUTPUT_DIR. One process.
"""

import copy
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gdc import DistillationConfig, DistillationTrainer, Teacher
from hf_gdc.checkpoints import claim_output_dir
from hf_gdc.cli import parse_options
from hf_gdc.encoding import IGNORED_LABEL, RightPadCollator
from hf_gdc.hub import write_model_card
from hf_gdc.trainers.pretraining import PretrainArguments, PretrainConfig, PretrainingTrainer, pretrain

MEASURED = ("kl_target_policy", "kl_policy_target")


@dataclass
class RecipeArguments:
    """Teacher, student and what is compared; everything else is DistillationConfig's."""

    teacher: str | None = field(
        default=None,
        metadata={"help": "A teacher made before, with its tokenizer. Default: one pretrained on the stories."},
    )
    teacher_stories: int = field(default=20_000, metadata={"help": "Stories that the teacher reads, each once."})
    teacher_kwargs: dict | str | None = field(default=None, metadata={"help": "Its configuration, a JSON object."})
    student_stories: int = field(default=3200, metadata={"help": "Stories that the student reads before it is taught."})
    student_kwargs: dict | str | None = field(default=None, metadata={"help": "Its configuration, a JSON object."})
    ways: list[str] = field(
        default_factory=lambda: ["fine-tuning", "reverse_kl", "kl", "js"],
        metadata={"help": "What is compared: fine-tuning, or a divergence, with +prefix behind it or without."},
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 3e-3], metadata={"help": "Each way takes the best of these."}
    )

    def __post_init__(self):
        for name in ("teacher_kwargs", "student_kwargs"):
            value = getattr(self, name)
            setattr(self, name, json.loads(value) if isinstance(value, str) else value or {})


def story_model(options: RecipeArguments, args: DistillationConfig, who: str, tokenizer: str) -> Path:
    """The folder of a small GPT, pretrained on stories."""
    folder, metrics = pretrain(
        PretrainArguments(
            num_stories=getattr(options, f"{who}_stories"),
            tokenizer=tokenizer,
            max_length=args.max_completion_length + 1,  # BOS is the prompt
            model_kwargs={
                "num_attention_heads": 4,
                "max_position_embeddings": 64,
                "tie_word_embeddings": False,
                **getattr(options, f"{who}_kwargs"),
            },
        ),
        PretrainConfig(
            output_dir=f"{args.output_dir}/{who}",
            per_device_train_batch_size=64,
            use_cpu=args.use_cpu,
            seed=args.seed,
            save_strategy="no",
            report_to="none",
            overwrite=args.overwrite,
        ),
    )
    print(f"the {who}: {metrics['eval_excess_nats']:.2f} nats per story above the grammar's entropy")
    return folder


def distiller(
    student, teacher: Teacher, tokenizer, args: DistillationConfig, way: str, **changes
) -> DistillationTrainer:
    divergence, _, prefix = way.partition("+")
    changes |= {"divergence": divergence, "prefix_term": bool(prefix)}
    return DistillationTrainer(student, teacher, args=replace(args, **changes), processing_class=tokenizer)


def fine_tune(trainer: DistillationTrainer) -> None:
    """Maximum likelihood on as many fresh samples of the teacher as the trainer would draw from its student."""
    args, tokenizer = trainer.args, trainer.processing_class
    samples = trainer.actors.draw(
        [{"prompt": ""}] * (args.max_steps * args.per_device_train_batch_size),
        False,
        salt=99,
        other=trainer.teacher.model,
    )
    prompt = samples.prompt_ids_BP[0].tolist()
    rows = [
        {"input_ids": prompt + ids, "labels": [IGNORED_LABEL] * len(prompt) + ids} for ids in samples.completion_ids()
    ]
    shared = ("learning_rate", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size", "adam_beta2", "seed")
    PretrainingTrainer(
        model=trainer.model,
        args=PretrainConfig(
            output_dir=f"{args.output_dir}/tuned",
            num_train_epochs=1,
            muon=False,
            use_cpu=args.use_cpu,
            save_strategy="no",
            report_to="none",
            disable_tqdm=args.disable_tqdm,
            **{name: getattr(args, name) for name in shared},
        ),
        data_collator=RightPadCollator(tokenizer.pad_token_id),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    ).train()


def teach(student, teacher: Teacher, tokenizer, args: DistillationConfig, way: str, learning_rate: float) -> tuple:
    """The student after one way at one learning rate, with its measurements."""
    divergence = "reverse_kl" if way == "fine-tuning" else way  # there: to draw and to evaluate alone
    folder = f"{args.output_dir}/{way}/{learning_rate:g}"
    trainer = distiller(
        copy.deepcopy(student), teacher, tokenizer, args, divergence, learning_rate=learning_rate, output_dir=folder
    )
    start = time.process_time()
    fine_tune(trainer) if way == "fine-tuning" else trainer.train()
    seconds = time.process_time() - start
    metrics = trainer.evaluate()
    row = {"way": way, "learning_rate": learning_rate, "cpu_seconds": seconds}
    for name in MEASURED:
        row |= {name: metrics[f"eval_{name}"], f"{name}_stderr": metrics[f"eval_{name}_stderr"]}
    print(row, flush=True)
    return row, trainer


def main(argv: list[str] | None = None) -> None:
    options, args = parse_options(RecipeArguments, DistillationConfig, argv=argv)
    if args.world_size > 1:
        raise ValueError("this comparison is made for one process; DistillationTrainer itself takes any number.")
    claim_output_dir(args.output_dir, args.overwrite)
    teacher_path = str(options.teacher or story_model(options, args, "teacher", "word"))
    student_path = story_model(options, args, "student", teacher_path)
    student, tokenizer = AutoModelForCausalLM.from_pretrained(student_path), AutoTokenizer.from_pretrained(teacher_path)
    teacher = Teacher(teacher_path)
    untaught, _ = teach(student, teacher, tokenizer, replace(args, max_steps=1), "reverse_kl", 0.0)
    rows, best = [untaught | {"way": "before"}], None
    for way in options.ways:
        tried = [teach(student, teacher, tokenizer, args, way, rate) for rate in options.learning_rates]
        row, trainer = min(tried, key=lambda pair: sum(pair[0][name] for name in MEASURED))
        rows.append(row)
        if best is None or sum(row[name] for name in MEASURED) < sum(best[0][name] for name in MEASURED):
            best = row, trainer
    report(Path(args.output_dir), rows, best, teacher_path)


def report(output: Path, rows: list[dict], best: tuple, teacher: str) -> None:
    """Print the table; save the numbers and the best student."""
    row, trainer = best
    trainer.save_model(str(output / "model"))
    trainer.target.save_pretrained(output / "model")
    write_model_card(
        output / "model",
        "A small GPT, taught by a larger one",
        trainer.target.formula(),
        "accelerate launch recipes/distillation/run.py --config recipes/distillation/config.yaml",
        {name: value for name, value in row.items() if isinstance(value, float)},
        f"samples, judged by {teacher}",
        divergence=row["way"],
    )
    (output / "report.json").write_text(json.dumps(rows, indent=2, allow_nan=False) + "\n")
    print(f"\n{'':18}{'KL(teacher||student)':>22}{'KL(student||teacher)':>22}{'learning rate':>15}{'CPU seconds':>13}")
    for row in rows:
        kls = [f"{row[name]:.3f} +- {row[name + '_stderr']:.3f}" for name in MEASURED]
        print(f"{row['way']:18}{kls[0]:>22}{kls[1]:>22}{row['learning_rate']:>15g}{row['cpu_seconds']:>13.0f}")
    print(f"\nwrote {output}/report.json and model/")


if __name__ == "__main__":
    main()
