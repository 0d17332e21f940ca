"""Self-BLEU (Zhu et al. 2018, Texygen, arXiv 1802.01886): how alike a model's own texts are.

Each text's BLEU (Papineni et al. 2002) with all others as its references. Done naively that compares every pair; here
each n-gram's largest count among the *other* texts is read off its two largest counts, so the time is that of a sort.

Left out: weights other than 1/max_n. Shapes: N texts, T tokens of all, P pairs of an n-gram and a text that has it.
"""

from collections.abc import Callable, Sequence

import numpy as np

from .diversity import token_lists

SMOOTHINGS = ("method1", "none")
EPSILON = 0.1  # NLTK's, for method1


def self_bleu(
    texts: Sequence, max_n: int = 4, smoothing: str = "method1", tokenizer: Callable[[str], Sequence] = str.split
) -> float:
    """Mean over texts of `self_bleu_scores`: 0 where no two texts share a token, 1 where all are the same.

    Texts of fewer than max_n tokens stay below 1. It rises with the number of texts, so compare equally many. Arguments
    and errors are those of `self_bleu_scores`.
    """
    return float(self_bleu_scores(texts, max_n, smoothing, tokenizer).mean())


def self_bleu_scores(
    texts: Sequence, max_n: int = 4, smoothing: str = "method1", tokenizer: Callable[[str], Sequence] = str.split
) -> np.ndarray:
    """BLEU of each text with all the others as references, the same as NLTK's `sentence_bleu`.

    Args:
        texts: N strings or lists of tokens.
        max_n: longest n-grams; each order has weight 1/max_n.
        smoothing: what a precision of 0 counts as. "method1" (Chen & Cherry 2014): 0.1 matches. It is the default since
            Texygen, and so published figures, use it. "none": 0, which makes the whole score 0, as it is for each text
            with fewer than max_n tokens.
        tokenizer: what splits the strings; of a transformers tokenizer, `tokenizer.tokenize`.

    Returns:
        (N,) float64 in [0, 1]; 0 for an empty text.

    Raises:
        ValueError: fewer than two texts, max_n below 1, or an unknown smoothing.
    """
    if max_n < 1:
        raise ValueError(f"max_n is {max_n}, but an n-gram has at least one token; the usual value is 4.")
    if smoothing not in SMOOTHINGS:
        raise ValueError(f"unknown smoothing {smoothing!r}; say one of {', '.join(map(repr, SMOOTHINGS))}.")
    sentences = token_lists(texts, tokenizer)
    if len(sentences) < 2:
        raise ValueError(
            f"self-BLEU compares each text with the others: it needs at least 2 texts, not {len(sentences)}."
        )
    length_N = np.array([len(tokens) for tokens in sentences])
    score_N = _brevity_penalty(length_N)
    for order, match_N in enumerate(_matches(sentences, length_N, max_n), start=1):
        if order == 1:
            score_N[match_N == 0] = 0.0  # not smoothed, as in NLTK
        smoothed_N = np.where(match_N == 0, EPSILON, match_N) if smoothing == "method1" else match_N
        score_N *= (smoothed_N / np.maximum(length_N - order + 1, 1)) ** (1 / max_n)
    return score_N


def _brevity_penalty(length_N: np.ndarray) -> np.ndarray:
    """exp(1 - r/c) where a text is not longer than r, the closest length among the others (of two, the shorter)."""
    length_L, at_N, count_L = np.unique(length_N, return_inverse=True, return_counts=True)
    shorter_L = np.append(-np.inf, length_L[:-1])
    longer_L = np.append(length_L[1:], np.inf)
    nearer_L = np.where(length_L - shorter_L <= longer_L - length_L, shorter_L, longer_L)
    closest_N = np.where(count_L > 1, length_L, nearer_L)[at_N]
    return np.exp(np.minimum(1 - closest_N / np.maximum(length_N, 1), 0))


def _matches(sentences: list[list], length_N: np.ndarray, max_n: int):
    """For n = 1 to max_n, (N,): how many n-grams of each text are found in the others, clipped as in BLEU."""
    vocabulary: dict = {}
    tokens = (vocabulary.setdefault(token, len(vocabulary)) for tokens in sentences for token in tokens)
    token_T = np.fromiter(tokens, dtype=np.int64)
    text_T = np.repeat(np.arange(len(sentences)), length_N)
    left_T = np.repeat(np.cumsum(length_N), length_N) - np.arange(len(token_T))  # tokens up to the text's end
    gram_T = token_T.copy()  # number of the n-gram that starts here
    for n in range(1, max_n + 1):
        start = np.flatnonzero(left_T >= n)
        if n > 1:
            longer = gram_T[start] * len(vocabulary) + token_T[start + n - 1]
            gram_T[start] = np.unique(longer, return_inverse=True)[1]
        yield _clipped(gram_T[start], text_T[start], len(sentences))


def _clipped(gram: np.ndarray, text: np.ndarray, texts: int) -> np.ndarray:
    """(N,) sums over a text's n-grams of min(its count, the largest count in any other text)."""
    pair_P, count_P = np.unique(gram * texts + text, return_counts=True)
    by_count = np.lexsort((count_P, pair_P // texts))
    (gram_P, text_P), count_P = np.divmod(pair_P[by_count], texts), count_P[by_count]
    last_P = np.diff(gram_P, append=-1) != 0  # has the n-gram's largest count; the one before it has the second largest
    last = np.flatnonzero(last_P)
    largest_P = np.repeat(count_P[last], np.diff(last, prepend=-1))
    before_P = np.where(np.diff(gram_P, prepend=-1) == 0, np.roll(count_P, 1), 0)
    others_P = np.where(last_P, before_P, largest_P)
    return np.bincount(text_P, weights=np.minimum(count_P, others_P), minlength=texts)
