"""How far two sets of texts are from each other in a model's eyes: the Frechet distance of their mean hidden states.

As FID is of images; its numbers compare with those of the same model and of as many texts alone, since it is biased in their
number. Left out: the distance itself (`images`). Shapes: N texts, S tokens, H hidden.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from ..text_models import TextModel
from .images import frechet_distance


def text_encoder(
    model: str | PreTrainedModel, processing_class: PreTrainedTokenizerBase | None = None, batch_size: int = 64
) -> TextModel:
    """What reads the texts: a path, a Hub id, or a model without a head and its tokenizer."""
    return TextModel(model, AutoModel.from_pretrained, processing_class, batch_size, "encoder")


def mean_embeddings(texts: Sequence[str], encoder: TextModel) -> Tensor:
    """(N, H) float64: the last layer's hidden states, averaged over a text's tokens."""

    def mean(outputs, mask_NS: Tensor) -> Tensor:
        mask_NS1 = mask_NS[..., None].to(outputs.last_hidden_state)
        return (outputs.last_hidden_state * mask_NS1).sum(1) / mask_NS1.sum(1)

    return encoder.per_text(texts, mean)


def embedding_distance(
    predictions: Sequence[str], references: Sequence[str], model: "str | TextModel", batch_size: int = 64
) -> float:
    """Frechet distance of two sets of texts, 0 for the same distribution (as for images: Heusel et al. 2017, 1706.08500).

    Args:
        model: path or Hub id of what reads them, or a `text_encoder`.

    Raises:
        ValueError: sets of different sizes, or of fewer than two texts.
    """
    if len(predictions) != len(references) or len(references) < 2:
        raise ValueError(
            f"the distance depends on the number of texts: {len(predictions)} against {len(references)} can't be compared. "
            "Take as many of each, and at least two."
        )
    encoder = text_encoder(model, batch_size=batch_size) if isinstance(model, str) else model
    return frechet_distance(mean_embeddings(predictions, encoder), mean_embeddings(references, encoder))
