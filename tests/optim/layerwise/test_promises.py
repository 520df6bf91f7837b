"""No step promises that the loss falls further than it can: wide layers and few rows would."""

import copy

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.optim.layerwise import motion
from tests.helpers.training import batches, network, weights


def first_losses(width=1024, size=16, steps=25, **options):
    torch.manual_seed(0)
    teacher = torch.randn(300, 20)
    model = nn.Sequential(nn.Linear(300, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 20))
    optimizer = kf.NaturalGradient(model, kf.Categorical(), **options)
    losses = []
    for _ in range(steps):
        x = torch.randn(size, 300)
        losses.append(float(optimizer.step(lambda x=x: model(x), (x @ teacher).argmax(1))))
    return losses


def test_a_wide_network_does_not_leave_its_start(monkeypatch):
    losses = first_losses()
    assert max(losses) < 1.1 * losses[0]
    monkeypatch.setattr(motion, "PROMISE", 1e30)
    assert max(first_losses()) > 1.3 * losses[0]


def one_step(backward, excess=None, lr=1.0):
    model = network(dtype=torch.float64)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), lr=lr)
    before = weights(model).clone()
    ((x, y),) = batches(1, dtype=torch.float64)
    backward(optimizer, x, y)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.step()
    return weights(model) - before, gradient, float(optimizer.parts.misfit.excess)


def plain(optimizer, x, y):
    optimizer.backward(optimizer.forward(x), y)


@pytest.mark.parametrize("lr", [1.0, 3000.0])
def test_a_step_promises_at_most_half_of_the_loss_of_classes(lr):
    step, gradient, excess = one_step(plain, lr=lr)
    ((x, y),) = batches(1, dtype=torch.float64)
    assert excess == pytest.approx(nn.functional.cross_entropy(network(dtype=torch.float64)(x), y).item(), rel=1e-6)
    promised = -float(step @ gradient)
    assert promised == pytest.approx(0.5 * excess, rel=1e-3) if lr > 1 else promised < 0.5 * excess


def test_a_step_that_momentum_takes_uphill_rises_by_no_more():
    model, ((x, y),) = network(dtype=torch.float64), batches(1, dtype=torch.float64)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), lr=0.01)
    optimizer.step(lambda: model(x), y)
    for state in optimizer.state.values():
        state["momentum"].mul_(-20)
    optimizer.param_groups[0]["lr"] = 3000.0
    before = weights(model).clone()
    optimizer.zero_grad()
    plain(optimizer, x, y)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.step()
    rise = float((weights(model) - before) @ gradient)
    assert 0 < rise < 0.5 * float(optimizer.parts.misfit.excess)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_scale_of_a_loss_of_ones_own_changes_nothing(factor):
    def scaled(optimizer, x, y):
        outputs = optimizer.forward(x)
        optimizer.backward(outputs, y, loss=factor * optimizer.loss(outputs, y))

    expected, _, excess = one_step(plain, lr=3000.0)
    step, _, seen = one_step(scaled, lr=3000.0)
    assert seen == pytest.approx(factor * excess, rel=1e-5)
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-9)


def test_parts_of_a_batch_count_as_the_batch():
    def in_parts(optimizer, x, y):
        for part in (slice(0, 8), slice(8, 16)):
            outputs = optimizer.forward(x[part])
            optimizer.backward(outputs, y[part], loss=optimizer.loss(outputs, y[part]) / 2)

    expected, _, excess = one_step(plain, lr=3000.0)
    assert len(batches(1)[0][0]) == 16
    step, _, seen = one_step(in_parts, lr=3000.0)
    assert seen == pytest.approx(excess, rel=1e-5)
    assert float((step - expected).norm() / expected.norm()) < 0.5  # labels are drawn differently


def test_a_loss_that_the_outputs_do_not_reach_bounds_nothing():
    def penalty(optimizer, x, y):
        outputs = optimizer.forward(x)
        model = optimizer._model
        optimizer.backward(outputs, y, loss=sum(p.square().sum() for p in model.parameters()) + 0.0 * outputs.sum())

    step, _, excess = one_step(penalty)
    assert excess == pytest.approx(1e30) and float(step.norm()) > 0


def test_a_likelihood_without_a_least_loss_bounds_nothing():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = kf.NaturalGradient(model, kf.HeteroscedasticGaussian())
    x, y = torch.randn(16, 4), torch.randn(16, 1)
    twin = copy.deepcopy(model)
    optimizer.step(lambda: model(x), y)
    assert float(optimizer.parts.misfit.excess) == pytest.approx(1e30)
    assert not torch.equal(model.weight, twin.weight)
