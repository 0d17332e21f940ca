"""PPO, hf_gdc against TRL 1.12's own PPOTrainer: samples per second, and peak memory with a vocabulary of 50,000.

    python recipes/benchmarks/vs_trl_ppo.py --trl .trl-1.12

`make test-trl-ppo` puts TRL 1.12 into that folder. Each side has a process of its own; they take turns, one set of rollouts
at a time, and the other one waits meanwhile. Both: the same random small GPT (4 layers of 128), tokenizer, prompts,
completion length (EOS ends 1 of 50 completions early), sets of rollouts, epochs, micro-batches, one optimizer step per epoch,
float32, threads, AdamW, k1, whitened advantages, both clips, a reward function that counts odd token ids. In TRL's favour:
the reward costs it no model, sampling and scoring take the whole set at once, no sample generations, no gradient
checkpointing, and it does not clip gradients, which ours does (TRL's never does). The ratio of processor seconds is given
too: it says more on a busy machine, and nothing of a GPU.

The memory is what a process held at most beyond its imports, resident on CPU, allocated on a GPU: processes of their own,
with a larger vocabulary. The last line is JSON, also written to OUTPUT/vs_trl_ppo.json.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MARK = "turn "  # begins the lines that a side writes to the benchmark
SIDES = ("hf_gdc", "trl")


class Finished(Exception):
    """Ends a side's training between two sets of rollouts."""


def peak_bytes() -> int:
    """The most memory that this process has held: on the GPU if there is one in use, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---- a side: one process ----


def make_tokenizer(size: int):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<bos>", "<eos>", "<pad>", *(f"w{n}" for n in range(size - 3))]
    inner = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side="left", **special)


def make_model(options):
    import torch

    from hf_gdc import SmallGPTConfig, SmallGPTForCausalLM

    torch.manual_seed(0)
    config = SmallGPTConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.num_hidden_layers,
        num_attention_heads=4,
        max_position_embeddings=options.prompt_length + options.length,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return SmallGPTForCausalLM(config)


def make_prompts(options) -> list[str]:
    """So many that no prompt comes twice in the benchmark."""
    words = options.vocab_size - 3
    number = options.samples * (options.updates + options.warmup)
    return [" ".join(f"w{(31 * n + 7 * k) % words}" for k in range(options.prompt_length)) for n in range(number)]


def counts_odd(completion_ids, **_) -> list[float]:
    return [float(sum(i % 2 for i in ids)) for ids in completion_ids]


def common(options) -> dict:
    """Options of `TrainingArguments` that both sides get."""
    import torch

    return {
        "output_dir": options.folder,
        "per_device_train_batch_size": options.micro_batch,
        "gradient_accumulation_steps": options.samples // options.micro_batch,
        "learning_rate": 1e-4,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "kl_coef": 0.05,
        "temperature": 1.0,
    }


def make_hf_gdc(options, callback):
    from datasets import Dataset

    from hf_gdc import PPOConfig, PPOTrainer

    args = PPOConfig(
        **common(options),
        max_steps=options.epochs * (options.updates + options.warmup + 1),
        num_iterations=options.epochs,
        steps_per_generation=options.samples // options.micro_batch,
        num_generations=1,
        max_completion_length=options.length,
        per_device_eval_batch_size=options.scoring_batch,
        logging_steps=options.epochs,
        critic=options.critic,
        overwrite=True,
    )
    dataset = Dataset.from_dict({"prompt": make_prompts(options)})
    tokenizer = make_tokenizer(options.vocab_size)
    return PPOTrainer(
        make_model(options),
        counts_odd,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[callback],
    )


def make_trl(options, callback):
    from recipes.trl.ppo import import_ppo, trl_ppo

    config, _ = import_ppo()
    args = config(
        **common(options),
        total_episodes=options.samples * (options.updates + options.warmup + 1),
        num_ppo_epochs=options.epochs,
        num_mini_batches=1,
        local_rollout_forward_batch_size=options.scoring_batch,
        response_length=options.length,
        stop_token="eos",
        num_sample_generations=0,
        logging_steps=1,
    )
    tokenizer = make_tokenizer(options.vocab_size)
    return trl_ppo(make_model(options), [counts_odd], args, make_prompts(options), tokenizer, callbacks=[callback])


def side(options) -> None:
    """Train as one side, a set of rollouts whenever the benchmark asks for one."""
    import torch
    import transformers
    from transformers import PrinterCallback, TrainerCallback

    sys.path.insert(0, str(ROOT))
    make = {"hf_gdc": make_hf_gdc, "trl": make_trl}[options.side]
    if options.side == "trl":
        from recipes.trl.ppo import import_ppo

        import_ppo()
    else:
        from hf_gdc import PPOTrainer  # noqa: F401
    transformers.logging.set_verbosity_error()
    imported = 0 if torch.cuda.is_available() else peak_bytes()
    steps = options.epochs if options.side == "hf_gdc" else 1  # calls of on_step_end for a set

    class Turnstile(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.done = 0
            self.wait()

        def on_step_end(self, *args, **kwargs):
            self.done += 1
            if self.done % steps == 0:
                seconds, busy = time.perf_counter() - self.start, time.process_time() - self.busy_start
                report = {"seconds": seconds, "busy": busy, "bytes": peak_bytes() - imported}
                print(MARK + json.dumps(report), flush=True)
                self.wait()

        def wait(self):
            if not sys.stdin.readline():
                raise Finished
            self.start, self.busy_start = time.perf_counter(), time.process_time()

    trainer = make(options, Turnstile())
    trainer.remove_callback(PrinterCallback)
    with contextlib.suppress(Finished):
        trainer.train()


# ---- the benchmark ----


class Side:
    """One side's process.

    Args:
        name: of `SIDES`. options: what the process is told, by name. trl: the folder of TRL 1.12.
    """

    def __init__(self, name: str, options: dict, trl: str):
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        paths = ([trl] if name == "trl" else []) + [os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        environment |= {"TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": str(options["threads"])}
        command = [sys.executable, __file__, "--trl", trl, "--side", name, *words]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.name = name
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def turn(self) -> dict:
        """One set of rollouts and its epochs: seconds, and the most bytes so far."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise SystemExit(f"the side {self.name} failed: see above.")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def race(options, told: dict) -> dict[str, list[dict]]:
    """What each side's turns gave, a set of rollouts each."""
    sides = [Side(name, told, options.trl) for name in SIDES]
    found = {name: [] for name in SIDES}
    for update in range(options.warmup + options.updates):
        for one in sides:
            turn = one.turn()
            if update >= options.warmup:
                found[one.name].append(turn)
        print(" | ".join(f"{name} {turns[-1]['seconds']:.2f} s" for name, turns in found.items() if turns), flush=True)
    for one in sides:
        one.close()
    return found


