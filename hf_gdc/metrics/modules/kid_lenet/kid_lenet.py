"""`kid_lenet` as a module of `evaluate`, which takes the first metric of the file: hence no `from` for the base."""

import hf_gdc.metrics.image_metric
from hf_gdc.metrics.images import kernel_distance


class KidLenet(hf_gdc.metrics.image_metric.ImageMetric):
    description = "KID, the unbiased squared MMD of features with a cubic kernel, on a small classifier."
    source = "Binkowski et al. 2018, arXiv 1801.01401"

    @staticmethod
    def measure(generated, real):
        return {"kid_lenet": kernel_distance(generated.features_BF, real.features_BF)}
