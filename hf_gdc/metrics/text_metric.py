"""A function of texts as a metric of `evaluate`: what the modules of `modules/` have in common.

Left out: the functions, each in its file.
"""

import inspect
from collections.abc import Callable

import datasets
import evaluate


class TextMetric(evaluate.Metric):
    """Calls `function(predictions, **options)` and gives its number by its name; `predictions` are texts or lists of tokens."""

    function: Callable[..., float]
    description: str
    source: str

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=self.description,
            citation=self.source,
            inputs_description="\n\nInputs are `predictions` (texts) and the options of:\n\n"
            + inspect.getdoc(self.function),
            features=[datasets.Features(predictions=kind) for kind in (text, datasets.List(text))],
        )

    def _compute(self, predictions, **options):
        return {self.function.__name__: self.function(predictions, **options)}
