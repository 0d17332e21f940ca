"""The two kinds of constraint of distributional control: for every sample, and on average.

Khalifa, Elsahar & Dymetman 2021 (arXiv 2012.11635): among all distributions that satisfy the constraints, the one closest
to the reference in KL is a(x) * b(x) * exp(lambda . phi(x)) / Z. For many prompts, one lambda that all share (Korbak et al.
2021, arXiv 2112.00791) or one for each group of prompts.
"""

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..features import Feature
from ..moment_window import Multiplier
from ..partition import prompt_key
from ..rollouts import Rollouts
from .base import Factor

GROUPS_SHOWN = 20  # in a report


class Pointwise(Factor):
    """b(x) in {0, 1}: every sample must have the feature.

    Args:
        feature: a function or text (see `hf_gdc.features`) that gives 0 or 1.
        name: its name in logs.

    Raises:
        ValueError: when scored, if the feature gives anything but 0 and 1.
    """

    hard = True

    def __init__(self, feature: "str | Callable | Feature", name: str | None = None):
        self.feature = Feature(feature, name)
        self.features = self.always = [self.feature]

    def log_score(self, rollouts: Rollouts) -> Tensor:
        value = self.feature(rollouts)
        wrong = (value != 0) & (value != 1)
        if bool(wrong.any()):
            raise ValueError(
                f"Pointwise feature {self.feature.name!r} must be 0 or 1 but gave {float(value[wrong][0]):g}. "
                "Threshold it, or use Moment or Reward for graded features."
            )
        return torch.where(value == 1, 0.0, -math.inf)

    def formula(self) -> str:
        return f"[{self.feature.name}]"

    def to_dict(self) -> dict:
        return {"feature": _spelling(self.feature), "name": self.feature.name}


