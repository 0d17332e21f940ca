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
from hf_gdc.cli import TargetArguments, build_target, parse_options, resume_option
from hf_gdc.data import load_prompts
from hf_gdc.hub import write_model_card
from hf_gdc.loading import adapter_config
from hf_gdc.trl_compat import ModelConfig, get_quantization_config


@dataclass
class RunArguments:
    """The prompts, and what is saved; the model and its adapter are TRL's ModelConfig."""

    data: str | None = field(
        default=None,
        metadata={"help": "Prompts: a .jsonl file or a Hub dataset with a column `prompt`. Default: the empty prompt."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read the prompts as a stream."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the model."})
    merge_adapter: bool = field(
        default=False, metadata={"help": "Save the model with the adapter merged into it too, in OUTPUT_DIR/merged."}
    )


def loading_options(run: RunArguments, model: ModelConfig) -> dict:
    """Arguments of `from_pretrained`."""
    options = {"dtype": model.dtype, "revision": model.model_revision, "trust_remote_code": run.trust_remote_code}
    options |= {
        "attn_implementation": model.attn_implementation,
        "quantization_config": get_quantization_config(model),
    }
    return {name: value for name, value in options.items() if value is not None}


def main(argv: list[str] | None = None) -> None:
    run, model, factors, args = parse_options(RunArguments, ModelConfig, TargetArguments, GDCConfig, argv=argv)
    if model.model_name_or_path is None:
        raise ValueError("which model? --model_name_or_path takes a path or an id of the Hub.")
    args.model_init_kwargs = {**loading_options(run, model), **(args.model_init_kwargs or {})}
    trainer = GDCTrainer(
        model.model_name_or_path,
        build_target(factors),
        args=args,
        train_dataset=None if run.data is None else load_prompts(run.data, streaming=run.streaming),
        peft_config=adapter_config(model),
    )
    adapted = isinstance(trainer.model, PeftModel)
    if run.merge_adapter and not adapted:
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
    shown = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    for place in folders:
        trainer.target.save_pretrained(place)
        write_model_card(
            place,
            title=f"{Path(model.model_name_or_path).name}, aimed at a target",
            formula=trainer.target.formula(),
            command="accelerate launch recipes/gdc/run.py --config recipes/gdc/config.yaml",
            results=shown,
            data=run.data or "the empty prompt",
            base_model=model.model_name_or_path,
        )
    for name, value in shown.items():
        print(f"{name:40} {value:.4g}")
    print(f"saved {' and '.join(str(place) for place in folders)}")


def merge(adapter: Path, folder: Path, options: dict) -> None:
    """Save the adapter's model with the adapter merged into its weights."""
    options = {name: value for name, value in options.items() if name != "revision"}  # the adapter's config has it
    AutoPeftModelForCausalLM.from_pretrained(adapter, **options).merge_and_unload().save_pretrained(folder)


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
