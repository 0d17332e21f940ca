"""Targets as products of factors.

    log P(x) = sum_k weight_k * log_score_k(x)

A method is a factor: it says what its term of log P is, whether that can be -inf, and how it is fitted. The product knows
nothing of particular methods.

Left out: the factors themselves, each in a file of its own, and the partition Z. Shapes: B samples of one process,
N gathered ones, K moments.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..divergences import get_divergence
from ..features import Feature
from ..moment_window import MomentWindow
from ..partition import DivergenceEstimator
from ..rollouts import Rollouts
from ..target_files import read_target, write_target

BEFORE_JOINING = "log q before others joined"  # an entry of scores, where sampler_logp_B is the density of a mixture


@dataclass
class Context:
    """What a factor may need from where it is used.

    `reference_logp(rollouts)` gives log a (B,) on the CPU; `sample_reference(prompts)` draws from a, one completion for
    each prompt; `gather` joins a CPU tensor of equal length over processes (the identity on one). `extras` replaces what
    features get as TRL's `trainer_state`, `log_metric` and `log_extra`. `tokenizer` is the policy's; `policy()` gives its
    model, whole, for a with-block, for factors that put an adapter on its base.
    """

    reference_logp: Callable[[Rollouts], Tensor]
    sample_reference: Callable[[Sequence], Rollouts]
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor
    extras: dict = field(default_factory=dict)
    tokenizer: PreTrainedTokenizerBase | None = None
    policy: Callable[[], AbstractContextManager[nn.Module]] | None = None


class Factor:
    """One term of log P. A new method implements `log_score`, and the rest where it needs to.

    Class attributes:
        hard: the score may be -inf.
        log_linear: the score is lambda * feature with a wanted mean; the target solves for all such lambdas jointly. See
            `Moment`, the one factor of that kind.
        normalised: the factor alone is a probability of the completion given the prompt.
    """

    hard = False
    log_linear = False
    normalised = False
    features: Sequence[Feature] = ()  # what it reads of the completions; the report says their means
    always: Sequence[Feature] = ()  # those of them that are 1 for every sample of the target

    def bind(self, context: Context) -> None:
        """Receive what the factor needs; called once before it is used."""

    def log_score(self, rollouts: Rollouts) -> Tensor:
        """(B,) log of this factor, on the CPU in float64."""
        raise NotImplementedError

    def fit(self, rollouts: Rollouts, real: Rollouts | None = None) -> bool:
        """Learn from a batch (and from real data, where there is some); True if P changed."""
        return False

    def formula(self) -> str:
        """This factor in a line of mathematics."""
        raise NotImplementedError

    def to_dict(self) -> dict:
        """Arguments that make it again, JSON only.

        Raises:
            ValueError: it holds something that can't be written down.
        """
        return {}

    def state_dict(self) -> dict:
        """What was learned: tensors, numbers and lists; JSON only where `save_pretrained` shall write it down."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass

    def save_model(self, folder: Path) -> bool:
        """Write a learned model into this folder, if the factor has one; True if it did."""
        return False

    @classmethod
    def from_dict(cls, arguments: dict, folder: Path) -> "Factor":
        """The factor that `to_dict` wrote; `folder` has what `save_model` did."""
        return cls(**arguments)

    def __mul__(self, other: "Factor") -> "Target":
        return Target([*_terms(self), *_terms(other)])

    def __pow__(self, weight: float) -> "Target":
        return Target([(factor, weight * own) for factor, own in _terms(self)])

    def __repr__(self) -> str:
        return self.formula()


def _terms(factor: Factor) -> list[tuple[Factor, float]]:
    return factor.terms if isinstance(factor, Target) else [(factor, 1.0)]


