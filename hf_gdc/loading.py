"""From what a user passes (an id, a path, a model) to the objects a trainer needs.

Left out: saving (transformers' own).
"""

import copy

import torch
from accelerate import Accelerator
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from .trl_compat import ModelConfig, get_peft_config, get_quantization_config, prepare_deepspeed, prepare_fsdp


def load_policy(
    model: "str | PreTrainedModel | PeftModel", model_init_kwargs: dict | None, peft_config: PeftConfig | None
) -> "PreTrainedModel | PeftModel":
    """The policy: loaded if given by name, wrapped in an adapter if `peft_config` says so.

    A saved adapter, given by name, is trained further: the reference stays the model under it.

    Raises:
        ValueError: options for loading beside a loaded model, nothing to train, or an adapter that can't be switched off
            to give the reference.
    """
    options = model_init_kwargs or {}
    if isinstance(model, str):
        at = {name: options[name] for name in ("revision", "token", "subfolder", "cache_dir") if name in options}
        if find_adapter_config_file(model, **at) is not None:
            model = AutoPeftModelForCausalLM.from_pretrained(model, is_trainable=True, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(model, **options)
    elif model_init_kwargs:
        raise ValueError("model_init_kwargs apply when the model is given by name, but a loaded model was passed.")
    if peft_config is not None:
        model = _with_adapter(model, peft_config, options.get("revision"))
    if isinstance(model, PeftModel):
        for config in model.peft_config.values():
            _check_kind(config)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "no parameter of the model is trainable. An adapter is loaded for training by "
            "PeftModel.from_pretrained(..., is_trainable=True)."
        )
    return model


def _with_adapter(model: "PreTrainedModel | PeftModel", config: PeftConfig, revision: str | None) -> PeftModel:
    if isinstance(model, PeftModel):
        raise ValueError("the model has an adapter already: pass no peft_config to train it, or merge it first.")
    _check_kind(config)
    before = _some_logits(model)
    model = get_peft_model(model, config, revision=revision)
    with model.disable_adapter():
        unchanged = torch.equal(before, _some_logits(model))
    if not unchanged:
        raise ValueError(
            f"this {type(config).__name__} changes the model under the adapter, which would no longer be the reference "
            "(PiSSA, OLoRA and LoftQ do, and layer_replication). Leave init_lora_weights at its default."
        )
    return model


def _check_kind(config: PeftConfig) -> None:
    """Refuse adapters that don't leave the model under them as it is."""
    if config.is_prompt_learning:
        raise ValueError(
            f"{config.peft_type.value} adds virtual tokens to the prompt, which this trainer does not "
            "support; use an adapter inside the weights, such as LoraConfig."
        )
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise ValueError(
            f"bias={bias!r} trains biases of the model itself, and the reference, the model with its adapter off, would "
            "move with them: set bias='none'."
        )


@torch.no_grad()
def _some_logits(model: nn.Module) -> Tensor:
    training = model.training
    model.eval()
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(4, device=embedding.device)[None] % embedding.shape[0]
    logits = model(input_ids=ids, use_cache=False).logits
    model.train(training)
    return logits


def loading_options(options: ModelConfig, trust_remote_code: bool) -> dict:
    """Arguments of `from_pretrained` from TRL's options, without those that are None."""
    found = {
        "dtype": options.dtype,
        "revision": options.model_revision,
        "trust_remote_code": trust_remote_code,
        "attn_implementation": options.attn_implementation,
        "quantization_config": get_quantization_config(options),
    }
    return {name: value for name, value in found.items() if value is not None}


def adapter_config(options: ModelConfig) -> PeftConfig | None:
    """The adapter that TRL's options ask for, or None without `use_peft`.

    TRL hands on a single `lora_target_modules` as a pattern for whole paths; here a plain name means modules of that name.
    """
    config = get_peft_config(options)
    if config is not None and isinstance(config.target_modules, str) and config.target_modules.isidentifier():
        config.target_modules = {config.target_modules}
    return config


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
