"""GDC: generation with distributional control, by f-DPG.

    grad D_f(pi || p) = E_{x ~ pi}[ f'(pi(x) / p(x)) * grad log pi(x) ]

Khalifa, Elsahar & Dymetman 2021 (arXiv 2012.11635) for the target; Go et al. 2023 (arXiv 2302.08215) for any f; Korbak et
al. 2022 (arXiv 2206.00761) for the baseline; Korbak et al. 2021 (arXiv 2112.00791) for one Z per prompt.
"""

from dataclasses import dataclass, field

from torch import Tensor

from ..arguments import PolicyGradientConfig, suggest_options
from ..divergences import available_divergences, get_divergence
from ..evaluation import LOG_NAMES, Scored
from ..objectives import score_function_loss
from ..reporting import warn_if_alike
from ..rollouts import Rollouts
from ..scoring import PolicyOutput
from ..searching import Searchable
from ..targets.base import Factor, Target
from ..targets.reward import Reward
from .policy_gradient import PolicyGradientTrainer


@suggest_options
@dataclass
class GDCConfig(PolicyGradientConfig):
    """Options of `GDCTrainer`; see `PolicyGradientConfig` for those of every trainer."""

    divergence: str = field(default="js", metadata={"help": "Which f-divergence: see available_divergences()."})
    divergence_kwargs: dict | str | None = field(
        default=None, metadata={"help": 'Its parameters, a JSON object: {"alpha": 0.5} for alpha.'}
    )
    reward_clip: float | None = field(
        default=None,
        metadata={"help": "Limit pseudo-rewards to [-c, c]; lets reverse KL meet hard constraints, at a bias."},
    )

    _VALID_DICT_FIELDS = PolicyGradientConfig._VALID_DICT_FIELDS + ["divergence_kwargs"]


class GDCTrainer(Searchable, PolicyGradientTrainer):
    """Trains a policy to match `target` in the divergence `args.divergence`.

        target = Reference() * Pointwise("contains:dragon") * Moment("contains:she", 0.5)
        GDCTrainer("my-model", target, args=GDCConfig(output_dir="out", max_steps=300)).train()

    Args: see `PolicyGradientTrainer`.

    Raises:
        ValueError: also where the divergence is infinite on what a hard constraint forbids.
    """

    searchable = ("num_iterations", "importance_clip", "reward_clip")

    def __init__(self, model, target: Factor, args: GDCConfig | None = None, **kwargs):
        args = GDCConfig(output_dir="gdc") if args is None else args
        self.divergence = get_divergence(args.divergence, **(args.divergence_kwargs or {}))
        whole = target if isinstance(target, Target) else Target([target])
        if whole.hard and args.reward_clip is None and not self.divergence.admits_hard_constraints:
            raise ValueError(
                f"{self.divergence.name} is infinite where a hard constraint forbids a sample, so {whole.formula()} gives no "
                "finite gradient. Use js, kl, tv, hellinger or alpha below 1; or a soft constraint, "
                "Reward(feature, beta=0.1); or limit the pseudo-reward with reward_clip=10."
            )
        super().__init__(model, whole, args, **kwargs)

    def search_metric(self) -> str:
        name = self.divergence.name
        return LOG_NAMES.get(name, name) if name in available_divergences() else LOG_NAMES["kl"]

    def pseudo_reward(self, log_t: Tensor) -> Tensor:
        reward = super().pseudo_reward(log_t)
        clip = self.args.reward_clip
        return reward if clip is None else reward.clamp(-clip, clip)

    def assign_credit(self, rollouts: Rollouts, scored_N: Scored) -> None:
        for factor, _ in self.target.terms:
            if isinstance(factor, Reward):
                warn_if_alike(self.actors.gather(factor.rewards(rollouts)))

    def policy_loss(self, out: PolicyOutput, reward_B: Tensor, rollouts: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        def like(numbers_B: Tensor) -> Tensor:
            return numbers_B.to(out.logp_B.dtype).to(out.logp_B.device)

        return score_function_loss(
            out.logp_B, like(rollouts.sampler_logp_B), reward_B, like(rollouts.baseline_B), self.args.importance_clip
        )
