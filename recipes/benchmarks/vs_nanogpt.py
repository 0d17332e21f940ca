"""Training on tinyshakespeare's characters: hf_gdc's pretraining against nanoGPT's setting for a CPU.

    OMP_NUM_THREADS=2 python recipes/benchmarks/vs_nanogpt.py --nanogpt PATH --data tinyshakespeare.txt

PATH is a checkout of https://github.com/karpathy/nanoGPT; its model and its optimizer are imported from there and trained
as its README's command for a CPU does: 4 layers, 4 heads, 128 wide, block 64, batch 12, 2,000 steps, AdamW, 100 steps of
warm-up, cosine decay to a tenth. hf_gdc trains through its own `PretrainingTrainer`, everything included. Both sides see the
same characters and are judged on the same full validation split: the last tenth, in blocks of 64, each predicted once.

Three questions: tokens per second with AdamW and nanoGPT's architecture on both sides, in turn; seconds until our recipe is
as good as nanoGPT at its end; and our loss at nanoGPT's budget of tokens. Our recipe is the small GPT with shifted tokens, Muon
and AdamW, smaller batches, linear decay. Seconds are of training alone, not of judging; on a busy machine take one thread and
compare CPU seconds. The last line is JSON.
"""

import argparse
import importlib
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_gdc import SmallGPTConfig, SmallGPTForCausalLM
from hf_gdc.trainers.pretraining import PretrainConfig, PretrainingTrainer

BLOCK, WIDTH, LAYERS, HEADS = 64, 128, 4, 4
STEPS, BATCH, WARMUP = 2000, 12, 100  # nanoGPT's
PARTS = ["nanogpt", "short", "budget", "speed"]


class Blocks(torch.utils.data.Dataset):
    """The text in blocks of BLOCK + 1 characters, the last also the next one's first: each but the first is predicted once."""

    def __init__(self, ids: Tensor):
        self.rows = ids.unfold(0, BLOCK + 1, BLOCK)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def read(path: str) -> tuple[Tensor, Tensor, int]:
    """-> (training ids, validation ids, number of characters)."""
    text = Path(path).read_text()
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = torch.tensor([index[character] for character in text])
    cut = int(0.9 * len(ids))
    return ids[:cut], ids[cut:], len(index)


@torch.no_grad()
def validation_loss(logits_of, ids: Tensor) -> float:
    """Mean nats per character over the whole split; `logits_of` maps (B, BLOCK) ids to (B, BLOCK, V)."""
    rows = Blocks(ids).rows
    total = 0.0
    for part in rows.split(128):
        logits_BTV = logits_of(part[:, :-1])
        total += float(nn.functional.cross_entropy(logits_BTV.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return total / (len(rows) * BLOCK)


# ---- nanoGPT ----


def nanogpt(path: str, vocab: int):
    """-> (its model, its optimizer), from the checkout."""
    if not (Path(path) / "model.py").is_file():
        raise SystemExit(f"{path} is no checkout of nanoGPT: it has no model.py.")
    sys.path.insert(0, path)
    module = importlib.import_module("model")
    config = module.GPTConfig(
        block_size=BLOCK, vocab_size=vocab, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, dropout=0.0, bias=False
    )
    model = module.GPT(config)
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=1e-3, betas=(0.9, 0.99), device_type="cpu")
    return model, optimizer


class Clock(TrainerCallback):
    """Seconds from the first step to the end of the last, and CPU seconds of the process."""

    def on_train_begin(self, *_, **__):
        self.start = time.perf_counter(), time.process_time()

    def on_step_end(self, *_, **__):
        self.times = time.perf_counter() - self.start[0], time.process_time() - self.start[1]


def train_nanogpt(model, optimizer, ids: Tensor, steps: int) -> tuple[float, float]:
    """-> (seconds, CPU seconds)."""
    clock = Clock()
    clock.on_train_begin()
    for step in range(steps):
        share = (step - WARMUP) / (STEPS - WARMUP)
        rate = (step + 1) / (WARMUP + 1) if step < WARMUP else 0.55 + 0.45 * math.cos(math.pi * share)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        at_B = torch.randint(len(ids) - BLOCK, (BATCH,))
        x_BT = torch.stack([ids[i : i + BLOCK] for i in at_B])
        y_BT = torch.stack([ids[i + 1 : i + BLOCK + 1] for i in at_B])
        _, loss = model(x_BT, y_BT)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    clock.on_step_end()
    return clock.times


# ---- hf_gdc ----


def small_gpt(vocab: int) -> SmallGPTForCausalLM:
    """With SwiGLU 344 wide it has as many parameters as nanoGPT's, whose MLP has two matrices of 512."""
    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 344}
    return SmallGPTForCausalLM(
        SmallGPTConfig(vocab_size=vocab, max_position_embeddings=BLOCK + 1, token_shift=True, **shape)
    )


def same_architecture(vocab: int) -> SmallGPTForCausalLM:
    """nanoGPT's own architecture, for the comparison of speeds: LayerNorm, GELU, learned positions."""
    shape = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 4 * WIDTH,
    }
    kinds = {"norm_type": "layer", "hidden_act": "gelu", "position_embedding_type": "learned"}
    return SmallGPTForCausalLM(SmallGPTConfig(vocab_size=vocab, max_position_embeddings=BLOCK, **shape, **kinds))


def collate(rows: list[dict]) -> dict[str, Tensor]:
    """BLOCK characters in, the BLOCK after them out, as nanoGPT has it: no position is computed that predicts nothing."""
    ids = torch.stack([row["input_ids"] for row in rows])
    known = ids[:, :-1].contiguous()
    return {"input_ids": known, "labels": known, "shift_labels": ids[:, 1:].contiguous()}


