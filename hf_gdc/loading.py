"""From what a user passes (an id, a path, a model) to the objects a trainer needs.

Left out: saving (transformers' own).
"""

import copy

from accelerate import Accelerator
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .trl_compat import prepare_deepspeed, prepare_fsdp


def load_policy(
    model: "str | PreTrainedModel | PeftModel", model_init_kwargs: dict | None, peft_config: PeftConfig | None
) -> "PreTrainedModel | PeftModel":
    """The policy: loaded if given by name, wrapped in an adapter if `peft_config` says so.

    Raises:
        ValueError: options for loading beside a loaded model, or an adapter kind that has no place in the weights.
    """
    if isinstance(model, str):
        model = AutoModelForCausalLM.from_pretrained(model, **(model_init_kwargs or {}))
    elif model_init_kwargs:
        raise ValueError("model_init_kwargs apply when the model is given by name, but a loaded model was passed.")
    if peft_config is not None:
        model = get_peft_model(model, peft_config)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"{model.active_peft_config.peft_type.value} adds virtual tokens to the prompt, which this trainer does not "
            "support; use an adapter inside the weights, such as LoraConfig."
        )
    return model


def load_tokenizer(
    processing_class: PreTrainedTokenizerBase | None, model: "PreTrainedModel | PeftModel"
) -> PreTrainedTokenizerBase:
    """The given tokenizer, or the one beside the model; padded with EOS where it has no pad token."""
    if processing_class is None:
        name = model.config._name_or_path
        if not name:
            raise ValueError("this model was not loaded from anywhere: pass its tokenizer as processing_class.")
        processing_class = AutoTokenizer.from_pretrained(name)
    if processing_class.pad_token_id is None:
        processing_class.pad_token = processing_class.eos_token
    return processing_class


def frozen_copy(model: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    """The reference: the weights as they are now, in evaluation mode, sharded like the policy where that is sharded."""
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    plugins = accelerator.state
    if getattr(plugins, "deepspeed_plugin", None) is not None:
        return prepare_deepspeed(reference, accelerator)
    if getattr(plugins, "fsdp_plugin", None) is not None:
        return prepare_fsdp(reference, accelerator)
    return accelerator.prepare_model(reference, evaluation_mode=True)


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability of the model to 0, in modules and in the configuration that attention reads."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_p"):
            if isinstance(module.__dict__.get(name), float):
                setattr(module, name, 0.0)
