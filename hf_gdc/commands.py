# SPDX-License-Identifier: Apache-2.0
"""The `hf-gdc` command: run a recipe, sample, evaluate, report and push.

What needs torch is imported when a command runs, so that help is instant. Left out: options of the recipes themselves, which
`hf-gdc train RECIPE --help` lists.
"""

import argparse
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
# In a wheel the recipes are data of the package; in the repository they stand beside it.
RECIPES = _HERE / "recipes" if (_HERE / "recipes").is_dir() else _HERE.parent / "recipes"


def available_recipes() -> list[str]:
    return sorted(path.parent.name for path in RECIPES.glob("*/run.py") if path.parent.name != "benchmarks")


# ---- train ----


def train(options: argparse.Namespace) -> int:
    """Launch a recipe with its own configuration file, unless the options name another."""
    folder = RECIPES / options.recipe
    words = list(options.words)
    chosen = any(word == "--config" or word.startswith("--config=") for word in words)
    if not chosen and (folder / "config.yaml").exists():
        words = ["--config", str(folder / "config.yaml"), *words]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *_launcher(options.accelerate)]
    return subprocess.run([*launch, str(folder / "run.py"), *words]).returncode


def _launcher(name: str | None) -> list[str]:
    """accelerate's options: the named file, else what `accelerate config` saved, else what the machine has."""
    if name is None:
        import torch
        from accelerate.commands.config.config_args import default_config_file

        if Path(default_config_file).exists():
            return []
        name = {0: "cpu", 1: "one_gpu"}.get(torch.cuda.device_count(), "multi_gpu")
    path = Path(name) if Path(name).is_file() else RECIPES / "accelerate" / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (RECIPES / "accelerate").glob("*.yaml")))
        raise ValueError(f"--accelerate takes a file or one of {known}, and {name!r} is neither.")
    return ["--config_file", str(path)]


# ---- sample and evaluate ----


def load(options: argparse.Namespace):
    """-> (model in evaluation mode on the best device, its tokenizer); an adapter comes with the model under it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(options.model, **where)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto", **where)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def sample(options: argparse.Namespace) -> int:
    """Print completions, token by token as they come."""
    from transformers import TextStreamer, set_seed

    from .encoding import tokenize_prompts

    model, tokenizer = load(options)
    if options.seed is not None:
        set_seed(options.seed)
    prompt = [{"role": "user", "content": options.prompt}] if options.chat else options.prompt
    ids = tokenize_prompts([prompt], tokenizer)
    for _ in range(options.num_samples):
        streamer = TextStreamer(tokenizer, skip_prompt=options.chat, skip_special_tokens=True)
        _generate(model, tokenizer, ids, options, streamer=streamer)
    return 0


def _generate(model, tokenizer, rows: list[list[int]], options: argparse.Namespace, **more):
    """Completions' token ids of rows of equal length, by the sampling that the options ask for."""
    import torch

    ids = torch.tensor(rows, device=model.device)
    settings = {"do_sample": options.temperature > 0, "max_new_tokens": options.max_new_tokens, "num_beams": 1}
    if settings["do_sample"]:  # all of it, because `generate` and a model's own settings may cut the distribution
        settings |= {"temperature": options.temperature, "top_k": 0, "top_p": options.top_p}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    mask = torch.ones_like(ids)
    with torch.no_grad():
        out = model.generate(ids, attention_mask=mask, pad_token_id=pad, use_cache=True, **settings, **more)
    return out[:, ids.shape[1] :]


def evaluate(options: argparse.Namespace) -> int:
    """Print perplexity and next-token accuracy on text or a task's scores, and rates of features in samples, with intervals."""
    import json

    from .text_scores import text_scores

    if options.data is None and not options.features:
        raise ValueError(
            "evaluate what? Give --data TEXT (with --task, its rows), --features contains:dragon, or both."
        )
    model, tokenizer = load(options)
    found = {}
    if options.task is not None:
        found |= _task_scores(model, tokenizer, options)
    elif options.data is not None:
        from .data import load_text

        texts = load_text(
            options.data, f"train[:{options.num_texts}]", num_stories=options.num_texts, seed=options.seed
        )
        found |= text_scores(model, tokenizer, texts, options.max_length, options.batch_size)
    if options.features:
        found |= _feature_rates(model, tokenizer, options)
    for name, value in found.items():
        print(f"{name:40} {value:.4g}")
    print(json.dumps(found))
    return 0


def _task_scores(model, tokenizer, options: argparse.Namespace) -> dict[str, float]:
    from datasets import Dataset

    from .data import load_rows
    from .story_tasks import story_task
    from .task_scores import task_scores
    from .tasks import get_task

    task = get_task(options.task, options.prompt_template, options.completion_template)
    if options.data == "stories":
        rows = Dataset.from_list(story_task(options.task, options.num_texts, options.seed))
    else:
        rows = load_rows(options.data, f"train[:{options.num_texts}]")
    chosen = (options.labels, options.length_normalised, options.max_length, options.max_new_tokens, options.batch_size)
    return task_scores(model, tokenizer, rows, task, *chosen)


