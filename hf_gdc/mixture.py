"""A defensive mixture: the policy's samples joined by reference samples that satisfy the constraints.

Early in training few samples of the policy are in a rare target's support, and a mode that it drops is never sampled again.
Samples of the reference that lie in the support are at hand from the fit of the moments: drawn from a(x) b(x) / AR, with AR
the acceptance rate, they join each set of rollouts, and all are weighed by the density of the whole mixture (the balance
heuristic: Veach & Guibas 1995; Owen & Zhou 2000),

    m(x) = (n pi(x) + k a(x) b(x) / AR) / (n + k),

so that pi/m and p/m stay bounded and every estimate stays consistent.

Left out: conditional targets, whose prompts would each need a pool. Shapes: B samples of the policy, K of the pool.
"""

import math
from dataclasses import replace

import torch
from accelerate.utils import gather_object

from .actors import Actors
from .rollouts import Rollouts


class DefensiveMixture:
    """Joins `size` samples of a pool to every set of rollouts of this process.

    Args:
        pool: this process's share of samples of the reference, for the empty prompt.
        in_support_B: which of them the target's hard constraints accept (bool).
        size: k.
        actors: policy and reference.
    """

    def __init__(self, pool: Rollouts, in_support_B: torch.Tensor, size: int, actors: Actors):
        accepted = pool.select(in_support_B.nonzero().flatten())
        parts, total = [accepted], len(pool)
        if actors.accelerator.num_processes > 1:  # every process draws from the whole pool
            states = gather_object([(accepted.state_dict(), len(pool))])
            parts, total = [Rollouts(**state) for state, _ in states], sum(n for _, n in states)
        self.accepted = Rollouts.concatenate(parts)
        self.log_acceptance = math.log(max(len(self.accepted), 1) / total)
        self.size, self.actors = size, actors

    def join(self, rollouts: Rollouts, in_support_B: torch.Tensor) -> Rollouts:
        """Both sets in one, with `sampler_logp_B` the mixture's; unchanged where the pool has no sample in the support.

        Args:
            rollouts: the policy's, with the reference's log-probs known.
            in_support_B: which of them the hard constraints accept (bool).
        """
        if not len(self.accepted):
            return rollouts
        picked = self.accepted.select(torch.randint(len(self.accepted), (self.size,)))
        picked.policy_logp_B = self.actors.policy_logp(picked)
        picked = picked.tokens_to(rollouts.completion_ids_BT.device)
        both = Rollouts.concatenate([replace(part, sampler_logps_BT=None) for part in (rollouts, picked)])
        supported = torch.cat([in_support_B, torch.ones(self.size, dtype=torch.bool)])
        filtered = torch.where(supported, both.scores["reference_logp"] - self.log_acceptance, -math.inf)
        share = len(rollouts) / len(both)
        both.sampler_logp_B = torch.logaddexp(both.policy_logp_B + math.log(share), filtered + math.log1p(-share))
        return both
