"""How varied a set of texts is, from its n-grams.

Both fall or rise with the number of texts, so compare equally many. Left out: self-BLEU (`self_bleu`).
"""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import chain

import numpy as np


def token_lists(texts: Sequence[str | Sequence[Hashable]], tokenizer: Callable[[str], Sequence] = str.split) -> list:
    """The tokens of each text: strings are split by `tokenizer` (default: at white space), lists of tokens stay.

    Raises:
        ValueError: one string where a list of texts is needed.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts must be a list of texts, not one string; pass [{texts[:40]!r}].")
    return [list(tokenizer(text) if isinstance(text, str) else text) for text in texts]


def ngram_counts(texts: Sequence, n: int, tokenizer: Callable[[str], Sequence] = str.split) -> Counter:
    """How often each n-gram, a tuple of n tokens, occurs in all the texts together; none goes over a text's end.

    Raises:
        ValueError: n below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}, but an n-gram has at least one token; say n=1 or more.")
    grams = (zip(*(tokens[start:] for start in range(n)), strict=False) for tokens in token_lists(texts, tokenizer))
    return Counter(chain.from_iterable(grams))


def distinct_n(texts: Sequence, n: int = 2, tokenizer: Callable[[str], Sequence] = str.split) -> float:
    """Distinct n-grams over all n-grams of the texts, in [0, 1]; 0 if there are none (Li et al. 2016, arXiv 1510.03055).

    Args:
        texts: strings or lists of tokens.
        n: tokens per n-gram.
        tokenizer: what splits the strings; of a transformers tokenizer, `tokenizer.tokenize`.
    """
    counts = ngram_counts(texts, n, tokenizer)
    return len(counts) / counts.total() if counts else 0.0


def ngram_entropy(texts: Sequence, n: int = 1, tokenizer: Callable[[str], Sequence] = str.split) -> float:
    """Shannon entropy, in nats, of the n-grams' relative frequencies over all texts; 0 if there are none.

    It lies between 0 and the log of the number of distinct n-grams. n = 1 is the entropy of single tokens, larger n the
    Ent-n of Zhang et al. 2018 (arXiv 1809.05972). A plug-in estimate: with few texts it is too low.

    Args: as for `distinct_n`.
    """
    counts = np.fromiter(ngram_counts(texts, n, tokenizer).values(), dtype=np.float64)
    return float((counts * np.log(counts.sum() / counts)).sum() / counts.sum()) if len(counts) else 0.0
