"""Train a reward model on preferences.

    accelerate launch recipes/reward_model/run.py --config recipes/reward_model/config.yaml \
        --model_name_or_path outputs/pretrain/model

The offline set is pairs of the embedded stories with a true reward (`hf_gdc.preferences`). Your own, plain text or chats:

    accelerate launch recipes/reward_model/run.py --config recipes/reward_model/config.yaml --model_name_or_path gpt2 \
        --data preferences.jsonl

OUTPUT_DIR/model has the model, or with `--use_peft` an adapter, with its tokenizer and card; `Reward("OUTPUT_DIR/model",
beta)` and `--reward OUTPUT_DIR/model` take either. A policy with an adapter on the same base carries the reward's beside its
own.
"""

from accelerate import PartialState

from hf_gdc.cli import parse_options, resume_option
from hf_gdc.trainers.reward_modeling import RewardModelArguments, train_reward_model
from hf_gdc.trl_compat import ModelConfig, RewardConfig


def main(argv: list[str] | None = None) -> None:
    options, model, args = parse_options(RewardModelArguments, ModelConfig, RewardConfig, argv=argv)
    folder, metrics = train_reward_model(options, model, args, resume_option(args))
    if args.process_index == 0:
        for name, value in metrics.items():
            print(f"{name:20} {value:.4g}")
        print(f"saved {folder}. Next, train a policy with it:")
        print(f"  accelerate launch recipes/ppo/run.py --config recipes/ppo/config.yaml --reward {folder} ...")


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
