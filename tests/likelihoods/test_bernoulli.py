import re

import pytest
import torch
from torch.distributions import Bernoulli as TorchBernoulli

from kronfisher.errors import DataError
from kronfisher.likelihoods import Bernoulli, Draws


def test_log_prob_is_the_density():
    outputs = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = (torch.arange(24).reshape(4, 3, 2) % 3 == 0).double()
    truth = TorchBernoulli(logits=outputs).log_prob(targets).flatten(1).sum(1)
    torch.testing.assert_close(Bernoulli().log_prob(outputs, targets), truth)


def test_sample_has_the_probability():
    logits = torch.tensor([-2.0, 0.0, 1.0, 1e4, -1e4], dtype=torch.float64)
    p = logits.sigmoid()
    mean = Bernoulli().sample(logits.expand(20000, 5), Draws(0)).mean(0)
    assert ((mean - p).abs() <= 4 * (p * (1 - p) / 20000).sqrt()).all()
    assert mean[3] == 1 and mean[4] == 0


def test_integer_and_fractional_targets():
    outputs = torch.tensor([[0.3, -1.0]], dtype=torch.float64)
    labels = torch.tensor([[1, 0]])
    Bernoulli().check(outputs, labels, labels="observed")
    torch.testing.assert_close(Bernoulli().observed(outputs, labels), outputs.sigmoid() - labels)
    soft = torch.tensor([[0.9, 0.25]], dtype=torch.float64)
    torch.testing.assert_close(Bernoulli().observed(outputs, soft), outputs.sigmoid() - soft)


def test_confident_predictions_keep_their_digits():
    outputs = torch.tensor([[30.0, -30.0]])
    expected = torch.tensor([[-30.0, -30.0]]).double().sigmoid() * torch.tensor([-1, 1])
    found = Bernoulli().observed(outputs, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(4), "Bernoulli needs targets of shape [4, 2], found [4]; reshape"),
        (torch.full((4, 2), -1.0), "Bernoulli needs targets in [0, 1], found -1.0; give zeros and ones"),
        (torch.full((4, 2), 2), "Bernoulli needs targets in [0, 1], found 2; give zeros and ones"),
        (torch.full((4, 2), torch.nan), "Bernoulli needs targets in [0, 1], found nan; give zeros and ones"),
        (torch.zeros(4, 2, dtype=torch.complex64), "Bernoulli needs real targets, found torch.complex64; give"),
    ],
)
def test_messages(targets, message):
    with pytest.raises(DataError, match="^batch 7: " + re.escape(message)):
        Bernoulli().check(torch.zeros(4, 2), targets, "batch 7")


def test_nothing_is_broadcast_without_check_either():
    for method in (Bernoulli().observed, Bernoulli().log_prob):
        with pytest.raises(DataError, match=r"targets of shape \[4, 1\], found \[4\]"):
            method(torch.zeros(4, 1), torch.zeros(4))
