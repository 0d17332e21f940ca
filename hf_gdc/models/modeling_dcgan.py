# SPDX-License-Identifier: Apache-2.0
"""DCGAN: a convolutional generator and discriminator for small images (Radford et al. 2016, arXiv 1511.06434).

The file travels to the Hub with every saved model, so it imports nothing of `hf_gdc`. Beside the paper's layers there are
a 3x3 convolution at full resolution and a dense layer, without which 8x8 images would have a single layer. Pixel values are
in [-1, 1].

Left out: spectral norm, moving averages and augmentation, which belong to the training.

Shapes: B images, C channels, H height, W width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_dcgan import DCGANConfig


@dataclass
class DCGANGeneratorOutput(ModelOutput):
    """`pixel_values` (B, C, H, W) in [-1, 1]."""

    pixel_values: torch.FloatTensor | None = None


@dataclass
class DCGANDiscriminatorOutput(ModelOutput):
    """`logits` (B,): log p(x) / q(x) of real over generated images at the optimum; `features` (B, F) before the last layer."""

    logits: torch.FloatTensor | None = None
    features: torch.FloatTensor | None = None


def make_norm(kind: str, channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(channels, 8), channels) if kind == "group" else nn.Identity()


class DCGANPreTrainedModel(PreTrainedModel):
    config: DCGANConfig
    base_model_prefix = "dcgan"
    input_modalities = ("image",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        scale = self.config.initializer_range
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            if scale is None:
                # A transposed convolution's fan: every output pixel sums kernel / stride taps a side.
                fan = module.weight[0].numel()
                if isinstance(module, nn.ConvTranspose2d):
                    fan = module.weight.shape[0] * (module.kernel_size[0] // module.stride[0]) ** 2
                init.normal_(module.weight, std=math.sqrt(2.0 / (1 + self.config.negative_slope**2) / fan))
            else:
                init.normal_(module.weight, std=scale)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=1.0 if scale is None else scale)
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            if isinstance(module, nn.BatchNorm2d):
                init.zeros_(module.running_mean)
                init.ones_(module.running_var)
                init.zeros_(module.num_batches_tracked)

    def check_labels(self, labels: Tensor | None) -> None:
        """Raise a ValueError where labels are missing, or given to a model that has no use for them."""
        classes = self.config.num_classes
        if classes and labels is None:
            raise ValueError(
                f"this {type(self).__name__} is conditioned on {classes} classes: pass labels (B,), int64."
            )
        if labels is not None and not classes:
            raise ValueError(f"labels were given to an unconditional {type(self).__name__}: build it with num_classes.")


class DCGANGenerator(DCGANPreTrainedModel):
    """Latent vectors, and class labels where conditioned, to images."""

    main_input_name = "latents"

    def __init__(self, config: DCGANConfig):
        super().__init__(config)
        if config.num_classes:
            self.class_embedding = nn.Embedding(config.num_classes, config.latent_size)
        width = config.hidden_size * 2**config.num_doublings
        inputs, dense = config.latent_size * (2 if config.num_classes else 1), config.dense_size
        self.dense = nn.Sequential(nn.Linear(inputs, dense), nn.ReLU()) if dense else nn.Identity()
        self.project = nn.Linear(dense or inputs, width * config.base_size**2)
        layers = [make_norm(config.generator_norm, width), nn.ReLU()]
        for _ in range(config.num_doublings):
            layers += [
                nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1, bias=config.generator_norm == "none")
            ]
            width //= 2
            layers += [make_norm(config.generator_norm, width), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, config.num_channels, 3, padding=1), nn.Tanh())
        self.post_init()

    def forward(self, latents: Tensor, labels: Tensor | None = None, **kwargs) -> DCGANGeneratorOutput:
        """
        Args:
            latents: (B, latent_size), standard normal.
            labels: (B,) classes, where the model is conditioned on them.

        Raises:
            ValueError: latents of another size; labels missing, or given to an unconditional model.
        """
        self.check_labels(labels)
        if latents.ndim != 2 or latents.shape[1] != self.config.latent_size:
            raise ValueError(f"latents must be (B, {self.config.latent_size}), but are {tuple(latents.shape)}.")
        if labels is not None:
            latents = torch.cat([latents, self.class_embedding(labels)], 1)
        base = self.config.base_size
        maps = self.project(self.dense(latents)).view(len(latents), -1, base, base)
        return DCGANGeneratorOutput(pixel_values=self.layers(maps))

    @torch.no_grad()
    def sample(
        self,
        num_images: int,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        batch_size: int = 500,
    ) -> Tensor:
        """`num_images` images (B, C, H, W) in [-1, 1], in evaluation mode.

        Args:
            labels: (num_images,) classes to draw; default: uniform ones, where the model is conditioned on them.
            generator: torch's random numbers, on the CPU; default: the global ones.
        """
        latents = torch.randn(num_images, self.config.latent_size, generator=generator).to(self.device, self.dtype)
        if labels is None and self.config.num_classes:
            labels = torch.randint(self.config.num_classes, (num_images,), generator=generator).to(self.device)
        training = self.training
        self.eval()
        parts = [slice(start, start + batch_size) for start in range(0, num_images, batch_size)]
        images = [self(latents[part], None if labels is None else labels[part]).pixel_values for part in parts]
        self.train(training)
        return torch.cat(images)


class DCGANDiscriminator(DCGANPreTrainedModel):
    """Images, and their labels where conditioned, to one logit each: log p/q of real over generated at the optimum."""

    main_input_name = "pixel_values"

    def __init__(self, config: DCGANConfig):
        super().__init__(config)
        width = config.hidden_size
        layers = [nn.Conv2d(config.num_channels, width, 3, padding=1), nn.LeakyReLU(config.negative_slope)]
        for _ in range(config.num_doublings):
            layers += [nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=config.discriminator_norm == "none")]
            width *= 2
            layers += [make_norm(config.discriminator_norm, width), nn.LeakyReLU(config.negative_slope)]
        layers, features = [*layers, nn.Flatten()], width * config.base_size**2
        if config.dense_size:
            layers += [nn.Linear(features, config.dense_size), nn.LeakyReLU(config.negative_slope)]
            features = config.dense_size
        self.layers = nn.Sequential(*layers)
        self.score = nn.Linear(features, 1)
        if config.num_classes:
            self.class_embedding = nn.Embedding(config.num_classes, features)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs) -> DCGANDiscriminatorOutput:
        """
        Args:
            pixel_values: (B, C, H, W) in [-1, 1].
            labels: (B,) classes, where the model is conditioned on them.

        Raises:
            ValueError: images of another shape; labels missing, or given to an unconditional model.
        """
        self.check_labels(labels)
        size, channels = self.config.image_size, self.config.num_channels
        if tuple(pixel_values.shape[1:]) != (channels, size, size):
            raise ValueError(
                f"images must be (B, {channels}, {size}, {size}), but are {tuple(pixel_values.shape)}: resize them, or build "
                "the model with their image_size and num_channels."
            )
        features = self.layers(pixel_values)
        logits = self.score(features).squeeze(-1)
        if labels is not None:
            logits = logits + (self.class_embedding(labels) * features).mean(-1)
        return DCGANDiscriminatorOutput(logits=logits, features=features)


# So that saving copies this file and its configuration.
DCGANGenerator.register_for_auto_class("AutoModel")
DCGANDiscriminator.register_for_auto_class("AutoModelForImageClassification")

__all__ = ["DCGANDiscriminator", "DCGANGenerator", "DCGANPreTrainedModel"]
