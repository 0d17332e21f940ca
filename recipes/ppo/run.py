"""Train a causal language model by PPO, on reward functions or any target.

    accelerate launch recipes/ppo/run.py --config recipes/ppo/config.yaml --model_name_or_path outputs/pretrain/model \
        --reward count:the

Any model with a tokenizer will do (`recipes/pretrain` makes a small one offline), on prompts or without, and any factors and
divergences:

    accelerate launch recipes/ppo/run.py --config recipes/ppo/config.yaml --model_name_or_path gpt2 \
        --data prompts.jsonl --reward my_rewards.py:helpful --pointwise contains:amazing --divergence js --fit_samples 4096

The model, its tokenizer, critic, target and card go to OUTPUT_DIR/model. With `--use_peft` the policy, the reference and,
with `--critic adapter`, the critic are adapters on one set of weights.
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState

from hf_gdc import PPOConfig, PPOTrainer
from hf_gdc.cli import TargetArguments, build_target, parse_options, resume_option
from hf_gdc.data import load_prompts
from hf_gdc.hub import write_model_card
from hf_gdc.loading import adapter_config
from hf_gdc.trl_compat import ModelConfig, get_quantization_config


@dataclass
class RunArguments:
    """The prompts and the target; the model and its adapter are TRL's ModelConfig. The reward's beta is `kl_coef`."""

    data: str | None = field(
        default=None,
        metadata={"help": "Prompts: a .jsonl file or a Hub dataset with a column `prompt`. Default: the empty prompt."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read the prompts as a stream."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with the model."})
    reward: list[str] | None = field(
        default=None, metadata={"help": "Reward functions, added up: count:the my_rewards.py:helpful."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "A weight for each reward function. Default: 1."}
    )
    pointwise: list[str] | None = field(default=None, metadata={"help": "Features that every sample must have."})
    moment: list[str] | None = field(
        default=None, metadata={"help": "Features with their wanted means: contains:she=0.5."}
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
    run, model, args = parse_options(RunArguments, ModelConfig, PPOConfig, argv=argv)
    if model.model_name_or_path is None:
        raise ValueError(
            "which model? --model_name_or_path takes a path or an id of the Hub; recipes/pretrain makes a small one."
        )
    args.model_init_kwargs = {**loading_options(run, model), **(args.model_init_kwargs or {})}
    target = build_target(TargetArguments(run.pointwise, run.moment, run.reward, run.reward_weights, args.kl_coef))
    trainer = PPOTrainer(
        model.model_name_or_path,
        target=target,
        args=args,
        train_dataset=None if run.data is None else load_prompts(run.data, streaming=run.streaming),
        peft_config=adapter_config(model),
    )
    trainer.train(resume_from_checkpoint=resume_option(args))
    metrics = trainer.evaluate()
    folder = Path(args.output_dir) / "model"
    trainer.save_model(str(folder))
    if not trainer.is_world_process_zero():
        return
    shown = {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}
    trainer.target.save_pretrained(folder)
    write_model_card(
        folder,
        title=f"{Path(model.model_name_or_path).name}, by PPO",
        formula=trainer.target.formula(),
        command="accelerate launch recipes/ppo/run.py --config recipes/ppo/config.yaml",
        results=shown,
        data=run.data or "the empty prompt",
    )
    for name, value in shown.items():
        print(f"{name:40} {value:.4g}")
    print(f"saved {folder}")


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
