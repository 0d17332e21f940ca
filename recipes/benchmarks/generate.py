"""Tokens per second of `generate`: the small GPT against transformers' Llama with the very same weights.

    OMP_NUM_THREADS=2 python recipes/benchmarks/generate.py

Both sides are greedy, in one process, in turn, with the default cache; every sequence runs to the same length. They are
the same function, so `same_tokens` has to be 1; cached and uncached logits are compared too.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_gdc import SmallGPTConfig, SmallGPTForCausalLM


def build(options: argparse.Namespace) -> tuple[SmallGPTForCausalLM, LlamaForCausalLM]:
    """The two models, with the same weights."""
    torch.manual_seed(0)
    shape = {"vocab_size": options.vocab_size, "hidden_size": options.hidden_size}
    shape |= {"num_hidden_layers": options.layers, "num_attention_heads": options.heads}
    small = SmallGPTForCausalLM(SmallGPTConfig(**shape, initializer_range=0.05)).eval()
    config = small.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            **shape,
            intermediate_size=config.intermediate_size,
            rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    ).eval()
    llama.load_state_dict(small.state_dict())
    for model in (small, llama):
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
    return small, llama


def timed(model: PreTrainedModel, ids_BP: Tensor, new_tokens: int) -> tuple[float, Tensor]:
    """-> (tokens per second, the sequences)."""
    start = time.perf_counter()
    sequences = model.generate(
        ids_BP, attention_mask=torch.ones_like(ids_BP), max_new_tokens=new_tokens, do_sample=False, use_cache=True
    )
    return len(ids_BP) * new_tokens / (time.perf_counter() - start), sequences


@torch.no_grad()
def cache_error(model: PreTrainedModel, ids_BT: Tensor) -> float:
    """The largest difference between logits with a cache, token by token, and without."""
    past, pieces = None, []
    for step_B1 in ids_BT.split(1, dim=1):
        output = model(step_B1, past_key_values=past, use_cache=True)
        past = output.past_key_values
        pieces.append(output.logits)
    return float((torch.cat(pieces, 1) - model(ids_BT, use_cache=False).logits).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="alternated runs of each side")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--prompt_tokens", type=int, default=8)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--output", default="outputs/benchmarks", help="folder of the JSON file")
    options = parser.parse_args()
    small, llama = build(options)
    result = {"parameters": small.num_parameters(), "threads": torch.get_num_threads(), "runs": options.runs}
    for batch_size in options.batch_sizes:
        ids_BP = torch.randint(0, options.vocab_size, (batch_size, options.prompt_tokens))
        ours, theirs = [], []
        for run in range(options.runs + 1):  # the first one warms up
            pair = [timed(model, ids_BP, options.new_tokens) for model in (small, llama)[:: 1 if run % 2 else -1]]
            (our_speed, our_ids), (their_speed, their_ids) = pair if run % 2 else pair[::-1]
            same = (our_ids == their_ids).float().mean().item()
            if run:
                ours.append(our_speed)
                theirs.append(their_speed)
        result[f"batch_{batch_size}"] = {
            "small_gpt_tokens_per_second": statistics.median(ours),
            "llama_tokens_per_second": statistics.median(theirs),
            "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
            "same_tokens": same,
            "cached_against_uncached_logits": cache_error(small, our_ids),
        }
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "generate.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
