"""Black-box distillation: a student learns from a teacher's texts alone (GAD, Ye et al. 2025, arXiv 2511.10643).

    accelerate launch recipes/gad/run.py --config recipes/gad/config.yaml --model_name_or_path STUDENT --data answers.jsonl

Rows have a `prompt` and the teacher's `completion`; nothing else of the teacher is needed, neither probabilities nor its
tokenizer. A `GANTrainer` does it all: `mle_steps` of fine-tuning on the teacher's texts, `discriminator_warmup_steps` of a
Bradley-Terry discriminator against the tuned student, then the game, the raw logit being the reward of a group's policy
gradient.

To try it out, a model at hand stands for the black box; it writes the texts first, and judges the student last:

    accelerate launch recipes/gad/run.py --config recipes/gad/config.yaml --data stories \
        --model_name_or_path outputs/distillation/student/model --teacher outputs/distillation/teacher/model
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_gdc import GANConfig, GANTrainer
from hf_gdc.cli import RealTextArguments, name_model, parse_options, train_and_save
from hf_gdc.data import load_prompts
from hf_gdc.evaluation import repeated
from hf_gdc.frozen import FrozenLM
from hf_gdc.loading import adapter_config
from hf_gdc.sampling import TransformersSampler
from hf_gdc.trl_compat import ModelConfig

COMMAND = "accelerate launch recipes/gad/run.py --config recipes/gad/config.yaml"


@dataclass
class GADArguments(RealTextArguments):
    """The teacher's texts, and the discriminator that reads them."""

    teacher: str | None = field(
        default=None,
        metadata={
            "help": "A model that stands for the black box: it completes the prompts of `data`, and judges the student. It "
            "must have the student's tokenizer."
        },
    )


def teacher_texts(run: GADArguments, args: GANConfig) -> Dataset:
    """The prompts of `data` with the teacher's completions: the same in every process, and in every run with this seed."""
    model, tokenizer = (kind.from_pretrained(run.teacher) for kind in (AutoModelForCausalLM, AutoTokenizer))
    sampler, size = TransformersSampler(tokenizer, args.max_completion_length), args.per_device_eval_batch_size
    prompts = load_prompts(run.data, num_stories=run.num_stories, seed=args.seed)["prompt"]
    set_seed(args.seed)
    parts = [sampler(model, prompts[at : at + size]) for at in range(0, len(prompts), size)]
    return Dataset.from_dict({"prompt": prompts, "completion": [text for part in parts for text in part.texts]})


def real_texts(run: GADArguments, args: GANConfig) -> tuple[Dataset, Dataset]:
    """The teacher's texts to learn, and those that are held out."""
    if run.teacher is None:
        texts, held_out = run.datasets()
    else:
        both = teacher_texts(run, args)
        count = len(both) * (100 - run.validation_percent) // 100
        texts, held_out = both.select(range(count)), both.select(range(count, len(both)))
    if not texts[0].get("prompt"):
        raise ValueError(
            f"{run.data!r} has no prompts, and the discriminator compares texts of one prompt: give rows with `prompt` and "
            "`completion`; for texts alone there is recipes/gan."
        )
    return texts, held_out


def judge(trainer: GANTrainer, teacher: str, held_out: Dataset) -> dict[str, float]:
    """KL between teacher and student, both ways, in nats per completion with standard errors, over the held-out prompts."""
    lm, args, rows = FrozenLM(teacher, trainer.args.per_device_eval_batch_size), trainer.args, list(held_out)
    student = trainer.actors.draw(repeated(rows, args.eval_samples), False, salt=1)
    texts = trainer.texts_of(rows[args.process_index :: args.world_size], student.completion_ids_BT.device)
    found = {}
    for name, side, sign in (("kl_teacher_student", texts, 1), ("kl_student_teacher", student, -1)):
        difference = trainer.actors.gather(sign * (lm.logp(side) - trainer.actors.policy_logp(side)))
        found |= {
            f"eval_{name}": float(difference.mean()),
            f"eval_{name}_stderr": float(difference.std()) / math.sqrt(len(difference)),
        }
    return found


def main(argv: list[str] | None = None) -> None:
    run, model, args = parse_options(GADArguments, ModelConfig, GANConfig, argv=argv)
    name = name_model(model, run.trust_remote_code, args)
    texts, held_out = real_texts(run, args)
    trainer = GANTrainer(
        name,
        run.make_discriminator(name, args.per_device_eval_batch_size),
        args=args,
        train_dataset=texts,
        eval_dataset=held_out,
        peft_config=adapter_config(model),
    )
    further = None if run.teacher is None else lambda: judge(trainer, run.teacher, held_out)
    train_and_save(trainer, f"{Path(name).name}, taught by texts", COMMAND, run.data, base_model=name, judge=further)


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
