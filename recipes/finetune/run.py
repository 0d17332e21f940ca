"""Fine-tune a causal language model on a task, and score it before and after.

    accelerate launch recipes/finetune/run.py --config recipes/finetune/config.yaml --model_name_or_path outputs/pretrain/model

The tasks are classification, summarisation, question_answering, translation and dialogue. Without `--data` they are about the
embedded stories. Your own are a .jsonl or .csv file, or a dataset of the Hub, with columns that the templates name:

    accelerate launch recipes/finetune/run.py --config recipes/finetune/config.yaml --model_name_or_path gpt2 \
        --task classification --data reviews.csv --prompt_template '{review}\nStars:' --completion_template ' {stars}'

Only completions are learned. OUTPUT_DIR/model has the model, or with `--use_peft` an adapter, with its tokenizer and card.
"""

from accelerate import PartialState

from hf_gdc.cli import parse_options, resume_option
from hf_gdc.trainers.finetuning import FinetuneArguments, FinetuneConfig, finetune
from hf_gdc.trl_compat import ModelConfig


def main(argv: list[str] | None = None) -> None:
    options, model, args = parse_options(FinetuneArguments, ModelConfig, FinetuneConfig, argv=argv)
    folder, before, after = finetune(options, model, args, resume_option(args))
    if args.process_index == 0:
        print(f"{options.task:24}{'before':>12}{'after':>12}")
        for name in after:
            print(f"{name:24}{before[name]:12.4g}{after[name]:12.4g}")
        print(f"saved {folder}")


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
