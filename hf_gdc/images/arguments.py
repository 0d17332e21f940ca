"""Options of the image GAN."""

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..arguments import suggest_options
from .augmentation import AUGMENTATIONS

DISCRIMINATOR_LOSSES = ("bce", "relativistic", "bound")
CONSTRAINED_SIDES = ("data", "generator")


@suggest_options
@dataclass
class ImageGANConfig(TrainingArguments):
    """Options of `ImageGANTrainer`; `max_steps` and learning rates without a suffix are the generator's."""

    # TrainingArguments' defaults that don't fit: DCGAN's (Radford et al. 2016, arXiv 1511.06434)
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of the generator."})
    adam_beta1: float = field(default=0.5, metadata={"help": "Adam's momentum, of both players."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of both learning rates."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Real, and generated, images of a step."})
    per_device_eval_batch_size: int = field(default=500, metadata={"help": "Images at once outside of training."})
    logging_steps: float = field(default=100, metadata={"help": "Log every so many steps."})
    remove_unused_columns: bool | None = field(default=False, metadata={"help": "Keep the dataset's columns."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Every batch is full."})

    # The game
    divergence: str = field(
        default="non_saturating",
        metadata={
            "help": "Which f-divergence the generator lowers: see available_divergences(); js is the minimax loss."
        },
    )
    divergence_kwargs: dict | str | None = field(
        default=None, metadata={"help": 'Its parameters, a JSON object: {"alpha": 0.5} for alpha.'}
    )
    discriminator_loss: str = field(
        default="bce",
        metadata={"help": "bce, relativistic, or bound: the divergence's own variational bound, from the logit."},
    )
    discriminator_steps: int = field(
        default=1, metadata={"help": "Updates of the discriminator for one of the generator; 0 keeps it as it is."}
    )
    discriminator_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak learning rate of the discriminator (TTUR). Default: learning_rate."}
    )
    r1_gamma: float = field(default=0.0, metadata={"help": "Penalty gamma/2 ||grad l||^2 on real images."})
    r2_gamma: float = field(default=0.0, metadata={"help": "The same on generated images."})
    penalty_interval: int = field(
        default=1,
        metadata={"help": "Take R1 and R2 at every so many updates, and so many times as heavy (lazy regularisation)."},
    )
    spectral_norm: bool = field(
        default=False, metadata={"help": "Spectral normalisation of the discriminator's layers, in training."}
    )
    augmentation: list[str] = field(
        default_factory=list,
        metadata={"help": f"What the discriminator sees through, on both sides: {', '.join(AUGMENTATIONS)}."},
    )
    ema_decay: float = field(
        default=0.999,
        metadata={
            "help": "Of the moving average of the generator's weights that is evaluated and saved; 0: the last ones."
        },
    )

    # The target
    constrain: str = field(
        default="data",
        metadata={
            "help": "Where the target's factors enter: data weighs the real images by them, for any feature; generator adds "
            "their log to the log ratio, for features that are differentiable Tensors."
        },
    )
    fit_samples: int = field(default=20_000, metadata={"help": "Real images on which the moments and Z are fitted."})

    # Reports
    eval_samples: int = field(
        default=2_000, metadata={"help": "Images that `evaluate` compares on each side, at most."}
    )
    sample_steps: int = field(default=500, metadata={"help": "Write a grid of samples every so many steps; 0: never."})
    sample_grid: int = field(default=64, metadata={"help": "Images in such a grid."})
    overwrite: bool = field(
        default=False,
        metadata={"help": "Start in an output_dir that is not empty: its checkpoints are deleted, files replaced."},
    )

    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["divergence_kwargs"]

    def __post_init__(self):
        super().__post_init__()
        if self.data_seed is None:
            self.data_seed = self.seed  # or processes, which are seeded apart, would shuffle apart
        if self.discriminator_learning_rate is None:
            self.discriminator_learning_rate = self.learning_rate
        for name, known in (("discriminator_loss", DISCRIMINATOR_LOSSES), ("constrain", CONSTRAINED_SIDES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, but is {getattr(self, name)!r}.")
        unknown = [name for name in self.augmentation if name not in AUGMENTATIONS]
        if unknown:
            raise ValueError(f"unknown augmentation {unknown[0]!r}; known: {', '.join(AUGMENTATIONS)}.")
        for name in ("discriminator_steps", "r1_gamma", "r2_gamma", "sample_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} can't be negative, but is {getattr(self, name)}.")
        for name in ("penalty_interval", "fit_samples", "eval_samples", "sample_grid"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), but is {self.ema_decay}; 0 keeps no average.")
        if self.fp16:
            raise ValueError("fp16 would need a loss scaler for each of the two players: use bf16.")
