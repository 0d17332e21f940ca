"""The README's way from a text to the Hub: its very commands, in an empty directory, with a Hub on the loopback."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import TOKEN, LoopbackHub
from safetensors.torch import load_file

from hf_gdc import GDCConfig, stories
from hf_gdc.cli import TargetArguments, parse_options
from hf_gdc.commands import RECIPES, _parser
from hf_gdc.trainers.pretraining import PretrainArguments, PretrainConfig
from hf_gdc.trl_compat import ModelConfig

ROOT = Path(__file__).parents[1]


def commands() -> str:
    section = (ROOT / "README.md").read_text().partition("## From your text to the Hub")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```bash\n(.*?)```", section, flags=re.S)
    return block


def test_the_commands_have_only_options_that_exist():
    gdc = runpy.run_path(str(RECIPES / "gdc" / "run.py"))
    kinds = {
        "pretrain": (PretrainArguments, PretrainConfig),
        "gdc": (gdc["RunArguments"], ModelConfig, TargetArguments, GDCConfig),
    }
    lines = commands().replace("\\\n", " ").splitlines()
    seen = []
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        assert program == "hf-gdc"
        options = _parser().parse_args(words)
        seen.append(options.run.__name__)
        if seen[-1] == "train":
            parse_options(*kinds[options.recipe], argv=[*options.words, "--use_cpu"])
    assert seen == ["train", "train", "report", "push", "sample"]


@pytest.mark.slow
def test_from_a_text_to_the_hub(tmp_path):
    place, programs = tmp_path / "empty", tmp_path / "bin"
    place.mkdir()
    programs.mkdir()
    (place / "my.txt").write_text("\n".join(stories.sample(1500, 0)))
    (programs / "hf-gdc").write_text(f'#!/bin/sh\nexec {sys.executable} -m hf_gdc.commands "$@"\n')
    (programs / "hf-gdc").chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    script = commands().replace("my-name/", "me/")
    with LoopbackHub() as hub:
        environment["HF_ENDPOINT"] = hub.url
        done = subprocess.run(["bash", "-e", "-c", script], cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        assert hub.repos["me/my-model"].private
        (tmp_path / "pushed.safetensors").write_bytes(hub.repos["me/my-model"].files("main")[1]["model.safetensors"])
    pushed, kept = load_file(tmp_path / "pushed.safetensors"), load_file(place / "controlled/model/model.safetensors")
    assert pushed.keys() == kept.keys() and all((pushed[name] == kept[name]).all() for name in kept)
    before = float(re.search(r"base/contains:she (\S+)", done.stdout)[1].rstrip(","))
    after = float(re.search(r"\| features/contains:she \| (\S+) \|", done.stdout)[1])
    assert abs(after - 0.5) < abs(before - 0.5)  # the report's
    samples = done.stdout.splitlines()[-3:]
    assert sum(map(len, samples)) > 100 and "not a directory" not in done.stderr
