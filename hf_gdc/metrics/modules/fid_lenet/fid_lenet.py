"""`fid_lenet` as a module of `evaluate`, which takes the first metric of the file: hence no `from` for the base."""

import hf_gdc.metrics.image_metric
from hf_gdc.metrics.images import frechet_distance


class FidLenet(hf_gdc.metrics.image_metric.ImageMetric):
    description = "FID, the Frechet distance of features, on a small classifier: compares with nobody's Inception FID."
    source = "Heusel et al. 2017, arXiv 1706.08500"

    @staticmethod
    def measure(generated, real):
        return {"fid_lenet": frechet_distance(generated.features_BF, real.features_BF)}
