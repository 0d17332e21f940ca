"""Distinct-n: distinct n-grams over all n-grams, as a module of `evaluate`, which reads imports line by line."""

import inspect

import datasets
import evaluate

from hf_gdc.metrics.diversity import distinct_n

TEXTS = datasets.Features(predictions=datasets.Value("string"))
TOKENS = datasets.Features(predictions=datasets.List(datasets.Value("string")))


class DistinctN(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Distinct-n: distinct n-grams over all n-grams.",
            citation="Li et al. 2016, arXiv 1510.03055",
            inputs_description=f"\n\nInputs are `predictions` (texts) and the options of:\n\n{inspect.getdoc(distinct_n)}",
            features=[TEXTS, TOKENS],
        )

    def _compute(self, predictions, **options):
        return {"distinct_n": distinct_n(predictions, **options)}
