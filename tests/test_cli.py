"""Options from YAML and the command line: who wins, and what a typing mistake gets."""

from dataclasses import dataclass, field

import pytest
from transformers import TrainingArguments

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
