"""A second adapter on the policy's own base weights: a critic's or a discriminator's.

Left out: what reads its hidden states.
"""

import copy
from contextlib import contextmanager

from peft import PeftConfig, PeftModel

from .scoring import same_trainable


def add_adapter(model: PeftModel, name: str) -> None:
    """Put an adapter like the policy's beside it; what was trainable stays so, and the new one is not yet."""
    policy = model.active_adapter
    with same_trainable(model):
        model.add_adapter(name, _without_head(model, model.peft_config[policy]))
        model.set_adapter(policy)
    model.set_requires_grad(name, False)


@contextmanager
def adapter_active(model: PeftModel, name: str):
    """This adapter in place of the policy's; all parameters stay as trainable as they are."""
    policy = model.active_adapter
    with same_trainable(model):
        model.set_adapter(name)
        try:
            yield
        finally:
            model.set_adapter(policy)


def adapter_parameters(model: PeftModel, name: str) -> dict:
    """The adapter's parameters, by name."""
    return {full: parameter for full, parameter in model.named_parameters() if f".{name}." in f"{full}."}


def _without_head(model: PeftModel, config: PeftConfig) -> PeftConfig:
    """The policy's adapter again, except on the vocabulary's head, which hidden states don't pass through."""
    config = copy.deepcopy(config)
    head = model.get_base_model().get_output_embeddings()
    names = {name.rpartition(".")[2] for name, module in model.get_base_model().named_modules() if module is head}
    config.modules_to_save = None
    if not isinstance(config.target_modules, str):
        config.target_modules = set(config.target_modules) - names
    return config
