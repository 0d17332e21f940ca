"""What the images' discriminator adds to the losses: weights, accuracy, penalties on gradients."""

import pytest
import torch

from hf_gdc.images.adversary import accuracy, squared_gradient_norm, weighted_mean


def test_weights_stand_for_repeated_samples():
    values, counts = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([4, 6, 10])
    repeated = torch.repeat_interleave(values, counts).mean()
    torch.testing.assert_close(weighted_mean(values, counts.double() * 3 / 20), repeated)
    torch.testing.assert_close(weighted_mean(values, None), values.mean())


def test_accuracy_counts_both_sides_alike():
    assert float(accuracy(torch.tensor([1.0, 2.0, -1.0]), torch.tensor([-1.0, 1.0, 1.0]))) == pytest.approx(0.5)
    assert float(accuracy(torch.ones(4), -torch.ones(2))) == 1.0


def test_squared_gradient_norm_is_that_of_each_row_and_differentiable():
    weight = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    norms = squared_gradient_norm((inputs * weight).sum(1) ** 2, inputs)
    expected = (2 * (inputs * weight).sum(1)[:, None] * weight).square().sum(1)
    torch.testing.assert_close(norms, expected)
    torch.testing.assert_close(
        torch.autograd.grad(norms.sum(), weight, retain_graph=True)[0], torch.autograd.grad(expected.sum(), weight)[0]
    )
