"""Divergences between a policy and a target, as a module of `evaluate`, which reads imports line by line."""

import inspect

import datasets
import evaluate

from hf_gdc.metrics.divergences import estimate_divergences

INPUTS = ("log_p", "policy_logp", "mixture_logp")


class Divergences(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Every divergence between a policy and an unnormalised target, with confidence intervals.",
            citation="Go et al. 2023, arXiv 2302.08215",
            inputs_description=f"\n\nInputs are {', '.join(INPUTS)} and the options of:\n\n"
            + inspect.getdoc(estimate_divergences),
            features=datasets.Features({name: datasets.Value("float64") for name in INPUTS}),
        )

    def _compute(self, log_p, policy_logp, mixture_logp, **options):
        return estimate_divergences(log_p, policy_logp, mixture_logp, **options)
