"""Divergences between a policy and an unnormalised target, from log-densities of samples.

Only numbers go in: neither models nor texts are needed. The trainer's `evaluate` gives the same names.
Left out: how the samples are drawn and pooled (`hf_gdc.evaluation`). Shapes: B samples, G prompts.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..evaluation import divergence_metrics
from ..intervals import normal_quantile
from ..partition import DivergenceEstimator


def estimate_divergences(
    log_p: Sequence[float],
    policy_logp: Sequence[float],
    mixture_logp: Sequence[float],
    prompts: Sequence | None = None,
    own: Sequence[float] | None = None,
    confidence: float = 0.95,
) -> dict[str, float]:
    """Every divergence between policy pi and target p = P / Z, log Z and the policy's share in the target's support.

    A sample counts by its importance weight P / (Z m) under the mixture m that it is counted to (the balance heuristic,
    Veach & Guibas 1995). Samples of pi alone, m = pi, cannot show a mode that pi has lost; pool them with the reference's.

    Args:
        log_p: (B,) log P(x) in nats, not normalised; -inf where the target forbids x.
        policy_logp: (B,) log pi(x); with `own` given, its value where log_p is -inf is not used.
        mixture_logp: (B,) log m(x) of the density that all samples are counted to, given the prompt.
        prompts: (B,) anything that tells the prompts apart (texts or numbers); default: all samples have one prompt.
        own: (B,) 1 for the policy's own samples and 0 for others, which then say nothing of its share in the support;
            default: every sample counts with pi / m.
        confidence: of the intervals.

    Returns:
        In nats where a divergence has a unit. For each NAME of `kl_target_policy`, `kl_policy_target`, `js`, `tv`, ... and
        `log_z`: `NAME`, `NAME_stderr` (delta method), `NAME_low` and `NAME_high` (normal; divergences not below 0). Then
        `in_support`, `ess` (effective number of samples) and `prompts_without_support`. Mean over the prompts with a
        sample in the support; NaN where there is none.

    Raises:
        ValueError: no samples, arrays of different lengths, or a number that is no log-density.
    """
    z = normal_quantile(confidence)
    given = {"log_p": log_p, "policy_logp": policy_logp, "mixture_logp": mixture_logp, "own": own}
    given = {name: torch.as_tensor(v, dtype=torch.float64) for name, v in given.items() if v is not None}
    prompts = np.zeros(given["log_p"].shape, dtype=int) if prompts is None else np.asarray(prompts)
    _check({**given, "prompts": prompts})
    keys, group = np.unique(prompts, return_inverse=True)
    log_p_B, logp_B, log_m_B = given["log_p"], given["policy_logp"], given["mixture_logp"]
    own_B = given.get("own", torch.exp(logp_B - log_m_B))
    estimate = DivergenceEstimator(log_p_B, logp_B, log_m_B, torch.from_numpy(group), len(keys), own_B)
    values = divergence_metrics(estimate, stderr=True)
    values["log_z"], values["log_z_stderr"] = estimate.log_z()
    for name in [name for name in values if not name.endswith("_stderr")]:
        value, half = values[name], z * values[f"{name}_stderr"]
        values[f"{name}_low"] = value - half if name == "log_z" else max(value - half, 0.0)
        values[f"{name}_high"] = value + half
    return values | {
        "in_support": float(estimate.in_support_G.mean()),
        "ess": estimate.ess,
        "prompts_without_support": float(estimate.unknown),
    }


def _check(arrays: dict[str, Tensor | np.ndarray]) -> None:
    shapes = {name: tuple(values.shape) for name, values in arrays.items()}
    if len(set(shapes.values())) > 1 or len(shapes["log_p"]) != 1 or shapes["log_p"] == (0,):
        raise ValueError(f"give one number per sample in each of {', '.join(shapes)}; their shapes are {shapes}.")
    used = (arrays["log_p"] > -math.inf) | ("own" not in arrays)
    wrong = {
        "log_p": arrays["log_p"].isnan() | (arrays["log_p"] == math.inf),
        "policy_logp": used & (arrays["policy_logp"].isnan() | (arrays["policy_logp"] == math.inf)),
        "mixture_logp": ~arrays["mixture_logp"].isfinite(),
    }
    for name, wrong_B in wrong.items():
        if bool(wrong_B.any()):
            row = int(wrong_B.nonzero()[0])
            also = "finite (a drawn sample has a density)" if name == "mixture_logp" else "a number or -inf"
            raise ValueError(f"{name}[{row}] is {float(arrays[name][row])}, but a log-density here must be {also}.")
