"""Where data can be fitted exactly, steps may fall below the law that noise needs."""

import pytest
import torch

import kronfisher as kf
from kronfisher.optim import misfit
from kronfisher.optim.misfit import Misfit, sum_of_misfits

CPU = torch.device("cpu")


def test_the_misfit_is_the_squared_error_less_what_a_constant_explains():
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(2, 9, 3, generator=generator).double()
    expected = (outputs - targets - (outputs - targets).mean(0)).square().sum()
    torch.testing.assert_close(sum_of_misfits(kf.Gaussian(), outputs, targets), expected)
    torch.testing.assert_close(sum_of_misfits(kf.Gaussian(), outputs, targets + 100), expected)
    assert float(sum_of_misfits(kf.Gaussian(), targets[:1] + 1, targets[:1])) == 3  # one example: as it is


def test_soft_targets_are_fitted_where_their_entropy_is_all_that_is_left():
    targets = torch.tensor([[0.2], [0.7], [0.4]])
    assert float(sum_of_misfits(kf.Bernoulli(), targets.logit(), targets)) < 1e-12
    assert float(sum_of_misfits(kf.Bernoulli(), torch.zeros(3, 1), targets)) > 0.1


def test_the_share_that_is_left_falls_with_the_misfit_below_a_twentieth_of_the_worst():
    one = Misfit()
    assert float(one.left) == 1
    for _ in range(40):
        one.follow(torch.tensor(2.0), CPU)
    assert float(one.left) == 1
    one.follow(torch.tensor(float("nan")), CPU)
    one.follow(float("inf"), CPU)
    assert float(one.worst) == 2 and float(one.left) == 1
    for _ in range(60):
        one.follow(0.01, CPU)
    assert float(one.left) == pytest.approx(0.1, rel=1e-2)
    again = Misfit()
    again.load_state_dict(one.state_dict(), CPU)
    assert torch.equal(again.left, one.left)


def train(steps=400):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 128), torch.nn.ReLU(), torch.nn.Linear(128, 5))
    x, y = torch.randn(256, 20), torch.randint(5, (256,))
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    for _ in range(steps):
        rows = torch.randint(256, (64,))
        optimizer.step(lambda rows=rows: model(x[rows]), y[rows])
    optimizer.eval()
    return torch.nn.functional.cross_entropy(model(x), y).item()


def test_labels_that_can_be_learnt_by_heart_are_fitted_better(monkeypatch):
    fitted = train()
    monkeypatch.setattr(misfit, "FITTED", 1e-30)  # the law of noise alone
    assert fitted < 0.6 * train()
