"""`ngram_entropy` as a module of `evaluate`, which takes the first metric of the file: hence no `from` for the base."""

import hf_gdc.metrics.text_metric
from hf_gdc.metrics.diversity import ngram_entropy


class NgramEntropy(hf_gdc.metrics.text_metric.TextMetric):
    function = staticmethod(ngram_entropy)
    description = "Entropy of the n-grams' distribution, in nats."
    source = "Zhang et al. 2018, arXiv 1809.05972"
