"""PPO: the reverse KL to a(x) exp(r(x) / beta), with a critic and a clipped objective; or any target and divergence.

    max E[r] - beta KL(pi || a)   is   min KL(pi || p),   p(x) = a(x) exp(r(x) / beta) / Z

Schulman et al. 2017 (arXiv 1707.06347) for the clipped objective; Schulman et al. 2016 (arXiv 1506.02438) for the
advantages; Ziegler et al. 2019 (arXiv 1909.08593) for the KL penalty per token and its adaptive coefficient.

Reverse KL is additive over tokens: each token is rewarded with -beta (log pi - log a), the last one also with what the
target has beside a, the reward. Any other divergence gives -f'(pi/p) at the end. There is no KL penalty beside it: a is
in p already. Left out: value bootstrapping for cut completions, which are elements of the space as they stand.

Shapes: B samples of this process, N of all processes, T completion tokens.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..critics import attach_critic, critic_parameters, load_critic, save_critic
from ..divergences import get_divergence
from ..evaluation import Scored
from ..features import Feature
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
        **kwargs,
    ):
        args = PPOConfig(output_dir="ppo") if args is None else args
        if (reward_funcs is None) == (target is None):
            raise ValueError(
                "give either reward_funcs, for the target a(x) exp(r(x) / kl_coef), or a target of your own."
            )
        if target is None:
            target = Reference() * Reward(reward_funcs, args.kl_coef, reward_weights)
        elif reward_weights is not None:
            raise ValueError("reward_weights go with reward_funcs; a target's Reward has its own.")
        whole = target if isinstance(target, Target) else Target([target])
        self.divergence = get_divergence(args.divergence, **(args.divergence_kwargs or {}))
        self.additive = self.divergence.name == "reverse_kl"
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
        if self.optimizer is not None:  # the user's
            self.optimizer.add_param_group({"params": critic_parameters(self.model)})
        self._tokens_per_sample = 1.0  # of the current rollouts, over all processes

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
        _, _, spread = masked_moments(returns_BT, mask_BT, gather)
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
        spread = float(scores_N.max() - scores_N.min())
        if self.reward is not None and len(scores_N) > 1 and spread <= 1e-9 * max(1.0, float(scores_N.abs().max())):
            warnings.warn(
                f"all {len(scores_N)} completions of a set of rollouts got the same reward, {float(scores_N[0]):.4g}: there is "
                "nothing to learn but the way back to the reference. Check the reward function on texts of your own, raise "
                "num_generations, or start from a model that earns it sometimes.",
                stacklevel=2,
            )
        kl = float((scored_N.policy_logp - scored_N.reference_logp).mean())
        metrics = {"objective/kl": kl}
        if self.additive:
            score = float(scores_N.mean())
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
        limit = self._value_limit(value_B, per_sample(weight_BT * rollouts.returns_BT**2))
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
        loss_B = scale * policy_B + args.vf_coef * limit * value_B
        return loss_B, {name: value.detach() for name, value in metrics.items()}

    def _sampler_weight(self, rollouts: Rollouts) -> Tensor:
        """(B, T) or (B, 1) pi_old/q: what sampled may have been warped."""
        if self.args.importance_sampling_level == "sequence":
            log_w_BT = (rollouts.policy_logp_B - rollouts.sampler_logp_B)[:, None].to(rollouts.policy_logps_BT.dtype)
        else:
            log_w_BT = rollouts.policy_logps_BT - rollouts.sampler_logps_BT
        weight_BT, clip = log_w_BT.to(rollouts.policy_logps_BT.device).exp(), self.args.importance_clip
        return weight_BT if clip is None else weight_BT.clamp(max=clip)

    def _value_limit(self, value_B: Tensor, squares_B: Tensor) -> Tensor | float:
        """A factor below 1 where the critic does far worse than predicting 0: it would drown the policy's gradient.

        Raises:
            ValueError: the value loss is not finite.
        """
        loss, limit = float(value_B.detach().mean()), EXPLODED * 0.5 * max(float(squares_B.mean()), 1.0)
        if not loss < float("inf"):
            raise ValueError(
                f"the value loss is {loss}: the critic has diverged. Lower learning_rate or critic_learning_rate, bound the "
                "reward, or start from an earlier checkpoint."
            )
        if loss <= limit:
            return 1.0
        warnings.warn(
            f"the value loss, {loss:.4g}, is more than {EXPLODED:g} times that of predicting 0, and was limited to "
            f"{limit:.4g}: lower learning_rate or critic_learning_rate, or bound the reward.",
            stacklevel=2,
        )
        return limit / loss

    # ---- the Trainer's hooks: the critic is trained, saved and loaded with the policy ----

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As the Trainer's, with a learning rate of the critic's own if asked."""
        made, rate = self.optimizer is None, self.args.critic_learning_rate
        optimizer = super().create_optimizer(model)
        if made and rate is not None:
            own = {id(parameter) for parameter in critic_parameters(self.model)}
            for group in list(optimizer.param_groups):
                critic = [parameter for parameter in group["params"] if id(parameter) in own]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in own]
                if critic:
                    optimizer.add_param_group({**group, "params": critic, "lr": rate})
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
        return super().process_state() | {"kl_coef": self.kl_coef, "tokens_per_sample": self._tokens_per_sample}

    def load_process_state(self, state: dict) -> None:
        super().load_process_state(state)
        self._tokens_per_sample = state["tokens_per_sample"]
        if self.args.kl_target is not None:
            self.reward.beta = state["kl_coef"]