class Moment(Factor):
    """exp(lambda * phi(x)) with lambda such that E_p[phi] = mean.

        Moment("contains:she", 0.5)                                     one lambda; the mean is over prompts
        Moment("contains:she", 0.5, per="topic")                        a lambda for each value of the column `topic`
        Moment("contains:she", {"fable": 0.5, "news": 0.3}, per="topic")

    Args:
        feature: a function or text (see `hf_gdc.features`).
        mean: the wanted mean under the target; with `per` also a mapping from group to mean, which leaves groups that it
            does not name alone.
        name: its name in logs.
        per: a column of the dataset, which groups the prompts, or "prompt" to take each by itself: every group has a
            lambda of its own, and its mean is over the prompts of that group.

    `lam` is solved for by the target, jointly for all moments and given all other factors: a number, or with `per` a
    mapping from the groups that have been fitted to their lambdas. A group that the pool of the first fit does not have
    (streaming prompts) has lambda 0 until recent samples of it are enough for a fit. Groups are called by `str` of the
    column's value, prompts by their text (chats as JSON).

    Raises:
        ValueError: a mean that is not a number, or a mapping without `per`; when scored, a column that is not there.
    """

    log_linear = True

    def __init__(
        self,
        feature: "str | Callable | Feature",
        mean: float | Mapping[str, float],
        name: str | None = None,
        per: str | None = None,
    ):
        self.feature, self.per = Feature(feature, name), per
        self.features = [self.feature]
        self.mean: float | dict[str, float]
        if isinstance(mean, Mapping):
            if per is None:
                raise ValueError(
                    f"the wanted mean of {self.feature.name!r} is a mapping from groups: say with `per` which column of the "
                    "dataset they are values of."
                )
            self.mean = {str(group): float(value) for group, value in mean.items()}
        else:
            self.mean = float(mean)
        if not all(math.isfinite(value) for value in (self.mean.values() if self._is_by_group else [self.mean])):
            raise ValueError(f"the wanted mean of {self.feature.name!r} must be a number, not {mean!r}.")
        self.lam: float | dict[str, float] = 0.0 if per is None else {}
        self._labels: dict[int, str] = {}  # of the groups seen in any process, by key

    @property
    def _is_by_group(self) -> bool:
        return isinstance(self.mean, dict)

    def log_score(self, rollouts: Rollouts) -> Tensor:
        if self.per is None:
            return self.lam * self.feature(rollouts)
        lam_B = torch.tensor([self.lam.get(group, 0.0) for group in self.groups(rollouts)], dtype=torch.float64)
        return lam_B * self.feature(rollouts)

    def groups(self, rollouts: Rollouts) -> list[str]:
        """The group of each sample's prompt.

        Raises:
            ValueError: the rollouts lack the column.
        """
        if self.per == "prompt":
            prompts = rollouts.prompts
            return [text if isinstance(text, str) else json.dumps(text, ensure_ascii=False) for text in prompts]
        if self.per not in rollouts.columns:
            has = ", ".join(f"`{column}`" for column in rollouts.columns) or "no others"
            raise ValueError(
                f"the moment of {self.feature.name!r} is per `{self.per}`, but the prompts have no such column; beside "
                f"`prompt` they have {has}."
            )
        return [str(value) for value in rollouts.columns[self.per]]

    def group_keys(self, rollouts: Rollouts, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """(B,) int64 keys of the groups, the same in every process; learns the names that other processes have seen."""
        if self.per is None:
            return torch.zeros(len(rollouts), dtype=torch.int64)
        groups = self.groups(rollouts)
        known = set(self._labels.values())
        for label in gather_texts(sorted(set(groups) - known), gather):
            self._labels[_group_key(label)] = label
        return torch.tensor([_group_key(group) for group in groups], dtype=torch.int64)

    def multipliers(self, keys: Sequence[int]) -> list[Multiplier]:
        """What is to be solved for, for groups with these keys."""
        if self.per is None:
            return [Multiplier(self.feature.name, self.mean, self.lam)]
        if self._is_by_group and not self.lam:
            self._check_names()
        found = []
        for group in (self._labels[key] for key in keys):
            mean = self.mean.get(group) if self._is_by_group else self.mean
            required = self._is_by_group and mean is not None
            found.append(Multiplier(self.named(group), mean, self.lam.get(group), grouped=True, required=required))
        return found

    def _check_names(self) -> None:
        """Say which groups of the mapping no prompt belongs to: a typing mistake, or they come later."""
        seen = set(self._labels.values())
        absent = [group for group in self.mean if group not in seen]
        if not absent:
            return
        problem = (
            f"no prompt so far has `{self.per}` = {', '.join(map(repr, absent))}, for which a mean of {self.feature.name!r} is "
            f"wanted; there are {', '.join(map(repr, sorted(seen)[:10]))}{', ...' if len(seen) > 10 else ''}."
        )
        if len(absent) == len(self.mean):
            raise ValueError(problem)
        warnings.warn(problem, stacklevel=2)

    def assign(self, keys: Tensor, lam: Tensor, fitted: Tensor) -> None:
        """Take over the solution for the groups with these keys, where there is one."""
        if self.per is None:
            self.lam = float(lam)
            return
        solved = zip(keys[fitted].tolist(), lam[fitted].tolist(), strict=True)
        self.lam = self.lam | {self._labels[key]: value for key, value in solved}

    def named(self, group: str) -> str:
        """NAME[group]; a long group, such as a prompt, is cut and told apart by its key."""
        short = group if len(group) <= 40 else f"{group[:30]}...{_group_key(group) % 16**6:06x}"
        return f"{self.feature.name}[{short}]"

    def report(self, rollouts: Rollouts, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """`base/NAME[group]` and `lambda/NAME[group]` of the groups with the most samples of all processes."""
        keys = gather(self.group_keys(rollouts, gather))
        values = gather(self.feature(rollouts))
        found, index, count = torch.unique(keys, return_inverse=True, return_counts=True)
        numbers = {}
        for k in count.argsort(descending=True, stable=True)[:GROUPS_SHOWN].tolist():
            group = self._labels[int(found[k])]
            numbers[f"base/{self.named(group)}"] = float(values[index == k].mean())
            numbers[f"lambda/{self.named(group)}"] = self.lam.get(group, 0.0)
        return numbers

    def formula(self) -> str:
        lam = f"{self.lam:.3g}" if self.per is None else f"lambda[{self.per}]"
        return f"exp({lam} * {self.feature.name})"

    def wanted(self) -> str:
        """E[...] = mean, as the target's formula shows it."""
        if self.per is None:
            return f"E[{self.feature.name}] = {self.mean:g}"
        if not self._is_by_group:
            return f"E[{self.feature.name} | each {self.per}] = {self.mean:g}"
        return ", ".join(f"E[{self.feature.name} | {self.per} = {group}] = {mu:g}" for group, mu in self.mean.items())

    def to_dict(self) -> dict:
        per = {} if self.per is None else {"per": self.per}
        return {"feature": _spelling(self.feature), "mean": self.mean, "name": self.feature.name} | per

    def state_dict(self) -> dict:
        if self.per is None:
            return {"lam": self.lam}
        return {"lam": dict(self.lam), "groups": list(self._labels.values())}

    def load_state_dict(self, state: dict) -> None:
        if self.per is None:
            self.lam = state["lam"]
            return
        self.lam = dict(state["lam"])
        self._labels = {_group_key(group): group for group in state["groups"]}


def _group_key(group: str) -> int:
    """A 63-bit key of a group's name, the same in every process and run."""
    return prompt_key(list(group.encode()))


def gather_texts(texts: Sequence[str], gather: Callable[[Tensor], Tensor]) -> list[str]:
    """The texts of all processes, as `gather` joins tensors of equal shape only; each process may have a different number."""
    rows = [list(text.encode()) for text in texts]
    sizes = gather(torch.tensor([[len(rows), max(map(len, rows), default=0)]]))
    count, width = sizes.amax(0).tolist()
    if count == 0:
        return []
    padded = torch.full((count, width + 1), -1, dtype=torch.int64)  # -1 ends a text; a row of -2 is none
    padded[len(rows) :] = -2
    for n, row in enumerate(rows):
        padded[n, : len(row)] = torch.tensor(row, dtype=torch.int64)
    joined = gather(padded).tolist()
    return [bytes(row[: row.index(-1)]).decode() for row in joined if row[0] != -2]


def _spelling(feature: Feature) -> str:
    if feature.spec is None:
        raise ValueError(
            f"feature {feature.name!r} can't be saved: it is a lambda or belongs to a script. Put it into a file and give "
            "it as 'my_features.py:function'."
        )
    return feature.spec
