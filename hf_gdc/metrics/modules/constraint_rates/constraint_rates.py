"""Shares and means of features, as a module of `evaluate`, which reads imports line by line."""

import inspect

import datasets
import evaluate

from hf_gdc.metrics.constraints import constraint_rates


class ConstraintRates(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Shares and means of features, with standard errors and confidence intervals.",
            citation="Wilson 1927, Journal of the American Statistical Association 22(158)",
            inputs_description="\n\nInputs are `predictions` (the completions), `features` and the options of:\n\n"
            + inspect.getdoc(constraint_rates),
            features=datasets.Features(predictions=datasets.Value("string")),
        )

    def _compute(self, predictions, features, **options):
        return constraint_rates(predictions, features, **options)