def _feature_rates(model, tokenizer, options: argparse.Namespace) -> dict[str, float]:
    from transformers import set_seed

    from .encoding import tokenize_prompts
    from .metrics.constraints import constraint_rates

    set_seed(options.seed)
    ids = tokenize_prompts([options.prompt], tokenizer)
    texts: list[str] = []
    while len(texts) < options.num_samples:
        rows = ids * min(options.batch_size, options.num_samples - len(texts))
        texts += tokenizer.batch_decode(_generate(model, tokenizer, rows, options), skip_special_tokens=True)
    return constraint_rates(texts, options.features, prompts=[options.prompt] * len(texts))


# ---- report and push ----


def report(options: argparse.Namespace) -> int:
    """Print what the card beside a model says of it: target, divergence, measured values."""
    from .hub import read_card

    print(read_card(options.folder))
    return 0


def push(options: argparse.Namespace) -> int:
    """Upload a folder as it is, in one commit."""
    from .hub import push_folder

    url = push_folder(options.folder, options.repo, options.private, options.revision, options.message)
    print(f"pushed {options.folder} to {url}")
    return 0


# ---- the command line ----

SAMPLING = {
    "--max_new_tokens": {"type": int, "default": 128, "help": "tokens of a completion at most (default 128)"},
    "--temperature": {
        "type": float,
        "default": 1.0,
        "help": "1 is the model's own distribution (default); 0 is greedy",
    },
    "--top_p": {
        "type": float,
        "default": 1.0,
        "help": "sample from the likeliest tokens of this mass (default 1: all)",
    },
}
TASK = {
    "--task": {"help": "classification, summarisation, question_answering, translation or dialogue"},
    "--prompt_template": {"help": "how a row's prompt is written, by its columns: '{text}\\nLabel:'"},
    "--completion_template": {"help": "how its right completion is written: ' {label}'"},
    "--labels": {"nargs": "+", "help": "of a classification (default: those of the data)"},
    "--length_normalised": {"action": "store_true", "help": "choose labels by log-likelihood per token"},
}
LOADING = {
    "model": {"metavar": "MODEL", "help": "a path or an id of the Hub; an adapter too"},
    "--revision": {"default": "main", "help": "branch, tag or commit on the Hub"},
    "--trust_remote_code": {"action": "store_true", "help": "run the code that comes with the model"},
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-gdc", description="Train language models to match a distribution.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(function, example: str, *groups: dict) -> argparse.ArgumentParser:
        command = commands.add_parser(
            function.__name__,
            help=function.__doc__.partition(".")[0].partition("\n")[0],
            description=function.__doc__,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for name, settings in ((n, s) for group in groups for n, s in group.items()):
            command.add_argument(name, **settings)
        command.set_defaults(run=function)
        return command

    command = add(
        train, "hf-gdc train gdc --model_name_or_path gpt2 --pointwise contains:amazing --output_dir outputs/gdc"
    )
    command.add_argument(
        "--accelerate", metavar="NAME", help="an accelerate configuration: a file, or cpu, multi_gpu, ..."
    )
    command.add_argument("recipe", choices=available_recipes(), metavar="RECIPE", help=", ".join(available_recipes()))
    command.add_argument("words", nargs=argparse.REMAINDER, metavar="--option value", help="of the recipe")

    command = add(sample, 'hf-gdc sample outputs/gdc/model "Once upon a time" --num_samples 3', LOADING, SAMPLING)
    command.add_argument("prompt", nargs="?", default="", help="text to go on from (default: none)")
    command.add_argument("--num_samples", type=int, default=1, help="completions, one after another (default 1)")
    command.add_argument("--seed", type=int, help="for the same samples again")
    command.add_argument(
        "--chat", action="store_true", help="the prompt is a user's message, in the model's chat template"
    )

    command = add(
        evaluate,
        "hf-gdc evaluate outputs/gdc/model --data book.txt --features contains:dragon contains:she",
        LOADING,
        SAMPLING,
        TASK,
    )
    command.add_argument("--data", help="text for perplexity, or a task's rows: a file, a Hub dataset, or `stories`")
    command.add_argument("--num_texts", type=int, default=1000, help="rows of it (default 1000)")
    command.add_argument("--max_length", type=int, default=512, help="tokens of a row that are read (default 512)")
    command.add_argument("--features", nargs="+", help="what to look for in samples: contains:dragon my.py:is_valid")
    command.add_argument("--prompt", default="", help="what the samples go on from (default: nothing)")
    command.add_argument("--num_samples", type=int, default=1024, help="samples for --features (default 1024)")
    command.add_argument("--batch_size", type=int, default=64, help="texts and samples at once (default 64)")
    command.add_argument("--seed", type=int, default=0, help="of the samples, and of which stories (default 0)")

    command = add(report, "hf-gdc report outputs/gdc/model")
    command.add_argument("folder", type=Path, help="of a saved model")

    command = add(push, "hf-gdc push outputs/gdc/model my-name/dragon-stories --private")
    command.add_argument("folder", type=Path, help="of a model, an adapter, a critic or a target")
    command.add_argument("repo", help="OWNER/NAME on the Hub; it is made if it is not there")
    command.add_argument("--private", action="store_true", help="make it private if it is made now")
    command.add_argument(
        "--revision", default="main", help="a branch, made from main if it is not there (default main)"
    )
    command.add_argument("--message", help="of the commit")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"hf-gdc: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
