"""The DCGAN's two players: against torch's layers, in every size, conditioned or not, and after a trip to the Hub."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModel, AutoModelForImageClassification

from hf_gdc import DCGANConfig, DCGANDiscriminator, DCGANGenerator
from hf_gdc.models.configuration_dcgan import IMAGE_SIZES

SMALL = {"hidden_size": 4, "latent_size": 6, "dense_size": 8}


def players(seed=0, **options):
    torch.manual_seed(seed)
    config = DCGANConfig(**(SMALL | options))
    return DCGANGenerator(config).eval(), DCGANDiscriminator(config).eval()


@pytest.mark.parametrize("size", IMAGE_SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_size_makes_images_that_its_discriminator_takes(size, channels):
    generator, discriminator = players(image_size=size, num_channels=channels)
    images = generator.sample(5, generator=torch.Generator().manual_seed(1))
    assert images.shape == (5, channels, size, size)
    assert images.min() >= -1 and images.max() <= 1 and images.std() > 0.05
    assert discriminator(images).logits.shape == (5,)


def test_the_papers_layers_by_hand():
    """Without dense layers and norms: a projection, transposed convolutions with rectifiers, and the mirror image."""
    generator, discriminator = players(image_size=16, dense_size=0, generator_norm="none")
    z = torch.randn(3, 6)
    weights = {name: tensor for name, tensor in generator.state_dict().items()}
    x = functional.linear(z, weights["project.weight"], weights["project.bias"]).view(3, 16, 4, 4).relu()
    for layer in (2, 5):
        kernel, bias = weights[f"layers.{layer}.weight"], weights[f"layers.{layer}.bias"]
        x = functional.conv_transpose2d(x, kernel, bias, stride=2, padding=1).relu()
    x = functional.conv2d(x, weights["layers.8.weight"], weights["layers.8.bias"], padding=1).tanh()
    torch.testing.assert_close(generator(z).pixel_values, x)
    weights = discriminator.state_dict()
    y = functional.leaky_relu(
        functional.conv2d(x, weights["layers.0.weight"], weights["layers.0.bias"], padding=1), 0.2
    )
    for layer in (2, 5):
        kernel, bias = weights[f"layers.{layer}.weight"], weights[f"layers.{layer}.bias"]
        y = functional.leaky_relu(functional.conv2d(y, kernel, bias, stride=2, padding=1), 0.2)
    logits = functional.linear(y.flatten(1), weights["score.weight"], weights["score.bias"]).squeeze(1)
    torch.testing.assert_close(discriminator(x).logits, logits)


@pytest.mark.parametrize("norm", ["group", "none"])
def test_without_batch_norm_no_image_depends_on_the_others(norm):
    generator, _ = players(image_size=8, generator_norm=norm)
    z = torch.randn(4, 6)
    together = generator.train()(z).pixel_values
    alone = torch.cat([generator(row[None]).pixel_values for row in z])
    torch.testing.assert_close(together, alone)


def test_initial_weights_keep_the_variance():
    """He's scale: signals neither vanish nor explode through the discriminator, whatever its depth."""
    _, discriminator = players(image_size=64, hidden_size=16, dense_size=64)
    images = torch.rand(64, 1, 64, 64) * 2 - 1
    features = images
    for layer in discriminator.layers:
        features = layer(features)
        if isinstance(layer, nn.LeakyReLU):
            assert 0.3 < float((features.square().mean() / images.square().mean()).detach()) < 3
    papers, _ = players(image_size=16, initializer_range=0.02)
    assert float(papers.project.weight.std()) == pytest.approx(0.02, rel=0.2)


def test_a_class_condition_reaches_both_players():
    generator, discriminator = players(image_size=8, num_classes=3)
    z = torch.randn(2, 6)
    first, second = (generator(z, torch.full((2,), label)).pixel_values for label in (0, 1))
    assert (first - second).abs().max() > 1e-3
    with_label = [discriminator(first, torch.full((2,), label)) for label in (0, 1)]
    # The projection of Miyato & Koyama: logits of two labels differ by the inner product with their embeddings' difference.
    difference = discriminator.class_embedding.weight[1] - discriminator.class_embedding.weight[0]
    torch.testing.assert_close(
        with_label[1].logits - with_label[0].logits, (with_label[0].features * difference).mean(1), atol=1e-6, rtol=1e-4
    )
    labels = torch.tensor([0, 1, 2, 0])
    drawn = generator.sample(4, labels, torch.Generator().manual_seed(0))
    z = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, generator(z, labels).pixel_values)


