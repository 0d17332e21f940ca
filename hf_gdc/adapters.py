"""Several adapters on one set of base weights: which one is switched on, which ones are only read, and a model for sequence
classification that has no backbone of its own.

Left out: adapters of other kinds than those inside the weights.
"""

import copy
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, load_peft_weights
from peft.utils import set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from .scoring import same_trainable

IN_FILE = "base_model.model."  # before the names of a model's weights, in an adapter's file


@contextmanager
def adapter_active(model: PeftModel, name: str):
    """The adapter `name` in place of the active one; all stay as trainable as they are."""
    before = model.active_adapter
    with same_trainable(model):
        model.set_adapter(name)
        try:
            yield
        finally:
            model.set_adapter(before)


@contextmanager
def only_trained_adapters(model: nn.Module):
    """Without those that are only read: a factor's stay in the folder that they came from when the policy is saved."""
    read = {}
    if isinstance(model, PeftModel):
        configs = model.peft_config.items()
        read = {name: own for name, own in configs if own.inference_mode and name not in model.active_adapters}
    for name in read:
        del model.peft_config[name]
    try:
        yield
    finally:
        if read:
            model.peft_config.update(read)


def is_base_of(config, model: PeftModel) -> bool:
    """Whether an adapter with this configuration belongs to the weights under the model's adapters."""
    theirs, ours = config.base_model_name_or_path or "", model.get_base_model().config._name_or_path
    return theirs == ours or (Path(theirs).is_dir() and Path(ours).is_dir() and Path(theirs).samefile(ours))


def classifier_on(model: PeftModel, path: str, name: str) -> PreTrainedModel:
    """A model for sequence classification from a saved adapter, whose backbone is that of `model`, under the adapter `name`.

    Its own are the adapter's weights, which `model` holds, frozen, and the head's.

    Raises:
        ValueError: the adapter lacks a head, or has weights that don't fit the backbone.
    """
    lm = model.get_base_model()
    config = copy.deepcopy(lm.config)
    config.num_labels = 1
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
    setattr(classifier, classifier.base_model_prefix, lm.base_model)
    head, adapter = split_weights(path, classifier)
    weight = lm.get_input_embeddings().weight
    classifier.load_state_dict(
        {key: value.to(weight.device, weight.dtype) for key, value in head.items()}, strict=False, assign=True
    )
    own = PeftConfig.from_pretrained(path)
    own.modules_to_save, own.task_type, own.inference_mode = None, model.active_peft_config.task_type, True
    with same_trainable(model):
        model.add_adapter(name, own)
        loaded = set_peft_model_state_dict(model, adapter, adapter_name=name)
    model.set_requires_grad(name, False)
    missing = [key for key in loaded.missing_keys if f".{name}." in key]
    if missing or loaded.unexpected_keys:
        odd = (missing or loaded.unexpected_keys)[0]
        raise ValueError(f"the adapter {path} does not fit the base model: see its weight {odd}.")
    return classifier


def split_weights(path: str, classifier: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An adapter's weights: those of the classifier's head by its own names, and the others by the file's."""
    weights = load_peft_weights(path, device="cpu")
    backbone = f"{classifier.base_model_prefix}."
    names = [key for key, _ in classifier.named_parameters() if not key.startswith(backbone)]
    missing = [key for key in names if IN_FILE + key not in weights]
    if missing:
        raise lacks_head(path, missing)
    return {key: weights.pop(IN_FILE + key) for key in names}, weights


def lacks_head(path: str, missing: list[str]) -> ValueError:
    return ValueError(
        f"the adapter {path} lacks {', '.join(missing)}, which would be random: train it with modules_to_save=['score'], as "
        "task_type='SEQ_CLS' does by itself."
    )
