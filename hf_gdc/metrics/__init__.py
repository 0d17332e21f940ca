"""Metrics of texts, images and samples, as pure functions, and each as a module of Hugging Face's `evaluate`.

    self_bleu(texts)                                   the pure function
    load_metric("self_bleu").compute(predictions=texts)    the same through evaluate, in a dictionary

`evaluate.load(path)` takes the folders in `modules/` too. Nothing needs a network.
"""

import difflib
import importlib
from pathlib import Path

from .constraints import constraint_rates
from .divergences import estimate_divergences
from .diversity import distinct_n, ngram_entropy
from .overlap import answer_f1, bleu, chrf, exact_match, rouge
from .self_bleu import self_bleu, self_bleu_scores

__all__ = [
    "answer_f1",
    "available_metrics",
    "bleu",
    "chrf",
    "constraint_rates",
    "distinct_n",
    "estimate_divergences",
    "exact_match",
    "load_metric",
    "ngram_entropy",
    "rouge",
    "self_bleu",
    "self_bleu_scores",
]

MODULES = Path(__file__).parent / "modules"


def available_metrics() -> list[str]:
    """The names that `load_metric` knows."""
    return sorted(path.stem for path in MODULES.glob("*/*.py") if path.stem == path.parent.name)


def load_metric(name: str, **options):
    """A metric of this library as an `evaluate.Metric`: call its `compute`, or `add_batch` several times and then `compute`.

    Inputs are kept in memory, unless `num_process` says that several processes share them through evaluate's cache.

    Args:
        name: one of `available_metrics()`.
        options: of `evaluate.Metric`: `num_process`, `process_id`, `experiment_id`, `cache_dir`, ...

    Raises:
        ValueError: unknown name (the known ones are listed).
    """
    if name not in available_metrics():
        near = difflib.get_close_matches(name, available_metrics(), n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown metric {name!r}.{hint} Known ones: {', '.join(available_metrics())}.")
    module = importlib.import_module(f".modules.{name}.{name}", __name__)
    metric = getattr(module, "".join(part.capitalize() for part in name.split("_")))
    return metric(**{"keep_in_memory": options.get("num_process", 1) == 1, **options})
