"""The default step: sizes, what is natural and what is adaptive, outliers, averages, horizons."""

import copy

import pytest
import torch
from torch import nn

import kronfisher as kf
from tests.helpers.training import batches, network, train, weights, wide


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.first, self.norm = nn.Embedding(10, 6), nn.Linear(6, 8), nn.LayerNorm(8)
        self.power, self.last = nn.Parameter(torch.zeros(())), nn.Linear(8, 3, bias=False)

    def forward(self, x):
        return self.last(self.norm(self.first(self.table(x)).tanh()) * self.power.exp())


def mixed_batch(n=32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(10, (n,), generator=generator)
    return x, x % 3


def test_matrices_follow_the_natural_gradient_and_everything_else_an_adaptive_one():
    model, (x, y) = Mixed(), mixed_batch()
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        optimizer.step(lambda: model(x), y)
    natural = {unit.parameters for unit in optimizer.parts.motion.units if unit.natural}
    assert natural == {("first.weight", "first.bias"), ("last.weight",)}
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_first_step_has_the_size_where_the_rates_of_muon_and_adamw_agree_whatever_the_scale_of_the_loss(scale):
    model, ((x, y), *_) = network(dtype=torch.float64), batches(1, dtype=torch.float64)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    outputs = optimizer.forward(x)
    optimizer.backward(outputs, y, optimizer.loss(outputs, y) * scale)
    optimizer.step()
    rate = optimizer.rule.rate * (len(x) / 128) ** 0.5  # of a batch with few rows
    for layer in ("0", "2"):
        moved = [p.detach() - before[name] for name, p in model.named_parameters() if name.startswith(layer)]
        square, numel = sum(float(m.square().sum()) for m in moved), sum(m.numel() for m in moved)
        # One gradient of weight 1 - β in an average that looks one step ahead: (1 - β)(1 + β) of its length.
        ahead = 1 - optimizer.rule.momentum**2
        assert square**0.5 == pytest.approx(rate * 0.2 * numel**0.5 * ahead, rel=1e-6)


def test_the_step_is_along_the_damped_inverse_of_dense_truth():
    model, ((x, y), *_) = network(dtype=torch.float64), batches(1, dtype=torch.float64)
    rule = kf.LayerwiseStep(damping=0.1, data_damping=0.0)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), step=rule, labels="exact")
    fisher = kf.estimate(model, (x, y), kf.Categorical(), labels="exact", fit="kfac")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    nn.functional.cross_entropy(model(x), y).backward()
    gradient = torch.cat([model[2].weight.grad, model[2].bias.grad[:, None]], 1)
    operator = fisher["2.weight"]
    A, B = operator.A[0], operator.B[0]
    damped = [F + 0.1 * F.trace() / len(F) * torch.eye(len(F), dtype=torch.float64) for F in (B, A)]
    expected = torch.linalg.solve(damped[0], gradient) @ torch.linalg.inv(damped[1])
    optimizer.step(lambda: model(x), y)
    moved = torch.cat([model[2].weight - before["2.weight"], (model[2].bias - before["2.bias"])[:, None]], 1)
    lengths = expected[:, :-1].norm(dim=1, keepdim=True)  # of the rows of the weight
    expected[:, :-1] *= (lengths / lengths.square().mean().sqrt()).clamp_min(0.25) ** -0.5
    torch.testing.assert_close(-moved / moved.norm(), expected / expected.norm())


def test_layers_that_read_data_are_damped_by_their_width():
    model = network()
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    train(optimizer, model, batches(1))
    assert [layer.reads_data for layer in optimizer.parts.statistics.layers] == [True, False]


def momentum_lengths(optimizer):
    """Of every unit."""
    named, units = dict(optimizer.trained()), optimizer.parts.motion.units
    momenta = [[optimizer.state[named[name]]["momentum"].flatten() for name in unit.parameters] for unit in units]
    return torch.stack([torch.cat(parts).norm() for parts in momenta])


