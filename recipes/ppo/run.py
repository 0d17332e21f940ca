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

from pathlib import Path

from accelerate import PartialState

from hf_gdc import PPOConfig, PPOTrainer
from hf_gdc.cli import (
    FactorArguments,
    PromptArguments,
    build_target,
    name_model,
    parse_options,
    train_and_save,
)
from hf_gdc.loading import adapter_config
from hf_gdc.trl_compat import ModelConfig

COMMAND = "accelerate launch recipes/ppo/run.py --config recipes/ppo/config.yaml"


def main(argv: list[str] | None = None) -> None:
    run, model, factors, args = parse_options(PromptArguments, ModelConfig, FactorArguments, PPOConfig, argv=argv)
    name = name_model(model, run.trust_remote_code, args)
    trainer = PPOTrainer(
        name,
        target=build_target(factors, beta=args.kl_coef),
        args=args,
        train_dataset=run.dataset(),
        peft_config=adapter_config(model),
    )
    data = run.data or "the empty prompt"
    train_and_save(trainer, f"{Path(name).name}, by PPO", COMMAND, data, base_model=name)


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
