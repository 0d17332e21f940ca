"""Train a causal language model and an energy together, on real texts: D_f(P_G || P_D) + lambda * D(P_D, P_true).

    accelerate launch recipes/unified/run.py --config recipes/unified/config.yaml --model_name_or_path outputs/pretrain/model

P_D = a(x) e^d(x) / Z, a being the model as it starts; rewards and constraints join the policy's target:

    accelerate launch recipes/unified/run.py --config recipes/unified/config.yaml --model_name_or_path gpt2 \
        --data texts.jsonl --data_weight 2 --reward my_rewards.py:helpful --beta 0.5

The model, its tokenizer, target (the energy in it) and card go to OUTPUT_DIR/model. The target is a factor like any other:
`QuasiRejectionSampler(Target.from_pretrained(...), "OUTPUT_DIR/model", reference=...)` samples it.
"""

from pathlib import Path

from accelerate import PartialState

from hf_gdc import UnifiedConfig, UnifiedTrainer
from hf_gdc.cli import (
    RealTextArguments,
    TargetArguments,
    further_factors,
    name_model,
    parse_options,
    train_and_save,
)
from hf_gdc.loading import adapter_config
from hf_gdc.trl_compat import ModelConfig

COMMAND = "accelerate launch recipes/unified/run.py --config recipes/unified/config.yaml"


def main(argv: list[str] | None = None) -> None:
    run, model, factors, args = parse_options(RealTextArguments, ModelConfig, TargetArguments, UnifiedConfig, argv=argv)
    name = name_model(model, run.trust_remote_code, args)
    if factors.teacher is not None:
        raise ValueError("--teacher takes the reference's place, which the energy is beside: leave it out.")
    texts, held_out = run.datasets()
    trainer = UnifiedTrainer(
        name,
        run.make_discriminator(name, args.per_device_eval_batch_size),
        target=further_factors(factors),
        args=args,
        train_dataset=texts,
        eval_dataset=held_out,
        peft_config=adapter_config(model),
    )
    train_and_save(trainer, f"{Path(name).name}, trained with an energy", COMMAND, run.data, base_model=name)


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
