# SPDX-License-Identifier: Apache-2.0
"""The library's own models. Their files travel to the Hub; what ties them to `hf_gdc` is here."""


def register():
    """Make transformers' Auto classes build these models from `model_type` alone, without remote code."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification

    from .configuration_dcgan import DCGANConfig
    from .configuration_small_gpt import SmallGPTConfig
    from .modeling_dcgan import DCGANDiscriminator, DCGANGenerator
    from .modeling_small_gpt import SmallGPTForCausalLM, SmallGPTModel

    AutoConfig.register(SmallGPTConfig.model_type, SmallGPTConfig, exist_ok=True)
    AutoModel.register(SmallGPTConfig, SmallGPTModel, exist_ok=True)
    AutoModelForCausalLM.register(SmallGPTConfig, SmallGPTForCausalLM, exist_ok=True)
    AutoConfig.register(DCGANConfig.model_type, DCGANConfig, exist_ok=True)
    AutoModel.register(DCGANConfig, DCGANGenerator, exist_ok=True)
    AutoModelForImageClassification.register(DCGANConfig, DCGANDiscriminator, exist_ok=True)


# Below `register`, and transformers first: `hf_gdc` calls `register` once transformers has been imported, and
# that may be on the next line, before the model files have begun.
import transformers  # noqa: E402, F401

from .configuration_dcgan import DCGANConfig  # noqa: E402
from .configuration_small_gpt import SmallGPTConfig  # noqa: E402
from .modeling_dcgan import DCGANDiscriminator, DCGANGenerator  # noqa: E402
from .modeling_small_gpt import SmallGPTForCausalLM, SmallGPTModel  # noqa: E402

__all__ = [
    "DCGANConfig",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "SmallGPTConfig",
    "SmallGPTForCausalLM",
    "SmallGPTModel",
    "register",
]
