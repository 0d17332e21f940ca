"""Pretrain a causal language model from scratch.

    accelerate launch recipes/pretrain/run.py --config recipes/pretrain/config.yaml

trains a small GPT on the embedded stories. Any text and any causal architecture do as well:

    accelerate launch recipes/pretrain/run.py --config recipes/pretrain/config.yaml --data book.txt \
        --max_length 128 --model_type gpt2 --model_kwargs '{"n_embd": 128, "n_layer": 4, "n_head": 4}'

The nats per token of the held-out part say how good the model is; on the stories, `eval_excess_nats` is
KL(grammar || model) per story, 0 for a perfect model. The model, its tokenizer and its code go to OUTPUT_DIR/model.
"""

from accelerate import PartialState

from hf_gdc.cli import parse_options, resume_option
from hf_gdc.trainers.pretraining import PretrainArguments, PretrainConfig, pretrain


def main(argv: list[str] | None = None) -> None:
    options, args = parse_options(PretrainArguments, PretrainConfig, argv=argv)
    folder, metrics = pretrain(options, args, resume_option(args))
    if args.process_index == 0:
        print(f"held out: {metrics['eval_nll_per_token']:.4f} nats per token", end="")
        if "eval_excess_nats" in metrics:
            print(
                f"; {metrics['eval_nll_per_text']:.3f} per story, {metrics['eval_excess_nats']:.3f} above the grammar's"
            )
        print(f"\nsaved {folder}. Next, teach it a constraint:")
        print(f"  accelerate launch recipes/gdc/run.py --config recipes/gdc/config.yaml --model_name_or_path {folder}")


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
