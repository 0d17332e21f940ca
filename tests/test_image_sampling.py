"""Quasi-rejection sampling of images on a generator whose distribution is known, and the loss functions' augmentation."""

import math

import pytest
import torch

from hf_gdc import ImageRejectionSampler, Moment, Pointwise, Policy, Reference, Reward
from hf_gdc.images.augmentation import augment, brightness, cutout, translate
from hf_gdc.moments import fit_moments


class Shades:
    """Draws plain images of four shades, with known shares."""

    shares = (0.1, 0.2, 0.3, 0.4)

    def sample(self, num_images, generator=None):
        shade = torch.multinomial(torch.tensor(self.shares), num_images, replacement=True, generator=generator)
        return (shade.float() / 1.5 - 1)[:, None, None, None].expand(-1, 1, 8, 8)


def shade(images: torch.Tensor) -> torch.Tensor:
    """0 to 3, of images in [0, 1]."""
    return (images[:, 0, 0, 0] * 3).round()


def is_darkest(images, **_):
    return (shade(images) == 0).float()


def shares_of(images: torch.Tensor) -> list[float]:
    return (torch.bincount(shade((images + 1) / 2).long(), minlength=4).double() / len(images)).tolist()


def test_a_moment_is_met_and_the_rest_keeps_its_proportions():
    """lambda = logit(1/2) - logit(1/10); beta above the largest P/q gives the target itself: 1/2, 1/9, 1/6, 2/9."""
    target = Policy() * Moment(is_darkest, 0.5)
    sampler = ImageRejectionSampler(target, Shades(), beta=10.0, seed=0)
    pool = sampler.pool(20_000)
    assert target.moments[0].lam == pytest.approx(
        math.log(9), abs=4 * 0.03
    )  # its standard error: 1/sqrt(20,000 * 0.09)
    estimate = sampler.estimate()
    assert estimate.tv < 1e-9 and estimate.acceptance_rate == pytest.approx(math.exp(pool.log_z) / 10, rel=1e-6)
    count = 20_000
    for share, wanted in zip(shares_of(sampler.sample(count)), (1 / 2, 1 / 9, 1 / 6, 2 / 9), strict=True):
        assert share == pytest.approx(wanted, abs=5 * math.sqrt(wanted * (1 - wanted) / count) + 0.007)  # and of lambda
    assert sampler.accepted / sampler.drawn == pytest.approx(estimate.acceptance_rate, rel=0.05)


def test_a_bound_on_tv_is_cheaper_and_kept():
    sampler = ImageRejectionSampler(Policy() * Moment(is_darkest, 0.5), Shades(), tv=0.1, seed=0)
    images = sampler.sample(20_000)
    wanted = (1 / 2, 1 / 9, 1 / 6, 2 / 9)
    tv = sum(abs(share - exact) for share, exact in zip(shares_of(images), wanted, strict=True)) / 2
    assert tv < 0.1 and sampler.estimate().tv_upper <= 0.1
    exact = ImageRejectionSampler(sampler.target, Shades(), beta=10.0, seed=0)
    exact.pool()
    assert sampler.estimate().acceptance_rate > 1.1 * exact.estimate().acceptance_rate


def test_a_hard_constraint_holds_for_every_image():
    sampler = ImageRejectionSampler(Pointwise(is_darkest), Shades(), seed=0)
    assert shares_of(sampler.sample(500)) == [1, 0, 0, 0]
    assert sampler.estimate().acceptance_rate == pytest.approx(0.1, abs=0.01)


