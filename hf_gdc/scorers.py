"""Scorers as features: a classifier of the Hub, similarity to texts by an encoder, and VADER's sentiment.

All read the completion alone, without its prompt, as text. Left out: reward models, which read the prompt too
(`reward_models`), and scorers that give several numbers at once.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .ready_features import text_of
from .text_models import TextModel

VADER_COMPONENTS = ("neg", "neu", "pos", "compound")


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


class Classifier(TextModel):
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
        load = AutoModelForSequenceClassification.from_pretrained
        super().__init__(model, load, processing_class, batch_size, "classifier")
        self.index = int(labels[label])
        self.threshold = threshold if output == "label" else None
        self.sigmoid = len(labels) == 1 or config.problem_type == "multi_label_classification"
        self.__name__ = f"classifier:{name or type(model).__name__}={label}" + (
            "" if self.threshold is None else f">{threshold:g}"
        )
        self.spec = self.__name__ if self.can_be_spelt else None

    def __call__(self, completions: list, **_) -> Tensor:
        """(B,) probabilities, or 0 and 1, in float64 on the CPU."""
        values = self.per_text([text_of(c) for c in completions], self._probability)
        return values if self.threshold is None else (values > self.threshold).double()

    def _probability(self, outputs, mask: Tensor) -> Tensor:
        logits = outputs.logits.float()
        return logits[:, self.index].sigmoid() if self.sigmoid else logits.softmax(-1)[:, self.index]


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


def similarity(
    model: str | PreTrainedModel,
    texts: str | Path | Sequence[str],
    processing_class: PreTrainedTokenizerBase | None = None,
    batch_size: int = 64,
) -> "Similarity":
    """A feature in [-1, 1]: the cosine between the completion's embedding and that of the nearest reference text.

        Reference() * Reward(similarity("org/encoder", ["A dragon slept.", "The end."]), beta=0.1)

    As text, `similarity:org/encoder=texts.txt`. An embedding is the mean of the last hidden states over a text's tokens
    (Sentence-BERT, Reimers & Gurevych 2019, arXiv 1908.10084), so any encoder or decoder will do.

    Args:
        model: Hub id, path or model.
        texts: the reference texts, or a file with one in each line.
        processing_class: the model's own tokenizer; default the one beside it.
        batch_size: texts in a forward pass.

    Raises:
        ValueError: no such file, no text, or a tokenizer of another model.
    """
    return Similarity(model, texts, processing_class, batch_size)


class Similarity(TextModel):
    """The function that `similarity` makes; `spec` is its text, or None where it can't be made again from text."""

    def __init__(self, model, texts, processing_class, batch_size: int):
        file = texts if isinstance(texts, (str, Path)) else None
        if file is not None:
            if not Path(file).is_file():
                raise ValueError(f"similarity: there is no file {str(file)!r} with texts (looked in {Path.cwd()}).")
            texts = Path(file).read_text(encoding="utf-8").splitlines()
        texts = [text.strip() for text in texts if text.strip()]
        if not texts:
            raise ValueError(f"similarity needs a text to compare with, and {file or 'the list'} has none.")
        super().__init__(model, AutoModel.from_pretrained, processing_class, batch_size, "encoder")
        name = f"{self.path or type(self.model).__name__}={file or f'{len(texts)} texts'}"
        self.__name__ = f"similarity:{name}"
        self.spec = self.__name__ if self.can_be_spelt and file is not None else None
        self.texts, self._references = texts, None

    def __call__(self, completions: list, **_) -> Tensor:
        """(B,) cosines in float64 on the CPU."""
        if self._references is None:
            self._references = self.per_text(self.texts, _embedding)
        values = self.per_text([text_of(c) for c in completions], _embedding)
        return (values @ self._references.T).amax(-1) if len(values) else values


def _embedding(outputs, mask: Tensor) -> Tensor:
    """(B, H) unit vectors: the mean over each text's tokens."""
    weight = mask[..., None].float()
    mean = (outputs.last_hidden_state.float() * weight).sum(1) / weight.sum(1)
    return torch.nn.functional.normalize(mean, dim=-1)


def spelt_similarity(text: str) -> Similarity:
    """The feature spelt `similarity:MODEL=FILE`; the last `=` divides."""
    model, _, file = text.rpartition("=")
    if not model or not file:
        raise ValueError(
            f"feature {'similarity:' + text!r}: spell it similarity:MODEL=FILE, as in similarity:org/encoder=texts.txt, with a "
            "text in each line of the file."
        )
    return similarity(model, file)
