"""The pathwise estimator on a line, where everything is known: a Gaussian x = mu + sigma z against a mixture of two.

D_f(q || p) and its gradient in (mu, sigma) come from a grid, which is exact to about 1e-9 for such smooth densities; the
discriminator is the optimal one, log p/q.
"""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from hf_gdc import ImageDataset, ImageGANConfig, ImageGANTrainer, available_divergences, get_divergence
from hf_gdc.adversarial.losses import bound_terms
from hf_gdc.objectives import pathwise

CHOICES = [(name, {}) for name in available_divergences() if name not in ("tv", "alpha")]
CHOICES += [("alpha", {"alpha": alpha}) for alpha in (-0.5, 0.3, 1.5)]
every_divergence = pytest.mark.parametrize(("name", "kwargs"), CHOICES, ids=[f"{n}{k or ''}" for n, k in CHOICES])

GRID = torch.linspace(-14, 14, 4001, dtype=torch.float64)
STEP = float(GRID[1] - GRID[0])
# A width at which all divergences are finite: chi2 needs sigma^2 > 1/2 of p's widest, reverse_chi2 sigma^2 < 2 of its own.
WEIGHTS, MEANS, WIDTHS = (0.4, 0.6), (-0.9, 0.7), (0.7, 0.9)


def log_normal(x: Tensor, mean, width) -> Tensor:
    return (
        -0.5 * ((x - mean) / width) ** 2
        - torch.log(torch.as_tensor(width, dtype=x.dtype))
        - 0.5 * math.log(2 * math.pi)
    )


def log_p(x: Tensor) -> Tensor:
    parts = [math.log(w) + log_normal(x, m, s) for w, m, s in zip(WEIGHTS, MEANS, WIDTHS, strict=True)]
    return torch.logsumexp(torch.stack(parts), 0)


def exact_divergence(divergence, mean: Tensor, log_width: Tensor) -> Tensor:
    """E_p f(q/p), on the grid."""
    log_t = log_normal(GRID, mean, log_width.exp()) - log_p(GRID)
    return (log_p(GRID).exp() * divergence.f(log_t)).sum() * STEP


def expectation_over_z(function, mean: Tensor, log_width: Tensor) -> Tensor:
    """E_z[function(mu + sigma z)] with its gradient through x, on the grid of z."""
    z = GRID[GRID.abs() <= 9]
    return (log_normal(z, 0.0, 1.0).exp() * function(mean + log_width.exp() * z)).sum() * STEP


def parameters(mean=0.5, log_width=-0.1):
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (mean, log_width)]


@every_divergence
def test_gradient_with_the_optimal_discriminator_is_the_analytic_one(name, kwargs):
    divergence = get_divergence(name, **kwargs)
    leaves = parameters()
    exact = torch.autograd.grad(exact_divergence(divergence, *leaves), leaves)
    fixed = [leaf.detach() for leaf in leaves]

    def loss(x: Tensor) -> Tensor:
        logits = log_p(x) - log_normal(x, fixed[0], fixed[1].exp())  # the optimum, as a fixed function of x
        return pathwise(-logits, divergence.f_prime)

    ours = torch.autograd.grad(expectation_over_z(loss, *leaves), leaves)
    assert max(abs(float(gradient)) for gradient in exact) > 1e-2
    torch.testing.assert_close(torch.stack(ours), torch.stack(exact), rtol=1e-5, atol=1e-6)


def test_the_classic_losses_of_gans_fall_out():
    """Minimax, non-saturating, reverse KL: functions of the discriminator's probability, up to a constant."""
    logits = torch.linspace(-3, 3, 7, dtype=torch.float64)
    probability = logits.sigmoid()
    classic = {
        "js": torch.log(1 - probability),
        "non_saturating": -torch.log(probability),
        "reverse_kl": -logits,
        "kl": -torch.exp(logits),
        "seqgan": -probability,
    }
    for name, expected in classic.items():
        difference = pathwise(-logits, get_divergence(name).f_prime) - expected
        torch.testing.assert_close(difference, difference[:1].expand(7))


def test_total_variation_has_no_pathwise_gradient():
    log_t = torch.linspace(-3, 3, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(pathwise(log_t, get_divergence("tv").f_prime).sum(), log_t)
    assert float(gradient.abs().max()) == 0.0
    with pytest.raises(ValueError, match="tv has no pathwise gradient"):
        ImageGANTrainer(None, args=ImageGANConfig(output_dir="never", divergence="tv", use_cpu=True))


# ---- the trainer, with the optimal discriminator plugged in ----


class LineConfig(PreTrainedConfig):
    model_type = "line"
    image_size, num_channels, num_classes, latent_size = 8, 1, 0, 1


class LineGenerator(PreTrainedModel):
    """x = mu + sigma z, shown as the first pixel of an 8x8 image."""

    config_class = LineConfig

    def __init__(self, config, mean=0.0, log_width=0.0):
        super().__init__(config)
        self.mean, self.log_width = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(log_width))
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, latents, labels=None):
        x = self.mean + self.log_width.exp() * latents
        return ModelOutput(pixel_values=nn.functional.pad(x.view(-1, 1, 1, 1), (0, 7, 0, 7)))


