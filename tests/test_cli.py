"""Options from YAML and the command line: who wins, and what a typing mistake gets."""

import json
import runpy
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from hf_gdc.cli import TargetArguments as TargetOptions
from hf_gdc.cli import build_target, parse_options, resume_option
from hf_gdc.trainers.gdc import GDCConfig


@dataclass
class TargetArguments:
    pointwise: list[str] = field(default_factory=list)
    divergence_scale: float = 1.0
    model_path: str | None = None


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"

    def write(text):
        path.write_text(text)
        return str(path)

    return write


def parse(*argv):
    return parse_options(TargetArguments, GDCConfig, argv=argv)


CONFIG = """
pointwise: [contains:dragon, contains:castle]
divergence_scale: 1e-3
divergence: alpha
divergence_kwargs: {alpha: 0.5}
max_steps: 7
use_cpu: true
"""


@pytest.mark.parametrize("spelling", ["--config {}", "--config={}"])
def test_a_config_replaces_defaults_and_the_command_line_replaces_it(config, spelling):
    words = spelling.format(config(CONFIG)).split()
    target, args = parse(*words)
    assert target == TargetArguments(["contains:dragon", "contains:castle"], 1e-3)
    assert (args.divergence, args.divergence_kwargs, args.max_steps) == ("alpha", {"alpha": 0.5}, 7)
    more = ["--pointwise", "contains:x", "--max_steps=9", "--divergence_kwargs", '{"alpha": 2}', "--overwrite"]
    for argv in (words + more, more + words):
        target, args = parse(*argv)
        assert target == TargetArguments(["contains:x"], 1e-3)
        assert (args.divergence_kwargs, args.max_steps, args.overwrite) == ({"alpha": 2}, 9, True)


def test_lists(config):
    assert parse("--use_cpu", "--pointwise", "contains:dragon", "contains:x")[0].pointwise == [
        "contains:dragon",
        "contains:x",
    ]
    path = config("{pointwise: contains:dragon, use_cpu: true}")
    assert parse("--config", path)[0].pointwise == ["contains:dragon"]  # one value needs no brackets
    assert parse("--use_cpu")[0].pointwise == []


def test_switches(config):
    path = config("{overwrite: true, disable_dropout: false, use_cpu: true}")
    assert parse("--config", path)[1].overwrite and not parse("--config", path)[1].disable_dropout
    _, args = parse("--config", path, "--overwrite", "false", "--disable_dropout")
    assert not args.overwrite and args.disable_dropout


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--divergance", "js"], "the command line has no option `divergance`. Did you mean `divergence`?"),
        (["--pointwize=x"], "the command line has no option `pointwize`. Did you mean `pointwise`?"),
        (["--learning", "1"], "has no option `learning`. Did you mean `learning_rate`?"),  # no abbreviations
        (["--config", "missing.yaml"], "--config needs a YAML file, and there is no 'missing.yaml'"),
        (["--max_steps", "3", "--config"], "--config needs a YAML file"),
    ],
)
def test_mistakes_on_the_command_line(argv, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        parse(*argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_step: 3", r"config.yaml has no option `max_step`. Did you mean `max_steps`\?"),
        ("- 3", r"must hold a YAML mapping"),
        ("", r"must hold a YAML mapping"),
        ("a: [", r"config.yaml is not YAML"),
    ],
)
def test_mistakes_in_a_config(config, text, message):
    with pytest.raises(ValueError, match=message):
        parse("--config", config(text))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), ("true", True), (True, True), ("false", None), ("a/checkpoint-3", "a/checkpoint-3")],
)
def test_resume_option(value, expected):
    assert resume_option(TrainingArguments(use_cpu=True, resume_from_checkpoint=value)) is expected


# ---- targets ----


