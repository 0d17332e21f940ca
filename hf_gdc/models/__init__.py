# SPDX-License-Identifier: Apache-2.0
"""The library's own models. Their files travel to the Hub; what ties them to `hf_gdc` is here."""


def register():
    """Make transformers' Auto classes build these models from `model_type` alone, without remote code."""
    from transformers.models import auto

    from . import configuration_small_gpt, modeling_small_gpt
    from .configuration_dcgan import DCGANConfig
    from .modeling_dcgan import DCGANDiscriminator, DCGANGenerator

    config_class = configuration_small_gpt.SmallGPTConfig
    auto.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for auto_class, reference in configuration_small_gpt.AUTO_MAP.items():
        if auto_class != "AutoConfig":
            model_class = getattr(modeling_small_gpt, reference.split(".")[1])
            getattr(auto, auto_class).register(config_class, model_class, exist_ok=True)
    auto.AutoConfig.register(DCGANConfig.model_type, DCGANConfig, exist_ok=True)
    auto.AutoModel.register(DCGANConfig, DCGANGenerator, exist_ok=True)
    auto.AutoModelForImageClassification.register(DCGANConfig, DCGANDiscriminator, exist_ok=True)


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
