"""PPO: the reverse KL to a(x) exp(r(x) / beta), with a critic and a clipped objective; or any target and divergence.

    max E[r] - beta KL(pi || a)   is   min KL(pi || p),   p(x) = a(x) exp(r(x) / beta) / Z

Schulman et al. 2017 (arXiv 1707.06347) for the clipped objective; Schulman et al. 2016 (arXiv 1506.02438) for the
advantages; Ziegler et al. 2019 (arXiv 1909.08593) for the KL penalty per token and its adaptive coefficient.

Reverse KL is additive over tokens: each token is rewarded with -beta (log pi - log a), the last one also with what the
target has beside a, the reward. Any other divergence gives -f'(pi/p) at the end. There is no KL penalty beside it: a is
in p already. Left out: value bootstrapping for cut completions, which are elements of the space as they stand.

Shapes: B samples of this process, N of all processes, T completion tokens.
"""

import copy
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..critics import add_critic, attach_critic, critic_parameters, load_critic, save_critic, split_critic
from ..divergences import get_divergence
from ..evaluation import Scored
from ..features import Feature
from ..loading import disable_dropout
from ..objectives import (
    adapted_kl_coef,
    clipped_policy_loss,
    clipped_value_loss,
    generalized_advantages,
    masked_moments,
    token_kl,
    whiten,
)
from ..ppo_arguments import PPOConfig
from ..reporting import warn_if_alike
from ..rollouts import Rollouts
from ..scoring import PolicyOutput
from ..targets.base import Factor, Target
from ..targets.reference import Reference
from ..targets.reward import Reward
from .policy_gradient import PolicyGradientTrainer

EXPLODED = 10.0  # times the value loss of predicting 0: a larger one is limited to that


