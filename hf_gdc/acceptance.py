"""What quasi-rejection sampling gives at every beta, from one pool of samples.

A sample x of q is accepted with probability min(1, P(x) / (beta q(x))). What comes out has the distribution

    p_beta(x) = min(P(x), beta q(x)) / Z_beta,      Z_beta = beta * AR(beta),      AR(beta) = E_q min(1, P / (beta q))

which goes from q on the support of P (beta -> 0) to p = P / Z (beta -> sup P/q). With n samples of any m that covers p and q,
AR, TV(p, p_beta) and both KLs are weighted means at once for every beta (Eikema et al. 2022, arXiv 2112.05702, sections 2
and 3), and they hang together (with beta -> 0 this is GUARD's identity, Khalifa et al. 2024, arXiv 2410.06716):

    KL(p || q) = KL(p || p_beta) - log AR(beta) + E_p log min(1, P / (beta q))

Left out: drawing and scoring the pool (`quasi_rejection`). Shapes: B samples of the pool.
"""

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from .intervals import wilson_bound

MIN_ESS = 30  # below this many effective samples, normal intervals mean nothing


@dataclass(frozen=True)
class AcceptanceEstimate:
    """Quasi-rejection sampling at one beta: values with standard errors (delta method), KL in nats.

    Attributes:
        log_beta: of beta in units of P/q; -inf accepts whatever has P > 0. beta_over_z: beta in units of p/q.
        acceptance_rate, acceptance_rate_lower: AR(beta) and its one-sided lower confidence bound.
        tv, tv_upper: TV(p, p_beta) and its one-sided upper confidence bound.
        kl, reverse_kl: KL(p || p_beta) and KL(p_beta || p).
        kl_target_policy: KL(p || q), without rejection.
        log_acceptance: E_p log min(1, P / (beta q)), the last term of the identity.
        ess, num_samples: effective and plain size of the pool. confidence: of the two bounds, each.
    """

    log_beta: float
    beta_over_z: float
    acceptance_rate: float
    acceptance_rate_stderr: float
    acceptance_rate_lower: float
    tv: float
    tv_stderr: float
    tv_upper: float
    kl: float
    kl_stderr: float
    reverse_kl: float
    reverse_kl_stderr: float
    kl_target_policy: float
    kl_target_policy_stderr: float
    log_acceptance: float
    log_z: float
    ess: float
    num_samples: int
    confidence: float

    @property
    def beta(self) -> float:
        """In units of P/q, as in the paper."""
        return math.exp(self.log_beta) if self.log_beta < 709 else math.inf

    def to_dict(self) -> dict[str, float | None]:
        """For JSON, which has no infinity: None for the log_beta that accepts whatever has P > 0."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


class AcceptancePool:
    """A pool of samples of m with log P and log q, and every estimate that follows from it.

    Args:
        log_score_B: log P, -inf outside of the support.
        log_q_B, log_m_B: log-density of the proposal q, and of what the samples were really drawn from.
        policy_samples: how many of them are q's own, on which bounds of the acceptance rate rest. Default: all.
        confidence: of one-sided bounds.

    Raises:
        ValueError: a log P that is NaN or +inf, or no sample with P > 0.
    """

    def __init__(
        self,
        log_score_B: Tensor,
        log_q_B: Tensor,
        log_m_B: Tensor,
        policy_samples: int | None = None,
        confidence: float = 0.95,
    ):
        check_log_score(log_score_B)
        self.size = len(log_score_B)
        self.policy_samples = self.size if policy_samples is None else policy_samples
        self.confidence, self.z = confidence, NormalDist().inv_cdf(confidence)
        self.alive_B = log_score_B > -math.inf
        if not bool(self.alive_B.any()):
            at_most = 1 - (1 - confidence) ** (1 / self.size)
            raise ValueError(
                f"none of the pool's {self.size} samples has P > 0: the acceptance rate is below {at_most:.2g} (with "
                f"confidence {confidence:g}). Draw at least {10 * self.size} samples (num_samples), train the policy towards "
                "the target first, or relax the hard constraints."
            )
        self.log_w_B = log_score_B.double() - log_q_B.double()
        self.q_B = torch.exp(log_q_B.double() - log_m_B.double())  # q/m
        log_u_B = log_score_B.double() - log_m_B.double()
        self.log_z = float(torch.logsumexp(log_u_B, 0)) - math.log(self.size)
        self.p_B = torch.exp(log_u_B - self.log_z)  # p/m, with mean 1
        self.ess = float(self.p_B.sum() ** 2 / (self.p_B**2).sum())

    def at(self, log_beta: float) -> AcceptanceEstimate:
        """Everything at one log beta (in units of P/q); -inf is the limit that accepts whatever has P > 0."""
        log_w_B = torch.where(self.alive_B, self.log_w_B, 0.0)
        log_acc_B = torch.zeros_like(log_w_B) if log_beta == -math.inf else (log_w_B - log_beta).clamp_max(0.0)
        accepted_B = torch.where(self.alive_B, self.q_B * torch.exp(log_acc_B), 0.0)
        rate = float(accepted_B.mean())
        b_B, p_B = accepted_B / rate, self.p_B  # p_beta/m and p/m, both with mean 1
        # Influences of the samples on the estimates: normalisers are estimated from the same pool.
        gap_B = p_B - b_B
        tv, sign_B = float(gap_B.abs().mean() / 2), gap_B.sign()
        by_p, by_b = float((sign_B * p_B).mean()) / 2, float((sign_B * b_B).mean()) / 2
        tv_influence_B = gap_B.abs() / 2 - tv - by_p * (p_B - 1) + by_b * (b_B - 1)
        cut_B = log_w_B - log_acc_B - self.log_z + math.log(rate)  # log p/p_beta
        kl, reverse = float((p_B * cut_B).mean()), float((b_B * -cut_B).mean())
        kl_influence_B = p_B * (cut_B - kl) + b_B - p_B
        reverse_influence_B = b_B * (-cut_B - reverse) + p_B - b_B
        distance = float((p_B * log_w_B).mean()) - self.log_z
        distance_influence_B = p_B * (log_w_B - self.log_z - distance) - (p_B - 1)
        rate_stderr, tv_stderr = self._stderr(accepted_B - rate), self._stderr(tv_influence_B)
        lower = min(rate - self.z * rate_stderr, wilson_bound(min(rate, 1.0), self.policy_samples, -self.z))
        return AcceptanceEstimate(
            log_beta=log_beta,
            beta_over_z=math.exp(min(log_beta - self.log_z, 709.0)),
            acceptance_rate=rate,
            acceptance_rate_stderr=rate_stderr,
            acceptance_rate_lower=max(0.0, lower),
            tv=tv,
            tv_stderr=tv_stderr,
            # With few or no truncated samples the delta method sees no variance; a share of ess samples of p does.
            tv_upper=min(1.0, max(tv + self.z * tv_stderr, wilson_bound(tv, self.ess, self.z))),
            kl=kl,
            kl_stderr=self._stderr(kl_influence_B),
            reverse_kl=reverse,
            reverse_kl_stderr=self._stderr(reverse_influence_B),
            kl_target_policy=distance,
            kl_target_policy_stderr=self._stderr(distance_influence_B),
            log_acceptance=float((p_B * log_acc_B).mean()),
            log_z=self.log_z,
            ess=self.ess,
            num_samples=self.size,
            confidence=self.confidence,
        )

    def log_beta_for_tv(self, tv: float) -> float:
        """The smallest log beta, hence the most accepted samples, whose upper bound of TV(p, p_beta) is at most `tv`.

        Raises:
            ValueError: tv outside of (0, 1), or a pool too small to certify it.
        """
        _check_open_unit("tv", tv)
        low, high = self._range()
        needed = max(MIN_ESS, self.z**2 * (1 - tv) / tv)  # where wilson_bound(0, ess, z) = tv
        self.require_ess(1.001 * needed, f"to certify TV <= {tv:g} with confidence {self.confidence:g}")
        return self._bisect(low, high, lambda log_beta: self.at(log_beta).tv_upper <= tv)

    def log_beta_for_acceptance_rate(self, acceptance_rate: float) -> float:
        """The largest log beta, hence the closest to p, whose lower bound of the acceptance rate is at least this.

        Raises:
            ValueError: a rate outside of (0, 1), one that no beta reaches, or a pool too small to certify it.
        """
        _check_open_unit("acceptance_rate", acceptance_rate)
        low, high = self._range()
        self.require_ess(MIN_ESS, "for a certificate")
        best = self.at(low)
        if best.acceptance_rate <= acceptance_rate:
            raise ValueError(
                f"no beta reaches an acceptance rate of {acceptance_rate:g}: already P > 0 holds for only "
                f"{best.acceptance_rate:.4g} of the policy's samples. Ask for less, or train the policy towards the target."
            )
        if best.acceptance_rate_lower < acceptance_rate:
            spread = (best.acceptance_rate - best.acceptance_rate_lower) / (best.acceptance_rate - acceptance_rate)
            raise ValueError(
                f"the pool of {self.size} samples is too small to certify an acceptance rate of {acceptance_rate:g}: the "
                f"highest is {best.acceptance_rate:.4g}, and at least {best.acceptance_rate_lower:.4g} with confidence "
                f"{self.confidence:g}. Draw about {math.ceil(1.1 * self.size * spread**2)} samples (num_samples)."
            )
        return -self._bisect(-high, -low, lambda x: self.at(-x).acceptance_rate_lower >= acceptance_rate)

    def require_ess(self, needed: float, purpose: str) -> None:
        """Raise a ValueError that says how many samples are needed if the pool is worth fewer samples of p."""
        if self.ess < needed:
            raise ValueError(
                f"the pool of {self.size} samples is too small: it is worth {self.ess:.1f} samples of the target, and "
                f"{needed:.1f} are needed {purpose}. Draw about {math.ceil(1.1 * self.size * needed / self.ess)} samples "
                "(num_samples), or train the policy towards the target first."
            )

    def _range(self) -> tuple[float, float]:
        """Below the first, every sample in the support is accepted; above the second, none is truncated."""
        inside = self.log_w_B[self.alive_B]
        return float(inside.min()), float(inside.max())

    def _bisect(self, low: float, high: float, holds) -> float:
        """The smallest point of [low, high] for which `holds`, which it does at `high` and above that point."""
        if holds(low):
            return low
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        return high

    def _stderr(self, influence_B: Tensor) -> float:
        return float((influence_B**2).mean().sqrt()) / math.sqrt(self.size)


def check_log_score(log_score_B: Tensor) -> None:
    """Raise a ValueError for a log P that no target with a finite Z has."""
    bad = log_score_B.isnan() | (log_score_B == math.inf)
    if bool(bad.any()):
        raise ValueError(
            f"the target can't be normalised: log P is {float(log_score_B[bad][0])} for sample {int(bad.nonzero()[0])}. "
            "Rewards and features must be finite, and P at most a multiple of a distribution; check the factors one by one."
        )


def _check_open_unit(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, both excluded, but is {value!r}.")


def check_choice(beta: float | None, tv: float | None = None, acceptance_rate: float | None = None) -> None:
    """Raise a ValueError for values out of range, or for more than one of them."""
    if sum(value is not None for value in (beta, tv, acceptance_rate)) > 1:
        raise ValueError("beta, tv and acceptance_rate are three ways to say one thing: give one of them.")
    if beta is not None and not 0 < beta < math.inf:
        raise ValueError(
            f"beta must be positive and finite, but is {beta!r}: it is the threshold of P/q above which every draw is accepted "
            "(guaranteed=True alone is the limit 0)."
        )
    for name, value in (("tv", tv), ("acceptance_rate", acceptance_rate)):
        if value is not None:
            _check_open_unit(name, value)
