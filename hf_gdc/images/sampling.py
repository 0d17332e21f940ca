"""Controlled images: a generator's own samples, filtered towards a target, with estimates of what comes out.

A generator G has no density, but a target that is relative to it, `Policy() * Pointwise(...) * Moment(...)`, is known as the
ratio P/q of its factors, and that is all that quasi-rejection sampling needs: an image x is accepted with probability
min(1, P(x) / (beta q(x))) (Eikema et al. 2022, arXiv 2112.05702; `acceptance` has the mathematics). Factors such as
`Reward(f, beta=1)` with f a discriminator's logit turn q into the data's distribution, as far as the discriminator is right
(Azadi et al. 2019, arXiv 1810.06758).

Left out: class conditions that are not drawn uniformly. Shapes: B images, C channels, H height, W width.
"""

import math

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from ..acceptance import AcceptanceEstimate, AcceptancePool, check_choice
from ..targets.base import Context, Factor, Target
from .batches import ImageBatch, no_density


class ImageRejectionSampler:
    """Samples p_beta, which lies between the generator's distribution (small beta) and the target (large beta).

        target = Policy() * Moment("image_class:path/to/classifier=3>0.5", 0.5)
        sampler = ImageRejectionSampler(target, "path/to/generator", tv=0.05)
        sampler.pool(20_000)
        images = sampler.sample(1000)

    Args:
        target: factors relative to the generator; its moments are fitted on the pool if they were not before.
        generator: a model with `sample(num_images, generator=...)`, its path or Hub id.
        beta: the threshold of P/q; or
        tv: the wanted upper bound of TV(p, p_beta), or
        acceptance_rate: the wanted lower bound of the acceptance rate. None of the three: whatever has P > 0 is accepted,
            which is the target itself where all its factors are hard constraints.
        batch_size: images drawn and scored at once.
        pool_samples: drawn where `pool` is not called first.
        confidence: of each one-sided bound.
        max_draws_per_sample: give up after so many draws for each wanted image.
        seed: of everything random; torch's global random numbers are left alone.

    Raises:
        ValueError: options out of range or in conflict.
    """

    def __init__(
        self,
        target: Factor,
        generator: "str | PreTrainedModel",
        beta: float | None = None,
        *,
        tv: float | None = None,
        acceptance_rate: float | None = None,
        batch_size: int = 1000,
        pool_samples: int = 20_000,
        confidence: float = 0.95,
        max_draws_per_sample: int = 10_000,
        seed: int = 42,
    ):
        check_choice(beta, tv, acceptance_rate)
        self.target = target if isinstance(target, Target) else Target([target])
        self.target.bind(Context(no_density, no_density))
        self.generator = AutoModel.from_pretrained(generator) if isinstance(generator, str) else generator
        self.beta, self.tv, self.acceptance_rate = beta, tv, acceptance_rate
        self.batch_size, self.pool_samples, self.confidence = batch_size, pool_samples, confidence
        self.max_draws_per_sample = max_draws_per_sample
        self._random = torch.Generator().manual_seed(seed)
        self._pool: AcceptancePool | None = None
        self._log_beta: float | None = None
        self.drawn = 0  # by `sample`, so far
        self.accepted = 0

    def pool(self, num_samples: int | None = None) -> AcceptancePool:
        """Draw a pool, fit the target's moments on it if that was not done, and estimate on it; its images are not returned.

        Raises:
            ValueError: no image has P > 0, the moments can't be met, or the pool is too small for the wanted bound.
        """
        batches = self._draw(self.pool_samples if num_samples is None else num_samples)
        images = ImageBatch(torch.cat([batch.pixel_values for batch in batches]))
        if self.target.moments and self.target.ess == 0:
            images.scores = {name: torch.cat([batch.scores[name] for batch in batches]) for name in batches[0].scores}
            self.target.fit(images)
            for batch in batches:
                batch.log_weight_B = self.target.log_weight(batch)
        log_w_B = torch.cat([batch.log_weight_B for batch in batches])
        zeros_B = torch.zeros_like(log_w_B)
        self._pool = AcceptancePool(log_w_B, zeros_B, zeros_B, confidence=self.confidence)
        if self.tv is not None:
            self._log_beta = self._pool.log_beta_for_tv(self.tv)
        elif self.acceptance_rate is not None:
            self._log_beta = self._pool.log_beta_for_acceptance_rate(self.acceptance_rate)
        else:
            self._log_beta = -math.inf if self.beta is None else math.log(self.beta)
        return self._pool

    def estimate(self) -> AcceptanceEstimate:
        """Acceptance rate, TV and KL between the target and what comes out, from the pool."""
        return self._ready().at(self._log_beta)

    def sample(self, num_images: int) -> Tensor:
        """Exactly `num_images` accepted images (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: too few accepted after `max_draws_per_sample` draws for each; the message has the rate.
        """
        if num_images < 1:
            raise ValueError(f"sample needs a positive number of images, not {num_images}.")
        self._ready()
        kept, count, drawn = [], 0, 0
        while count < num_images:
            if drawn >= num_images * self.max_draws_per_sample:
                raise ValueError(
                    f"{count} of {num_images} images were accepted after {drawn} draws (rate {count / drawn:.2g}): train the "
                    "generator towards the target first, relax the constraints, or lower beta."
                )
            (batch,) = self._draw(self.batch_size)
            log_accept_B = batch.log_weight_B - self._log_beta
            if self._log_beta == -math.inf:
                log_accept_B = torch.where(batch.log_weight_B > -math.inf, 0.0, -math.inf)
            uniform_B = torch.rand(len(batch), generator=self._random, dtype=torch.float64)
            accepted = batch.pixel_values[(uniform_B.log() < log_accept_B).to(batch.pixel_values.device)]
            kept.append(accepted)
            count, drawn = count + len(accepted), drawn + len(batch)
        self.drawn, self.accepted = self.drawn + drawn, self.accepted + count
        return torch.cat(kept)[:num_images]

    def _ready(self) -> AcceptancePool:
        return self.pool() if self._pool is None else self._pool

    @torch.no_grad()
    def _draw(self, count: int) -> list[ImageBatch]:
        """Batches with `log_weight_B`, log P/q of each image."""
        batches = []
        for start in range(0, count, self.batch_size):
            images = self.generator.sample(min(self.batch_size, count - start), generator=self._random)
            batch = ImageBatch(images)
            batch.log_weight_B = self.target.log_weight(batch)
            batches.append(batch)
        return batches
