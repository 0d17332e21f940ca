"""How varied a set of texts is."""

from collections.abc import Sequence


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams of the texts (Li et al. 2016, arXiv 1510.03055); 0 if there are none.

    It falls as more texts are compared, so compare equally many.
    """
    seen, total = set(), 0
    for text in texts:
        words = text.split()
        grams = list(zip(*(words[start:] for start in range(n)), strict=False))
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0
