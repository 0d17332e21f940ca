"""The recipe for images as users run it, made small: what it writes, its model elsewhere, and the two ways to threes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from PIL import Image

from hf_gdc import DCGANConfig, DCGANGenerator
from hf_gdc.images.classifier import load_classifier
from hf_gdc.images.data import ImageDataset

RECIPES = Path(__file__).parents[1] / "recipes" / "images"
SMALL = ["--use_cpu", "true", "--disable_tqdm", "true", "--sample_steps", "4", "--logging_steps", "20"]

LOAD = """
import sys, torch
try:
    import hf_gdc
except ImportError:
    pass
else:
    sys.exit("hf_gdc can be imported here")
from transformers import AutoModel
generator = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
images = generator.sample(8, generator=torch.Generator().manual_seed(0))
assert images.shape == (8, 1, 8, 8) and images.std() > 0.01
print(type(generator).__module__)
"""


def load_recipe(name: str) -> ModuleType:
    """A recipe in this process, which saves its imports."""
    spec = importlib.util.spec_from_file_location(f"images_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("images") / "out"
    options = ["--output_dir", str(output), "--max_steps", "60", "--classifier_epochs", "8", "--ema_decay", "0.9"]
    command = [sys.executable, str(RECIPES / "run.py"), "--config", str(RECIPES / "config.yaml"), *options, *SMALL]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--class_condition", "false"], capture_output=True, text=True, env=environment, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return output, done.stdout


def test_it_writes_what_the_page_promises(run):
    output, printed = run
    report = json.loads((output / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    generated, floor, itself = report["metrics"].values()
    assert report["images"] == 898  # the test half
    assert itself["fid"] == pytest.approx(0.0, abs=1e-3) and itself["precision"] == 1.0
    assert 0 < floor["fid"] < generated["fid"]  # sixty steps make no digits
    assert generated["fid_over_floor"] == pytest.approx(generated["fid"] / floor["fid"])
    assert sum(report["class_shares"]["test"]) == pytest.approx(1.0)
    assert report["classifier"] in printed and "inception_score" in printed
    for name in ("samples.png", "model/samples.png", "training/samples/step-000004.png"):
        assert Image.open(output / name).size[0] > 200
    card = (output / "model" / "README.md").read_text()
    assert "P(x) = q(x)" in card and report["classifier"] in card
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "unconditional-image-generation"
    assert (output / "classifier" / "model.safetensors").is_file()


def test_the_generator_samples_without_the_library(run, tmp_path):
    output, _ = run
    (tmp_path / "hf_gdc.py").write_text("raise ImportError('not here')")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", LOAD, str(output / "model")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("transformers_modules")


def test_filtered_and_trained_towards_threes(run, tmp_path):
    """The filter meets the share whatever the generator; four steps of training only have to run and be reported."""
    output, _ = run
    shares = json.loads((output / "report.json").read_text())["class_shares"]["generated"]
    label = min(range(10), key=lambda n: abs(shares[n] - 0.2))  # not one that this generator hardly makes
    options = ["--config", str(RECIPES / "control.yaml"), "--run", str(output), "--output_dir", str(tmp_path / "some")]
    options += ["--label", str(label), "--share", "0.5", "--tv", "0.1", "--max_steps", "4", *SMALL]
    load_recipe("control").main([*options, "--measured", "1000", "--pool", "3000"])
    report = json.loads((tmp_path / "some" / "report.json").read_text())
    spread = 4 * (0.25 / 1000) ** 0.5
    assert abs(report["filtered"]["share"] - 0.5) < 0.1 + spread and report["filtered"]["tv_upper"] <= 0.1
    assert {"before", "filtered", "trained"} <= set(report)
    torch.testing.assert_close(torch.tensor(sum(report["trained"]["shares"])), torch.tensor(1.0))


def test_classes_on_request_fill_the_grid_and_have_no_share_to_control(run, tmp_path):
    output, _ = run
    generator = DCGANGenerator(DCGANConfig(image_size=8, hidden_size=4, dense_size=8, latent_size=4, num_classes=3))
    asked = []
    generator.register_forward_pre_hook(lambda module, inputs: asked.append(inputs[1]))
    assert load_recipe("run").grid_images(generator, 9).shape == (9, 1, 8, 8)
    assert asked[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    (tmp_path / "classifier").symlink_to(output / "classifier")
    generator.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="is told the class of each image"):
        load_recipe("control").main(["--run", str(tmp_path), "--output_dir", str(tmp_path / "never"), *SMALL])
    assert not (tmp_path / "never").exists()


def test_the_given_judge_is_kept_with_the_run_and_classes_need_labels(run, tmp_path):
    output, _ = run
    recipe, images = load_recipe("run"), ImageDataset(torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
    given = recipe.ImageArguments(classifier=str(output / "classifier"), class_condition=True, data="my/folder")
    recipe.place_classifier(given, images, images, str(tmp_path))  # trains none: these images have no labels
    ours, theirs = (load_classifier(str(place)).fingerprint() for place in (tmp_path, output / "classifier"))
    assert ours == theirs
    with pytest.raises(ValueError, match="class_condition needs labels, and 'my/folder' has none"):
        recipe.build_generator(given, images)


def test_a_second_run_and_a_wrong_option_are_refused(run):
    output, _ = run
    options = ["--config", str(RECIPES / "config.yaml"), "--output_dir", str(output), *SMALL]
    with pytest.raises(ValueError, match="is not empty.*--overwrite"):
        load_recipe("run").main(options)
    with pytest.raises(ValueError, match="Did you mean `divergence`\\?"):
        load_recipe("run").main([*options, "--divergense", "js"])
