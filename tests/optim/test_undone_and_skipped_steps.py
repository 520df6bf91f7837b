"""Batches without a gradient or with NaN, exploding losses, singular factors and errors leave the weights sound."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import kronfisher as kf
from tests.helpers.training import FITS, FIXED, batches, network, train, weights

EVERY_FIT = pytest.mark.parametrize("fit", FITS, ids=str)
TOLD = pytest.mark.filterwarnings(
    "ignore:Step [0-9]+ (runs on|moves nothing|preconditions nothing):UserWarning",
    "ignore:The loss was not finite:UserWarning",
    "ignore:[0-9]+% of the parameters are outside:UserWarning",
)


def test_batches_without_a_gradient_are_skipped():
    model, data = network(), batches(6)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    ignored = torch.full((16,), -100)
    before = weights(model)
    with pytest.warns(kf.NumericalWarning, match="Step 0 moves nothing, because no batch so far gave any curvature"):
        optimizer.step(lambda: model(data[0][0]), ignored)
    assert torch.equal(weights(model), before) and optimizer.report().skipped == 1
    train(optimizer, model, data)
    optimizer.step(lambda: model(data[0][0]), ignored)
    assert torch.isfinite(weights(model)).all()


@TOLD
@EVERY_FIT
def test_a_batch_with_nan_moves_nothing(fit):
    model, data = network(), batches(6)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), fit=fit, refresh=kf.Refresh(1, 1, 1))
    train(optimizer, model, data[:3])
    before = weights(model)
    (x, y), told = data[3], False
    for poisoned in (x.clone().fill_(torch.nan), x.clone().index_fill_(0, torch.tensor([2]), torch.inf)):
        with nullcontext() if told else pytest.warns(kf.NumericalWarning, match="statistics were not finite"):
            optimizer.step(lambda x=poisoned: model(x), y)
        told = True
        optimizer.parts.judge.divergence.failures = 0  # two in a row would be blamed on the weights
        assert torch.equal(weights(model), before)
    assert optimizer.report().skipped == 2
    losses = train(optimizer, model, data[3:])
    assert all(torch.isfinite(loss) for loss in losses) and torch.isfinite(weights(model)).all()


@TOLD
@EVERY_FIT
def test_a_first_batch_with_nan_moves_nothing(fit):
    model, data = network(), batches(2)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), fit=fit)
    before = weights(model)
    with pytest.warns(kf.NumericalWarning, match="no batch so far gave any curvature"):
        optimizer.step(lambda: model(data[0][0] * torch.nan), data[0][1])
    assert torch.equal(weights(model), before)
    train(optimizer, model, data)
    assert torch.isfinite(weights(model)).all() and not torch.equal(weights(model), before)


def test_a_step_that_makes_the_loss_rise_is_undone_bit_for_bit():
    model, data = network(), batches(1)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), lr=500.0, step=kf.QuadraticModel())
    before = weights(model)
    damping = None
    for _ in range(2):
        train(optimizer, model, data)
        report = optimizer.report()
        assert torch.equal(weights(model), before)
        assert damping is None or report.damping > damping
        damping = report.damping
    assert optimizer.report().rejected == 2


@EVERY_FIT
def test_an_exploded_loss_takes_the_last_step_back(fit):
    model = network()
    data = batches(20)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), fit=fit, **FIXED)
    train(optimizer, model, data[:12])
    before = weights(model)
    optimizer.param_groups[0]["lr"], optimizer.parts.step_size.kl_limit = 1e5, 1e12
    train(optimizer, model, data[12:13])
    assert float((weights(model) - before).norm()) > 100
    optimizer.param_groups[0]["lr"], optimizer.parts.step_size.kl_limit = 1.0, 1.0
    train(optimizer, model, data[13:14])
    torch.testing.assert_close(weights(model), before, rtol=1e-2, atol=1e-2)
    assert optimizer.report().rejected == 1


@pytest.mark.parametrize("fit", [*FITS, "diagonal"], ids=str)
def test_weights_stay_finite_with_dead_units_and_unused_layers(fit):
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
            self.use = True

        def forward(self, x):
            x = self.first(x).relu()
            return self.last(self.second(x).relu() if self.use else x)

    model = Sometimes()
    with torch.no_grad():
        model.first.bias.fill_(-100.0)[:3] = 0  # half of the units are dead
        model.second.weight.zero_()
    optimizer = kf.NaturalGradient(model, kf.Categorical(), fit=fit, refresh=kf.Refresh(1, 1, 1))
    for k, (x, y) in enumerate(batches(12)):
        model.use = not 4 <= k < 8
        assert torch.isfinite(optimizer.step(lambda x=x: model(x), y))
    assert torch.isfinite(weights(model)).all()


@EVERY_FIT
def test_the_loss_falls_with_a_singular_factor(fit):
    model, generator = network(), torch.Generator().manual_seed(0)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), fit=fit, refresh=kf.Refresh(1, 1, 1))
    row = torch.randn(1, 4, generator=generator)  # one example again and again: inputs and gradients of rank one
    losses = [optimizer.step(lambda: model(row.expand(16, -1)), torch.ones(16, dtype=torch.long)) for _ in range(12)]
    assert losses[-1] < losses[0] and torch.isfinite(weights(model)).all()


@pytest.mark.parametrize("training", ["optimizer", "preconditioner"])
def test_an_error_during_statistics_leaves_that_batch_out(training, monkeypatch):
    def run(interrupted):
        model, data = network(), batches(4)
        if training == "optimizer":
            optimizer = kf.NaturalGradient(model, kf.Categorical())
            statistics, step = optimizer.parts.statistics, lambda x, y: optimizer.step(lambda: model(x), y)
        else:
            preconditioner = kf.Preconditioner(model, kf.Categorical())
            statistics = preconditioner.statistics

            def step(x, y):
                model.zero_grad()
                nn.functional.cross_entropy(preconditioner(x), y).backward()
                preconditioner.step()

        step(*data[0])
        if interrupted:
            fit = type(statistics.layers[0].fit)
            update, count = fit.update, [0]

            def failing(self, state, samples):
                count[0] += 1
                if count[0] > 1:
                    raise MemoryError("simulated")
                return update(self, state, samples)

            with monkeypatch.context() as patch:
                patch.setattr(fit, "update", failing)
                with pytest.raises(MemoryError):
                    step(100 * data[1][0], data[1][1])
            if training == "optimizer":
                optimizer.zero_grad()
        step(*data[2])
        return [layer.average.states[0].sums["inputs"].clone() for layer in statistics.layers]

    interrupted, expected = run(True), run(False)
    for mine, other in zip(interrupted, expected, strict=True):
        torch.testing.assert_close(mine, other)


class Forces(nn.Module):
    """The gradient of a scalar with respect to the inputs, which the forward pass computes by autograd."""

    def __init__(self, fails_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.energy = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        self.calls, self.fails_at = [], fails_at

    def forward(self, x):
        self.calls.append(torch.is_grad_enabled())
        if len(self.calls) == self.fails_at:
            raise MemoryError("simulated")
        x = x.detach().requires_grad_()
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


@TOLD
@pytest.mark.parametrize("options", [*({"fit": fit} for fit in FITS), {"labels": "observed"}], ids=str)
def test_models_that_differentiate_within_their_forward_pass_are_trained(options):
    model, generator = Forces(), torch.Generator().manual_seed(1)
    x = torch.randn(16, 3, generator=generator)
    optimizer = kf.NaturalGradient(model, kf.Gaussian(), step=kf.QuadraticModel(), **options)
    losses = [float(optimizer.step(lambda: model(x), torch.sin(x))) for _ in range(8)]
    assert losses[-1] < losses[0] and optimizer.parts.step_size.exact


@TOLD
@pytest.mark.parametrize("call", range(1, 9))
def test_a_step_that_raises_moves_nothing(call):
    model, x = Forces(fails_at=call), torch.ones(16, 3)
    optimizer = kf.NaturalGradient(model, kf.Gaussian(), step=kf.QuadraticModel())
    for _ in range(4):
        before = weights(model)
        try:
            optimizer.step(lambda: model(x), x)
        except MemoryError:
            assert torch.equal(weights(model), before)
            break
    optimizer.step(lambda: model(x), x)
    assert torch.isfinite(weights(model)).all()


TRAINED = [
    *FITS,
    kf.KFOC("running"),
    kf.KFOC("approx"),
    kf.EKFAC(kf.KFOC("running")),
    kf.TKFAC(),
    kf.KFACCorrected(),
    kf.BlockTridiagonal(kf.KFAC()),
    "full",
    "diagonal",
]


@TOLD
@pytest.mark.parametrize("before", [0, 1, 3])
@pytest.mark.parametrize("fit", TRAINED, ids=str)
def test_statistics_that_overflow_are_left_out_in_every_layer(fit, before):
    data = batches(7)
    poisoned = data[0][0].clone()
    for size in (1e30, torch.inf):
        poisoned[2] = size
        model = network()
        preconditioner = kf.Preconditioner(model, kf.Categorical(), fit=fit, refresh=kf.Refresh(1, 1, 1))
        layers, truth = preconditioner.statistics, weights(model)

        def step(x, y, preconditioner=preconditioner, model=model):
            model.zero_grad()
            nn.functional.cross_entropy(preconditioner(x), y).backward()
            preconditioner.step()

        for x, y in data[1 : 1 + before]:
            step(x, y)
        old = [layer.operator().to_dense() for layer in layers.layers if layer.average is not None]
        step(poisoned, data[0][1])
        new = [layer.operator().to_dense() for layer in layers.layers if layer.average is not None]
        if layers.dropped:  # in gradients of saturated outputs, which are zero, nothing may overflow
            assert len(new) == len(old) and all(map(torch.equal, new, old))
        assert layers.dropped == 1 or (fit == "full" and size == 1e30)
        for x, y in data[4:]:
            step(x, y)
        assert layers.dropped <= 1 and torch.equal(weights(model), truth)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    model = network()
    optimizer = kf.NaturalGradient(model, kf.Categorical(), fit=fit, refresh=kf.Refresh(1, 1, 1))
    train(optimizer, model, data[1 : 1 + before])
    poisoned[2] = 1e30
    optimizer.step(lambda: model(poisoned), data[0][1])
    train(optimizer, model, data[4:])
    assert optimizer.report().dropped == (fit != "full") and torch.isfinite(weights(model)).all()