class Target(Factor):
    """The unnormalised target P: a product of factors, each with a power.

        target = Reference() * Pointwise("contains:dragon") * Moment("contains:she", 0.5)

    Args:
        terms: factors with their powers, or plain factors.

    `version` is raised whenever a fit changes P.
    """

    def __init__(self, terms: Sequence["Factor | tuple[Factor, float]"]):
        self.terms = [term if isinstance(term, tuple) else (term, 1.0) for term in terms]
        for factor, weight in self.terms:
            if not isinstance(factor, Factor):
                raise ValueError(f"a target is a product of factors; {factor!r} is not one.")
            if factor.log_linear and weight != 1.0 or not weight > 0:
                raise ValueError(f"{factor.formula()} can't be raised to the power {weight:g}.")
        self.moments = [factor for factor, _ in self.terms if factor.log_linear]
        names = [factor.feature.name for factor in self.moments]
        if len(set(names)) < len(names):
            raise ValueError(f"each moment needs a feature of its own, but these were given: {', '.join(names)}.")
        named: dict[str, Feature] = {}
        for feature in self._features():
            if not named.setdefault(feature.name, feature).same_as(feature):
                raise ValueError(
                    f"two features are called {feature.name!r}: give them names, e.g. Pointwise(f, name='short')."
                )
        self._refuse_contradictions()
        self.version = 0
        self._window = MomentWindow()
        self._context: Context | None = None

    def _refuse_contradictions(self) -> None:
        """A moment of what a hard constraint already fixes to 1 contradicts it, or says it again."""
        for factor, _ in self.terms:
            for moment in self.moments:
                if any(moment.feature.same_as(feature) for feature in factor.always):
                    raise ValueError(
                        f"{factor.formula()} gives every sample {moment.feature.name} = 1, so {moment.wanted()} "
                        f"{'says it again' if moment.mean == 1 else 'contradicts it'}: drop one of the two."
                    )

    @property
    def ess(self) -> float:
        """Effective sample size of the last fit of the moments, 0 before the first."""
        return self._window.ess

    def _features(self) -> list[Feature]:
        return [feature for factor, _ in self.terms for feature in factor.features]

    @property
    def hard(self) -> bool:
        return any(factor.hard for factor, _ in self.terms)

    @property
    def normalised(self) -> bool:
        """Whether Z = 1 for every prompt, because P is one factor that is a probability."""
        return len(self.terms) == 1 and self.terms[0][1] == 1.0 and self.terms[0][0].normalised

    def bind(self, context: Context) -> None:
        self._context = context
        for factor, _ in self.terms:
            factor.bind(context)
        for feature in self._features():
            feature.extras |= context.extras

    def log_weight(self, rollouts: Rollouts) -> Tensor:
        """(B,) log P - log q in float64: the primary quantity.

        Raises:
            ValueError: a factor is NaN or infinite, so that P can't be normalised.
        """
        return self._sum(rollouts, self.terms) - rollouts.sampler_logp_B

    def log_score(self, rollouts: Rollouts) -> Tensor:
        """(B,) log P in float64."""
        return self._sum(rollouts, self.terms)

    def _sum(self, rollouts: Rollouts, terms) -> Tensor:
        total = torch.zeros(len(rollouts), dtype=torch.float64)
        for factor, weight in terms:
            score = weight * factor.log_score(rollouts)
            bad = torch.isnan(score) | (score == torch.inf)
            if bool(bad.any()):
                row = int(bad.nonzero()[0])
                raise ValueError(
                    f"the target can't be normalised: the log of {factor.formula()} is {float(score[row])} for "
                    f"{rollouts.describe(row)}. Bound the reward or raise its beta; of a model, check that its "
                    "weights and log-probs are finite."
                )
            total = total + score
        return total

    def fit(self, rollouts: Rollouts, real: Rollouts | None = None) -> bool:
        """Fit learned factors and, jointly, the moments' lambdas; raises `version` and returns True if P changed.

        The first call (a pool from the reference) always fits the moments. Later rollouts join a window of recent
        samples, weighted towards the target, and lambda is fitted again whenever the window's effective sample size has
        doubled: rare constraints leave few samples of the reference, but the trained policy gives many
        (`hf_gdc.moment_window`).

        Raises:
            ValueError: the moments can't be met, or the first pool has next to no effective samples.
        """
        changed = any([factor.fit(rollouts, real) for factor, _ in self.terms if not factor.log_linear])
        if self.moments:
            changed = self._fit_moments(rollouts) or changed
        self.version += changed
        return changed

    def _fit_moments(self, rollouts: Rollouts) -> bool:
        rest = [(factor, weight) for factor, weight in self.terms if not factor.log_linear]
        log_w = self._sum(rollouts, rest) - rollouts.sampler_logp_B
        phi = torch.stack([moment.feature(rollouts) for moment in self.moments], 1)
        gather = self._context.gather
        groups = torch.stack([moment.group_keys(rollouts, gather) for moment in self.moments], 1)
        self._window.add(gather(phi), gather(log_w), gather(rollouts.prompt_key_B), gather(groups))
        solved = self._window.fit([moment.multipliers for moment in self.moments])
        if solved is None:
            return False
        for moment, (keys, lam, fitted) in zip(self.moments, solved, strict=True):
            moment.assign(keys, lam, fitted)
        return True

    def report(
        self, prompts: Sequence = ("",), num_samples: int = 4096, rollouts: Rollouts | None = None
    ) -> dict[str, float]:
        """What to know before a long run, from samples of the reference (drawn, or given as `rollouts`).

        Returns each feature's mean under the reference (`base/NAME`), the fitted `lambda/NAME` (where a moment has groups of
        prompts, both for the 20 largest, as `NAME[group]`), `log_z` with its standard error, `in_support` (share of samples
        with P > 0), `kl_target_reference` (how far p is from a, in nats), `ess` and `prompts_without_support`. Fits the
        moments if that has not been done.
        """
        if rollouts is None:
            each = max(1, num_samples // len(prompts))
            rollouts = self._context.sample_reference([prompt for prompt in prompts for _ in range(each)])
        if self.moments and self.ess == 0:
            self.fit(rollouts)
        gather = self._context.gather
        log_score, logp = gather(self.log_score(rollouts)), gather(rollouts.sampler_logp_B)
        keys, group = torch.unique(gather(rollouts.prompt_key_B), return_inverse=True)
        estimate = DivergenceEstimator(log_score, logp, logp, group, len(keys), torch.ones_like(logp))
        log_z, stderr = estimate.log_z()
        distance, _ = estimate.divergence(get_divergence("kl"))  # with the reference in the policy's place
        named = {feature.name: feature(rollouts, allow_none=True) for feature in self._features()}
        numbers = {f"base/{name}": float(gather(values).nanmean()) for name, values in named.items()}
        for moment in self.moments:
            if moment.per is None:
                numbers[f"lambda/{moment.feature.name}"] = moment.lam
            else:
                numbers |= moment.report(rollouts, gather)
        numbers |= {"log_z": log_z, "log_z_stderr": stderr, "in_support": float(estimate.in_support_G.mean())}
        numbers |= {"kl_target_reference": distance, "ess": estimate.ess}
        return numbers | {"prompts_without_support": float(estimate.unknown)}

    def formula(self) -> str:
        parts = [factor.formula() + (f"^{weight:g}" if weight != 1.0 else "") for factor, weight in self.terms]
        wanted = [moment.wanted() for moment in self.moments]
        return "P(x) = " + " * ".join(parts) + (f"   with {', '.join(wanted)}" if wanted else "")

    def state_dict(self) -> dict:
        return {
            "version": self.version,
            "window": self._window.state_dict(),
            "factors": [factor.state_dict() for factor, _ in self.terms],
        }

    def load_state_dict(self, state: dict) -> None:
        self.version = state["version"]
        self._window.load_state_dict(state["window"])
        for (factor, _), own in zip(self.terms, state["factors"], strict=True):
            factor.load_state_dict(own)

    def save_pretrained(self, path: "str | Path") -> None:
        """Write the target to `path`/target.json, with copies of the files that its features come from and with the models
        that its factors learned.

        Raises:
            ValueError: a feature is a lambda or lives in a script: give it as "file.py:function"; or two files with
                features have one name.
        """
        write_target(self.terms, self.formula(), self.ess, Path(path))

    @classmethod
    def from_pretrained(
        cls, path: "str | Path", revision: str | None = None, trust_remote_code: bool = False
    ) -> "Target":
        """The target that `save_pretrained` wrote, lambdas included.

        Args:
            path: a folder or an id of the Hub.
            revision: branch, tag or commit on the Hub.
            trust_remote_code: from the Hub, fetch the Python files of its features too, which then run here.

        Raises:
            ValueError: no target there, or one with a factor that this version doesn't know.
        """
        kinds = {kind.__name__: kind for kind in Factor.__subclasses__()}
        terms, ess = read_target(path, kinds, revision, trust_remote_code)
        target = cls(terms)
        target._window.ess = ess
        return target
