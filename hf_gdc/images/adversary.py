"""The discriminator of an image GAN, with all that belongs to it: optimizer, schedule, losses, penalties, spectral norm.

Left out: what it is shown (`trainers.image_gan`), the losses themselves (`adversarial_losses`).

Shapes: B images of this process.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel, get_scheduler

from ..adversarial.losses import binary_terms, bound_terms, calibration, pair_terms
from ..divergences import Divergence, available_divergences, get_divergence
from .arguments import ImageGANConfig
from .augmentation import augment
from .players import apply_spectral_norm, synchronise_batch_norms


@dataclass
class Sides:
    """What a discriminator compares: as many generated as real images (B, C, H, W), with the same labels.

    Attributes:
        labels: (B,) or None. weights_B: of the real images, with mean 1 over their distribution; None: all 1.
    """

    real: Tensor
    fake: Tensor
    labels: Tensor | None = None
    weights_B: Tensor | None = None


class Adversary:
    """A discriminator that is trained.

    Args:
        model: takes `pixel_values` and `labels`, gives `logits` (B,); moved to the accelerator's device.
        divergence: whose bound it climbs if `discriminator_loss` is "bound".
        autocast: makes the context of mixed precision.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: ImageGANConfig,
        divergence: Divergence,
        accelerator: Accelerator,
        autocast: Callable[[], AbstractContextManager],
    ):
        self.args, self.divergence, self.accelerator, self.autocast = args, divergence, accelerator, autocast
        self.model = synchronise_batch_norms(model.to(accelerator.device), accelerator)
        if args.spectral_norm:
            apply_spectral_norm(self.model)
        self.optimizer = None
        if args.discriminator_steps:
            betas = (args.adam_beta1, args.adam_beta2)
            self.optimizer = torch.optim.Adam(
                self.model.parameters(), args.discriminator_learning_rate, betas, args.adam_epsilon, fused=True
            )
        self.updates = 0
        self.scheduler: torch.optim.lr_scheduler.LRScheduler | None = None

    def create_scheduler(self, num_training_steps: int) -> None:
        """The generator's schedule, for as many steps as the generator takes times the discriminator's steps for each."""
        updates = self.args.discriminator_steps
        if updates:
            self.scheduler = get_scheduler(
                self.args.lr_scheduler_type,
                optimizer=self.optimizer,
                num_warmup_steps=self.args.get_warmup_steps(num_training_steps) * updates,
                num_training_steps=num_training_steps * updates,
                scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
            )

    # ---- learning ----

    def update(self, micro_batches: list[Sides]) -> dict[str, float]:
        """One step of the optimizer on all micro-batches together; what was measured."""
        self.model.train()
        self.optimizer.zero_grad()
        metrics: dict[str, Tensor] = {}
        for sides in micro_batches:
            with self.autocast():
                loss, numbers = self.loss(sides)
            self.accelerator.backward(loss / len(micro_batches))
            for name, value in numbers.items():
                metrics[name] = metrics.get(name, 0.0) + value.detach() / len(micro_batches)
        self._average_gradients()
        if self.args.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.updates += 1
        return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))

    def loss(self, sides: Sides) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with its penalties, and its parts."""
        args = self.args
        every = args.penalty_interval
        gammas = {"r1": args.r1_gamma * every, "r2": args.r2_gamma * every} if self.updates % every == 0 else {}
        real, fake = (augment(images, args.augmentation).detach() for images in (sides.real, sides.fake))
        real.requires_grad_(gammas.get("r1", 0) > 0)
        fake.requires_grad_(gammas.get("r2", 0) > 0)
        real_B, fake_B = (self.model(images, sides.labels).logits for images in (real, fake))
        loss = self.plain_loss(real_B, fake_B, sides.weights_B)
        numbers = {"discriminator/loss": loss, "discriminator/accuracy": accuracy(real_B, fake_B)}
        numbers |= {"logits/real": real_B.mean(), "logits/fake": fake_B.mean()}
        for name, logits_B, images in (("r1", real_B, real), ("r2", fake_B, fake)):
            if gamma := gammas.get(name):
                penalty = squared_gradient_norm(logits_B, images).mean()
                loss = loss + gamma / 2 * penalty
                numbers[f"discriminator/{name}"] = penalty
        return loss, numbers

    def plain_loss(self, real_B: Tensor, fake_B: Tensor, weights_B: Tensor | None) -> Tensor:
        """Of logits alone. Weights of real images have mean 1 over their distribution, so they are not normalised again."""
        if self.args.discriminator_loss == "relativistic":
            # One generated image for each real one, not all pairs: those would depend on the number of processes.
            terms_B = pair_terms(real_B, fake_B).diagonal()
            return weighted_mean(terms_B, weights_B)
        if self.args.discriminator_loss == "bound":
            real_B, fake_B = bound_terms(real_B, fake_B, self.divergence.f, self.divergence.f_prime)
        else:
            real_B, fake_B = binary_terms(real_B, fake_B)
        return weighted_mean(real_B, weights_B) + fake_B.mean()

    def _average_gradients(self) -> None:
        """Over processes; by hand, because a wrapped model could be differentiated neither twice nor by the generator."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        mean = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, part in zip(gradients, mean.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    # ---- judging ----

    def log_ratio(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """(B,) log p/q of generated images, with a graph through them alone: what the generator learns from."""
        self.model.requires_grad_(False)
        logits_B = self.model(augment(images, self.args.augmentation), labels).logits
        self.model.requires_grad_(True)
        if self.args.discriminator_loss == "relativistic":
            logits_B = logits_B - calibration(self.accelerator.gather(logits_B.detach()))
        return logits_B

    @torch.no_grad()
    def metrics(self, sides: Sides) -> dict[str, float]:
        """Accuracy, and the lower bound of every divergence D_f(q || p) that its logits give, on any number of images."""
        training, size = self.model.training, self.args.per_device_eval_batch_size
        self.model.eval()
        labels = [None] * len(sides.real) if sides.labels is None else sides.labels.split(size)
        real_B, fake_B = (
            torch.cat(
                [self.model(part, own).logits for part, own in zip(images.split(size), labels, strict=False)]
            ).double()
            for images in (sides.real, sides.fake)
        )
        self.model.train(training)
        if self.args.discriminator_loss == "relativistic":
            constant = calibration(fake_B)
            real_B, fake_B = real_B - constant, fake_B - constant
        metrics = {"discriminator_accuracy": float(accuracy(real_B, fake_B))}
        for divergence in [get_divergence(name) for name in available_divergences() if name not in ("alpha", "tv")]:
            over_p_B, over_q_B = bound_terms(real_B, fake_B, divergence.f, divergence.f_prime)
            metrics[f"{divergence.name}_bound"] = -float(over_p_B.mean() + over_q_B.mean())
        return metrics

    # ---- saving ----

    def state_dict(self) -> dict:
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler}
        state = {name: None if part is None else part.state_dict() for name, part in parts.items()}
        return {"model": self.model.state_dict(), "updates": self.updates, **state}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]
        for name, part in (("optimizer", self.optimizer), ("scheduler", self.scheduler)):
            if part is not None:
                part.load_state_dict(state[name])

    def save_pretrained(self, folder: str) -> None:
        """The model, with the spectral norm worked into its weights."""
        weights = {name: tensor for name, tensor in self.model.state_dict().items() if ".parametrizations." not in name}
        training = self.model.training
        self.model.eval()  # training would move the estimate of the norm
        for name, module in self.model.named_modules():
            if parametrize.is_parametrized(module, "weight"):
                weights[f"{name}.weight"] = module.weight.detach()
        self.model.train(training)
        self.model.save_pretrained(folder, state_dict=weights)


def weighted_mean(values_B: Tensor, weights_B: Tensor | None) -> Tensor:
    return values_B.mean() if weights_B is None else (weights_B.to(values_B) * values_B).mean()


def accuracy(real_B: Tensor, fake_B: Tensor) -> Tensor:
    """Share of logits on the right side of 0, of both sides alike; 1/2 where the discriminator knows nothing."""
    return ((real_B > 0).float().mean() + (fake_B < 0).float().mean()) / 2


def squared_gradient_norm(logits_B: Tensor, inputs: Tensor) -> Tensor:
    """(B,) ||grad_x l(x)||^2, differentiable: R1 on real and R2 on generated images (Mescheder et al. 2018, 1801.04406).

    Args:
        inputs: (B, ...) with `requires_grad`, from which `logits_B` was computed, each logit from its own row.
    """
    (gradient,) = torch.autograd.grad(logits_B.sum(), inputs, create_graph=True)
    return gradient.flatten(1).square().sum(1)
