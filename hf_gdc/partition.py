"""log Z per prompt, and everything else that is a weighted mean over a prompt's samples.

Z_c = E_q[P(x)/q(x)] is kept for every prompt as running sums in float64; baselines, effective sample sizes and divergence
estimates use the same weights. All of it is vectorised over samples: a `group` vector says which prompt a sample has.

Left out: where the weights come from (`targets`) and gathering over processes (the trainer's).

Shapes: B samples, G prompts in the batch, K prompts ever seen.
"""

import hashlib
import math
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor


def group_sum(x_B: Tensor, group_B: Tensor, groups: int) -> Tensor:
    """(G,) sums of `x_B` over the samples of each group."""
    return torch.zeros(groups, dtype=x_B.dtype, device=x_B.device).index_add(0, group_B, x_B)


def group_logsumexp(x_B: Tensor, group_B: Tensor, groups: int) -> Tensor:
    """(G,) log-sum-exp of `x_B` in each group; -inf for a group whose entries all are."""
    empty = torch.full((groups,), -math.inf, dtype=x_B.dtype, device=x_B.device)
    top = empty.scatter_reduce(0, group_B, x_B, "amax")
    top = torch.where(top == -math.inf, 0.0, top)
    return group_sum(torch.exp(x_B - top[group_B]), group_B, groups).log() + top


def effective_sample_size(log_w_B: Tensor) -> float:
    """Kish's (sum w)^2 / sum w^2; 0 when every weight is 0."""
    if not bool((log_w_B > -math.inf).any()):
        return 0.0
    log_w_B = log_w_B.double()
    return float(torch.exp(2 * torch.logsumexp(log_w_B, 0) - torch.logsumexp(2 * log_w_B, 0)))


def leave_one_out_baseline(reward_B: Tensor, log_ratio_B: Tensor, group_B: Tensor, groups: int) -> Tensor:
    """Self-normalised leave-one-out baseline B_i = sum_{j != i} w_j r_j / sum_{j != i} w_j within the prompt's group.

    Args:
        reward_B: pseudo-rewards, finite.
        log_ratio_B: log w = log pi - log q at the time of the rollout; zeros when the policy itself sampled.
        group_B: the prompt of each sample as an index below `groups`.

    Returns:
        (B,): independent of the sample's own completion, hence unbiased, and shifting with constants in the reward. The
        only sample of its prompt gets 0.
    """
    top = torch.full((groups,), -math.inf, dtype=log_ratio_B.dtype, device=log_ratio_B.device)
    top = top.scatter_reduce(0, group_B, log_ratio_B, "amax")
    w_B = torch.exp(log_ratio_B - top[group_B])
    w_others = group_sum(w_B, group_B, groups)[group_B] - w_B
    # Centred on the group's mean first: sums of the others then lose no digits to a large common reward.
    size = group_sum(torch.ones_like(reward_B), group_B, groups)
    centre_B = (group_sum(reward_B, group_B, groups) / size)[group_B]
    weighted = w_B * (reward_B - centre_B)
    numerator = group_sum(weighted, group_B, groups)[group_B] - weighted
    alone = (size[group_B] == 1) | (w_others <= 0)  # others of no weight say nothing
    return torch.where(alone, 0.0, centre_B + numerator / torch.where(alone, 1.0, w_others))


