"""Move a causal language model to a target distribution (GDC).

    accelerate launch recipes/gdc/run.py --config recipes/gdc/config.yaml --model_name_or_path outputs/pretrain/model

Any model with a tokenizer and any target will do, on prompts or without:

    accelerate launch recipes/gdc/run.py --config recipes/gdc/config.yaml --model_name_or_path gpt2 \
        --data prompts.jsonl --pointwise contains:amazing --moment my_features.py:is_polite=0.8 --divergence js

The model, its tokenizer, target and card go to OUTPUT_DIR/model.
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState

from hf_gdc import GDCConfig, GDCTrainer
from hf_gdc.cli import TargetArguments, build_target, parse_options, resume_option
from hf_gdc.data import load_prompts
from hf_gdc.hub import write_model_card


@dataclass
class RunArguments:
    """The model and its prompts."""

    model_name_or_path: str = field(metadata={"help": "A model with its tokenizer: a path or an id of the Hub."})
    data: str | None = field(
        default=None,
        metadata={"help": "Prompts: a .jsonl file or a Hub dataset with a column `prompt`. Default: the empty prompt."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read the prompts as a stream."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the model."})


def main(argv: list[str] | None = None) -> None:
    run, factors, args = parse_options(RunArguments, TargetArguments, GDCConfig, argv=argv)
    if run.trust_remote_code:
        args.model_init_kwargs = {**(args.model_init_kwargs or {}), "trust_remote_code": True}
    trainer = GDCTrainer(
        run.model_name_or_path,
        build_target(factors),
        args=args,
        train_dataset=None if run.data is None else load_prompts(run.data, streaming=run.streaming),
    )
    trainer.train(resume_from_checkpoint=resume_option(args))
    metrics = trainer.evaluate()
    folder = Path(args.output_dir) / "model"
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        trainer.target.save_pretrained(folder)
        shown = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
        write_model_card(
            folder,
            title=f"{Path(run.model_name_or_path).name}, aimed at a target",
            formula=trainer.target.formula(),
            command="accelerate launch recipes/gdc/run.py --config recipes/gdc/config.yaml",
            results=shown,
            data=run.data or "the empty prompt",
        )
        for name, value in shown.items():
            print(f"{name:40} {value:.4g}")
        print(f"saved {folder}")


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
