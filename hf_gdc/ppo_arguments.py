"""Options of PPO, under the names that TRL 1.12's PPO has for them where it has them.

Left out: what they do, which stands beside the trainer (`trainers/ppo`).
"""

from dataclasses import dataclass, field

from .arguments import PolicyGradientConfig, suggest_options
from .critics import KINDS


@suggest_options
@dataclass
class PPOConfig(PolicyGradientConfig):
    """Options of `PPOTrainer`; see `PolicyGradientConfig` for those of every trainer.

    Names and defaults are those of TRL 1.12's PPO; where ours differ, `recipes/ppo/README.md` says which is which.
    """

    learning_rate: float = field(default=3e-6, metadata={"help": "Peak learning rate of AdamW."})
    num_iterations: int = field(default=4, metadata={"help": "PPO epochs over a set of rollouts."})
    fit_samples: int = field(
        default=0,
        metadata={"help": "Samples of the reference that fit moments and estimate Z first; reverse KL needs none."},
    )

    # The target
    kl_coef: float = field(
        default=0.05, metadata={"help": "beta: the price of a nat of KL to the reference, in units of the reward."}
    )
    kl_target: float | None = field(
        default=None, metadata={"help": "Adapt kl_coef until KL(pi || a), in nats per completion, is this."}
    )
    kl_horizon: float = field(default=10000, metadata={"help": "Completions over which kl_coef adapts."})
    kl_estimator: str = field(
        default="k1",
        metadata={"help": "Per-token KL in the reward: k1 gives KL's exact gradient, k3 varies less and does not."},
    )
    divergence: str = field(default="reverse_kl", metadata={"help": "Which f-divergence: see available_divergences()."})
    divergence_kwargs: dict | str | None = field(
        default=None, metadata={"help": 'Its parameters, a JSON object: {"alpha": 0.5} for alpha.'}
    )
    missing_eos_penalty: float | None = field(
        default=None,
        metadata={"help": "Taken off the reward of a completion that was cut; it is a part of the target."},
    )

    # The critic
    critic: str = field(
        default="shared",
        metadata={
            "help": "shared: a head on the policy's hidden states; adapter: a second adapter on the same base; separate: "
            "a copy of the backbone."
        },
    )
    critic_path: str | None = field(default=None, metadata={"help": "Folder of a saved critic to start from."})
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the critic's own weights. Default: learning_rate."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    cliprange_value: float | None = field(
        default=0.2, metadata={"help": "How far values may move on one set of rollouts (YAML null: any)."}
    )

    # The objective
    cliprange: float | None = field(
        default=0.2, metadata={"help": "pi/pi_old counts up to 1 +- this (YAML null: no limit)."}
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    lam: float = field(default=0.95, metadata={"help": "lambda of generalized advantage estimation."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale per-token rewards to variance 1."})
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Shift and scale advantages to mean 0 and variance 1, over all processes."}
    )
    loss_reduction: str = field(
        default="token",
        metadata={"help": "token: mean over the tokens of a set of rollouts; sequence: sums, mean over completions."},
    )
    importance_sampling_level: str = field(
        default="sequence",
        metadata={
            "help": "pi_old/q, where sampling was warped, of whole completions (exact) or of each token (varies less)."
        },
    )

    _VALID_DICT_FIELDS = PolicyGradientConfig._VALID_DICT_FIELDS + ["divergence_kwargs"]

    def __post_init__(self):
        super().__post_init__()
        choices = {"critic": KINDS, "kl_estimator": ("k1", "k3"), "loss_reduction": ("token", "sequence")}
        choices |= {"importance_sampling_level": ("sequence", "token")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, but is {getattr(self, name)!r}.")
        for name in ("kl_coef", "kl_horizon", "kl_target", "cliprange", "cliprange_value", "missing_eos_penalty"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                zero = name == "kl_coef" and value == 0
                why = ": a(x) exp(r(x) / 0) is no target, so use a small one, such as 0.001" if zero else ""
                raise ValueError(f"{name} must be positive, but is {value}{why}.")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, but is {getattr(self, name)}.")
        if self.vf_coef < 0:
            raise ValueError(f"vf_coef can't be negative, but is {self.vf_coef}.")
        if self.replay_samples:
            raise ValueError("replay_samples mixes in samples without values or per-token log-probs: use GDCTrainer.")
        if self.critic == "adapter" and (self.activation_checkpointing or self.gradient_checkpointing):
            raise ValueError(
                "critic='adapter' switches adapters in a forward, and activation checkpointing would run it again with "
                "the wrong one: switch activation checkpointing off, or use critic='shared'."
            )