def test_a_discriminators_logit_is_a_reward():
    """exp(logit) with logit = log p/q turns q into p."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])

    def log_ratio(images, **_):
        return (p / torch.tensor(Shades.shares)).log()[shade(images).long()]

    images = ImageRejectionSampler(Policy() * Reward(log_ratio, beta=1.0), Shades(), beta=4.0, seed=0).sample(20_000)
    assert shares_of(images) == pytest.approx(p.tolist(), abs=0.018)


def test_the_same_seed_draws_the_same_images_and_the_global_numbers_stay():
    state = torch.random.get_rng_state()
    first, second = (ImageRejectionSampler(Pointwise(is_darkest), Shades(), seed=3).sample(20) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(state, torch.random.get_rng_state())


def test_what_can_not_be_sampled_is_refused():
    def never(images, **_):
        return torch.zeros(len(images))

    with pytest.raises(ValueError, match="none of the pool's 300 samples has P > 0"):
        ImageRejectionSampler(Pointwise(never), Shades()).pool(300)
    with pytest.raises(ValueError, match="three ways to say one thing"):
        ImageRejectionSampler(Pointwise(never), Shades(), beta=1.0, tv=0.1)
    with pytest.raises(ValueError, match="has no density"):
        ImageRejectionSampler(Reference() * Pointwise(never), Shades()).pool(300)
    with pytest.raises(ValueError, match="a positive number of images, not 0"):
        ImageRejectionSampler(Pointwise(is_darkest), Shades()).sample(0)
    sampler = ImageRejectionSampler(Pointwise(is_darkest), Shades(), max_draws_per_sample=1, batch_size=100)
    with pytest.raises(ValueError, match=r"of 200 images were accepted after 200 draws \(rate 0\.\d+\)"):
        sampler.sample(200)


def test_the_multiplier_is_the_solvers():
    """The sampler's fit is that of the text targets, on its own pool."""
    target = Policy() * Moment(is_darkest, 0.3)
    sampler = ImageRejectionSampler(target, Shades(), beta=5.0, seed=1)
    sampler.pool(5000)
    images = torch.cat([batch.pixel_values for batch in ImageRejectionSampler(target, Shades(), seed=1)._draw(5000)])
    phi = is_darkest((images + 1) / 2)[:, None].double()
    zeros = torch.zeros(5000, dtype=torch.float64)
    fit = fit_moments(phi, zeros, torch.tensor([0.3]), zeros.long(), torch.zeros(1), ["dark"])
    assert target.moments[0].lam == pytest.approx(float(fit.lam), abs=1e-6)


# ---- augmentation ----


def test_translation_shifts_whole_images_and_fills_with_the_border():
    torch.manual_seed(0)
    images = torch.rand(40, 2, 8, 8)
    shifted = translate(images, 0.25)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2), mode="replicate")
    seen = set()
    for number in range(40):
        windows = {
            (top, left)
            for top in range(5)
            for left in range(5)
            if torch.equal(padded[number, :, top : top + 8, left : left + 8], shifted[number])
        }
        assert len(windows) == 1
        seen |= windows
    assert len(seen) > 12  # of 25


def test_cutout_blanks_one_square_and_brightness_adds_one_number():
    torch.manual_seed(0)
    images = torch.rand(30, 1, 16, 16) + 1
    cut = cutout(images, 0.25)
    assert ((cut == 0).flatten(1).sum(1) == 16).all() and torch.equal(cut[cut != 0], images[cut != 0])
    for image in cut:
        rows, columns = (image[0] == 0).any(1).nonzero().flatten(), (image[0] == 0).any(0).nonzero().flatten()
        assert rows[-1] - rows[0] == columns[-1] - columns[0] == 3
    change = (brightness(images, 0.2) - images).flatten(1)
    torch.testing.assert_close(change, change[:, :1].expand_as(change), atol=1e-6, rtol=0)
    assert change.abs().max() <= 0.2001 and change.std() > 0.05


def test_gradients_pass_through_augmentation():
    torch.manual_seed(0)
    images = torch.rand(4, 1, 8, 8, requires_grad=True)
    augment(images, ["translate", "cutout", "brightness"]).sum().backward()
    assert images.grad.abs().sum() > 0
    assert torch.equal(augment(images, []), images)
