"""The f-divergences, as one table: a name, f and f'.

With t = pi/p, the policy pi over the target p,

    D_f(pi || p) = E_p[f(t)] + f'(inf) * pi(p = 0),        f(1) = 0.

Every function takes log t and is exact at log t = +-inf. Adding c * (t - 1) to f changes no divergence but shifts f' by
c; the gauge is fixed to f'(1) = 0, so that pseudo-rewards -f' vanish where the policy meets the target.

Left out: losses and estimators (`objectives`, `partition`). To add a divergence write its f and f' as functions of log t:

    Divergence("my_kl", f=lambda log_t: -log_t, f_prime=lambda log_t: -torch.exp(-log_t))

Sources: Go et al. 2023 (f-DPG, arXiv 2302.08215), table 1; Nowozin et al. 2016 (f-GAN, arXiv 1606.00709), table 1.
"""

import difflib
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

LOG_2 = math.log(2.0)


class Divergence:
    """An f-divergence D_f(pi || p), as functions of log t = log(pi / p).

    Args:
        name: how it is called in options and logs.
        f: elementwise function of log t with f(1) = 0, convex in t.
        f_prime: elementwise function of log t, the derivative of f with respect to t (not log t). Its value at
            log t = inf is the weight of samples that the target forbids.
        baseline_is_zero: whether E_pi[f'(pi/p)] = 0 for every pi, so that the gauge itself is the best constant baseline
            (kl alone: E_pi[p/pi] = 1; GDC++, Korbak et al. 2022, arXiv 2206.00761).

    The gauge is fixed here: whatever multiple of (t - 1) `f` carries is removed from both functions.

    Raises:
        ValueError: when f(1) is not 0 or f' has no limit at log t = inf.
    """

    def __init__(
        self,
        name: str,
        f: Callable[[Tensor], Tensor],
        f_prime: Callable[[Tensor], Tensor],
        baseline_is_zero: bool = False,
    ):
        self.name, self.baseline_is_zero = name, baseline_is_zero
        self._f, self._f_prime = f, f_prime
        at_one, at_inf = torch.tensor([0.0], dtype=torch.float64), torch.tensor([math.inf], dtype=torch.float64)
        self._gauge = float(f_prime(at_one))
        self.f_prime_inf = float(f_prime(at_inf)) - self._gauge
        if abs(float(f(at_one))) > 1e-6:
            raise ValueError(f"divergence {name!r}: f must be 0 at log t = 0, but it is {float(f(at_one)):.3g}.")
        if math.isnan(self.f_prime_inf) or math.isnan(self._gauge):
            raise ValueError(
                f"divergence {name!r}: f_prime must have a value at log t = 0 and a limit (a number or inf) at "
                f"log t = inf, but gives {self._gauge} and {self.f_prime_inf}. Write it with softplus, expm1 or "
                "torch.where so that no inf * 0 or inf - inf appears."
            )

    def f(self, log_t: Tensor) -> Tensor:
        """f(t), gauged so that f'(1) = 0; hence f >= 0. Same shape as `log_t`; inf at log t = inf."""
        value = self._f(log_t)
        if self._gauge:
            value = value - self._gauge * torch.expm1(log_t)
        return torch.where(torch.exp(log_t) == math.inf, math.inf, value)  # t overflows: no inf - inf

    def f_prime(self, log_t: Tensor) -> Tensor:
        """f'(t), gauged so that f'(1) = 0. Same shape as `log_t`; its limit (maybe inf) at log t = inf."""
        return self._f_prime(log_t) - self._gauge

    @property
    def admits_hard_constraints(self) -> bool:
        """Whether samples with p = 0 get a finite pseudo-reward."""
        return math.isfinite(self.f_prime_inf)

    def __repr__(self) -> str:
        return f"Divergence({self.name!r})"


def _times_t(log_t: Tensor, value: Tensor) -> Tensor:
    """t * value, with 0 where t = 0 even if the value is infinite there."""
    return torch.where(log_t == -math.inf, 0.0, torch.exp(log_t) * value)


