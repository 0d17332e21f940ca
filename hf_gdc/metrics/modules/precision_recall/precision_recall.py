"""`precision_recall` as a module of `evaluate`, which takes the first metric of the file: hence no `from` for the base."""

import hf_gdc.metrics.image_metric
from hf_gdc.metrics.images import precision_recall


class PrecisionRecall(hf_gdc.metrics.image_metric.ImageMetric):
    description = "Shares of generated images near real ones, and of real ones near generated, on a small classifier."
    source = "Kynkaanniemi et al. 2019, arXiv 1904.06991"

    @staticmethod
    def measure(generated, real):
        precision, recall = precision_recall(generated.features_BF, real.features_BF)
        return {"precision": precision, "recall": recall}
