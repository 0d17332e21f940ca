"""Scorers as features: a classifier of the Hub, and VADER's sentiment.

Both read the completion alone, without its prompt, as text. Left out: rewards that read the prompt too (any function of
your own may), and scorers that give several numbers at once.
"""

from collections.abc import Callable

import torch
from accelerate.state import AcceleratorState, is_initialized
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .ready_features import text_of

VADER_COMPONENTS = ("neg", "neu", "pos", "compound")
LONGEST = 10**6  # tokens; tokenizers that know no limit have 10**30


def vader(component: str) -> Callable:
    """VADER's sentiment (Hutto & Gilbert 2014): shares `neg`, `neu`, `pos` in [0, 1], or `compound` in [-1, 1].

    Raises:
        ValueError: another component, or the package is not installed.
    """
    if component not in VADER_COMPONENTS:
        raise ValueError(f"vader:{component} is unknown; say {', '.join(f'vader:{c}' for c in VADER_COMPONENTS)}.")
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise ValueError(
            f"vader:{component} needs the package vaderSentiment: pip install vaderSentiment, or hf-gdc[scorers]."
        ) from error
    analyzer = SentimentIntensityAnalyzer()
    return lambda completions, **_: [analyzer.polarity_scores(text_of(c))[component] for c in completions]


def classifier(
    model: str | PreTrainedModel,
    label: str,
    processing_class: PreTrainedTokenizerBase | None = None,
    batch_size: int = 64,
    output: str = "probability",
    threshold: float = 0.5,
) -> "Classifier":
    """A feature from a classifier of texts.

        Moment(classifier("org/sentiment", "positive"), 0.8)
        Pointwise(classifier("org/toxicity", "toxic", output="label"))

    As text, `classifier:org/sentiment=positive` and `classifier:org/toxicity=toxic>0.5`.

    Args:
        model: Hub id, path, or a model with a head for sequence classification, which stays on its device. One that is
            given by name goes to the accelerator's device.
        label: one of the model's labels.
        processing_class: the classifier's own tokenizer; default the one beside the model.
        batch_size: completions in a forward pass.
        output: "probability" of the label: softmax over the labels, or sigmoid of its logit where the model has one logit
            or many labels at a time; "label": 1.0 where that is above `threshold`, else 0.0.
        threshold: between 0 and 1.

    Texts longer than the classifier can read are cut.

    Raises:
        ValueError: the model does not have the label (its labels are named), has no tokenizer, or an unknown output.
    """
    return Classifier(model, label, processing_class, batch_size, output, threshold)


class Classifier:
    """The function that `classifier` makes; `spec` is its text, or None where it can't be made again from text."""

    def __init__(self, model, label: str, processing_class, batch_size: int, output: str, threshold: float):
        if output not in ("probability", "label") or not 0 < threshold < 1:
            raise ValueError(
                f"a classifier's output is 'probability' or 'label' with a threshold in (0, 1), not {output!r} with "
                f"{threshold!r}."
            )
        config = AutoConfig.from_pretrained(model) if isinstance(model, str) else model.config
        name = model if isinstance(model, str) else config._name_or_path
        labels = {known: index for index, known in config.id2label.items()}
        if label not in labels:
            called = f"classifier {name!r}" if name else "the classifier"
            raise ValueError(f"{called} has no label {label!r}; it has {', '.join(map(repr, labels))}.")
        self.index, self.batch_size = int(labels[label]), batch_size
        self.threshold = threshold if output == "label" else None
        self.sigmoid = len(labels) == 1 or config.problem_type == "multi_label_classification"
        self.__name__ = f"classifier:{name or type(model).__name__}={label}" + (
            "" if self.threshold is None else f">{threshold:g}"
        )
        self.spec = self.__name__ if name and processing_class is None else None
        if processing_class is None:
            if not name:
                raise ValueError(
                    "this classifier was not loaded from anywhere: pass its tokenizer as processing_class."
                )
            processing_class = AutoTokenizer.from_pretrained(name)
        self.tokenizer = processing_class
        self._placed = not isinstance(model, str)
        self.model = AutoModelForSequenceClassification.from_pretrained(model) if isinstance(model, str) else model
        self.model.eval()
        self._prepare_tokens()

    def _prepare_tokens(self) -> None:
        """How texts are cut, padded, and written where they have no token at all."""
        tokenizer, config = self.tokenizer, self.model.config
        self.limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or LONGEST)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if config.pad_token_id is None:  # decoders need it to find the last token, which they classify
            config.pad_token_id = tokenizer.pad_token_id
        self.blank = "" if tokenizer("")["input_ids"] else tokenizer.bos_token or tokenizer.eos_token

    def __call__(self, completions: list, **_) -> Tensor:
        """(B,) probabilities, or 0 and 1, in float64 on the CPU."""
        texts = [text if text.strip() else self.blank for text in map(text_of, completions)]
        if not self._placed:
            self.model.to(_device())
            self._placed = True
        # Texts of like length share a batch, so that little of it is padding.
        order = torch.tensor(sorted(range(len(texts)), key=lambda n: len(texts[n])), dtype=torch.int64)
        values = torch.zeros(len(texts), dtype=torch.float64)
        for part in order.split(self.batch_size) if len(order) else ():
            values[part] = self._probability([texts[n] for n in part.tolist()])
        return values if self.threshold is None else (values > self.threshold).double()

    @torch.no_grad()
    def _probability(self, texts: list[str]) -> Tensor:
        inputs = self.tokenizer(
            texts, padding=True, padding_side="right", truncation=True, max_length=self.limit, return_tensors="pt"
        )
        logits = self.model(**inputs.to(self.model.device)).logits.float()
        if self.sigmoid:
            return logits[:, self.index].sigmoid().double().cpu()
        return logits.softmax(-1)[:, self.index].double().cpu()


def _device() -> torch.device:
    """The accelerator's device where a trainer has set one up (it may have been told to use the CPU), else the best."""
    if is_initialized():
        return AcceleratorState().device
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def spelt_classifier(text: str) -> Classifier:
    """The feature spelt `classifier:MODEL=LABEL` or `classifier:MODEL=LABEL>THRESHOLD`.

    The last `=` divides, so a path may have `:` and `=` in it, but a label may not have `=`.
    """
    model, _, label = text.rpartition("=")
    known, sign, threshold = label.rpartition(">")
    if not model or not label:
        raise ValueError(
            f"feature {'classifier:' + text!r}: spell it classifier:MODEL=LABEL, as in classifier:org/sentiment=positive, "
            "with >0.5 behind it for 0 or 1."
        )
    if not sign:
        return classifier(model, label)
    try:
        bound = float(threshold)
    except ValueError as error:
        raise ValueError(f"feature {'classifier:' + text!r}: the threshold {threshold!r} is not a number.") from error
    return classifier(model, known, output="label", threshold=bound)