def _js_f(log_t: Tensor) -> Tensor:
    return _times_t(log_t, LOG_2 - softplus(-log_t)) - softplus(log_t) + LOG_2


def _non_saturating_f(log_t: Tensor) -> Tensor:
    return _times_t(log_t, softplus(log_t) - LOG_2 - 1.0) + softplus(log_t) - LOG_2 + 1.0


def _alpha(alpha: float) -> Divergence:
    """Amari's alpha family (Minka 2005): 0 is kl, 1/2 twice hellinger, 1 reverse_kl."""
    name = f"alpha({alpha:g})"
    if alpha == 0.0:
        return Divergence(name, *_TABLE["kl"], baseline_is_zero=True)
    if alpha == 1.0:
        return Divergence(name, *_TABLE["reverse_kl"])
    return Divergence(
        name,
        lambda log_t: (torch.expm1(alpha * log_t) / alpha - torch.expm1(log_t)) / (alpha - 1.0),
        lambda log_t: torch.expm1((alpha - 1.0) * log_t) / (alpha - 1.0),
    )


# One-sided names put p first: "kl" is KL(p || pi).
_TABLE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "kl": (lambda log_t: torch.expm1(log_t) - log_t, lambda log_t: -torch.expm1(-log_t)),
    "reverse_kl": (lambda log_t: _times_t(log_t, log_t) - torch.expm1(log_t), lambda log_t: log_t),
    "js": (_js_f, lambda log_t: LOG_2 - softplus(-log_t)),
    "tv": (lambda log_t: torch.expm1(log_t).abs() / 2, lambda log_t: torch.sign(log_t) / 2),
    "chi2": (lambda log_t: 4 * torch.sinh(log_t / 2) ** 2, lambda log_t: -torch.expm1(-2 * log_t)),
    "reverse_chi2": (lambda log_t: torch.expm1(log_t) ** 2, lambda log_t: 2 * torch.expm1(log_t)),
    "hellinger": (lambda log_t: torch.expm1(log_t / 2) ** 2, lambda log_t: -torch.expm1(-log_t / 2)),
    "jeffreys": (lambda log_t: torch.expm1(log_t) * log_t, lambda log_t: log_t - torch.expm1(-log_t)),
    "non_saturating": (_non_saturating_f, lambda log_t: softplus(log_t) - LOG_2),  # 2 KL(m || p), m = (p + pi) / 2
    "seqgan": (  # KL(p || m)
        lambda log_t: LOG_2 - softplus(log_t) + torch.expm1(log_t) / 2,
        lambda log_t: torch.sigmoid(log_t) - 0.5,
    ),
}


def available_divergences() -> list[str]:
    """The names that `get_divergence` knows."""
    return [*_TABLE, "alpha"]


def get_divergence(name_or_divergence: "str | Divergence", **kwargs) -> Divergence:
    """A divergence by name, or the given one unchanged.

    Args:
        name_or_divergence: one of `available_divergences()`, or a `Divergence`.
        kwargs: parameters of a family: `alpha` for "alpha".

    Raises:
        ValueError: unknown name (the known ones are listed) or a parameter that the divergence doesn't have.
    """
    if isinstance(name_or_divergence, Divergence):
        name, wanted = name_or_divergence.name, set()
    else:
        name, wanted = str(name_or_divergence), {"alpha"} if name_or_divergence == "alpha" else set()
        if name not in available_divergences():
            near = difflib.get_close_matches(name, available_divergences(), n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown divergence {name!r}.{hint} Known: {', '.join(available_divergences())}.")
    if set(kwargs) != wanted:
        raise ValueError(
            f"divergence {name!r} takes {', '.join(sorted(wanted)) or 'no parameters'}, "
            f"but got {', '.join(f'{k}={v!r}' for k, v in sorted(kwargs.items())) or 'none'}."
        )
    if isinstance(name_or_divergence, Divergence):
        return name_or_divergence
    return _alpha(float(kwargs["alpha"])) if name == "alpha" else Divergence(name, *_TABLE[name], name == "kl")
