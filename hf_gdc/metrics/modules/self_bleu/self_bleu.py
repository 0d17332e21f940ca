"""`self_bleu` as a module of `evaluate`, which takes the first metric of the file: hence no `from` for the base."""

import hf_gdc.metrics.text_metric
from hf_gdc.metrics.self_bleu import self_bleu


class SelfBleu(hf_gdc.metrics.text_metric.TextMetric):
    function = staticmethod(self_bleu)
    description = "Self-BLEU: how alike texts are."
    source = "Zhu et al. 2018, Texygen, arXiv 1802.01886"
