"""The RLHF recipe, made small: every stage once, what a second run does, and the table."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from hf_gdc.preferences import kindness

SCRIPT = Path(__file__).parents[1] / "recipes" / "rlhf" / "run.py"
SMALL = {"num_stories": 600, "num_pairs": 100, "max_steps": 4, "num_prompts": 256, "per_device_train_batch_size": 32}
SMALL |= {"report_samples": 32, "reference_samples": 64, "eval_samples": 32, "save_steps": 2, "disable_tqdm": "true"}
STAGES = ("pretrain", "sft", "reward_model", "policy")


def rlhf(output: Path, *flags: str, **options) -> dict:
    words = [word for name, value in (SMALL | options).items() for word in (f"--{name}", str(value))]
    main = runpy.run_path(str(SCRIPT))["main"]
    main(["--config", str(SCRIPT.with_name("config.yaml")), "--output_dir", str(output), *words, *flags])
    return json.loads((output / "report.json").read_text(), parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    output = tmp_path_factory.mktemp("rlhf") / "out"
    return output, rlhf(output)


def test_the_table_is_measured_on_the_samples(made):
    output, report = made
    assert set(report["models"]) == {"pretrain", "sft", "policy"}
    start, end = report["models"]["sft"], report["models"]["policy"]
    assert start["kl_sft"] == pytest.approx(0.0, abs=1e-4) and start["overoptimisation"] == 0.0
    assert end["gained"] == pytest.approx(end["true_reward"] - start["true_reward"])
    assert end["overoptimisation"] == pytest.approx(end["promised"] - end["gained"])
    base = report["models"]["pretrain"]
    slopes = [row["promised"] / (row["learned_reward"] - start["learned_reward"]) for row in (base, end)]
    assert slopes[0] == pytest.approx(slopes[1])
    assert 0.3 < report["reward_model"]["accuracy"] < 1 and len(end["samples"]) == 6
    assert all(isinstance(value, float) for value in kindness(end["samples"]))
    for stage in STAGES:
        assert (output / stage / "model" / "config.json").is_file()
    card = (output / "policy" / "model" / "README.md").read_text()
    assert "a(x) * exp((reward_model:" in card


def test_a_second_run_skips_what_is_finished(made, capsys):
    output, report = made
    before = {path: path.stat().st_mtime_ns for stage in STAGES for path in (output / stage).rglob("*")}
    assert rlhf(output) == report
    assert {path: path.stat().st_mtime_ns for stage in STAGES for path in (output / stage).rglob("*")} == before
    printed = capsys.readouterr().out
    assert "of it not true: over-optimisation" in printed and "KL to the fine-tuned model" in printed
    with pytest.raises(ValueError, match=r"policy' was made with kl_coef=0.2, now 0.7. Delete that folder"):
        rlhf(output, kl_coef=0.7)
    assert {path: path.stat().st_mtime_ns for stage in STAGES for path in (output / stage).rglob("*")} == before


def test_a_policy_that_was_cut_off_goes_on_from_its_checkpoint(made, tmp_path):
    output, report = made
    shutil.copytree(output, tmp_path / "out")
    policy = tmp_path / "out" / "policy"
    shutil.rmtree(policy / "model")
    mark = json.loads((policy / "stage.json").read_text())
    (policy / "stage.json").write_text(json.dumps(mark | {"finished": False}))
    again = rlhf(tmp_path / "out", logging_steps=3)  # which changes nothing that is made
    files = [folder / "policy" / "model" / "model.safetensors" for folder in (output, tmp_path / "out")]
    first, second = map(load_file, files)
    assert all((first[name] == second[name]).all() for name in first)
    assert again["models"]["policy"]["samples"] == report["models"]["policy"]["samples"]


def test_gdc_with_adapters_on_one_base(made, tmp_path):
    output, _ = made
    for stage in ("pretrain", "sft"):
        shutil.copytree(output / stage, tmp_path / "out" / stage)
    flags = ["--use_peft", "--method", "gdc", "--divergence", "js", "--lora_target_modules", "q_proj", "v_proj"]
    rlhf(tmp_path / "out", *flags, fit_samples=64)
    folder = tmp_path / "out" / "policy" / "model"
    assert list(AutoPeftModelForCausalLM.from_pretrained(folder).peft_config) == ["default"]
    assert (
        not (folder / "reward").exists()
        and (tmp_path / "out" / "reward_model" / "model" / "adapter_config.json").exists()
    )
    assert [row["type"] for row in json.loads((folder / "target.json").read_text())["factors"]] == [
        "Reference",
        "Reward",
    ]


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match="method must be 'ppo' or 'gdc', but is 'dpo'"):
        rlhf(tmp_path / "out", method="dpo")
    (tmp_path / "out" / "pretrain").mkdir(parents=True)
    (tmp_path / "out" / "pretrain" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="pretrain' is not empty"):
        rlhf(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["pretrain", "mine.txt"]
