"""Replay: samples of the target, as far as it is known so far, join every set of rollouts.

Early in training few samples of the policy are in a rare target's support, and a mode that it drops is never sampled
again. But weighted samples of the target are at hand: those of the reference that fitted the moments, and what the policy
sampled in earlier steps. Resampled by their weights P/q they follow p = P / Z, join the rollouts, and all are weighed by
the density of the whole mixture (a defensive one: Owen & Zhou 2000; the balance heuristic: Veach & Guibas 1995),

    m(x) = (n pi(x) + k p(x)) / (n + k),

so that pi/m <= (n + k)/n and p/m <= (n + k)/k are bounded for every target and every estimate stays consistent.

Left out: drawing the first samples (the trainer's). Shapes: B samples of the policy, N particles, G prompts of the rollouts.
"""

import math
from dataclasses import replace

import torch
from accelerate.utils import gather_object
from torch import Tensor

from .actors import Actors
from .partition import group_logsumexp, group_sum
from .rollouts import Rollouts
from .targets.base import Target


class Replay:
    """A set of weighted samples per prompt, and the mixture of fresh and replayed samples.

    Samples come in batches, each from one sampler. In a batch the weights P/q are normalised per prompt; batches are
    weighed by their effective sample sizes. The batch of the fit stays; those of the policy leave when there are more
    than `window` samples of them.

    Args:
        target, actors: of the run.
        size: k, the samples that join the rollouts of this process, divided evenly among its prompts.
        window: the most samples of the policy's batches.
    """

    def __init__(self, target: Target, actors: Actors, size: int, window: int):
        self.target, self.actors, self.size, self.window = target, actors, size, window
        self._batches: list[tuple[Rollouts, Tensor]] = []  # samples in the support; how many were tried per prompt
        self._fit_batches = 0  # at the front of them, 0 or 1

    def add(self, rollouts: Rollouts, from_fit: bool = False) -> None:
        """Add samples with their `sampler_logp_B`; those of the fit stay, and every process has those of all."""
        if not from_fit and not self.window:
            return
        alive = (self.target.log_score(rollouts) > -math.inf).nonzero().flatten()
        kept = rollouts.tokens_to("cpu").select(alive)
        kept = replace(kept, sampler_logps_BT=None, log_score_B=None, log_z_B=None, baseline_B=None)
        prompts = rollouts.prompt_key_B
        if from_fit and self.actors.accelerator.num_processes > 1:
            parts = gather_object([(kept.state_dict(), prompts)])
            kept = Rollouts.concatenate([Rollouts(**part) for part, _ in parts])
            prompts = torch.cat([part for _, part in parts])
        keys, counts = torch.unique(prompts, return_counts=True)
        tried = counts[torch.searchsorted(keys, kept.prompt_key_B)].double()
        if len(kept):
            self._batches.append((kept, tried))
            self._fit_batches += from_fit
        while sum(len(batch) for batch, _ in self._batches[self._fit_batches :]) > self.window:
            self._batches.pop(self._fit_batches)

    def weighted(self) -> tuple[Rollouts, Tensor, Tensor, Tensor, Tensor]:
        """The N samples, their prompts' index (N,), shares p^(x) within the prompt (N,), keys (G,) and log Z (G,)."""
        samples = Rollouts.concatenate([batch for batch, _ in self._batches])
        tried = torch.cat([tried for _, tried in self._batches])
        sizes = torch.tensor([len(batch) for batch, _ in self._batches])
        keys, group = torch.unique(samples.prompt_key_B, return_inverse=True)
        log_w = self.target.log_weight(samples)
        # one cell for each batch and prompt
        cell = torch.arange(len(sizes)).repeat_interleave(sizes) * len(keys) + group
        cells = len(sizes) * len(keys)
        total = group_logsumexp(log_w, cell, cells)
        ess = torch.exp(2 * total - group_logsumexp(2 * log_w, cell, cells)).nan_to_num(0.0)
        first = torch.ones(cells, dtype=torch.float64).scatter_reduce(0, cell, tried, "amax")
        of_prompt = torch.arange(cells) % len(keys)
        ess_G = group_sum(ess, of_prompt, len(keys))
        log_z = group_logsumexp(total - first.log() + ess.log(), of_prompt, len(keys)) - ess_G.log()
        share = torch.exp(log_w - total[cell]) * ess[cell] / ess_G[group]
        return samples, group, share, keys, log_z

    def join(self, rollouts: Rollouts) -> Rollouts:
        """The rollouts and `size` replayed samples, with `sampler_logp_B` the mixture's.

        A prompt that has no weighted sample yet gets copies of its own with weight 0, so that every process has equally
        many. Unchanged where no prompt has one.
        """
        wanted = torch.unique(rollouts.prompt_key_B)
        each = self.size // len(wanted)
        if not self._batches or not each:
            return rollouts
        samples, group, share, keys, log_z = self.weighted()
        picked = samples.select(_resample(group, share, torch.isin(keys, wanted), each))
        picked.policy_logp_B = self.actors.policy_logp(picked)
        missing = wanted[~torch.isin(wanted, keys)]
        at = (rollouts.prompt_key_B[None] == missing[:, None]).long().argmax(1)
        filler = rollouts.select(at.repeat_interleave(each))
        parts = [rollouts, picked.tokens_to(rollouts.completion_ids_BT.device), filler]
        both = Rollouts.concatenate(
            [replace(p, sampler_logps_BT=None, scores=self._shared(p)) for p in parts if len(p)]
        )
        log_score = self.target.log_score(both)
        place = torch.searchsorted(keys, both.prompt_key_B).clamp_max(len(keys) - 1)
        known = keys[place] == both.prompt_key_B
        log_p = torch.where(known, log_score - log_z[place], -math.inf)
        fresh = group_sum(
            torch.ones(len(rollouts)).double(), torch.searchsorted(wanted, rollouts.prompt_key_B), len(wanted)
        )
        log_share = (fresh / (fresh + each)).log()[torch.searchsorted(wanted, both.prompt_key_B)]
        log_m = torch.logaddexp(both.policy_logp_B + log_share, log_p + torch.log1p(-log_share.exp()))
        log_m[len(rollouts) + len(picked) :] = math.inf
        both.sampler_logp_B = log_m
        return both

    def _shared(self, rollouts: Rollouts) -> dict[str, Tensor]:
        names = self._batches[0][0].scores.keys() & rollouts.scores.keys()
        return {name: rollouts.scores[name] for name in sorted(names)}

    def state_dict(self) -> dict:
        batches = [(batch.state_dict(), tried) for batch, tried in self._batches]
        return {"batches": batches, "fit_batches": self._fit_batches}

    def load_state_dict(self, state: dict) -> None:
        self._batches = [(Rollouts(**batch), tried) for batch, tried in state["batches"]]
        self._fit_batches = state["fit_batches"]


def _resample(group: Tensor, share: Tensor, chosen: Tensor, each: int) -> Tensor:
    """Positions of `each` samples of every chosen group, drawn by their shares: systematic resampling, which varies least."""
    order, index = torch.argsort(group, stable=True), chosen.nonzero().flatten()
    cumulative = share[order].cumsum(0)  # rises by 1 in every group
    points = index[:, None] + (torch.arange(each) + torch.rand(len(index), 1, dtype=torch.float64)) / each
    end = torch.bincount(group, minlength=len(chosen)).cumsum(0)[index] - 1  # rounding must not reach the next group
    return order[torch.minimum(torch.searchsorted(cumulative, points), end[:, None]).flatten()]
