"""Train a causal language model against a discriminator, on real texts.

    accelerate launch recipes/gan/run.py --config recipes/gan/config.yaml --model_name_or_path outputs/pretrain/model

Any model with a tokenizer and any texts will do; with prompts and completions it is GAIL, or GAD if a teacher wrote the
completions:

    accelerate launch recipes/gan/run.py --config recipes/gan/config.yaml --model_name_or_path gpt2 --data pairs.jsonl \
        --num_generations 8 --divergence reverse_kl --discriminator_loss bradley_terry

The model, its tokenizer, target (the discriminator in it) and card go to OUTPUT_DIR/model. With `--use_peft --discriminator
adapter` both players are adapters on one set of weights.
"""

from pathlib import Path

from accelerate import PartialState

from hf_gdc import GANConfig, GANTrainer
from hf_gdc.cli import RealTextArguments, name_model, parse_options, train_and_save
from hf_gdc.loading import adapter_config
from hf_gdc.trl_compat import ModelConfig

COMMAND = "accelerate launch recipes/gan/run.py --config recipes/gan/config.yaml"


def main(argv: list[str] | None = None) -> None:
    run, model, args = parse_options(RealTextArguments, ModelConfig, GANConfig, argv=argv)
    name = name_model(model, run.trust_remote_code, args)
    texts, held_out = run.datasets()
    trainer = GANTrainer(
        name,
        run.make_discriminator(name, args.per_device_eval_batch_size),
        args=args,
        train_dataset=texts,
        eval_dataset=held_out,
        peft_config=adapter_config(model),
    )
    train_and_save(trainer, f"{Path(name).name}, trained against a discriminator", COMMAND, run.data, base_model=name)


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