def test_an_outlier_is_clipped_and_a_batch_that_is_not_finite_moves_nothing():
    model, data = network(), batches(12)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    train(optimizer, model, data[:-1])
    x, y = data[-1]
    before = weights(model)
    with pytest.warns(kf.NumericalWarning, match="not finite"):
        optimizer.step(lambda: model(x * torch.nan), y)
        assert torch.equal(weights(model), before) and optimizer.report().skipped == 1
        lengths, momenta = optimizer.parts.motion.lengths.clone(), momentum_lengths(optimizer)
        optimizer.step(lambda: model(x) * 1e4, y)
    assert bool((optimizer.parts.motion.lengths <= 1.5 * lengths).all())
    natural = torch.tensor([unit.natural for unit in optimizer.parts.motion.units])
    most = 0.9 * momenta + 0.1 * 5 * lengths  # as if it were five times as long as directions are
    assert bool((momentum_lengths(optimizer) <= 1.001 * most)[natural].all())
    assert bool(torch.isfinite(weights(model)).all())


def test_averages_are_exchanged_for_evaluation_and_training_asks_for_the_weights_back():
    torch.manual_seed(0)
    model, data = network(nn.BatchNorm1d(6)), batches(6)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    iterates = []
    for batch in data:
        train(optimizer, model, [batch])
        iterates.append({name: p.detach().clone() for name, p in model.named_parameters()})
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    expected = iterates[0]
    for k, iterate in enumerate(iterates, 1):
        share = min(1.0, 13 / (k + 12))
        expected = {name: (1 - share) * value + share * iterate[name] for name, value in expected.items()}
    optimizer.eval()
    for name, value in expected.items():
        torch.testing.assert_close(model.state_dict()[name], value)
    with pytest.raises(kf.UnsupportedError, match=r"optimizer\.train\(\)"):
        train(optimizer, model, data[:1])
    optimizer.train()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in iterates[-1].items())
    assert buffers and all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_at_the_end_of_a_horizon_the_last_iterate_is_near_the_average():
    distances = []
    for total in (None, 60):
        torch.manual_seed(0)
        model, data = network(), batches(6) * 10
        optimizer = kf.NaturalGradient(model, kf.Categorical(), total_steps=total)
        train(optimizer, model, data)
        last = weights(model)
        optimizer.eval()
        distances.append(float((weights(model) - last).norm()))
    assert 0 < distances[1] < 0.5 * distances[0]


def test_a_horizon_anneals_the_rate():
    model, data = network(), batches(10)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), total_steps=10)
    rates = []
    for batch in data:
        train(optimizer, model, [batch])
        rates.append(optimizer.report().step_size / optimizer.rule.rate / (16 / 128) ** 0.5)
    assert rates == pytest.approx([1, 1, 1, 1, 1, 1, 1, 1 - 0.8 / 3, 1 - 0.8 * 2 / 3, 0.2])


def test_steps_beyond_the_horizon_are_told_once_and_counted():
    model, data = network(), batches(1) * 9
    optimizer = kf.NaturalGradient(model, kf.Categorical(), total_steps=4)
    train(optimizer, model, data[:4])
    assert optimizer.report().beyond == 0 and "total_steps" not in str(optimizer.report())
    message = r"Step 5 comes after total_steps=4.*fell to 20%.*leave it out"
    with pytest.warns(kf.NumericalWarning, match=message) as caught:
        train(optimizer, model, data[:2])
    report = optimizer.report()
    assert len(caught) == 1 and report.beyond == 2 and "2 steps after total_steps" in str(report)
    assert any(text.startswith("Step 5 comes after") for text in report.warnings)
    again = network()
    again.load_state_dict(model.state_dict())
    resumed = kf.NaturalGradient(again, kf.Categorical(), total_steps=4)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(resumed, again, data[:1])  # it was told
    assert resumed.report().beyond == 3
    longer = kf.NaturalGradient(again, kf.Categorical(), total_steps=100)
    longer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(longer, again, data[:1])
    assert longer.report().beyond == 0


