# SPDX-License-Identifier: Apache-2.0
"""The `hf-gdc` command, from this repository and from a wheel in a folder of its own."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from builders import small_gpt
from datasets import Dataset

from hf_gdc import SmallGPTForCausalLM, commands, stories
from hf_gdc.data import word_tokenizer
from hf_gdc.text_scores import text_scores

ROOT = Path(__file__).parents[1]
TINY = ["--num_stories", "300", "--max_steps", "2", "--tokenizer", "word", "--use_cpu", "true"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = word_tokenizer(stories.sample(300, seed=0))
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    small_gpt(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def hf_gdc(*words, **environment):
    command = [sys.executable, "-m", "hf_gdc.commands", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=400)


# --- help and mistakes


def test_help_shows_an_example_of_each_command(capsys):
    for command in ("train", "sample", "evaluate", "report", "push"):
        with pytest.raises(SystemExit, match="0"):
            commands.main([command, "--help"])
        assert f"example:\n  hf-gdc {command} " in capsys.readouterr().out


def test_help_is_instant():
    code = "import sys, hf_gdc.commands as c; c._parser(); print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_an_unknown_recipe_is_refused_with_those_there_are(capsys):
    with pytest.raises(SystemExit, match="2"):
        commands.main(["train", "gcd"])
    assert "'gdc'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--accelerate", "gpus", "pretrain"], "'gpus' is neither"),
        (["report", "nowhere"], "no README.md"),
        (["push", "nowhere", "me/model"], "holds none of config.json"),
        (["evaluate", "nowhere"], "evaluate what"),
    ],
)
def test_mistakes_end_with_what_to_do(words, message, capsys):
    assert commands.main(words) == 1
    assert message in capsys.readouterr().err


# --- train


def test_a_recipe_gets_its_configuration_and_the_options(monkeypatch):
    seen = []
    monkeypatch.setattr(
        commands.subprocess, "run", lambda command: seen.append(command) or subprocess.CompletedProcess([], 7)
    )
    assert commands.main(["train", "--accelerate", "cpu", "gdc", "--max_steps", "3", "--help"]) == 7
    assert commands.main(["train", "gdc", "--config", "mine.yaml"]) == 7
    folder = ROOT / "recipes"
    launch = ["--config_file", str(folder / "accelerate" / "cpu.yaml"), str(folder / "gdc" / "run.py")]
    assert seen[0][3:] == [*launch, "--config", str(folder / "gdc" / "config.yaml"), "--max_steps", "3", "--help"]
    assert seen[1][-3:] == [str(folder / "gdc" / "run.py"), "--config", "mine.yaml"]


# --- sample, evaluate, report


def test_samples_stream_and_are_the_models_own(model_folder):
    """Greedy text as `generate` gives it; and the first words are there before the last."""
    model = SmallGPTForCausalLM.from_pretrained(model_folder)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    words = ["sample", model_folder, "Once upon a time", "--temperature", "0", "--max_new_tokens", "40"]
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "hf_gdc.commands", *map(str, words)], stdout=subprocess.PIPE, text=True
    )
    times, text = [], ""
    while character := process.stdout.read(1):
        times.append(time.monotonic())
        text += character
    assert process.wait() == 0
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    ids = ids[:, :-1] if ids[0, -1] == tokenizer.eos_token_id else ids
    expected = model.generate(ids, max_new_tokens=40, do_sample=False)
    assert text.strip() == tokenizer.decode(expected[0], skip_special_tokens=True).strip()
    assert times[-1] - times[0] > 0.01  # one write at the end would take microseconds


def test_a_seed_gives_the_same_samples_again(model_folder, capsys):
    printed = []
    for seed in ("1", "1", "2"):
        assert (
            commands.main(["sample", str(model_folder), "--seed", seed, "--num_samples", "2", "--max_new_tokens", "8"])
            == 0
        )
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


def test_evaluate_gives_perplexity_and_rates_with_intervals(model_folder, capsys):
    words = ["evaluate", model_folder, "--data", "stories", "--num_texts", "40", "--features", "contains:the"]
    assert commands.main([*map(str, words), "--num_samples", "64", "--max_new_tokens", "12"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
    assert found["perplexity_low"] < found["perplexity"] < found["perplexity_high"] and found["texts"] == 40
    (name,) = [n for n in found if n.endswith("_low") and not n.startswith("perplexity")]
    assert 0 <= found[name] <= found[name.removesuffix("_low")] <= found[name.replace("_low", "_high")] <= 1


def test_text_scores_are_those_of_each_text_alone(model_folder):
    from transformers import AutoTokenizer

    model, tokenizer = SmallGPTForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    texts = stories.sample(5, seed=3)
    nats, tokens, hits = [], [], 0
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        logps = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).detach()
        nats.append(-float(logps[torch.arange(len(ids) - 1), ids[1:]].sum()))
        tokens.append(len(ids) - 1)
        hits += int((logps.argmax(-1) == torch.tensor(ids[1:])).sum())
    found = text_scores(model, tokenizer, Dataset.from_dict({"text": texts}), max_length=200, batch_size=2)
    assert found["nats_per_token"] == pytest.approx(sum(nats) / sum(tokens), rel=1e-5)
    assert found["token_accuracy"] == pytest.approx(hits / sum(tokens))
    # The jackknife's standard error of the ratio, which the delta method approximates.
    left_out = torch.tensor([(sum(nats) - n) / (sum(tokens) - t) for n, t in zip(nats, tokens, strict=True)])
    jackknife = float(((left_out - left_out.mean()) ** 2).sum() * 4 / 5) ** 0.5
    assert found["nats_per_token_stderr"] == pytest.approx(jackknife, rel=0.2)
    with pytest.raises(ValueError, match="at least two"):
        text_scores(model, tokenizer, Dataset.from_dict({"text": texts[:1]}), max_length=200)


# --- the wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The wheel, and a folder where it alone is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("hf_gdc", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return wheel, folder / "site"


def test_the_wheel_has_every_file(installed):
    """The packages are listed by hand in pyproject.toml."""
    with zipfile.ZipFile(installed[0]) as archive:
        packed = {name for name in archive.namelist() if name.startswith("hf_gdc/")}
    ours = {str(p.relative_to(ROOT)) for p in (ROOT / "hf_gdc").rglob("*") if p.suffix in (".py", ".md")}
    recipes = {
        f"hf_gdc/{p.relative_to(ROOT)}" for p in (ROOT / "recipes").rglob("*") if p.suffix in (".py", ".yaml", ".jsonl")
    }
    assert ours | recipes <= packed


def test_the_installed_command_trains_and_samples(installed, tmp_path):
    _, site = installed
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}

    def command(*words):
        done = subprocess.run(
            [sys.executable, str(site / "bin" / "hf-gdc"), *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    place = "import hf_gdc; print(hf_gdc.__file__)"
    shown = subprocess.run([sys.executable, "-c", place], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert shown.stdout.startswith(str(site))
    printed = command("train", "pretrain", *TINY, "--output_dir", "out")
    assert "nats per token" in printed
    assert command("sample", "out/model", "--max_new_tokens", "8", "--seed", "0").strip()
