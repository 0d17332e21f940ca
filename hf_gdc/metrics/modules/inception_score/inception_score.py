"""`inception_score` as a module of `evaluate`, which takes the first metric of the file: hence no `from` for the base."""

import hf_gdc.metrics.image_metric
from hf_gdc.metrics.images import inception_score


class InceptionScore(hf_gdc.metrics.image_metric.ImageMetric):
    description = "The inception score, on a small classifier: at most its number of classes."
    source = "Salimans et al. 2016, arXiv 1606.03498"
    inputs = ("predictions",)

    @staticmethod
    def measure(generated, real):
        return {"inception_score": inception_score(generated.logps_BK)}