def prompt_key(prompt_ids: Sequence[int]) -> int:
    """A 63-bit key of a prompt's token ids, the same in every process and run."""
    digest = hashlib.blake2b(array("q", prompt_ids).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Partition:
    """The one owner of log Z, keyed by prompt.

    For every prompt it keeps the number of samples and the log of sum w and of sum w^2, with w = P/q: a running mean
    over all rollouts made while the target stood still. When the target's `version` changes, it starts afresh.

    Args:
        normalised: P is a probability already, so every Z is 1, without error.
    """

    def __init__(self, normalised: bool = False):
        self.normalised, self.version = normalised, 0
        self._reset()

    def _reset(self) -> None:
        self._key_K = torch.zeros(0, dtype=torch.int64)
        self._count_K, self._log_w_K, self._log_w2_K = (torch.zeros(0, dtype=torch.float64) for _ in range(3))

    def update(self, key_B: Tensor, log_w_B: Tensor, version: int) -> None:
        """Add the samples of all processes: their prompts' keys (int64) and log P - log q."""
        if version != self.version:
            self.version = version
            self._reset()
        log_w_B = log_w_B.detach().double().cpu()
        key_G, group_B = torch.unique(key_B.cpu(), return_inverse=True)
        groups = len(key_G)
        new = (
            group_sum(torch.ones_like(log_w_B), group_B, groups),
            group_logsumexp(log_w_B, group_B, groups),
            group_logsumexp(2 * log_w_B, group_B, groups),
        )
        key_K, index = torch.unique(torch.cat([self._key_K, key_G]), return_inverse=True)
        old_at, new_at = index[: len(self._key_K)], index[len(self._key_K) :]
        count = torch.zeros(len(key_K), dtype=torch.float64)
        count[old_at] = self._count_K
        count[new_at] += new[0]
        sums = []
        for old, added in zip((self._log_w_K, self._log_w2_K), new[1:], strict=True):
            merged = torch.full((len(key_K),), -math.inf, dtype=torch.float64)
            merged[old_at] = old
            merged[new_at] = torch.logaddexp(merged[new_at], added)
            sums.append(merged)
        self._key_K, self._count_K, (self._log_w_K, self._log_w2_K) = key_K, count, sums

    @property
    def samples(self) -> int:
        """How many samples log Z rests on, over all prompts."""
        return int(self._count_K.sum())

    def log_z(self, key_B: Tensor) -> Tensor:
        """(B,) float64 log Z of the prompts with these keys, all of them seen before; -inf where Z is still 0."""
        if self.normalised:
            return torch.zeros(len(key_B), dtype=torch.float64, device=key_B.device)
        at = torch.searchsorted(self._key_K, key_B.cpu())
        return (self._log_w_K[at] - self._count_K[at].log()).to(key_B.device)

    def log_z_stderr(self, key_B: Tensor) -> Tensor:
        """(B,) standard error of log Z by the delta method, sqrt(Var w / n) / Z; inf where Z is 0 or n is 1."""
        if self.normalised:
            return torch.zeros(len(key_B), dtype=torch.float64, device=key_B.device)
        at = torch.searchsorted(self._key_K, key_B.cpu())
        count = self._count_K[at]
        second_over_first = torch.exp(self._log_w2_K[at] - 2 * self._log_w_K[at]) * count  # E[w^2] / E[w]^2
        relative = (second_over_first - 1).clamp_min(0) / (count - 1).clamp_min(0)
        unknown = (self._log_w_K[at] == -math.inf) | (count < 2)
        return torch.where(unknown, math.inf, relative.sqrt()).to(key_B.device)

    def state_dict(self) -> dict:
        return {
            "version": self.version,
            "key": self._key_K,
            "count": self._count_K,
            "log_w": self._log_w_K,
            "log_w2": self._log_w2_K,
        }

    def load_state_dict(self, state: dict) -> None:
        self.version = state["version"]
        self._key_K, self._count_K = state["key"], state["count"]
        self._log_w_K, self._log_w2_K = state["log_w"], state["log_w2"]


class DivergenceEstimator:
    """Divergences between policy and target from weighted samples, with standard errors.

    The samples come from any mixture m whose density is known: the policy alone (m = pi), or the policy's samples
    together with the reference's under the balance heuristic, m = sum_k n_k q_k / n (Veach & Guibas 1995). With
    w = P / (Z m), E_m[w] = 1 and on the support of p

        D_f(pi || p) = E_m[w f(t)] + f'(inf) * pi(p = 0),     t = pi Z / P,   f gauged so that f >= 0.

    Where f'(inf) is infinite, the divergence is that of the policy restricted to the support, KL(pi(. | S) || p) and so
    on, over the prompts where the policy has a sample there: report it beside the share in support.

    Args:
        log_p_B: log P(x), unnormalised; -inf outside of the support.
        logp_B: log pi(x); its value outside of the support is not used.
        log_m_B: log m(x) of the mixture that the sample is counted to, given its prompt.
        group_B: prompt of each sample, as an index below `groups`.
        own_B: of the policy's own samples pi/q up to a factor (1 where it was sampled as it is), 0 of all others: these
            give the share of the policy in the support.
        log_z_G: log Z per prompt where it is known better than from these samples, else None.

    Every prompt with a sample in the support counts the same; the others are left out and counted in `unknown`.
    """

    def __init__(
        self,
        log_p_B: Tensor,
        logp_B: Tensor,
        log_m_B: Tensor,
        group_B: Tensor,
        groups: int,
        own_B: Tensor,
        log_z_G: Tensor | None = None,
    ):
        log_w_B = (log_p_B - log_m_B).double()
        self.group_B, self.groups = group_B, groups
        self.count_G = group_sum(torch.ones_like(log_w_B), group_B, groups)
        if log_z_G is None:
            log_z_G = group_logsumexp(log_w_B, group_B, groups) - self.count_G.log()
        self.log_z_G = log_z_G
        self.known_G = self.log_z_G > -math.inf
        self.unknown = int((~self.known_G).sum())
        self.alive_B = log_p_B > -math.inf
        # (B,) with mean 1 per prompt; times `alive` its mean is the share in support.
        self.own_B = own_B.double() / self._mean(own_B.double()).clamp_min(1e-300)[group_B]
        self.in_support_G = self._mean(self.own_B * self.alive_B)
        safe_log_z_B = torch.where(self.known_G, self.log_z_G, 0.0)[group_B]
        self.w_B = torch.where(self.alive_B, torch.exp(log_w_B - safe_log_z_B), 0.0)
        self.log_t_B = torch.where(self.alive_B, logp_B.double() - log_p_B.double() + safe_log_z_B, 0.0)

    def _mean(self, x_B: Tensor) -> Tensor:
        return group_sum(x_B, self.group_B, self.groups) / self.count_G

    def _stderr(self, influence_B: Tensor, known_G: Tensor) -> float:
        """Of the mean over these prompts, from each sample's influence on its prompt's estimate."""
        variance_G = self._mean(influence_B**2) / self.count_G
        return float(variance_G[known_G].sum().sqrt()) / int(known_G.sum())

    def divergence(self, divergence) -> tuple[float, float]:
        """Mean over prompts of D_f(pi || p) and its standard error; (nan, inf) when no prompt has a sample in p."""
        restricted, share_G, log_t_B = not divergence.admits_hard_constraints, self.in_support_G, self.log_t_B
        known_G = self.known_G & (share_G > 0) if restricted else self.known_G  # nothing of the policy to restrict
        if not bool(known_G.any()):
            return math.nan, math.inf
        if restricted:
            log_t_B = log_t_B - share_G.clamp_min(1e-300).log()[self.group_B]
        f_prime_inf = 0.0 if restricted else divergence.f_prime_inf
        f_B = divergence.f(log_t_B)
        value_G = self._mean(self.w_B * f_B)
        # Z is estimated from the same samples: d value / d log Z = E_m[w (t f' - f)].
        t_f_prime_B = torch.where(log_t_B == -math.inf, 0.0, torch.exp(log_t_B) * divergence.f_prime(log_t_B))
        slope_G = self._mean(self.w_B * torch.where(self.alive_B, t_f_prime_B - f_B, 0.0))
        influence_B = self.w_B * f_B - value_G[self.group_B] + slope_G[self.group_B] * (self.w_B - 1)
        # So is the share: it enters through f'(inf), or through log t of the restricted policy.
        by_share_G = -self._mean(self.w_B * t_f_prime_B) / share_G.clamp_min(1e-300) if restricted else -f_prime_inf
        share_B = self.own_B * (self.alive_B.double() - share_G[self.group_B])
        influence_B += (by_share_G[self.group_B] if restricted else by_share_G) * share_B
        total_G = (value_G + f_prime_inf * (1 - share_G))[known_G]
        return float(total_G.mean()), self._stderr(influence_B, known_G)

    @property
    def ess(self) -> float:
        """Effective number of samples under the target."""
        total = self.w_B.sum()
        return float(total**2 / (self.w_B**2).sum()) if total > 0 else 0.0

    def log_z(self) -> tuple[float, float]:
        """Mean of log Z over the known prompts and its standard error."""
        if not bool(self.known_G.any()):
            return -math.inf, math.inf
        return float(self.log_z_G[self.known_G].mean()), self._stderr(self.w_B - 1, self.known_G)
