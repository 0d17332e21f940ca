# SPDX-License-Identifier: Apache-2.0
"""Configuration of the two convolutional players of an image GAN.

The file travels to the Hub with every saved model, so it imports nothing of `hf_gdc`.
"""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

NORMS = ("batch", "group", "none")
IMAGE_SIZES = (8, 14, 16, 28, 32, 56, 64)  # 4 or 7 pixels, doubled up to 64


@strict
class DCGANConfig(PreTrainedConfig):
    """The shape of a DCGAN (Radford et al. 2016, arXiv 1511.06434), shared by generator and discriminator.

    Images grow from 4x4 or 7x7 by doublings; each halving of the size doubles the channels.

    Args:
        image_size: 4 * 2^n or 7 * 2^n pixels a side, from 8 to 64.
        num_channels: 1 for grey, 3 for colour.
        latent_size: length of the latent vector z ~ N(0, 1).
        hidden_size: channels at full resolution; `hidden_size * 2^n` at the smallest.
        dense_size: units of a dense layer behind the latent vector and, again, before the logit, which ties together what the
            few convolutions of small images see apart. 0: none, as in the paper.
        num_classes: classes to condition on: an embedding joins z in the generator and, as a projection (Miyato & Koyama
            2018, arXiv 1802.05637), the discriminator's logit. 0: unconditional.
        generator_norm, discriminator_norm: "batch" as in the paper; "group", which makes no image depend on the others of
            its batch; or "none".
        negative_slope: of the discriminator's leaky rectifiers.
        initializer_range: standard deviation of the initial weights; None scales each layer to keep variances (He et al.
            2015, arXiv 1502.01852), which a discriminator without norms needs. The paper has 0.02.

    Raises:
        ValueError: a value is out of range or unknown.
    """

    model_type = "dcgan"

    image_size: int = 28
    num_channels: int = 1
    latent_size: int = 64
    hidden_size: int = 32
    dense_size: int = 256
    num_classes: int = 0
    generator_norm: str = "batch"
    discriminator_norm: str = "none"
    negative_slope: float = 0.2
    initializer_range: float | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_architecture()  # here too, because `strict` wraps what it raises in an error of its own

    def validate_architecture(self):
        """Raise `ValueError` with the field, its value and the fix. `strict` and saving call it too."""
        sizes = f"choose 4 * 2^n or 7 * 2^n from 8 to 64: {', '.join(map(str, IMAGE_SIZES))}"
        self._require(self.image_size in IMAGE_SIZES, "image_size", sizes)
        self._require(self.num_channels in (1, 3), "num_channels", "choose 1 (grey) or 3 (colour)")
        for name in ("latent_size", "hidden_size"):
            self._require(getattr(self, name) >= 1, name, "set it to 1 or more")
        self._require(self.dense_size >= 0, "dense_size", "set it to 0 (none) or more")
        self._require(self.num_classes == 0 or self.num_classes >= 2, "num_classes", "set it to 0 or at least 2")
        for name in ("generator_norm", "discriminator_norm"):
            self._require(getattr(self, name) in NORMS, name, f"choose one of {', '.join(map(repr, NORMS))}")
        self._require(0 <= self.negative_slope < 1, "negative_slope", "set it to at least 0 and below 1")
        scale = self.initializer_range
        self._require(scale is None or scale > 0, "initializer_range", "set it above 0, or to None")

    @property
    def base_size(self) -> int:
        """Pixels a side of the smallest feature map."""
        return 7 if self.image_size % 7 == 0 else 4

    @property
    def num_doublings(self) -> int:
        return (self.image_size // self.base_size).bit_length() - 1

    def _require(self, holds: bool, name: str, fix: str):
        if not holds:
            raise ValueError(f"{type(self).__name__}: {name}={getattr(self, name)!r} is not possible: {fix}.")


DCGANConfig.register_for_auto_class()  # so that saving copies this file

__all__ = ["DCGANConfig"]
