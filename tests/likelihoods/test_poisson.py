import math

import numpy as np
import pytest
import torch
from torch import nn

from kronfisher.errors import DataError, NumericalError
from kronfisher.likelihoods import Draws, Poisson
from kronfisher.likelihoods.poisson import _quantile


def batch(*shape):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    return outputs, torch.randint(6, shape, generator=generator).double()


def test_log_prob_is_the_poisson_density():
    outputs, targets = batch(4, 3)
    truth = torch.distributions.Poisson(outputs.exp()).log_prob(targets)
    torch.testing.assert_close(Poisson().log_prob(outputs, targets), truth.sum(1))
    torch.testing.assert_close(Poisson().log_probs(outputs, targets), truth)
    loss = nn.PoissonNLLLoss(log_input=True, full=False, reduction="none")
    leaf = outputs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, targets).sum(), leaf)
    torch.testing.assert_close(Poisson().observed(outputs, targets), gradient)


@pytest.mark.parametrize("rate", [1e-8, 0.3, 3.0, 47.5, 1e4])
def test_counts_invert_the_distribution_function(rate):
    """The smallest k whose sum of the first k probabilities reaches u, summed in a loop."""
    uniform = torch.tensor([1e-6, 0.01, 0.3, 0.5, 0.97, 1 - 1e-6], dtype=torch.float64)
    found = _quantile(torch.full_like(uniform, rate), uniform)
    k = np.arange(int(rate + 10 * rate**0.5 + 40))
    logs = k * math.log(rate) - rate - np.array([math.lgamma(i + 1) for i in k])
    truth = np.searchsorted(np.cumsum(np.exp(logs)), uniform.numpy())
    assert found.tolist() == truth.tolist()


def test_large_rates_are_nearly_normal():
    rate = torch.full((20000,), 1e12, dtype=torch.float64)
    sample = Poisson().sample(rate.log(), Draws(0))
    scaled = (sample - rate) / rate.sqrt()
    assert abs(scaled.mean()) < 0.03 and abs(scaled.std() - 1) < 0.03


def test_counts_of_half_precision_outputs_are_counts():
    outputs = torch.full((1000,), math.log(3001.0), dtype=torch.bfloat16)
    sample = Poisson().sample(outputs, Draws(0))
    assert sample.dtype == torch.float32 and torch.equal(sample, sample.round()) and (sample % 2 == 1).any()


def test_messages():
    outputs, targets = batch(2, 3)
    for wrong in (-targets - 1, targets * math.nan, targets.to(torch.complex64)):
        with pytest.raises(DataError, match=r"^batch 7: Poisson needs targets that are counts, found negative, NaN"):
            Poisson().check(outputs, wrong, "batch 7")
    with pytest.raises(DataError, match=r"^batch 7: Poisson needs targets of shape \[2, 3\], found \[2, 1\]"):
        Poisson().check(outputs, targets[:, :1], "batch 7")
    with pytest.raises(
        NumericalError, match=r"^batch 7: Poisson needs logarithms of rates below 89, .*float32, found 90"
    ):
        Poisson().check(torch.tensor([90.0, 0.0]), None, "batch 7")
    Poisson().check(torch.tensor([-1e4, 88.0]), None)  # a rate of zero is one
    assert torch.equal(Poisson().sample(torch.tensor([-1e4]), Draws(0)), torch.zeros(1))
