"""The trainer's step against a bare loop that does the same work and nothing else.

    python recipes/benchmarks/gdc_step.py

Both sides: sample with `generate`, score the reference, forward and backward of the policy, one AdamW step; 0.9 M
parameters, 20 tokens, 256 samples a step. The bare loop computes no features, partition, divergences or logs. The two
alternate in one process; the last line is JSON, also written to outputs/benchmarks/gdc_step.json.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from hf_gdc import GDCConfig, GDCTrainer, Reference, Reward, SmallGPTConfig, SmallGPTForCausalLM, data, stories

SAMPLES, LENGTH, STEPS = 256, 20, 8


def make_model(vocab_size: int) -> SmallGPTForCausalLM:
    torch.manual_seed(0)
    config = SmallGPTConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return SmallGPTForCausalLM(config)


def bare_loop(model: SmallGPTForCausalLM) -> float:
    """Samples per second of the work itself."""
    reference = copy.deepcopy(model).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    prompt = torch.zeros(SAMPLES, 1, dtype=torch.long)
    start = time.perf_counter()
    for _ in range(STEPS):
        with torch.no_grad():
            ids = model.eval().generate(prompt, do_sample=True, top_k=0, max_new_tokens=LENGTH, min_new_tokens=LENGTH)
            reference_logp = log_prob(reference, ids)
        logp = log_prob(model.train(), ids)
        loss = -((reference_logp - logp.detach()) * logp).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return STEPS * SAMPLES / (time.perf_counter() - start)


def log_prob(model: SmallGPTForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    logp = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
    return logp.gather(-1, ids[:, 1:, None]).squeeze(-1).sum(-1)


class Clock(TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = time.perf_counter() - self.start


def trainer_steps(model: SmallGPTForCausalLM, tokenizer, folder: Path) -> float:
    """Samples per second of `GDCTrainer`, with all its features, estimates and logs."""
    args = GDCConfig(
        output_dir=str(folder),
        overwrite=True,
        max_steps=STEPS,
        per_device_train_batch_size=SAMPLES,
        max_completion_length=LENGTH,
        learning_rate=1e-4,
        fit_samples=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    clock = Clock()
    target = Reference() * Reward("contains:dragon", beta=0.5)
    GDCTrainer(model, target, args=args, processing_class=tokenizer, callbacks=[clock]).train()
    return STEPS * SAMPLES / clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="alternated runs of each side")
    parser.add_argument("--output", default="outputs/benchmarks", help="folder of the JSON file")
    options = parser.parse_args()
    folder = Path(options.output)
    tokenizer = data.train_tokenizer(stories.sample(2000, 0))
    model = make_model(len(tokenizer))
    # Untrained, the model draws EOS at 1 in 729: nearly every completion has all 20 tokens on both sides.
    bare, ours = [], []
    for run in range(options.runs + 1):  # the first one warms up
        pair = bare_loop(copy.deepcopy(model)), trainer_steps(copy.deepcopy(model), tokenizer, folder / "gdc_step")
        if run:
            bare.append(pair[0])
            ours.append(pair[1])
    result = {
        "bare_samples_per_second": statistics.median(bare),
        "trainer_samples_per_second": statistics.median(ours),
        "ratio": statistics.median(a / b for a, b in zip(ours, bare, strict=True)),
        "parameters": model.num_parameters(),
        "threads": torch.get_num_threads(),
        "runs": options.runs,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gdc_step.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
