"""Whether two models mean the same by a token id.

Left out: mapping one vocabulary to another.
"""

from transformers import PreTrainedTokenizerBase


def differing_tokens(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> list[str]:
    """The tokens of either that the other lacks or has under another id."""
    mine, theirs = first.get_vocab(), second.get_vocab()
    differ = [token for token in theirs if mine.get(token) != theirs[token]]
    return differ + [token for token in mine if token not in theirs]
