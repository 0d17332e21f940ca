"""Demonstrations: real texts join the rollouts, as samples of the target that the policy does not have to find first.

TextGAIL (Wu et al. 2020, arXiv 2004.13796) puts them into PPO's batches with a reward of their own. Here they are what the
target says that they are: where p = P / Z is (nearly) the data's distribution, n samples of the policy and k real texts are
samples of the mixture

    m(x) = (n pi(x) + k p(x)) / (n + k),

and are weighed by it, so that pi/m <= (n + k) / n and every estimate is one of D_f(pi || p) (as in `replay`).

Left out: log p of each prefix, so they go with credit for whole completions. Shapes: B samples, k texts, G prompts.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from ..actors import Actors
from ..partition import group_logsumexp
from ..rollouts import Rollouts
from ..targets.base import BEFORE_JOINING, Target


class Demonstrations:
    """Joins real texts to rollouts; stands where a `Replay` would.

    Args:
        target, actors: of the run.
        size: k, of this process.
    """

    def __init__(self, target: Target, actors: Actors, size: int):
        self.target, self.actors, self.size = target, actors, size
        self.texts: Rollouts | None = None  # of this set of rollouts

    def add(self, rollouts: Rollouts, from_fit: bool = False) -> None:
        """Samples of the policy are not kept."""

    def join(self, rollouts: Rollouts) -> Rollouts:
        """The rollouts and the first `size` of `texts`, with `sampler_logp_B` the mixture's."""
        given = self.texts.select(torch.arange(self.size))
        given.policy_logp_B = given.sampler_logp_B = self.actors.policy_logp(given)
        self.actors.reference_logp(given)
        log_weight = self.target.log_weight(rollouts)
        log_score = torch.cat([log_weight + rollouts.sampler_logp_B, self.target.log_score(given)])
        parts = [replace(part, sampler_logps_BT=None, policy_logps_BT=None) for part in (rollouts, given)]
        both = Rollouts.concatenate(parts)
        keys, group = torch.unique(both.prompt_key_B, return_inverse=True)
        fresh, texts = (
            torch.bincount(part, minlength=len(keys)).double() for part in group.split([len(rollouts), self.size])
        )
        log_z_G = group_logsumexp(log_weight, group[: len(rollouts)], len(keys)) - fresh.log()
        log_q = both.policy_logp_B
        log_m = torch.logaddexp(
            log_q + (fresh / (fresh + texts)).log()[group],
            _safe(log_score - log_z_G[group]) + (texts / (fresh + texts)).log()[group],
        )
        both.scores[BEFORE_JOINING], both.sampler_logp_B = log_q, log_m
        return both

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


def _safe(log_p: Tensor) -> Tensor:
    """Where Z is still 0, p says nothing."""
    return torch.where(log_p.isfinite(), log_p, -math.inf)