def test_sample_is_in_evaluation_mode_and_leaves_the_global_random_numbers_alone():
    generator, _ = players(image_size=8)
    generator.train()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    images = [generator.sample(7, generator=torch.Generator().manual_seed(1), batch_size=size) for size in (2, 7)]
    assert torch.equal(torch.rand(3), expected) and generator.training
    torch.testing.assert_close(images[0], images[1])
    assert all(torch.equal(before[name], tensor) for name, tensor in generator.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 10}, r"image_size=10 is not possible: choose 4 \* 2\^n or 7 \* 2\^n from 8 to 64: 8, 14, 16"),
        ({"image_size": 128}, "image_size=128 is not possible"),
        ({"image_size": 7}, "image_size=7 is not possible"),
        ({"num_channels": 2}, r"num_channels=2 is not possible: choose 1 \(grey\) or 3"),
        ({"num_classes": 1}, "num_classes=1 is not possible: set it to 0 or at least 2"),
        ({"latent_size": 0}, "latent_size=0"),
        ({"dense_size": -1}, "dense_size=-1"),
        ({"generator_norm": "layer"}, "generator_norm='layer' is not possible: choose one of 'batch', 'group', 'none'"),
        ({"initializer_range": 0.0}, "initializer_range=0.0"),
        ({"negative_slope": 1.0}, "negative_slope=1.0"),
    ],
)
def test_bad_config_is_refused_with_the_fix(options, message):
    with pytest.raises(ValueError, match=message):
        DCGANConfig(**options)


def test_bad_inputs_are_refused():
    generator, discriminator = players(image_size=8)
    conditional, judge = players(image_size=8, num_classes=3)
    with pytest.raises(ValueError, match=r"latents must be \(B, 6\), but are \(2, 5\)"):
        generator(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"images must be \(B, 1, 8, 8\), but are \(2, 1, 16, 16\): resize them"):
        discriminator(torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match="DCGANGenerator is conditioned on 3 classes: pass labels"):
        conditional(torch.zeros(2, 6))
    with pytest.raises(ValueError, match="DCGANDiscriminator is conditioned on 3 classes: pass labels"):
        judge(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="labels were given to an unconditional DCGANGenerator"):
        generator(torch.zeros(2, 6), torch.zeros(2, dtype=torch.long))


def test_auto_classes_know_both(tmp_path):
    for model, auto in zip(players(image_size=8), (AutoModel, AutoModelForImageClassification), strict=True):
        model.save_pretrained(tmp_path / auto.__name__)
        again = auto.from_pretrained(tmp_path / auto.__name__)
        assert type(again) is type(model)
        assert {name: getattr(again.config, name) for name in SMALL} == SMALL and again.config.image_size == 8
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name


REMOTE = """
import sys, torch
try:
    import hf_gdc
except ImportError:
    pass
else:
    sys.exit("hf_gdc can be imported here")
from transformers import AutoModel, AutoModelForImageClassification
generator = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
discriminator = AutoModelForImageClassification.from_pretrained(sys.argv[1] + "/discriminator", trust_remote_code=True)
images = generator.sample(4, generator=torch.Generator().manual_seed(3))
torch.save({"images": images, "logits": discriminator(images).logits}, sys.argv[2])
print(type(generator).__module__, type(discriminator).__module__)
"""


def test_loads_as_remote_code_without_the_library(tmp_path):
    generator, discriminator = players(image_size=14)
    generator.save_pretrained(tmp_path / "model")
    discriminator.save_pretrained(tmp_path / "model" / "discriminator")
    (tmp_path / "hf_gdc.py").write_text("raise ImportError('not here')")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", REMOTE, str(tmp_path / "model"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("transformers_modules") == 2
    out = torch.load(tmp_path / "out.pt")
    images = generator.sample(4, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(out["images"], images)
    torch.testing.assert_close(out["logits"], discriminator(images).logits)