def speeds(turns: dict[str, list[dict]], samples: int) -> dict:
    """Medians of samples per second and of the ratios of neighbouring turns; of wall-clock and of processor seconds."""

    def ratios(clock: str) -> list[float]:
        pairs = zip(turns["hf_gdc"], turns["trl"], strict=True)
        return [theirs[clock] / ours[clock] for ours, theirs in pairs]

    found = {name: round(statistics.median(samples / turn["seconds"] for turn in turns[name]), 1) for name in SIDES}
    found |= {"ratio": round(statistics.median(ratios("seconds")), 2)}
    found |= {"ratios": [round(ratio, 2) for ratio in ratios("seconds")]}
    return found | {"ratio_of_processor_seconds": round(statistics.median(ratios("busy")), 2)}


def memory(options, told: dict) -> dict[str, float]:
    """MiB that each side held at most beyond its imports, one side after the other."""
    found = {}
    for name in SIDES:
        one = Side(name, told, options.trl)
        found[name] = [one.turn() for _ in range(2)][-1]["bytes"] / 2**20  # the optimizer's state comes with the first
        one.close()
        print(f"{name}: {found[name]:.0f} MiB", flush=True)
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", required=True, help="folder that has TRL 1.12's package `trl`")
    parser.add_argument("--output", default="outputs/benchmarks", help="folder of the results")
    parser.add_argument("--updates", type=int, default=7, help="sets of rollouts of each side that count")
    parser.add_argument("--warmup", type=int, default=1, help="sets of rollouts before them")
    parser.add_argument("--samples", type=int, default=128, help="completions in a set")
    parser.add_argument("--micro_batch", type=int, default=128, help="completions in a forward and backward pass")
    parser.add_argument(
        "--scoring_batch", type=int, default=128, help="completions scored at once; TRL also samples so many"
    )
    parser.add_argument("--epochs", type=int, default=4, help="over a set of rollouts")
    parser.add_argument("--prompt_length", type=int, default=8)
    parser.add_argument("--length", type=int, default=20, help="most tokens of a completion")
    parser.add_argument("--vocab_size", type=int, default=1000, help="where speed is measured")
    parser.add_argument("--memory_vocab_size", type=int, default=50_257, help="where memory is measured; 0: not at all")
    parser.add_argument("--memory_micro_batch", type=int, default=32, help="micro- and scoring batch there")
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--critic", default="shared", help="hf_gdc's: shared, or separate as TRL's is")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (Path(options.trl) / "trl" / "experimental" / "ppo").is_dir():
        raise ValueError(f"--trl {options.trl!r} has no trl/experimental/ppo: give the folder that holds TRL 1.12.")
    return options


TOLD = (
    "updates",
    "warmup",
    "samples",
    "micro_batch",
    "scoring_batch",
    "epochs",
    "prompt_length",
    "length",
    "vocab_size",
)
TOLD += ("hidden_size", "num_hidden_layers", "critic", "threads")


def main() -> None:
    options = parse()
    if options.side:
        return side(options)
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    options.trl = str(Path(options.trl).resolve())
    settings = {name: getattr(options, name) for name in TOLD}
    told = settings | {"folder": folder / "vs_trl_ppo"}
    result = {"samples_per_second": speeds(race(options, told), options.samples)}
    if options.memory_vocab_size:
        batch = {"micro_batch": options.memory_micro_batch, "scoring_batch": options.memory_micro_batch}
        peak = memory(options, told | {"vocab_size": options.memory_vocab_size} | batch)
        result["peak_mib"] = {name: round(value) for name, value in peak.items()}
        result["peak_mib"] |= {"ratio": round(peak["hf_gdc"] / peak["trl"], 2)} | batch
        result["peak_mib"] |= {"vocab_size": options.memory_vocab_size}
    result |= {"settings": settings, "versions": versions(options.trl)}
    line = json.dumps(result)
    (folder / "vs_trl_ppo.json").write_text(line + "\n")
    print(line)


def versions(trl: str) -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in ("hf-gdc", "torch", "transformers")}
    ppo = next(iter(importlib.metadata.distributions(name="trl", path=[trl])), None)
    return found | {"trl": "unknown" if ppo is None else ppo.version}


if __name__ == "__main__":
    main()
