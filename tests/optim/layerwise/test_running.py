"""Running statistics of batch normalisation: averages of the batches, with the shares of the iterates."""

import copy

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.optim.layerwise.running import RunningStatistics


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))


def batches(number, size=40):
    generator = torch.Generator().manual_seed(1)
    inputs = [3 + 2 * torch.randn(size, 6, generator=generator) for _ in range(number)]
    return [(x, x[:, :3].argmax(1)) for x in inputs]


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
@pytest.mark.parametrize("passes", [1, 3])
def test_averages_of_batches(momentum, passes):
    """Batches of a step weigh as in the running statistics, and steps as their shares say."""
    layer = nn.BatchNorm1d(4, momentum=momentum, dtype=torch.float64)
    running, model = RunningStatistics(), nn.Sequential(layer)
    model(torch.randn(10, 4, dtype=torch.float64))
    running.update(model, torch.tensor(1.0))  # nothing is known of what was before
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    for k in range(1, 6):
        xs = [k + torch.randn(10, 4, dtype=torch.float64) * k for _ in range(passes)]
        for x in xs:
            model(x)
        running.update(model, share := torch.tensor(1 / k))
        powers = [1.0 if momentum is None else (1 - momentum) ** (passes - 1 - i) for i in range(passes)]
        means = sum(p * x.mean(0) for p, x in zip(powers, xs, strict=True)) / sum(powers)
        variances = sum(p * x.var(0) for p, x in zip(powers, xs, strict=True)) / sum(powers)
        mean, var = mean.lerp(means, share.double()), var.lerp(variances, share.double())
    torch.testing.assert_close(running.averages["0.running_mean"], mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(running.averages["0.running_var"], var, rtol=1e-5, atol=1e-5)


def test_layers_that_see_no_batch_or_keep_nothing():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False), nn.InstanceNorm1d(4))
    model[0].running_mean.fill_(2.0)
    model[0].eval()
    running = RunningStatistics()
    for _ in range(3):
        model(torch.randn(5, 4, 7))
        running.update(model, torch.tensor(0.5))
    assert set(running.averages) == {"0.running_mean", "0.running_var"}
    assert (running.averages["0.running_mean"] == 2).all() and (running.averages["0.running_var"] == 1).all()
    model[0].train()
    model[0].reset_running_stats()  # counts begin anew: no batch can be told from it
    running.update(model, torch.tensor(0.5))
    assert all(average.isfinite().all() for average in running.averages.values())


def test_evaluation_early_in_training_is_of_the_present_network():
    """The model's own statistics look back over ten batches; those put in place are close to the data's."""
    model, data = network(), batches(20, size=300)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    for x, y in data:
        optimizer.step(lambda x=x: model(x), y)
    own = model[1].running_mean.clone()
    optimizer.eval()
    found = model[1].running_mean.clone()
    exact = model[0](torch.cat([x for x, _ in data])).mean(0).detach()
    assert (found - exact).norm() < 0.5 * (own - exact).norm()
    optimizer.train()
    assert (model[1].running_mean == own).all()


def test_a_resumed_training_evaluates_alike():
    model, data = network(), batches(12)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    for x, y in data[:6]:
        optimizer.step(lambda x=x: model(x), y)
    other = copy.deepcopy(model)
    resumed = kf.NaturalGradient(other, kf.Categorical())
    resumed.load_state_dict(optimizer.state_dict())
    for x, y in data[6:]:
        optimizer.step(lambda x=x: model(x), y)
        resumed.step(lambda x=x: other(x), y)
    optimizer.eval(), resumed.eval()
    for name, buffer in model.named_buffers():
        assert (buffer == dict(other.named_buffers())[name]).all(), name


def test_states_without_them_load():
    model, ((x, y), *_) = network(), batches(3)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    optimizer.step(lambda: model(x), y)
    state = optimizer.state_dict()
    del state["natural_gradient"]["average"]["running"]
    resumed = kf.NaturalGradient(model, kf.Categorical())
    resumed.load_state_dict(state)
    resumed.step(lambda: model(x), y)
    before = model[1].running_mean.clone()
    resumed.eval()
    assert model[1].running_mean.isfinite().all()
    resumed.train()
    assert (model[1].running_mean == before).all()
