"""Training that fails says so, once, with what to do; training that does not is silent."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from tests.helpers.networks import Written
from tests.helpers.training import batches, network, train, weights

STEPS = pytest.mark.parametrize("step", [kf.LayerwiseStep(), kf.QuadraticModel()], ids=["layerwise", "quadratic"])


def follow(losses):
    watch = kf.NaturalGradient(network(), kf.Categorical()).parts.watch
    for loss in losses:
        watch.follow(torch.tensor(float(loss), dtype=torch.float64))
    watch.judge()
    return watch


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([1.0] * 50 + [1.5] * 100, r"above its start \(1.49\d*, at first 1\)"),
        ([3.0] * 20 + [1.0] * 100 + [2.5] * 150, "grown for 1[0-9]{2} steps"),
        ([1.0, torch.nan, 1.0], "not finite"),
    ],
)
def test_a_loss_that_goes_wrong_is_told_once(losses, message):
    with pytest.warns(kf.NumericalWarning, match=message) as caught:
        watch = follow(losses)
        watch.judge()
    assert len(caught) == 1


@pytest.mark.parametrize("seed", range(5))
def test_losses_of_single_examples_are_noise_until_they_grow(seed):
    """Exponentially distributed losses, as of batches of one: level or falling they are not told, growing they are."""
    noise = -torch.rand(800, generator=torch.Generator().manual_seed(seed)).log()
    assert not follow((2 * noise).tolist()).told
    assert not follow((torch.linspace(2, 1, 800) * noise).tolist()).told
    with pytest.warns(kf.NumericalWarning, match="above its start"):
        assert follow((torch.logspace(0, 2, 800) * noise).tolist()).told
    fallen = torch.cat([torch.logspace(1, -1, 300), torch.linspace(0.1, 10, 500)])
    with pytest.warns(kf.NumericalWarning, match="has grown for|above its start"):
        assert follow((fallen * noise).tolist()).told


def test_batches_of_one_learn_without_a_word():
    """At a rate that falls with the root of the examples."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 4, generator=generator)
    y = (x[:, 0] + x[:, 1].square() > 1).long() + (x[:, 2] > 0).long()
    model = network()
    start = float(nn.functional.cross_entropy(model(x), y).detach())
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    train(optimizer, model, [(x[k : k + 1], y[k : k + 1]) for k in range(600)])
    end = float(nn.functional.cross_entropy(model(x), y).detach())
    assert not optimizer.report().warnings and end < 0.95 * start


def test_a_loss_that_falls_is_not_told():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(300, generator=generator)
    assert not follow((torch.linspace(3, 1, 300) + 0.3 * noise).tolist()).told
    assert not follow((1 + 0.0 * noise).tolist()).told
    assert not follow([5.0, *[1.0] * 300]).told


@STEPS
@pytest.mark.filterwarnings("ignore:Step [0-9]+ runs on:UserWarning")
def test_a_batch_that_is_not_finite_is_told(step):
    model, data = network(), batches(4)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), step=step, refresh=kf.Refresh(1, 1))
    train(optimizer, model, data[:2])
    before = weights(model)
    with pytest.warns(kf.NumericalWarning, match="The loss was not finite") as caught:
        train(optimizer, model, [(data[2][0] * torch.nan, data[2][1])])
        assert torch.equal(weights(model), before)
        train(optimizer, model, data)
    assert sum("The loss was not finite" in str(one.message) for one in caught) == 1
    assert torch.isfinite(weights(model)).all() and not torch.equal(weights(model), before)
    assert any("not finite" in line for line in optimizer.report().warnings)


def test_a_network_that_is_mostly_outside_is_told():
    x, y = batches(1)[0]
    model = Written(lambda m, x: m.last(x @ m.w.square()), w=torch.randn(4, 30), last=nn.Linear(30, 3))
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    with pytest.warns(
        kf.NumericalWarning, match=r"56% of the parameters are outside every fit .*: w: used by square"
    ) as caught:
        for _ in range(3):
            optimizer.step(lambda: model(x), y)
    assert len(caught) == 1
    assert "Adam's steps: w: used by square" in str(optimizer.report())


def test_steps_undone_in_a_row_are_told():
    model, data = network(), batches(1)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), lr=500.0, step=kf.QuadraticModel())
    with pytest.warns(kf.NumericalWarning, match="5 compared steps in a row were undone"):
        train(optimizer, model, data * 6)
