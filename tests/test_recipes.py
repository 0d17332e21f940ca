"""The recipes as users run them, made small; what they save loads where hf_gdc can't be imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"

LOAD = """
import sys
try:
    import hf_gdc
except ImportError:
    pass
else:
    sys.exit("hf_gdc can be imported here")
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = tokenizer("", return_tensors="pt")
out = model.generate(**ids, do_sample=True, top_k=0, max_new_tokens=8)
assert out.shape[1] > 1
print(type(model).__module__, tokenizer.decode(out[0]))
"""


def recipe(job: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(RECIPES / job / "run.py"), "--config", str(RECIPES / job / "config.yaml"), *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    output = tmp_path_factory.mktemp("quickstart") / "out"
    options = ["--output_dir", str(output), "--num_stories", "5000", "--hidden_size", "32", "--max_steps", "4"]
    options += ["--fit_samples", "4096", "--reference_samples", "4096", "--eval_samples", "256", "--logging_steps", "1"]
    done = recipe("quickstart", *options, "--disable_tqdm", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    return output, done.stdout


def test_quickstart_writes_what_the_readme_promises(quickstart):
    output, printed = quickstart
    report = json.loads((output / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    for which in ("before", "after"):
        assert set(report[which]["moments"]) == {"dragon", "she"}
        assert len(report[which]["samples"]) == 5
        for key in ("kl_target_policy", "kl_target_policy_stderr", "kl_policy_reference", "distinct_2"):
            assert isinstance(report[which][key], float)
    assert report["before"]["kl_policy_reference"] == pytest.approx(0.0, abs=1e-3)
    assert report["after"]["kl_policy_reference"] > 1e-3
    assert report["seconds"] > 0
    assert (output / "report.png").stat().st_size > 10_000
    assert "[dragon]" in (output / "model" / "README.md").read_text()
    assert "stories with a dragon" in printed


def test_the_model_loads_without_the_library(quickstart, tmp_path):
    output, _ = quickstart
    blocked = tmp_path / "hf_gdc.py"  # stands before the installed package, which then can't be imported
    blocked.write_text("raise ImportError('not here')")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", LOAD, str(output / "model")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("transformers_modules")


def test_the_gdc_recipe_takes_targets_prompts_and_text_features(quickstart, tmp_path):
    output, _ = quickstart
    feature = tmp_path / "mine.py"
    feature.write_text("def short(completions, **_):\n    return [float(len(c.split()) < 30) for c in completions]\n")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("Once upon a time", "Long ago", "Mia was")))
    options = ["--model_name_or_path", str(output / "pretrain" / "model"), "--output_dir", str(tmp_path / "out")]
    options += ["--data", str(prompts), "--pointwise", f"{feature}:short", "--moment", "contains:she=0.4"]
    options += ["--max_steps", "2", "--per_device_train_batch_size", "16", "--max_completion_length", "40"]
    options += ["--fit_samples", "192", "--reference_samples", "192", "--eval_samples", "96", "--use_cpu", "true"]
    done = recipe("gdc", *options, "--disable_tqdm", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    target = json.loads((tmp_path / "out" / "model" / "target.json").read_text())
    assert [factor["type"] for factor in target["factors"]] == ["Reference", "Pointwise", "Moment"]
    assert (tmp_path / "out" / "model" / "mine.py").read_text() == feature.read_text()
    again = recipe("gdc", *options)
    assert again.returncode != 0 and "is not empty" in again.stderr and "--overwrite" in again.stderr
    wrong = recipe("gdc", *options, "--divergense", "js")
    assert wrong.returncode != 0 and "Did you mean `divergence`?" in wrong.stderr
