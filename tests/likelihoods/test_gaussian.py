import re

import pytest
import torch
from torch.distributions import Normal

from kronfisher.errors import DataError
from kronfisher.likelihoods import Draws, Gaussian


def batch(*shape):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("variance", [1.0, 0.3, torch.tensor(2.0), torch.tensor([0.5, 1.0, 4.0])], ids=str)
@pytest.mark.parametrize("shape", [(4, 3), (2, 5, 3)])
def test_log_prob_is_the_normal_density(variance, shape):
    outputs, targets = batch(*shape)
    scale = torch.as_tensor(variance).double().sqrt()
    truth = Normal(outputs, scale).log_prob(targets).flatten(1).sum(1)
    torch.testing.assert_close(Gaussian(variance).log_prob(outputs, targets), truth)


def test_one_dimensional_outputs_are_one_number_per_example():
    outputs, targets = batch(4)
    gaussian = Gaussian(0.25)
    assert gaussian.columns(outputs) == 1
    torch.testing.assert_close(next(gaussian.exact(outputs)), torch.full_like(outputs, 2.0))
    torch.testing.assert_close(gaussian.log_prob(outputs, targets), Normal(outputs, 0.5).log_prob(targets))


def test_sample_has_the_mean_and_variance():
    variance = torch.tensor([0.5, 4.0], dtype=torch.float64)
    outputs = torch.tensor([3.0, -1.0], dtype=torch.float64).expand(20000, 2)
    sample = Gaussian(variance).sample(outputs, Draws(0))
    assert (((sample.mean(0) - outputs[0]) / (variance / 20000).sqrt()).abs() < 4).all()
    assert ((sample.var(0) / variance - 1).abs() < 4 * (2 / 20000) ** 0.5).all()


def test_targets_are_not_needed_for_curvature():
    outputs, targets = batch(4, 3)
    gaussian = Gaussian(torch.tensor([0.5, 1.0, 4.0]))
    gaussian.check(outputs, None)
    assert gaussian.positions(outputs, targets) is None
    assert torch.equal(gaussian.sampled(outputs, None, Draws(0)), gaussian.sampled(outputs, targets, Draws(0)))
    assert len(list(gaussian.exact(outputs))) == 3


@pytest.mark.parametrize("variance", [0.0, -1.0, float("nan"), float("inf"), torch.tensor([1.0, 0.0])], ids=str)
def test_variance_must_be_positive_and_finite(variance):
    with pytest.raises(ValueError, match=r"variance=.* must be positive and finite"):
        Gaussian(variance)


@pytest.mark.parametrize(
    ("gaussian", "outputs", "targets", "message"),
    [
        (Gaussian(), (4, 1), torch.zeros(4), "Gaussian needs targets of shape [4, 1], found [4]; reshape"),
        (Gaussian(), (4,), torch.zeros(4, 1), "Gaussian needs targets of shape [4], found [4, 1]; reshape"),
        (Gaussian(torch.ones(2)), (4, 3), None, "variance of shape [2], the output of one example has shape [3]; give"),
        (Gaussian(torch.ones(4, 3)), (4, 3), None, "variance of shape [4, 3], the output of one example has shape [3]"),
        (Gaussian(), (4, 3), torch.full((4, 3), torch.nan), "finite targets, found NaN, infinite or complex ones; rem"),
        (Gaussian(), (4, 3), torch.zeros(4, 3, dtype=torch.complex64), "NaN, infinite or complex ones; remove"),
    ],
)
def test_messages(gaussian, outputs, targets, message):
    with pytest.raises(DataError, match="^batch 7: .*" + re.escape(message)):
        gaussian.check(torch.zeros(outputs), targets, "batch 7")


def test_nothing_is_broadcast_without_check_either():
    for method in (Gaussian().observed, Gaussian().log_prob):
        with pytest.raises(DataError, match=r"targets of shape \[4, 1\], found \[4\]"):
            method(torch.zeros(4, 1), torch.zeros(4))


def test_a_number_as_variance_keeps_its_digits():
    (column,) = Gaussian(0.1).exact(torch.zeros(1, 1, dtype=torch.float64))
    assert abs(column.item() - 0.1**-0.5) < 1e-15 * 0.1**-0.5 * 4
