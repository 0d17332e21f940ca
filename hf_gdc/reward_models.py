"""Reward models of the Hub: a number for a prompt with its completion, by a model with its own tokenizer and chat template.

One that is an adapter on the policy's own base shares its weights: under PEFT the policy, the reference, the critic and the
reward are then one model, and each switches its own adapter on.

Left out: models that score pairs, single tokens or steps of a solution; training (`recipes/reward_model`).
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from jinja2 import TemplateError
from peft import AutoPeftModelForSequenceClassification, PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from .adapters import adapter_active, classifier_on, is_base_of, lacks_head
from .scoring import evaluating
from .text_models import TextModel, default_device


def reward_model(
    model: str | PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | None = None,
    batch_size: int = 16,
    chat_template_kwargs: dict | None = None,
) -> "RewardModel | RewardAdapter":
    """A reward function from a model with a head for sequence classification that has one label, or from an adapter for one.

        Reference() * Reward("org/reward-model", beta=0.1)
        Reference() * Reward(reward_model("org/reward-model", batch_size=4), beta=0.1)

    As text, `reward_model:org/reward-model`.

    Args:
        model: Hub id, path or model.
        processing_class: the reward model's own tokenizer; default the one beside it. The policy may have another.
        batch_size: texts in a forward pass.
        chat_template_kwargs: passed to its chat template.

    It reads prompt and completion as one text, or as one chat in its own template. Of texts longer than its context it
    reads the end.

    Raises:
        ValueError: more labels than one, a head that was never trained, a tokenizer of another model; when called, chats
            without a chat template or one that refuses them.
    """
    kind = RewardAdapter if isinstance(model, str) and _is_adapter(model) else RewardModel
    return kind(model, processing_class, batch_size, chat_template_kwargs)


def _is_adapter(name: str) -> bool:
    try:
        return find_adapter_config_file(name) is not None
    except OSError:  # there is nothing of this name, as the model's loading will say
        return False


class RewardModel(TextModel):
    """The function that `reward_model` makes; `spec` is its text, or None where it can't be made again from text."""

    def __init__(self, model, processing_class, batch_size: int, chat_template_kwargs: dict | None):
        try:
            config = AutoConfig.from_pretrained(model) if isinstance(model, str) else model.config
        except (OSError, ValueError) as error:
            raise ValueError(
                f"found no reward model {model!r}, as a path or on the Hub ({error}). A feature is spelt with a colon, such as "
                "contains:dragon or my_rewards.py:helpful."
            ) from error
        name = model if isinstance(model, str) else config._name_or_path or type(model).__name__
        if config.num_labels != 1:
            labels = ", ".join(map(repr, config.id2label.values()))
            raise ValueError(
                f"{name} has {config.num_labels} labels ({labels}), and a reward model has one. For the probability of a "
                f"label use the feature 'classifier:{name}=LABEL'."
            )
        super().__init__(
            model, _with_trained_head, processing_class, batch_size, "reward model", truncation_side="left"
        )
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.__name__ = f"reward_model:{name}"
        self.spec = self.__name__ if self.can_be_spelt and not chat_template_kwargs else None

    def __call__(self, prompts: list, completions: list, **_) -> Tensor:
        """(B,) rewards in float64 on the CPU."""
        chats = bool(prompts) and isinstance(prompts[0], list)
        texts = [
            self._chat(prompt + completion) if chats else prompt + completion
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return self.per_text(texts, lambda out, mask: out.logits[:, 0].float(), special_tokens=not chats)

    def _chat(self, messages: list[dict]) -> str:
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"the prompts are chats, and the tokenizer of {self.__name__} has no chat template: set its "
                "chat_template to the one that the model was trained with and pass that tokenizer in "
                "reward_processing_classes, or give prompts as plain text."
            )
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **self.chat_template_kwargs)
        except TemplateError as error:
            raise ValueError(
                f"the chat template of {self.__name__} refuses the roles {[m['role'] for m in messages]}: {error}. Change the "
                "prompts (some templates know no system message, or want user and assistant in turns), or pass a tokenizer "
                "with another template in reward_processing_classes."
            ) from error