@pytest.mark.parametrize(
    ("spec", "feature", "mean", "per"),
    [
        ("contains:she=0.5", "contains:she", 0.5, None),
        ("regex:a=b=1e-1", "regex:a=b", 0.1, None),
        ("contains:once per day=0.5", "contains:once per day", 0.5, None),
        ("contains:she=0.5 per topic", "contains:she", 0.5, "topic"),
        ("contains:she=.5 per prompt", "contains:she", 0.5, "prompt"),
        (
            "contains:she={fable: 0.5, 3: 0.3, no: 1} per my topic",
            "contains:she",
            {"fable": 0.5, "3": 0.3, "no": 1},
            "my topic",
        ),
        ('contains:she={"a b": 0.5} per topic', "contains:she", {"a b": 0.5}, "topic"),
    ],
)
def test_moments_as_text(spec, feature, mean, per):
    (moment,) = build_target(TargetOptions(moment=[spec])).moments
    assert (moment.feature.name, moment.mean, moment.per) == (feature, mean, per)


@pytest.mark.parametrize(
    "spec",
    [
        "contains:she",
        "contains:she=",
        "=0.5",
        "contains:she=half",
        "contains:she={a: 0.5}",
        "contains:she={a} per topic",
    ]
    + ["contains:she={a: b} per topic", "contains:she=half per topic", "contains:she={a: 0.5 per topic"],
)
def test_moments_without_their_mean(spec):
    with pytest.raises(ValueError, match="lacks its wanted mean: spell it feature=mean.* per column"):
        build_target(TargetOptions(moment=[spec]))


def test_targets_from_a_config(config):
    text = '{pointwise: contains:dragon, moment: [contains:she=0.5 per topic, "length:words={a: 3} per topic"], use_cpu: true}'
    options, _ = parse_options(TargetOptions, GDCConfig, argv=["--config", config(text)])
    assert [moment.per for moment in build_target(options).moments] == ["topic", "topic"]


def test_a_teacher_takes_the_references_place(tmp_path):
    tiny.model(1, 1.0, torch.float32).save_pretrained(tmp_path / "large")
    tiny.tokenizer().save_pretrained(tmp_path / "large")
    path = str(tmp_path / "large")
    alone = build_target(TargetOptions(teacher=path))
    assert alone.formula() == "P(x) = teacher_large(x)" and alone.normalised
    both = build_target(TargetOptions(teacher=path, pointwise=["contains:b"], reward=["count:a"], beta=0.5))
    assert both.formula() == "P(x) = teacher_large(x) * [contains:b] * exp((count:a) / 0.5)"
    with pytest.raises(ValueError, match="the target is the reference itself: give it a .* or --teacher"):
        build_target(TargetOptions())


def test_the_gdc_recipe_learns_from_a_teacher(tmp_path):
    for seed, name in enumerate(("student", "large")):
        tiny.model(seed, 1.0, torch.float32).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    script = Path(__file__).parents[1] / "recipes" / "gdc" / "run.py"
    (tmp_path / "config.yaml").write_text(f"teacher: {tmp_path / 'large'}\nreport_to: none\nsave_strategy: 'no'\n")
    options = {"config": tmp_path / "config.yaml", "model_name_or_path": tmp_path / "student"}
    options |= {"output_dir": tmp_path / "out", "max_steps": 30, "learning_rate": 1e-2}
    options |= {"max_completion_length": 3, "per_device_train_batch_size": 128, "fit_samples": 128, "use_cpu": "true"}
    options |= {"reference_samples": 512, "eval_samples": 512, "disable_tqdm": "true"}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    runpy.run_path(str(script))["main"](words)
    target = json.loads((tmp_path / "out" / "model" / "target.json").read_text())
    assert [factor["type"] for factor in target["factors"]] == ["Teacher"]
    ids = torch.tensor([[0, 1, 2]])
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("student", "large", "out/model")]
    before, teacher, after = (model(ids).logits[0].log_softmax(-1).detach() for model in models)
    assert (after - teacher).abs().mean() < 0.5 * (before - teacher).abs().mean()
