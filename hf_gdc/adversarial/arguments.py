"""Options of adversarial training, for GANs of text and for the unified objective.

Left out: what they do, which stands beside the trainers (`trainers/adversarial`, `trainers/gan`, `trainers/unified`).
"""

from dataclasses import dataclass, field

from ..arguments import PolicyGradientConfig, suggest_options
from .game import ACTIONS

LOSSES = ("bce", "bradley_terry", "relativistic", "bound")
DATA_TERMS = ("ml", "nce", "critic")


@suggest_options
@dataclass
class AdversarialConfig(PolicyGradientConfig):
    """Options that `GANTrainer` and `UnifiedTrainer` share; see `PolicyGradientConfig` for those of every trainer."""

    num_generations: int = field(
        default=8,
        metadata={"help": "Completions per prompt. For texts without prompts it becomes 1: each is a sample."},
    )
    fit_samples: int = field(
        default=0,
        metadata={"help": "Samples of the reference that estimate Z first; the target moves, so few are needed."},
    )
    divergence: str = field(default="js", metadata={"help": "Which f-divergence: see available_divergences()."})
    divergence_kwargs: dict | str | None = field(
        default=None, metadata={"help": 'Its parameters, a JSON object: {"alpha": 0.5} for alpha.'}
    )
    reward_clip: float | None = field(default=None, metadata={"help": "Limit pseudo-rewards to [-c, c], at a bias."})

    # The discriminator's training
    discriminator_loss: str = field(
        default="bce",
        metadata={
            "help": "bce; bradley_terry (pairs of one prompt); relativistic (all pairs); bound: that of the divergence, from "
            "the logit."
        },
    )
    discriminator_learning_rate: float | None = field(
        default=None, metadata={"help": "Of its AdamW, constant. Default: learning_rate."}
    )
    discriminator_weight_decay: float = field(default=0.0, metadata={"help": "Of its AdamW."})
    discriminator_steps: int = field(default=1, metadata={"help": "Its optimizer steps on each set of rollouts."})
    discriminator_target_accuracy: float | None = field(
        default=None, metadata={"help": "It rests while its accuracy on fresh samples is above this."}
    )
    discriminator_label_smoothing: float = field(
        default=0.0, metadata={"help": "bce: real texts count as sampled with this probability."}
    )
    discriminator_replay_samples: int = field(
        default=0, metadata={"help": "So many earlier samples, weighted by pi/q, join each set that it learns from."}
    )
    discriminator_replay_window: int = field(
        default=4096, metadata={"help": "The most earlier samples of a process to replay from."}
    )
    spectral_norm: bool = field(default=False, metadata={"help": "Spectral normalisation of its linear layers."})
    r1: float = field(
        default=0.0, metadata={"help": "Weight of half the squared gradient by the embeddings of real texts."}
    )
    r2: float = field(default=0.0, metadata={"help": "The same, of samples."})

    # The game
    mle_steps: int = field(
        default=0, metadata={"help": "First steps in which the policy learns the real texts by maximum likelihood."}
    )
    discriminator_warmup_steps: int = field(
        default=0, metadata={"help": "Steps after those in which the discriminator alone learns."}
    )
    demonstrations: int = field(
        default=0,
        metadata={"help": "So many real texts join each set of rollouts of a process, as samples of the target."},
    )
    on_collapse: str = field(
        default="warn",
        metadata={
            "help": "When the sides are separable, or samples are copies of each other: warn, pause (it rests), stop."
        },
    )
    collapse_patience: int = field(default=10, metadata={"help": "Sets of rollouts in a row that make it a collapse."})

    _VALID_DICT_FIELDS = PolicyGradientConfig._VALID_DICT_FIELDS + ["divergence_kwargs"]

    def __post_init__(self):
        super().__post_init__()
        for name, known in (("discriminator_loss", LOSSES), ("on_collapse", ACTIONS)):
            _check_choice(self, name, known)
        for name in ("discriminator_steps", "collapse_patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}.")
        names = ["discriminator_replay_samples", "discriminator_replay_window", "r1", "r2", "mle_steps"]
        names += ["discriminator_warmup_steps", "demonstrations", "discriminator_weight_decay"]
        for name in names:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} can't be negative, but is {getattr(self, name)}.")
        rate = self.discriminator_learning_rate
        if rate is not None and not rate > 0:
            raise ValueError(f"discriminator_learning_rate must be positive, but is {rate}.")
        if not 0 <= self.discriminator_label_smoothing < 0.5:
            raise ValueError(
                f"discriminator_label_smoothing must be in [0, 0.5), but is {self.discriminator_label_smoothing}."
            )
        if self.discriminator_label_smoothing and self.discriminator_loss != "bce":
            raise ValueError(f"discriminator_label_smoothing is for bce, not for {self.discriminator_loss}.")
        goal = self.discriminator_target_accuracy
        if goal is not None and not 0.5 < goal <= 1:
            raise ValueError(f"discriminator_target_accuracy must be in (0.5, 1], but is {goal}.")
        if self.warped and (self.demonstrations or self.discriminator_replay_samples):
            raise ValueError(
                "demonstrations and discriminator_replay_samples are weighed by the policy's own probabilities: they need "
                "sampling without temperature, top_k, top_p, min_p and repetition_penalty."
            )

    @property
    def warped(self) -> bool:
        """Whether what is sampled is not the policy itself."""
        options = (self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        return options != (1.0, 0, 1.0, None, 1.0)


@suggest_options
@dataclass
class GANConfig(AdversarialConfig):
    """Options of `GANTrainer`."""

    token_credit: bool = field(
        default=True,
        metadata={"help": "With a dense discriminator, credit for every token by the divergences of all prefixes."},
    )
    gamma: float = field(
        default=1.0, metadata={"help": "Discount per token of that credit; 1 gives the exact gradient."}
    )
    cliprange: float | None = field(
        default=None, metadata={"help": "PPO's clipped objective: pi/pi_old counts up to 1 +- this. None: exact."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be between 0 and 1, but is {self.gamma}.")
        if self.cliprange is not None and not self.cliprange > 0:
            raise ValueError(f"cliprange must be positive, but is {self.cliprange}.")
        if self.cliprange is not None and self.warped:
            raise ValueError(
                "cliprange limits pi/pi_old of the policy that was sampled: it needs sampling without temperature, top_k, "
                "top_p, min_p and repetition_penalty."
            )
        if self.cliprange is not None and self.demonstrations:
            raise ValueError("cliprange limits steps away from what sampled: it has no place for demonstrations.")
        if self.replay_samples:
            raise ValueError(
                "replay_samples replays samples of a target that stands still; here use discriminator_replay_samples (for the "
                "discriminator) or demonstrations (for the policy)."
            )


@suggest_options
@dataclass
class UnifiedConfig(AdversarialConfig):
    """Options of `UnifiedTrainer`."""

    data_weight: float = field(
        default=1.0, metadata={"help": "lambda: the weight of the energy's distance to the data against the policy's."}
    )
    data_term: str = field(
        default="ml",
        metadata={
            "help": "How the energy learns the data: ml (maximum likelihood), nce (discriminator_loss of its log-ratio to the "
            "policy), critic (the divergence itself, by a second discriminator)."
        },
    )
    reference_negatives: int = field(
        default=0,
        metadata={
            "help": "So many samples of the reference join each set that a process's energy learns from: a multiple of its "
            "real texts."
        },
    )
    distil: bool = field(
        default=True, metadata={"help": "The first term's gradient in the energy; without it lambda is only a scale."}
    )

    def __post_init__(self):
        super().__post_init__()
        _check_choice(self, "data_term", DATA_TERMS)
        if not self.data_weight > 0:
            raise ValueError(f"data_weight must be positive, but is {self.data_weight}.")
        if self.reference_negatives < 0:
            raise ValueError(f"reference_negatives can't be negative, but is {self.reference_negatives}.")
        if self.discriminator_replay_samples:
            raise ValueError(
                "discriminator_replay_samples corrects a log-ratio to the policy, and an energy's expectations need no earlier "
                "samples: use reference_negatives."
            )
        if self.warped and (self.reference_negatives or self.data_term == "nce"):
            raise ValueError(
                "reference_negatives and nce need the policy's own density of every text: sample without temperature, top_k, "
                "top_p, min_p and repetition_penalty."
            )


def _check_choice(args, name: str, known: tuple[str, ...]) -> None:
    if getattr(args, name) not in known:
        raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, but is {getattr(args, name)!r}.")