class OptimalDiscriminator(PreTrainedModel):
    """log p/q of the generator as it is now, times exp(lambda x) or not: nothing here is trained."""

    config_class = LineConfig

    def __init__(self, config, generator):
        super().__init__(config)
        self.generator = [generator]  # in a list: none of its parameters is this model's

    def forward(self, pixel_values, labels=None):
        x, generator = pixel_values[:, 0, 0, 0].double(), self.generator[0]
        mean, width = generator.mean.detach().double(), generator.log_width.detach().double().exp()
        return ModelOutput(logits=(log_p(x) - log_normal(x, mean, width)).to(pixel_values.dtype))


def quantiles(count: int) -> Tensor:
    """(count, 1) midpoints of equal shares of the standard normal: every batch of latents is the same, with hardly an error."""
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.distributions.Normal(0.0, 1.0).icdf(shares).float()[:, None]


def optimum(divergence) -> Tensor:
    """(mu, log sigma) that minimises D_f on the grid, by Newton's method."""
    leaves = torch.tensor([0.1, 0.0], dtype=torch.float64)
    for _ in range(40):
        hessian = torch.autograd.functional.hessian(lambda v: exact_divergence(divergence, *v), leaves)
        gradient = torch.autograd.functional.jacobian(lambda v: exact_divergence(divergence, *v), leaves)
        step = torch.linalg.solve(hessian, gradient)
        leaves = leaves - step.clamp(-0.2, 0.2)
        if float(step.abs().max()) < 1e-9:
            return leaves
    raise AssertionError(f"{divergence.name}: no optimum found")


def line_trainer(folder, count=2000, **options) -> ImageGANTrainer:
    generator = LineGenerator(LineConfig(), mean=0.4, log_width=-0.1)
    settings = {"learning_rate": 3e-2, "adam_beta1": 0.9, "lr_scheduler_type": "cosine", "max_steps": 150}
    settings |= {"per_device_train_batch_size": count, "discriminator_steps": 0, "ema_decay": 0.0, "sample_steps": 0}
    settings |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    data = ImageDataset(torch.zeros(count, 1, 8, 8, dtype=torch.uint8))
    args = ImageGANConfig(output_dir=str(folder), **(settings | options))
    trainer = ImageGANTrainer(generator, OptimalDiscriminator(LineConfig(), generator), args=args, train_dataset=data)
    trainer.draw_latents = quantiles
    return trainer


@every_divergence
def test_training_reaches_the_divergences_optimum(name, kwargs, tmp_path):
    divergence = get_divergence(name, **kwargs)
    best = optimum(divergence)
    # The quantiles' tails end, which a divergence that lives in the tails feels: at 2,000 of them 0.03, at 8,000 0.0135, at
    # 32,000 0.0102.
    count, tolerance = (32_000, 1.1e-2) if name == "reverse_chi2" else (2000, 1e-2)
    trainer = line_trainer(tmp_path, count, divergence=name, divergence_kwargs=kwargs or None)
    trainer.train()
    reached = torch.stack([trainer.model.mean, trainer.model.log_width]).detach().double()
    torch.testing.assert_close(reached, best, rtol=0, atol=tolerance)
    value, least = exact_divergence(divergence, *reached), exact_divergence(divergence, *best)
    assert float(value - least) < 1e-3 * max(1.0, float(least))


def test_the_divergences_optima_differ():
    """So that reaching each of them says something: reverse KL seeks the mode, KL covers."""
    widths = {
        name: float(optimum(get_divergence(name))[1]) for name in ("reverse_chi2", "reverse_kl", "js", "kl", "chi2")
    }
    assert list(widths) == sorted(widths, key=widths.get)
    assert widths["chi2"] - widths["reverse_chi2"] > 0.07


# ---- the discriminator's bound ----


@every_divergence
def test_the_bound_is_tight_at_the_optimal_logit_and_below_elsewhere(name, kwargs):
    divergence = get_divergence(name, **kwargs)
    mean, log_width = (leaf.detach() for leaf in parameters())
    real = GRID[(GRID - 0.2).abs() < 9]
    log_q = log_normal(real, mean, log_width.exp())
    best = log_p(real) - log_q

    def bound(logits: Tensor) -> float:
        """On the grid: the mean over p, then over q, by their densities as weights."""
        n = len(real) * STEP
        weights_p, weights_q = log_p(real).exp() * n, log_q.exp() * n
        over_p, over_q = bound_terms(logits, logits, divergence.f, divergence.f_prime)
        return -float((weights_p * over_p + weights_q * over_q).mean())

    exact = float(exact_divergence(divergence, mean, log_width))
    assert bound(best) == pytest.approx(exact, rel=1e-5, abs=1e-8)
    for other in (best + 0.1, 0.8 * best, best + 0.2 * torch.sin(real)):
        assert bound(other) < exact - 1e-6
