"""When and on what the moments' lambdas are fitted: a window of recent samples, weighted towards the target.

The first fit is on a pool of the reference. Later samples join a window of that size, and lambda is fitted again whenever
the window's effective sample size has doubled: rare constraints leave few samples of the reference, but the trained policy
gives many. A doubling rule makes few refits, so log Z, which restarts with each, stays good.

How few is too few, measured on one binary feature (20% to 50%, log-normal weights): the mean that the fitted lambda really
has is off by 0.06 (root mean square) at an effective sample size above 50, 0.1 at 20 to 30, 0.17 at 5 to 10 and 0.24 below
5, where lambda = 0 is off by 0.3.

Left out: the solver (`moments`). Shapes: N samples of all processes, G prompts, M moments, K lambdas.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import MomentFit, ess_behind, feature_range, fit_moments, weighted_stats
from .partition import group_logsumexp

FEW = 30  # effective samples below which a fit is reported as uncertain
TOO_FEW = 3  # below which the first fit is refused: lambda would be the noise of a sample or two ...
SHARE = 0.01  # ... if they are a smaller share than this of all: a few strings that were enumerated have exact weights
FEW_OF_A_GROUP = 10  # below which a group that was not fitted yet waits for more samples


@dataclass
class Multiplier:
    """One lambda to be solved for.

    Attributes:
        name: of the feature, with its group, for messages.
        mean: the wanted mean; None: none is wanted of this group.
        lam: its value; None: never fitted.
        grouped: it is for one group of prompts.
        required: the user named this group, so its mean must be reachable.
    """

    name: str
    mean: float | None
    lam: float | None
    grouped: bool = False
    required: bool = False


class MomentWindow:
    """The samples on which lambda is fitted.

    Attributes:
        ess: effective sample size of the last fit, 0 before the first.
        size: how many samples are kept, beside the newest batches: as many as the first fit had.
    """

    def __init__(self):
        self.ess, self.size = 0.0, 0
        self._parts: list[tuple[Tensor, ...]] = []

    def add(self, phi: Tensor, log_w: Tensor, key: Tensor, group: Tensor) -> None:
        """Add a batch of all processes: features (N, M), log weights (N,), keys of prompts (N,) and groups (N, M)."""
        self._parts.append((phi, _by_batch(log_w, key), key, group))
        self.size = self.size or len(phi)
        while sum(len(part[0]) for part in self._parts[1:]) >= self.size:
            self._parts.pop(0)

    def fit(self, multipliers_of: Sequence[Callable[[list[int]], list[Multiplier]]]) -> list[tuple] | None:
        """Fit lambda, unless that was done on more than half as large an effective sample.

        Args:
            multipliers_of: for each moment, what makes its multipliers from the keys of its groups, ascending.

        Returns:
            For each moment the keys of its groups, their lambdas, and whether each was fitted, as tensors of equal
            length; None where nothing was fitted.

        Raises:
            ValueError: see `fit_moments`; or, at the first fit, no effective samples to speak of.
        """
        phi, log_w, key, group = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        multipliers, owner, column, keys = [], [], torch.empty_like(group), []
        for m, make in enumerate(multipliers_of):
            found, index = torch.unique(group[:, m], return_inverse=True)
            column[:, m] = index + len(multipliers)
            multipliers += make(found.tolist())
            owner += [m] * len(found)
            keys.append(found)
        lam = torch.tensor([one.lam or 0.0 for one in multipliers], dtype=torch.float64)
        first = self.ess == 0
        free, ess = self._ready(phi, log_w, key, column, multipliers, owner, lam)
        news = any(one.grouped and one.lam is None for k, one in enumerate(multipliers) if free[k])
        if not first and ess < 2 * self.ess and not news:
            return None
        wanted = torch.tensor([0.0 if one.mean is None else one.mean for one in multipliers], dtype=torch.float64)
        names = [one.name for one in multipliers]
        fit = fit_moments(phi, log_w, wanted, key, lam, names, column, free)
        _report_uncertain(fit, free, names, len(phi), first)
        self.ess = fit.ess
        sizes = [len(found) for found in keys]
        return list(zip(keys, fit.lam.split(sizes), free.split(sizes), strict=True))

    def _ready(
        self,
        phi: Tensor,
        log_w: Tensor,
        key: Tensor,
        column: Tensor,
        multipliers: list[Multiplier],
        owner: list[int],
        lam: Tensor,
    ) -> tuple[Tensor, float]:
        """(K,) bool: which lambdas the window can say something of, and its effective sample size now.

        Overall moments and, at first, groups that the user named are always among them, so that a mean out of reach is
        an error. Other groups wait until their samples span the mean.
        """
        first = self.ess == 0
        alive = log_w > -torch.inf
        if not bool(alive.any()):
            return torch.full((len(lam),), first), 0.0  # a first fit says what is wrong
        phi, log_w, column = phi[alive], log_w[alive], column[alive]
        prompts, group = torch.unique(key[alive], return_inverse=True)
        ess_G = weighted_stats(lam, phi, log_w, group, len(prompts), column)[3]
        column_GM = torch.zeros(len(prompts), phi.shape[1], dtype=torch.int64)
        column_GM[group] = column
        behind = ess_behind(ess_G, column_GM, len(lam))
        low, high = feature_range(phi, group, len(prompts), column, len(lam))
        free, waiting, hopeless = torch.ones(len(lam), dtype=torch.bool), [], True
        for k, one in enumerate(multipliers):
            if not one.grouped or (first and one.required):
                continue
            spanned = one.mean is not None and bool(low[k] < one.mean < high[k])
            free[k] = spanned and (one.lam is not None or bool(behind[k] >= FEW_OF_A_GROUP))
            if one.mean is not None and not free[k]:
                waiting.append(f"{one.name} (wants {one.mean:g}, has ({low[k]:.3g}, {high[k]:.3g}))")
                of_all = phi[:, owner[k]]
                hopeless = hopeless and not bool(of_all.min() < one.mean < of_all.max())
        if first and waiting:
            _report_waiting(waiting, hopeless and not bool(free.any()))
        return free, float(ess_G.sum())

    def state_dict(self) -> dict:
        return {"ess": self.ess, "size": self.size, "parts": list(self._parts)}

    def load_state_dict(self, state: dict) -> None:
        self.ess, self.size = state["ess"], state["size"]
        self._parts = [tuple(part) for part in state["parts"]]


def _report_waiting(waiting: list[str], hopeless: bool) -> None:
    shown = ", ".join(waiting[:5]) + (", ..." if len(waiting) > 5 else "")
    problem = (
        f"{len(waiting)} groups of prompts have fewer than {FEW_OF_A_GROUP} effective samples that satisfy the hard "
        f"constraints, or none on one side of the wanted mean: {shown}."
    )
    if hopeless:
        raise ValueError(f"{problem} Draw more samples (fit_samples), or ask for means inside of the range.")
    warnings.warn(f"{problem} Their lambda stays 0 until later samples allow a fit.", stacklevel=2)


def _report_uncertain(fit: MomentFit, free: Tensor, names: Sequence[str], samples: int, first: bool) -> None:
    """Say which lambdas rest on few effective samples; refuse a first fit on next to none."""
    weak = [(float(fit.ess_K[k]), names[k]) for k in free.nonzero().flatten() if fit.ess_K[k] < FEW]
    if not weak:
        return
    shown = ", ".join(f"{name} on {ess:.1f}" for ess, name in sorted(weak)[:5]) + (", ..." if len(weak) > 5 else "")
    problem = (
        f"few effective samples under the target (ESS) of {samples} drawn are behind these moments' lambda: {shown}."
    )
    if first and float(fit.ess_K[free].max()) < min(TOO_FEW, SHARE * samples):
        raise ValueError(
            f"{problem} A fit on fewer than {TOO_FEW} is noise. Draw more samples (fit_samples), relax the constraints, or "
            "start from a model that is nearer to them."
        )
    warnings.warn(
        f"{problem} Below {FEW} the means are off by 0.1 and more; they get better as the policy finds the target and lambda "
        "is fitted again, or with more fit_samples.",
        stacklevel=2,
    )


def _by_batch(log_w: Tensor, key: Tensor) -> Tensor:
    """Log weights of one batch, self-normalised per prompt and scaled by their effective sample size.

    Batches of one window come from different policies; this weighs each by about the inverse of its variance.
    """
    keys, group = torch.unique(key, return_inverse=True)
    total = group_logsumexp(log_w, group, len(keys))
    log_ess = 2 * total - group_logsumexp(2 * log_w, group, len(keys))
    return torch.where(log_w > -torch.inf, log_w + (log_ess - total)[group], -torch.inf)