def _with_trained_head(name: str) -> PreTrainedModel:
    model, loading = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True)
    if loading["missing_keys"]:
        raise ValueError(
            f"{name} is no reward model: its weights lack {', '.join(sorted(loading['missing_keys']))}, which would be random."
        )
    return model


class RewardAdapter:
    """A reward function, as `RewardModel`, of a saved adapter for sequence classification with one label.

    Until `bind` finds a policy on the same base, its first call loads the base for it alone.

    Args: see `reward_model`; the adapter's folder or id in place of the model.

    Raises:
        ValueError: an adapter for something else; when first called, one that lacks its head or weights.
    """

    def __init__(
        self,
        path: str,
        processing_class: PreTrainedTokenizerBase | None,
        batch_size: int,
        chat_template_kwargs: dict | None,
    ):
        self.path, self.config = path, PeftConfig.from_pretrained(path)
        if self.config.task_type != "SEQ_CLS":
            raise ValueError(
                f"the adapter {path} is for {self.config.task_type}, and a reward model's is for SEQ_CLS: train one with "
                "recipes/reward_model --use_peft."
            )
        self.tokenizer = _tokenizer_beside(path) if processing_class is None else processing_class
        self.options = {"batch_size": batch_size, "chat_template_kwargs": chat_template_kwargs}
        self.__name__ = f"reward_model:{path}"
        self.spec = self.__name__ if processing_class is None and not chat_template_kwargs else None
        self._reader: RewardModel | None = None
        self._active: Callable[[], AbstractContextManager] = nullcontext

    def bind(self, policy: Callable[[], AbstractContextManager[nn.Module]] | None) -> None:
        """Move onto the policy's base, if it has adapters on the base that this one was trained on.

        Args:
            policy: gives the policy's whole model for a with-block.
        """
        self._reader, self._active = None, nullcontext
        if policy is None:
            return
        with policy() as model:
            if not (isinstance(model, PeftModel) and self._shares_base(model)):
                return
            name = next(name for name in _names() if name not in model.peft_config)
            with evaluating(model):
                self._reader = self._reading(classifier_on(model, self.path, name))

        reader = self._reader.model
        heads = [part for key, part in reader.named_children() if key != reader.base_model_prefix]

        @contextmanager
        def active():
            with policy() as model, evaluating(model), adapter_active(model, name):
                for head in heads:
                    head.to(reader.device)  # the backbone may have moved when training began
                yield

        self._active = active

    def _shares_base(self, model: PeftModel) -> bool:
        if is_base_of(self.config, model) and model.peft_type == self.config.peft_type:
            return True
        own = f"{self.config.peft_type.value} on {self.config.base_model_name_or_path}"
        policys = f"{model.peft_type.value} on {model.get_base_model().config._name_or_path}"
        warnings.warn(
            f"the reward adapter {self.path} ({own}) can't share the policy's base ({policys}): it gets a model of its own.",
            stacklevel=2,
        )
        return False

    def __call__(self, prompts: list, completions: list, **_) -> Tensor:
        """(B,) rewards in float64 on the CPU."""
        if self._reader is None:
            try:
                alone = AutoPeftModelForSequenceClassification.from_pretrained(self.path, num_labels=1)
            except KeyError as error:  # which PEFT raises for modules_to_save
                raise lacks_head(self.path, [error.args[0]]) from error
            self._reader = self._reading(alone.to(default_device()))
        with self._active():
            return self._reader(prompts, completions)

    def _reading(self, model: "PreTrainedModel | PeftModel") -> RewardModel:
        # an adapter's folder has no configuration of the model, whose base knows neither
        model.config.pad_token_id, model.config._name_or_path = self.tokenizer.pad_token_id, self.path
        return RewardModel(model, self.tokenizer, **self.options)


def _tokenizer_beside(path: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"there is no tokenizer beside the reward adapter {path!r}: pass its base's in reward_processing_classes."
        ) from error


def _names() -> Iterator[str]:
    yield "reward"
    number = 2
    while True:
        yield f"reward_{number}"
        number += 1