def train_hf_gdc(model, ids: Tensor, steps: int, options: argparse.Namespace, **more) -> tuple[float, float]:
    """-> (seconds, CPU seconds)."""
    clock = Clock()
    args = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 10**9}
    args |= {"output_dir": f"{options.output}/vs_nanogpt", "overwrite": True, "max_steps": steps, "seed": options.seed}
    config = PretrainConfig(**(args | {"per_device_train_batch_size": BATCH} | more))
    trainer = PretrainingTrainer(
        model=model, args=config, train_dataset=Blocks(ids), data_collator=collate, callbacks=[clock], whole_texts=False
    )
    trainer.train()
    return clock.times


# ---- the comparison ----


def speeds(options: argparse.Namespace, train: Tensor, vocab: int) -> dict[str, float]:
    """Tokens per second with AdamW and one architecture on both sides: medians of alternated runs, and of their ratios."""
    tokens, ours, theirs = options.speed_steps * BATCH * BLOCK, [], []
    adamw = {"muon": False, "learning_rate": 1e-3, "weight_decay": 0.1, "adam_beta2": 0.99}
    for run in range(options.runs + 1):  # the first one warms up
        pair = (
            train_nanogpt(*nanogpt(options.nanogpt, vocab), train, options.speed_steps),
            train_hf_gdc(same_architecture(vocab), train, options.speed_steps, options, **adamw),
        )
        if run:
            theirs.append(pair[0])
            ours.append(pair[1])
    ratios = [[t / o for t, o in zip(*times, strict=True)] for times in zip(theirs, ours, strict=True)]
    return {
        "nanogpt_tokens_per_second": tokens / statistics.median(seconds for seconds, _ in theirs),
        "hf_gdc_tokens_per_second": tokens / statistics.median(seconds for seconds, _ in ours),
        "speed_ratio": statistics.median(ratio for ratio, _ in ratios),
        "speed_ratio_by_cpu_seconds": statistics.median(ratio for _, ratio in ratios),
    }


def their_run(options: argparse.Namespace, train: Tensor, validation: Tensor, vocab: int) -> dict[str, float]:
    """nanoGPT as its README trains it on a CPU."""
    torch.manual_seed(options.seed)
    model, optimizer = nanogpt(options.nanogpt, vocab)
    seconds, cpu = train_nanogpt(model, optimizer, train, options.steps)
    found = {"parameters": model.get_num_params(), "seconds": seconds, "cpu_seconds": cpu}
    model.eval()
    loss = validation_loss(lambda x: model(x, x)[0], validation)  # with targets it gives all logits
    return {f"nanogpt_{name}": value for name, value in (found | {"loss": loss}).items()}


def our_run(name: str, tokens: int, options: argparse.Namespace, train: Tensor, validation: Tensor, vocab: int) -> dict:
    """Our recipe on so many tokens."""
    recipe = {"learning_rate": options.learning_rate, "lr_scheduler_type": "linear", "warmup_steps": 0.05}
    recipe["per_device_train_batch_size"] = options.batch_size
    torch.manual_seed(options.seed)
    ours = small_gpt(vocab)
    seconds, cpu = train_hf_gdc(ours, train, tokens // (options.batch_size * BLOCK), options, **recipe)
    found = {"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu}
    ours.eval()
    found["loss"] = validation_loss(lambda x: ours(x, use_cache=False).logits, validation)
    return {"hf_gdc_parameters": ours.num_parameters()} | {
        f"hf_gdc_{name}_{key}": value for key, value in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", required=True, help="a checkout of nanoGPT")
    parser.add_argument("--data", required=True, help="tinyshakespeare.txt")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=PARTS,
        help="what to measure now; the file keeps what was measured before (default: all)",
    )
    parser.add_argument("--runs", type=int, default=5, help="alternated runs for the speed")
    parser.add_argument("--speed_steps", type=int, default=200, help="steps of each of them")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of nanoGPT, and its budget of tokens for ours")
    parser.add_argument(
        "--short_tokens", type=int, default=122_880, help="of our run that has to be as good as nanoGPT's"
    )
    parser.add_argument("--learning_rate", type=float, default=6e-3, help="of our recipe, with Muon and linear decay")
    parser.add_argument("--batch_size", type=int, default=6, help="of our recipe, in blocks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="outputs/benchmarks", help="folder of the JSON file")
    options = parser.parse_args()
    train, validation, vocab = read(options.data)
    file = Path(options.output) / "vs_nanogpt.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = set(options.parts) == set(PARTS)
    result = json.loads(file.read_text()) if file.exists() and not whole else {}
    result |= {"threads": torch.get_num_threads(), "seed": options.seed}
    budget = options.steps * BATCH * BLOCK
    for part in options.parts:
        if part == "nanogpt":
            result |= their_run(options, train, validation, vocab)
        elif part == "speed":
            result |= speeds(options, train, vocab)
        else:
            tokens = budget if part == "budget" else options.short_tokens
            result |= our_run(part, tokens, options, train, validation, vocab)
        file.write_text(json.dumps(result, indent=2) + "\n")
    if {"nanogpt_seconds", "hf_gdc_short_seconds"} <= set(result):
        good = result["hf_gdc_short_loss"] <= result["nanogpt_loss"]
        share = result["hf_gdc_short_seconds"] / result["nanogpt_seconds"]
        result["as_good_in_share_of_its_seconds"] = share if good else None
        file.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
