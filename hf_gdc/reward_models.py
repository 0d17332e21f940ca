"""Reward models of the Hub: a number for a prompt with its completion, by a model with its own tokenizer and chat template.

Left out: models that score pairs, single tokens or steps of a solution.
"""

from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from .text_models import TextModel


def reward_model(
    model: str | PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | None = None,
    batch_size: int = 16,
    chat_template_kwargs: dict | None = None,
) -> "RewardModel":
    """A reward function from a model with a head for sequence classification that has one label.

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
    return RewardModel(model, processing_class, batch_size, chat_template_kwargs)


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
