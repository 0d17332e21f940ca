"""Entropy of the n-grams' distribution, in nats, as a module of `evaluate`, which reads imports line by line."""

import inspect

import datasets
import evaluate

from hf_gdc.metrics.diversity import ngram_entropy

TEXTS = datasets.Features(predictions=datasets.Value("string"))
TOKENS = datasets.Features(predictions=datasets.List(datasets.Value("string")))


class NgramEntropy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Entropy of the n-grams' distribution, in nats.",
            citation="Zhang et al. 2018, arXiv 1809.05972",
            inputs_description=f"\n\nInputs are `predictions` (texts) and the options of:\n\n{inspect.getdoc(ngram_entropy)}",
            features=[TEXTS, TOKENS],
        )

    def _compute(self, predictions, **options):
        return {"ngram_entropy": ngram_entropy(predictions, **options)}
