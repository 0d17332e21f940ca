"""Self-BLEU: how alike texts are, as a module of `evaluate`, which reads imports line by line."""

import inspect

import datasets
import evaluate

from hf_gdc.metrics.self_bleu import self_bleu

TEXTS = datasets.Features(predictions=datasets.Value("string"))
TOKENS = datasets.Features(predictions=datasets.List(datasets.Value("string")))


class SelfBleu(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Self-BLEU: how alike texts are.",
            citation="Zhu et al. 2018, Texygen, arXiv 1802.01886",
            inputs_description=f"\n\nInputs are `predictions` (texts) and the options of:\n\n{inspect.getdoc(self_bleu)}",
            features=[TEXTS, TOKENS],
        )

    def _compute(self, predictions, **options):
        return {"self_bleu": self_bleu(predictions, **options)}
