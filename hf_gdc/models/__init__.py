# SPDX-License-Identifier: Apache-2.0
"""The library's own models. Their files travel to the Hub; what ties them to `hf_gdc` is here."""


def register():
    """Make transformers' Auto classes build these models from `model_type` alone, without remote code."""
    from transformers.models import auto

    from . import configuration_dcgan, configuration_small_gpt, modeling_dcgan, modeling_small_gpt

    config_class = configuration_small_gpt.SmallGPTConfig
    auto.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class, reference in configuration_small_gpt.AUTO_MAP.items():
        if auto_class != "AutoConfig":
            model_class = getattr(modeling_small_gpt, reference.split(".")[1])
            getattr(auto, auto_class).register(config_class, model_class, exist_ok=True)
    auto.AutoConfig.register(configuration_dcgan.DCGANConfig.model_type, configuration_dcgan.DCGANConfig, exist_ok=True)
    auto.AutoModel.register(configuration_dcgan.DCGANConfig, modeling_dcgan.DCGANGenerator, exist_ok=True)
    auto.AutoModelForImageClassification.register(
        configuration_dcgan.DCGANConfig, modeling_dcgan.DCGANDiscriminator, exist_ok=True
    )


# Below `register`, and transformers first: `hf_gdc` calls `register` once transformers has been imported, and
# that may be on the next line, before the model files have begun.
import transformers  # noqa: E402, F401

from .configuration_dcgan import DCGANConfig  # noqa: E402
from .configuration_small_gpt import SmallGPTConfig  # noqa: E402
from .modeling_dcgan import DCGANDiscriminator, DCGANGenerator  # noqa: E402
from .modeling_small_gpt import (  # noqa: E402
    SmallGPTForCausalLM,
    SmallGPTForMaskedLM,
    SmallGPTForQuestionAnswering,
    SmallGPTForSequenceClassification,
    SmallGPTForTokenClassification,
    SmallGPTModel,
)

__all__ = [
    "DCGANConfig",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "SmallGPTConfig",
    "SmallGPTForCausalLM",
    "SmallGPTForMaskedLM",
    "SmallGPTForQuestionAnswering",
    "SmallGPTForSequenceClassification",
    "SmallGPTForTokenClassification",
    "SmallGPTModel",
    "register",
]
