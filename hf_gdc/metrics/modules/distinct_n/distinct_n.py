"""`distinct_n` as a module of `evaluate`, which takes the first metric of the file: hence no `from` for the base."""

import hf_gdc.metrics.text_metric
from hf_gdc.metrics.diversity import distinct_n


class DistinctN(hf_gdc.metrics.text_metric.TextMetric):
    function = staticmethod(distinct_n)
    description = "Distinct-n: distinct n-grams over all n-grams."
    source = "Li et al. 2016, arXiv 1510.03055"
