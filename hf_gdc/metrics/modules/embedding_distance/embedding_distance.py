"""`embedding_distance` as a module of `evaluate`, which reads imports line by line."""

import inspect

import datasets
import evaluate

from hf_gdc.metrics.embeddings import embedding_distance


class EmbeddingDistance(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Frechet distance of two sets of texts, in a model's mean hidden states.",
            citation="Heusel et al. 2017, arXiv 1706.08500, of texts",
            inputs_description="\n\nInputs are `predictions`, `references` and the options of:\n\n"
            + inspect.getdoc(embedding_distance),
            features=datasets.Features(predictions=text, references=text),
        )

    def _compute(self, predictions, references, **options):
        return {"embedding_distance": embedding_distance(predictions, references, **options)}
