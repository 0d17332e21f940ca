"""Move a causal language model to a target distribution (GDC).

    accelerate launch recipes/gdc/run.py --config recipes/gdc/config.yaml --model_name_or_path outputs/pretrain/model

Any model with a tokenizer and any target will do, on prompts or without:

    accelerate launch recipes/gdc/run.py --config recipes/gdc/config.yaml --model_name_or_path gpt2 \
        --data prompts.jsonl --pointwise contains:amazing --moment my_features.py:is_polite=0.8 --divergence js

The model, its tokenizer, target and card go to OUTPUT_DIR/model. With an adapter, that folder has the adapter alone, and the
reference is the same weights with the adapter off, so there is one model in memory:

    accelerate launch recipes/gdc/run.py --config recipes/gdc/config.yaml --model_name_or_path gpt2 \
        --use_peft --lora_r 8 --lora_target_modules c_attn c_fc --merge_adapter
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from peft import AutoPeftModelForCausalLM, PeftModel

from hf_gdc import GDCConfig, GDCTrainer
from hf_gdc.cli import (
    PromptArguments,
    TargetArguments,
    build_target,
    name_model,
    parse_options,
    resume_option,
    save_run,
)
from hf_gdc.loading import adapter_config
from hf_gdc.trl_compat import ModelConfig

COMMAND = "accelerate launch recipes/gdc/run.py --config recipes/gdc/config.yaml"


@dataclass
class RunArguments(PromptArguments):
    """The prompts, and what is saved; the model and its adapter are TRL's ModelConfig."""

    merge_adapter: bool = field(
        default=False, metadata={"help": "Save the model with the adapter merged into it too, in OUTPUT_DIR/merged."}
    )


def main(argv: list[str] | None = None) -> None:
    run, model, factors, args = parse_options(RunArguments, ModelConfig, TargetArguments, GDCConfig, argv=argv)
    name = name_model(model, run.trust_remote_code, args)
    trainer = GDCTrainer(
        name, build_target(factors), args=args, train_dataset=run.dataset(), peft_config=adapter_config(model)
    )
    if run.merge_adapter and not isinstance(trainer.model, PeftModel):
        raise ValueError("--merge_adapter merges an adapter, and there is none: add --use_peft.")
    trainer.train(resume_from_checkpoint=resume_option(args))
    metrics = trainer.evaluate()
    folder = Path(args.output_dir) / "model"
    trainer.save_model(str(folder))
    if not trainer.is_world_process_zero():
        return
    folders = [folder]
    if run.merge_adapter:
        folders.append(folder.with_name("merged"))
        merge(folder, folders[-1], args.model_init_kwargs)
        trainer.processing_class.save_pretrained(folders[-1])
    title, data = f"{Path(name).name}, aimed at a target", run.data or "the empty prompt"
    save_run(trainer, metrics, folders, title, COMMAND, data, base_model=name)


def merge(adapter: Path, folder: Path, options: dict) -> None:
    """Save the adapter's model with the adapter merged into its weights."""
    options = {name: value for name, value in options.items() if name != "revision"}  # the adapter's config has it
    AutoPeftModelForCausalLM.from_pretrained(adapter, **options).merge_and_unload().save_pretrained(folder)


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
