# SPDX-License-Identifier: Apache-2.0
"""The library's own models. Their files travel to the Hub; what ties them to `hf_gdc` is here."""


def register():
    """Make transformers' Auto classes build these models from `model_type` alone, without remote code."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from .configuration_small_gpt import SmallGPTConfig
    from .modeling_small_gpt import SmallGPTForCausalLM, SmallGPTModel

    AutoConfig.register(SmallGPTConfig.model_type, SmallGPTConfig, exist_ok=True)
    AutoModel.register(SmallGPTConfig, SmallGPTModel, exist_ok=True)
    AutoModelForCausalLM.register(SmallGPTConfig, SmallGPTForCausalLM, exist_ok=True)


# Below `register`, and transformers first: `hf_gdc` calls `register` once transformers has been imported, and
# that may be on the next line, before the model files have begun.
import transformers  # noqa: E402, F401

from .configuration_small_gpt import SmallGPTConfig  # noqa: E402
from .modeling_small_gpt import SmallGPTForCausalLM, SmallGPTModel  # noqa: E402

__all__ = ["SmallGPTConfig", "SmallGPTForCausalLM", "SmallGPTModel", "register"]