def test_a_horizon_that_means_nothing_is_refused():
    for options in ({"total_steps": 0}, {"total_steps": -3}, {"total_steps": 10, "step": kf.QuadraticModel()}):
        with pytest.raises(ValueError, match="total_steps="):
            kf.NaturalGradient(network(), kf.Categorical(), **options)


def test_weight_decay_is_decoupled():
    model, data = network(), batches(1)
    twin = copy.deepcopy(model)
    for one, decay in ((model, 0.5), (twin, 0.0)):
        train(kf.NaturalGradient(one, kf.Categorical(), weight_decay=decay), one, data)
    start = network()
    for name, p in model.named_parameters():
        rate = 0.06 * (16 / 128) ** 0.5 * 0.5
        expected = dict(twin.named_parameters())[name] - rate * dict(start.named_parameters())[name]
        torch.testing.assert_close(p, expected)


def test_no_step_collects_statistics_and_makes_inverses_once_periods_allow():
    model = network()
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    renewed = []
    for step, (x, y) in enumerate(batches(140)):
        due = optimizer.parts.statistics.is_due(step)
        optimizer.step(lambda x=x: model(x), y)
        if any(one.made == step for one in optimizer.parts.direction.inverses):
            renewed.append(step)
            assert not due or step < 60  # the first steps change much, and inverses follow at once
        assert not optimizer.report().stale
    assert len([step for step in renewed if step > 60]) > 3


@pytest.mark.parametrize("option", [{"momentum": 1.0}, {"rate": 0.0}, {"damping": -1.0}, {"data_damping": -1.0}])
def test_options_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        kf.LayerwiseStep(**option)


@pytest.mark.usefixtures("few_rows_pay")
def test_steps_from_rows_heed_hooks_of_gradients():
    # Batches so small that natural gradients of wide layers are made from rows, where nobody changes gradients.
    model, data = wide(), batches(12, n=6)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    train(optimizer, model, data[:3])
    assert optimizer.parts.forward_backward.state_dict()["rows_pay"]
    for parameter in model[3].parameters():
        optimizer.state[parameter]["momentum"].zero_()
        parameter.register_hook(torch.zeros_like)
    before = model[3].weight.clone()
    train(optimizer, model, data[3:])
    assert torch.equal(model[3].weight, before)


def test_steps_across_a_valley_are_shortened_only_where_no_average_takes_them_out():
    line = torch.linspace(-1, 1, 20)
    x = torch.cartesian_prod(line, line)
    y = torch.sin(14 * x[:, :1]) * torch.cos(11 * x[:, 1:])  # without noise, so that steps of one size overshoot
    least = {}
    for average in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))
        optimizer = kf.NaturalGradient(model, kf.Gaussian(), step=kf.LayerwiseStep(average=average))
        brakes = []
        for _ in range(120):
            optimizer.step(lambda model=model: model(x), y)
            brakes.append(float(optimizer.parts.motion.rates.brake.min()))
        least[average] = min(brakes)
    assert least[True] >= 1 > 0.95 > least[False]


@pytest.mark.filterwarnings("ignore:100%")
@pytest.mark.parametrize("trained", ["biases", "weights that no layer uses"])
def test_networks_without_a_layer_that_is_treated_train(trained):
    """Seen: a rate of zero in silence, because the rate grows with the rows of layers, and there were none."""
    model, ((x, y), *_) = network(), batches(1)
    if trained == "biases":
        for name, p in model.named_parameters():
            p.requires_grad_("bias" in name)
        forward = model
    else:
        torch.manual_seed(0)
        model = torch.nn.ParameterList([torch.randn(x.shape[1]) for _ in range(int(y.max()) + 1)])
        forward = lambda x: x @ torch.stack(list(model), 1).cumsum(0)  # noqa: E731
        model.forward = forward
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    losses = [float(optimizer.step(lambda: forward(x), y)) for _ in range(10)]
    assert losses[-1] < losses[0]
    assert not any(map(torch.equal, before, optimizer.param_groups[0]["params"]))
