"""How much texts share with their references: BLEU by sacrebleu, ROUGE by rouge_score, exact match and F1 of answers.

Each of N texts has one reference or several. Left out: texts compared with each other (`self_bleu`).
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

ROUGE = ("rouge1", "rouge2", "rougeL")


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU, 0 to 100, as sacrebleu's defaults have it (Papineni et al. 2002; Post 2018, arXiv 1804.08771)."""
    import sacrebleu

    return sacrebleu.corpus_bleu(list(predictions), _streams(predictions, references)).score


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """chrF2 of the characters' n-grams, 0 to 100 (Popovic 2015), by sacrebleu."""
    import sacrebleu

    return sacrebleu.corpus_chrf(list(predictions), _streams(predictions, references)).score


def rouge(
    predictions: Sequence[str], references: Sequence[Sequence[str]], kinds: Sequence[str] = ROUGE
) -> dict[str, float]:
    """Mean F-measures, 0 to 100, each text's with its best reference (Lin 2004), by rouge_score; no stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    _streams(predictions, references)
    scorer = RougeScorer(list(kinds))
    found = [scorer.score_multi(list(known), text) for text, known in zip(predictions, references, strict=True)]
    return {kind: 100 * float(np.mean([scores[kind].fmeasure for scores in found])) for kind in kinds}


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of texts that equal a reference but for case, articles and punctuation, 0 to 1 (SQuAD, arXiv 1606.05250)."""
    return _best(predictions, references, lambda ours, theirs: float(ours == theirs))


def answer_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean F1 of the words that text and best reference share, 0 to 1 (SQuAD's, normalised as for `exact_match`)."""
    return _best(predictions, references, _f1)


def _f1(ours: list[str], theirs: list[str]) -> float:
    shared = (Counter(ours) & Counter(theirs)).total()
    return float(ours == theirs) if not ours or not theirs else 2 * shared / (len(ours) + len(theirs))


def _best(predictions: Sequence[str], references: Sequence[Sequence[str]], score: Callable) -> float:
    _streams(predictions, references)
    pairs = zip(predictions, references, strict=True)
    return float(np.mean([max(score(_words(text), _words(other)) for other in known) for text, known in pairs]))


def _words(text: str) -> list[str]:
    bare = "".join(" " if c in string.punctuation else c for c in text.lower())
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _streams(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """sacrebleu's form: the first reference of every text, the second of every text, ..., None where there is none.

    Raises:
        ValueError: no texts, another number of references than texts, or a text without any.
    """
    counts = [0 if isinstance(known, str) else len(known) for known in references]
    if not len(predictions) or len(predictions) != len(references) or not all(counts):
        raise ValueError(
            f"{len(predictions)} texts and references for {len(references)}: give each text a list of one reference or more."
        )
    return [[known[n] if n < len(known) else None for known in references] for n in range(max(counts))]
