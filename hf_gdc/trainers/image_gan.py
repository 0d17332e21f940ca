"""Images: a GAN whose generator lowers any f-divergence, by the other estimator of the policy gradient.

    grad D_f(q || p) = E_z[ grad f'(q(G(z)) / p(G(z))) ],     log q/p = -l(x) at the discriminator's optimum

So one loss is the minimax GAN (js), the non-saturating one, reverse KL and the rest (Nowozin et al. 2016, arXiv 1606.00709;
`objectives.pathwise`). p is the data's distribution times the factors of a `target`: hard constraints, moments, rewards on
images. Either the real images are weighted by them, so that the discriminator sees p itself, or their log is added to the
log ratio, so that the generator follows their gradient.

A step updates the discriminator `discriminator_steps` times, each on its own real images, then the generator once. The loop
is `transformers.Trainer`'s. Left out: the discriminator's side (`images/adversary`), adapters, sharded models.

Shapes: B images of this process.
"""

import copy
import math
from collections.abc import Callable
from itertools import islice

import torch
from accelerate.utils import set_seed
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)

from ..adversarial.losses import has_bound
from ..checkpoints import SafeCheckpoints
from ..divergences import get_divergence
from ..images.adversary import Adversary, Sides
from ..images.arguments import ImageGANConfig
from ..images.batches import ImageBatch, no_density
from ..images.data import ImageCollator, rows_of
from ..images.grids import save_grid, track_image
from ..images.players import check_players, moving_average, synchronise_batch_norms
from ..models import DCGANDiscriminator
from ..objectives import pathwise
from ..reporting import Averages
from ..targets.base import Context, Factor, Target