class PPOTrainer(PolicyGradientTrainer):
    """PPO on text or chat prompts with reward functions, or with any target.

        PPOTrainer("my-model", reward_funcs=helpfulness, args=PPOConfig(output_dir="out"), train_dataset=prompts).train()
        PPOTrainer("my-model", target=Reference() * Pointwise("contains:dragon"), args=PPOConfig(divergence="js"))

    Args:
        model: see `PolicyGradientTrainer`, as for everything that is not said here.
        reward_funcs: one or several, with TRL's signature: the target is a(x) exp(r(x) / kl_coef).
        target: in their place, any target. With one `Reward` in it, that one's beta is the KL coefficient; otherwise
            reverse KL's rewards are in nats.
        reward_weights: of the reward functions; default 1.
        reward_processing_classes: tokenizers of those that are reward models: see `Reward`.

    Raises:
        ValueError: both or neither of `reward_funcs` and `target`; options that need one `Reward` without one; a hard
            constraint under a divergence that is infinite there.
    """

    uses_values = True

    def __init__(
        self,
        model,
        reward_funcs: "str | Callable | Sequence[str | Callable] | None" = None,
        args: PPOConfig | None = None,
        target: Factor | None = None,
        reward_weights: Sequence[float] | None = None,
        reward_processing_classes=None,
        **kwargs,
    ):
        args = PPOConfig(output_dir="ppo") if args is None else args
        if (reward_funcs is None) == (target is None):
            raise ValueError(
                "give either reward_funcs, for the target a(x) exp(r(x) / kl_coef), or a target of your own."
            )
        if target is None:
            reward = Reward(
                reward_funcs, args.kl_coef, reward_weights, reward_processing_classes=reward_processing_classes
            )
            target = Reference() * reward
        elif reward_weights is not None or reward_processing_classes is not None:
            raise ValueError(
                "reward_weights and reward_processing_classes go with reward_funcs; a target's Reward has its own."
            )
        whole = target if isinstance(target, Target) else Target([target])
        self.divergence = get_divergence(args.divergence, **(args.divergence_kwargs or {}))
        self.additive = self.divergence.name == "reverse_kl"
        if args.missing_eos_penalty is not None or args.kl_target is not None:
            whole = _with_own_rewards(whole)  # which change; the user's must not
        rewards = [factor for factor, power in whole.terms if isinstance(factor, Reward) and power == 1.0]
        self.reward = rewards[0] if len(rewards) == 1 else None
        self._check(whole, args)
        super().__init__(model, whole, args, **kwargs)
        if args.missing_eos_penalty is not None:
            ids = ",".join(map(str, self.actors.sampler.eos_ids))
            self.reward.features.append(Feature(f"cut:{ids}", "missing_eos"))
            self.reward.weights.append(-args.missing_eos_penalty)
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)  # every process starts the same adapter
            self.actors.scorer.critic = attach_critic(self.model, args.critic, args.critic_path)
        if args.disable_dropout:
            disable_dropout(self.model)  # a critic's adapter may have some
        self.parameter_blocks.always |= critic_parameters(self.model).keys()
        if self.optimizer is not None:  # the user's
            add_critic(self.optimizer, self.model, args.critic_learning_rate, self.lr_scheduler is not None)
        self._tokens_per_sample, self._mean_square = 1.0, 1.0  # of the current rollouts' returns, over all processes

    def _check(self, target: Target, args: PPOConfig) -> None:
        if target.hard and not self.divergence.admits_hard_constraints:
            raise ValueError(
                f"{self.divergence.name} is infinite where a hard constraint forbids a sample, so {target.formula()} gives no "
                "finite reward. Use divergence='js', kl, tv, hellinger or alpha below 1; or a soft constraint, "
                "Reward(feature, beta=0.1)."
            )
        for name in ("kl_target", "missing_eos_penalty"):
            if getattr(args, name) is not None and self.reward is None:
                raise ValueError(f"{name} changes the target's reward, so it needs reward_funcs or one Reward factor.")
        if args.kl_target is not None and (target.moments or not self.additive):
            raise ValueError(
                "kl_target moves the target at every set of rollouts, while moments' lambda and the log Z that other "
                "divergences need are fitted to one that stands still: drop kl_target, or use reverse_kl without moments."
            )
        if not (args.fit_samples or self.additive):
            warnings.warn(
                f"{self.divergence.name} needs log Z, and without fit_samples the first rollouts alone estimate it: set "
                "fit_samples, e.g. to 4096.",
                stacklevel=4,
            )

    @property
    def kl_coef(self) -> float:
        """beta as it is now; 1 where the rewards are in nats."""
        return 1.0 if self.reward is None else self.reward.beta

    # ---- rollouts: values, rewards, advantages ----

    def score_tokens(self, rollouts: Rollouts) -> None:
        out = self.actors.score_tokens(rollouts, values=True)
        tokens = rollouts.lengths_B.sum()
        self._averages.add({"policy/entropy_avg": float(out.entropy_BT.sum() / tokens)})

    def assign_credit(self, rollouts: Rollouts, scored_N: Scored) -> None:
        args, gather = self.args, self.actors.gather
        known_B = (rollouts.log_z_B > -torch.inf).to(rollouts.values_BT.device)
        mask_BT = rollouts.completion_mask_BT & known_B[:, None]
        rewards_BT = self.token_rewards(rollouts)
        if args.whiten_rewards:
            _, mean, variance = masked_moments(rewards_BT, mask_BT, gather)
            rewards_BT = whiten(rewards_BT, mask_BT, mean, variance, shift_mean=False)
        advantages_BT, returns_BT = generalized_advantages(
            rewards_BT, rollouts.values_BT, mask_BT, args.gamma, args.lam
        )
        tokens, mean, variance = masked_moments(advantages_BT, mask_BT, gather)
        self._averages.add({"policy/advantage_std": float(variance.sqrt())})
        if args.whiten_advantages:
            advantages_BT = whiten(advantages_BT, mask_BT, mean, variance)
        rollouts.advantages_BT = advantages_BT
        rollouts.returns_BT = torch.where(mask_BT, returns_BT, rollouts.values_BT)
        self._tokens_per_sample = max(float(tokens) / len(scored_N.log_score), 1.0)
        _, mean, spread = masked_moments(returns_BT, mask_BT, gather)
        self._mean_square = float(mean**2 + spread * (tokens - 1) / tokens.clamp_min(1))
        _, _, missed = masked_moments(returns_BT - rollouts.values_BT, mask_BT, gather)
        self._averages.add({"val/explained_variance": 1.0 - float(missed / spread) if spread > 0 else 0.0})
        self._report_rewards(scored_N)

    def token_rewards(self, rollouts: Rollouts) -> Tensor:
        """(B, T) rewards of the tokens: reverse KL's own for each, and what the completion earns at its last."""
        mask_BT, like = rollouts.completion_mask_BT, rollouts.policy_logps_BT
        known_B = rollouts.log_z_B > -torch.inf
        if self.additive:
            kl_BT = token_kl(rollouts.policy_logps_BT, rollouts.reference_logps_BT, self.args.kl_estimator)
            rewards_BT = torch.where(mask_BT, -self.kl_coef * kl_BT, 0.0)
            end_B = self.kl_coef * (rollouts.log_score_B - rollouts.scores["reference_logp"])
        else:
            rewards_BT = torch.zeros_like(like)
            log_z_B = torch.where(known_B, rollouts.log_z_B, 0.0)
            end_B = self.pseudo_reward(rollouts.policy_logp_B - rollouts.log_score_B + log_z_B)
        end_B = torch.where(known_B, end_B, 0.0).to(like.dtype).to(like.device)
        last_BT = mask_BT & (mask_BT.cumsum(-1) == mask_BT.sum(-1, keepdim=True))
        return rewards_BT + last_BT * end_B[:, None]

    def _report_rewards(self, scored_N: Scored) -> None:
        """Log what was earned, say when there is nothing to learn from, and move the KL coefficient."""
        scores_N = self.kl_coef * (scored_N.log_score - scored_N.reference_logp)
        if self.reward is not None:
            warn_if_alike(scores_N)
        share_N = torch.softmax(
            scored_N.policy_logp - scored_N.sampler_logp, 0
        )  # equal where the policy itself sampled
        kl = float(share_N @ (scored_N.policy_logp - scored_N.reference_logp))
        metrics = {"objective/kl": kl}
        if self.additive:
            score = float(share_N @ scores_N)
            metrics |= {"objective/scores": score, "objective/rlhf_reward": score - self.kl_coef * kl}
        if self.reward is not None:
            metrics["objective/kl_coef"] = self.kl_coef
        self._averages.add(metrics)
        if self.args.kl_target is not None:
            samples, horizon = len(scores_N), self.args.kl_horizon
            self._set_kl_coef(adapted_kl_coef(self.kl_coef, kl, self.args.kl_target, samples, horizon))

    def _set_kl_coef(self, kl_coef: float) -> None:
        self.reward.beta = kl_coef
        self.target.version += 1  # another target, another Z

    # ---- the loss ----

    def policy_loss(self, out: PolicyOutput, reward_B: Tensor, rollouts: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """PPO's losses from advantages and returns that were fixed with the rollouts; `reward_B` plays no part."""
        args, mask_BT, old_BT = self.args, rollouts.completion_mask_BT, rollouts.policy_logps_BT
        losses_BT, clipped_BT = clipped_policy_loss(out.logps_BT, old_BT, rollouts.advantages_BT, args.cliprange)
        errors_BT, held_BT = clipped_value_loss(
            out.values_BT, rollouts.values_BT, rollouts.returns_BT, args.cliprange_value
        )
        weight_BT = self._sampler_weight(rollouts)

        def per_sample(numbers_BT: Tensor) -> Tensor:
            """(B,) whose mean over the set of rollouts is the mean over its tokens."""
            return torch.where(mask_BT, numbers_BT, 0.0).sum(-1) / self._tokens_per_sample

        policy_B, value_B = per_sample(weight_BT * losses_BT), per_sample(weight_BT * errors_BT)
        scale = self._tokens_per_sample if args.loss_reduction == "sequence" else 1.0
        limit_B = self._value_limit(value_B.detach(), per_sample(weight_BT * self._zero_loss(rollouts.returns_BT)))
        log_ratio_BT = (out.logps_BT - old_BT).detach()
        metrics = {
            "loss/policy_avg": policy_B,
            "loss/value_avg": value_B,
            "policy/clipfrac_avg": per_sample(clipped_BT),
            "policy/approxkl_avg": per_sample(0.5 * log_ratio_BT**2),
            "val/clipfrac_avg": per_sample(held_BT),
            "val/ratio": per_sample(log_ratio_BT.exp()),
            "sampling/importance_ratio": per_sample(weight_BT.expand_as(mask_BT)),
        }
        loss_B = scale * policy_B + args.vf_coef * limit_B * value_B
        return loss_B, {name: value.detach() for name, value in metrics.items()}

    def _sampler_weight(self, rollouts: Rollouts) -> Tensor:
        """(B, T) or (B, 1) pi_old/q: what sampled may have been warped."""
        if self.args.importance_sampling_level == "sequence":
            log_w_BT = (rollouts.policy_logp_B - rollouts.sampler_logp_B)[:, None].to(rollouts.policy_logps_BT.dtype)
        else:
            log_w_BT = rollouts.policy_logps_BT - rollouts.sampler_logps_BT
        weight_BT, clip = log_w_BT.to(rollouts.policy_logps_BT.device).exp(), self.args.importance_clip
        return weight_BT if clip is None else weight_BT.clamp(max=clip)

    def _zero_loss(self, returns_BT: Tensor) -> Tensor:
        """(B, T) value losses of predicting 0, there or on average, whichever is larger."""
        return 0.5 * (returns_BT**2).clamp_min(max(self._mean_square, 1.0))

    def _value_limit(self, value_B: Tensor, zero_B: Tensor) -> Tensor:
        """(B,) factors, below 1 where the critic does far worse on a sample than predicting 0: it would drown the policy's
        gradient. The same however a set of rollouts is cut into micro-batches.

        Args:
            value_B: value losses. zero_B: those of predicting 0.

        Raises:
            ValueError: a value loss is not finite.
        """
        if not bool(value_B.isfinite().all()):
            raise ValueError(
                "the value loss is not finite: the critic has diverged. Lower learning_rate or critic_learning_rate, bound the "
                "reward, or start from an earlier checkpoint."
            )
        limit_B = EXPLODED * zero_B
        beyond_B = value_B > limit_B
        if bool(beyond_B.any()):
            warnings.warn(
                f"the value loss of {int(beyond_B.sum())} of {len(value_B)} samples is more than {EXPLODED:g} times that of "
                "predicting 0, and was limited to that: lower learning_rate or critic_learning_rate, or bound the reward.",
                stacklevel=2,
            )
        return torch.where(beyond_B, limit_B / value_B.clamp_min(1e-30), 1.0)

    # ---- the Trainer's hooks: the critic is trained, saved and loaded with the policy ----

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As the Trainer's, with a learning rate of the critic's own if asked."""
        made, rate = self.optimizer is None, self.args.critic_learning_rate
        optimizer = super().create_optimizer(model)
        if made and rate is not None:
            split_critic(optimizer, self.model, rate)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = self.args.output_dir if output_dir is None else output_dir
        if self.args.should_save:
            save_critic(self.model, folder, state_dict)
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self.is_fsdp_enabled:  # whose checkpoint has the critic among the weights
            load_critic(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            load_critic(self.model, self.state.best_model_checkpoint)

    def process_state(self) -> dict:
        numbers = {"tokens_per_sample": self._tokens_per_sample, "mean_square": self._mean_square}
        return super().process_state() | {"kl_coef": self.kl_coef} | numbers

    def load_process_state(self, state: dict) -> None:
        super().load_process_state(state)
        self._tokens_per_sample, self._mean_square = state["tokens_per_sample"], state["mean_square"]
        if self.args.kl_target is not None:
            self.reward.beta = state["kl_coef"]


def _with_own_rewards(target: Target) -> Target:
    """The target with copies of its Rewards."""

    def own(factor: Factor) -> Factor:
        if not isinstance(factor, Reward):
            return factor
        factor = copy.copy(factor)
        factor.features, factor.weights = list(factor.features), list(factor.weights)
        return factor

    return Target([(own(factor), power) for factor, power in target.terms])