class ImageGANTrainer(SafeCheckpoints, Trainer):
    """Trains a generator of images against a discriminator.

        generator = DCGANGenerator(DCGANConfig(image_size=8))
        data = load_images("digits", "train", image_size=8)
        ImageGANTrainer(generator, args=ImageGANConfig(output_dir="out", max_steps=4000), train_dataset=data).train()

    Args:
        model: the generator: a Hub id, path or model that takes `latents` (B, config.latent_size), and `labels` (B,) where
            `config.num_classes` > 0, and gives `pixel_values` in [-1, 1].
        discriminator: the same, or None for a `DCGANDiscriminator` of the generator's configuration: takes `pixel_values`
            and `labels`, gives `logits` (B,).
        args: an `ImageGANConfig`.
        train_dataset: real images: an `ImageDataset`, or rows with `image` (or `pixel_values`) and maybe `label`.
        eval_dataset: the same, held out; default the training images.
        target: factors that the data's distribution is multiplied by, such as `Moment(is_three, 0.5)`; features are
            `f(images, **columns)` on images in [0, 1].
        compute_metrics: as in `transformers.Trainer`, on predictions = generated and label_ids = real images in [-1, 1].
        callbacks, optimizers: as in `transformers.Trainer`.

    Evaluated and saved (by `save_model`) is the moving average of the generator, where there is one, with the discriminator
    beside it in `discriminator/`.

    Raises:
        ValueError: what can't work, before anything is computed or written.
    """

    args: ImageGANConfig

    def __init__(
        self,
        model: "str | PreTrainedModel",
        discriminator: "str | PreTrainedModel | None" = None,
        args: ImageGANConfig | None = None,
        train_dataset=None,
        eval_dataset=None,
        target: Factor | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        args = ImageGANConfig(output_dir="image_gan") if args is None else args
        self.divergence = get_divergence(args.divergence, **(args.divergence_kwargs or {}))
        if not has_bound(self.divergence.f_prime):
            raise ValueError(
                f"{self.divergence.name} has no pathwise gradient: its f' is flat (of tv, sign(t - 1)/2). Take js or seqgan, "
                "whose pseudo-rewards are bounded above too; for text, the score-function trainers take tv."
            )
        set_seed(args.seed)
        model = AutoModel.from_pretrained(model) if isinstance(model, str) else model
        if isinstance(discriminator, str):
            discriminator = AutoModelForImageClassification.from_pretrained(discriminator)
        elif discriminator is None:
            discriminator = DCGANDiscriminator(copy.deepcopy(model.config))
        if train_dataset is None:
            raise ValueError("train_dataset is missing: the real images.")
        collate = ImageCollator(model.config.image_size, model.config.num_channels)
        check_players(model, discriminator, collate([next(rows_of(train_dataset))]))
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._check_run()
        set_seed(args.seed, device_specific=True)  # processes must not draw the same latents
        self.loss_is_scaled_for_ga = False
        self.model = self.model_wrapped = synchronise_batch_norms(self.model, self.accelerator)
        self.adversary = Adversary(
            discriminator, args, self.divergence, self.accelerator, self.compute_loss_context_manager
        )
        self.average = None
        if args.ema_decay:
            self.average = AveragedModel(self.model, multi_avg_fn=moving_average(args.ema_decay))
        self.target = target if target is None or isinstance(target, Target) else Target([target])
        if self.target is not None:
            self.target.bind(Context(no_density, no_density))
        self._log_z: float | None = None  # of the target over the data, once it has been fitted
        self._window: list[dict] = []  # the micro-batches of this step
        self._averages = Averages()
        generator = torch.Generator().manual_seed(args.seed)
        self._grid_latents = torch.randn(args.sample_grid, self.model.config.latent_size, generator=generator)
        self.add_callback(AfterStep(self))

    def _check_run(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError(
                "ImageGANTrainer trains two small models and shards neither: leave DeepSpeed and FSDP out."
            )
        try:
            size = len(self.train_dataset)
        except TypeError:  # a stream
            return
        batch = self.args.per_device_train_batch_size * max(1, self.args.discriminator_steps) * self.args.world_size
        if size < batch:
            raise ValueError(
                f"{size} training images don't fill one batch of {batch} (per_device_train_batch_size * discriminator_steps * "
                "processes): lower it."
            )

    # ---- what a step does ----

    def compute_loss(self, model, inputs: dict[str, Tensor], return_outputs=False, num_items_in_batch=None):
        """The generator's: the mean of f'(q/p) over generated images, differentiated through the images."""
        labels = self.labels_of(inputs)
        images = model(self.draw_latents(len(inputs["pixel_values"])), labels).pixel_values
        log_ratio_B = self.adversary.log_ratio(images, labels)
        if self.target is not None and self.args.constrain == "generator":
            log_ratio_B = log_ratio_B + self.log_factor(images, inputs).to(log_ratio_B)
        loss_B = pathwise(-log_ratio_B, self.divergence.f_prime)
        return (loss_B.mean(), images) if return_outputs else loss_B.mean()

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        if inputs is self._window[0]:  # the discriminator first, on all of this step's micro-batches
            if self.target is not None and self._log_z is None:
                self.fit_target()
            for step in range(self.args.discriminator_steps):
                self._averages.add(
                    self.adversary.update([self.sides(self._part(batch, step)) for batch in self._window])
                )
            self._averages.add({}, samples=len(self._window) * self._train_batch_size * self.args.world_size)
        return super().training_step(model, self._part(inputs, 0), num_items_in_batch)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        self._window, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        return self._window, count

    @torch.no_grad()
    def sides(self, inputs: dict[str, Tensor]) -> Sides:
        """Real images, weighted by the target's factors, and as many new ones of the generator."""
        self.model.train()
        inputs = self._prepare_inputs(inputs)
        real, labels = inputs["pixel_values"], self.labels_of(inputs)
        fake = self.model(self.draw_latents(len(real)), labels).pixel_values
        weights_B = None
        if self.target is not None and self.args.constrain == "data":
            weights_B = torch.exp(self.log_factor(real, inputs)).to(fake)
        return Sides(real, fake, labels, weights_B)

    def _part(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The real images of one of the discriminator's updates; the generator takes the first's labels."""
        updates = max(1, self.args.discriminator_steps)
        return {name: value.chunk(updates)[step] for name, value in batch.items()}

    def draw_latents(self, count: int) -> Tensor:
        """(count, latent_size) standard normal, from the CPU's random numbers, which a checkpoint keeps."""
        return torch.randn(count, self.model.config.latent_size).to(self.args.device, self.model.dtype)

    def labels_of(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """The batch's labels where the generator is conditioned on classes."""
        return inputs["labels"] if self.model.config.num_classes else None

    # ---- the target ----

    def log_factor(self, images: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        """(B,) log of p over the data's density, for these images: the target's factors, less log Z."""
        value_B = self.target.log_weight(ImageBatch.of(images, inputs)) - self._log_z
        if images.requires_grad and not value_B.requires_grad:
            raise ValueError(
                f"constrain='generator' differentiates {self.target.formula()} through the images, but its features give no "
                "graph: return Tensors that are computed from `images` by differentiable operations, or set constrain='data'."
            )
        return value_B

    @torch.no_grad()
    def fit_target(self) -> None:
        """Fit the moments and Z on real images, the same ones on every process.

        Raises:
            ValueError: none satisfies the hard constraints, or the moments can't be met.
        """
        inputs = self.data_collator(list(islice(rows_of(self.train_dataset), self.args.fit_samples)))
        pool = ImageBatch.of(inputs["pixel_values"].to(self.args.device), inputs)
        log_w_B = self.target.log_weight(pool)
        if bool((log_w_B == -math.inf).all()):
            raise ValueError(
                f"none of {len(pool)} real images satisfies {self.target.formula()}: nothing to learn from."
            )
        self.target.fit(pool)
        log_w_B = self.target.log_weight(pool)
        self._log_z = float(torch.logsumexp(log_w_B, 0)) - math.log(len(pool))
        if self.is_world_process_zero():
            print(f"target, q being the data: {self.target}")

    # ---- samples and reports ----

    @property
    def sampler(self) -> PreTrainedModel:
        """The generator that is evaluated and saved."""
        return self.model if self.average is None else self.average.module

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The discriminator's view of held-out real images against as many new ones, features' means, `compute_metrics`.

        `NAME_bound` is the variational lower bound of a divergence to the data, at the current discriminator. The
        training's random numbers are left alone.
        """
        dataset = eval_dataset or self.eval_dataset or self.train_dataset
        inputs = self.data_collator(list(islice(rows_of(dataset), self.args.eval_samples)))
        inputs = {name: value.to(self.args.device) for name, value in inputs.items()}
        real, generator = inputs["pixel_values"], torch.Generator().manual_seed(self.args.seed + self.state.global_step)
        labels = self.labels_of(inputs)
        fake = self.sampler.sample(len(real), labels, generator, self.args.per_device_eval_batch_size)
        metrics = self.adversary.metrics(Sides(real, fake, labels))
        if self.target is not None:
            batch = ImageBatch.of(fake, inputs if labels is not None else {})
            features = [feature for factor, _ in self.target.terms for feature in factor.features]
            metrics |= {f"features/{feature.name}": float(feature(batch).mean()) for feature in features}
        if self.compute_metrics is not None:
            metrics |= self.compute_metrics(
                EvalPrediction(predictions=fake.cpu().numpy(), label_ids=real.cpu().numpy())
            )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a training step's, not an evaluation's or the end's
            logs = {**logs, **self._averages.pop()}
        super().log(logs, start_time)

    def write_samples(self) -> None:
        """A grid of the same latents every time, and of the classes in turn, in `output_dir/samples` and in the trackers."""
        classes, latents = self.model.config.num_classes, self._grid_latents.to(self.args.device, self.model.dtype)
        labels = torch.arange(len(latents), device=self.args.device) % classes if classes else None
        training = self.sampler.training
        with torch.no_grad():
            images = self.sampler.eval()(latents, labels).pixel_values
        self.sampler.train(training)
        picture = save_grid(images, f"{self.args.output_dir}/samples/step-{self.state.global_step:06d}.png")
        track_image(self.callback_handler.callbacks, "samples", picture, self.state.global_step)

    # ---- the Trainer's hooks ----

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        self.adversary.create_scheduler(num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def get_train_dataloader(self) -> DataLoader:
        """Each batch has the real images of all of the discriminator's updates of a step."""
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self._train_batch_size * max(1, self.args.discriminator_steps),
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def floating_point_ops(self, inputs) -> int:
        return 0  # the estimate is for tokens

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint's weights are the generator's own; whoever else asks gets what is evaluated, and the discriminator."""
        if _internal_call:
            return super().save_model(output_dir, _internal_call)
        folder = self.args.output_dir if output_dir is None else output_dir
        if self.args.should_save:
            self.sampler.save_pretrained(folder)
            self.adversary.save_pretrained(f"{folder}/discriminator")
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def process_state(self) -> dict:
        parts = {"average": self.average, "target": self.target, "adversary": self.adversary}
        state = {name: None if part is None else part.state_dict() for name, part in parts.items()}
        return state | {"log_z": self._log_z}

    def load_process_state(self, state: dict) -> None:
        for name in ("average", "target", "adversary"):
            if state[name] is not None:
                getattr(self, name).load_state_dict(state[name])
        self._log_z = state["log_z"]


class AfterStep(TrainerCallback):
    """When the generator has moved, its average follows, and now and then a grid is written."""

    def __init__(self, trainer: ImageGANTrainer):
        self.trainer = trainer

    def on_step_end(self, args: ImageGANConfig, state, control, **kwargs):
        if self.trainer.average is not None:
            self.trainer.average.update_parameters(self.trainer.model)
        if args.sample_steps and state.global_step % args.sample_steps == 0 and state.is_world_process_zero:
            self.trainer.write_samples()
