"""NaturalGradient: steps against dense algebra, both interfaces, resuming, and what can go wrong."""

import copy
import io

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.experiments.race.problems import PROBLEMS
from kronfisher.likelihoods import Categorical
from tests.exact import exact_fisher

EXACT = {"labels": "exact", "trust": 0.1}
FITS = ["kfac", "kfoc", "ekfac", "ekfac-kfoc", kf.KroneckerSum(2)]
FIXED = {"momentum": 0.9, "trust": 0.1, "kl_limit": 1.0}


def network(*extra, dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *extra, nn.Linear(6, 3)).to(dtype)


def batches(count=4, n=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(n, 4, generator=generator, dtype=dtype), torch.randint(3, (n,), generator=generator))
        for _ in range(count)
    ]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def train(optimizer, model, data):
    return [optimizer.step(lambda x=x: model(x), y) for x, y in data]


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_steps_are_those_of_dense_algebra(weight_decay):
    model, data = network(dtype=torch.float64), batches(3, dtype=torch.float64)
    optimizer = kf.NaturalGradient(
        model,
        kf.Categorical(),
        fit=kf.Full(across_layers=True),
        labels="exact",
        trust=0.1,
        weight_decay=weight_decay,
        refresh=kf.Refresh(1, 1, 1, average=0.0),
    )
    last = torch.zeros_like(weights(model))
    for k, (x, y) in enumerate(data):
        start = weights(model)
        F = exact_fisher(model, x, kf.Categorical())
        eye = torch.eye(len(F), dtype=F.dtype)
        loss = nn.functional.cross_entropy(model(x), y)
        g = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        g = g + weight_decay * start
        directions = [-torch.linalg.solve(F + 0.1 * eye, g), last][: 1 + (k > 0)]
        D = torch.stack(directions, 1)
        c = -torch.linalg.solve(D.T @ (F + (0.1 + weight_decay) * eye) @ D, D.T @ g)
        if k and not 0 <= c[1] <= 1:
            bounded = c[1].clamp(0, 1)
            C, b = D.T @ (F + (0.1 + weight_decay) * eye) @ D, D.T @ g
            c = torch.stack([-(b[0] + C[0, 1] * bounded) / C[0, 0], bounded])
        last = D @ c
        found = optimizer.step(lambda x=x: model(x), y)
        torch.testing.assert_close(found, loss.detach())
        torch.testing.assert_close(weights(model) - start, last, rtol=1e-7, atol=1e-10)


def test_a_fixed_rate_stays_within_the_limit():
    model, ((x, y), *_) = network(dtype=torch.float64), batches(dtype=torch.float64)
    start = weights(model)
    optimizer = kf.NaturalGradient(
        model, kf.Categorical(), fit=kf.Full(across_layers=True), labels="exact", trust=0.1, momentum=0.5, kl_limit=1e-3
    )
    F = exact_fisher(model, x, kf.Categorical()) + 0.1 * torch.eye(len(start), dtype=torch.float64)
    train(optimizer, model, [(x, y)])
    step = weights(model) - start
    assert float(step @ F @ step) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    "options", [{}, FIXED, {"fit": "ekfac", "trust": 0.1}, {"labels": "observed", **FIXED}], ids=str
)
def test_both_interfaces_make_the_same_steps(options):
    models = [network(), network()]
    whole, parts = (kf.NaturalGradient(model, kf.Categorical(), **options) for model in models)
    for x, y in batches(6):
        loss = whole.step(lambda x=x: models[0](x), y)
        parts.zero_grad()
        outputs = parts.forward(x)
        assert torch.equal(parts.backward(outputs, y), loss)
        parts.step()
        assert torch.equal(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize("fit", FITS, ids=str)
def test_the_seconds_of_all_phases_are_seconds(fit):
    model = network()
    optimizer = kf.NaturalGradient(model, kf.Categorical(), fit=fit, labels="exact")
    train(optimizer, model, batches(6))
    assert all(spent >= 0 for spent in optimizer.report().seconds.values())


def test_a_closure_in_the_manner_of_torch():
    models = [network(), network()]
    whole, closed = (kf.NaturalGradient(model, kf.Categorical()) for model in models)
    for x, y in batches(3):

        def closure(x=x, y=y):
            closed.zero_grad()
            return closed.backward(closed.forward(x), y)

        assert torch.equal(whole.step(lambda x=x: models[0](x), y), closed.step(closure))
    assert torch.equal(weights(models[0]), weights(models[1]))


def test_gradients_accumulate_and_may_be_clipped():
    models = [network(dtype=torch.float64) for _ in range(2)]
    options = {"labels": "exact", "trust": 0.1, "momentum": 0.0, "kl_limit": 1e9}
    whole, parts = (kf.NaturalGradient(model, kf.Categorical(), **options) for model in models)
    (x, y), *_ = batches(dtype=torch.float64)
    train(whole, models[0], [(x, y)])
    for half in (slice(0, 8), slice(8, 16)):
        outputs = parts.forward(x[half])
        parts.backward(outputs, y[half], parts.loss(outputs, y[half]) / 2)
    parts.step()
    torch.testing.assert_close(weights(models[0]), weights(models[1]))
    before = weights(models[1])
    parts.zero_grad()
    parts.backward(parts.forward(x), y)
    nn.utils.clip_grad_norm_(models[1].parameters(), 1e-9)
    parts.step()
    assert 0 < float((weights(models[1]) - before).norm()) < 1e-7


def test_a_scaled_loss_is_unscaled_before_the_step():
    models = [network(dtype=torch.float64) for _ in range(2)]
    plain, scaled = (kf.NaturalGradient(model, kf.Categorical()) for model in models)
    for x, y in batches(3, dtype=torch.float64):
        plain.step(lambda x=x: models[0](x), y)
        scaled.zero_grad()
        scaled.backward(scaled.forward(x), y, scale=lambda loss: loss * 1024)
        for p in models[1].parameters():
            p.grad /= 1024
        scaled.step()
    torch.testing.assert_close(weights(models[0]), weights(models[1]))


def test_groups_and_schedulers_scale_the_models_own_step():
    model, ((x, y), *_) = network(dtype=torch.float64), batches(dtype=torch.float64)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.5}]
    optimizer = kf.NaturalGradient(model, kf.Categorical(), params=groups, **FIXED | {"kl_limit": 1e9})
    twin = copy.deepcopy(model)
    reference = kf.NaturalGradient(twin, kf.Categorical(), **FIXED | {"kl_limit": 1e9})
    start = [p.detach().clone() for p in model.parameters()]
    train(optimizer, model, [(x, y)])
    train(reference, twin, [(x, y)])
    for k, (p, q, old) in enumerate(zip(model.parameters(), twin.parameters(), start, strict=True)):
        torch.testing.assert_close(p - old, (q - old) * (1.0 if k < 2 else 0.5))


def test_schedulers_multiply_the_step():
    model, data = network(), batches(2)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    train(optimizer, model, data[:1])
    scheduler.step()
    before = weights(model)
    train(optimizer, model, data[1:])
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize(
    "options",
    [
        {},
        *({"fit": fit} for fit in FITS),
        {"fit": kf.KFOC("running")},
        {"fit": "full"},
        {"fit": "diagonal", "damping": kf.Tikhonov()},
        FIXED,
    ],
    ids=str,
)
def test_a_resumed_training_gives_the_same_bits(options):
    data = batches(14)
    options = {"refresh": kf.Refresh(statistics=3, inverse=4, model=2), **options}
    model = network(nn.Dropout(0.2))
    optimizer = kf.NaturalGradient(model, kf.Categorical(), **options)
    torch.manual_seed(0)
    train(optimizer, model, data[:7])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, file)
    train(optimizer, model, data[7:])
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = network(nn.Dropout(0.2))
    again.load_state_dict(saved["model"])
    resumed = kf.NaturalGradient(again, kf.Categorical(), **options)
    resumed.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    train(resumed, again, data[7:])
    assert torch.equal(weights(model), weights(again))
    assert resumed.report().damping == optimizer.report().damping


def test_a_state_of_other_fits_is_refused():
    model, data = network(), batches(1)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    train(optimizer, model, data)
    other = kf.NaturalGradient(model, kf.Categorical(), fit={"0.*": "diagonal", "*": "kfac"})
    with pytest.raises(kf.DataError, match=r"differ at 0\.bias, 0\.weight"):
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(kf.DataError, match="lacks the curvature"):
        other.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())


def test_dropout_is_replayed_and_buffers_are_left_alone():
    model = network(nn.Dropout(0.5), nn.BatchNorm1d(6))
    twin = copy.deepcopy(model)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    x, y = batches(1)[0]
    torch.manual_seed(1)
    optimizer.step(lambda: model(x), y)  # one that solves the model and compares
    after = torch.get_rng_state()
    torch.manual_seed(1)
    twin(x)
    assert torch.equal(after, torch.get_rng_state())
    for (name, mine), other in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, other), name
    assert optimizer.report().coupled


def test_frozen_parameters_stay_and_cost_nothing():
    model = network()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    train(optimizer, model, batches(3))
    assert torch.equal(model[0].weight, before)
    assert {layer.name for layer in optimizer.curvature.layers} == {"0.bias", "2.weight"}
    model[2].weight.requires_grad_(False)  # frozen on the way
    before = model[2].weight.clone()
    train(optimizer, model, batches(3))
    assert torch.equal(model[2].weight, before)
    model.requires_grad_(True)
    train(optimizer, model, batches(3))
    assert not torch.equal(model[2].weight, before)
    assert {layer.name for layer in optimizer.curvature.layers} == {"0.bias", "2.weight"}


def test_parameters_without_a_block_make_plain_steps_and_are_reported():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.power = network(), nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.inner(x) * self.power.exp()

    model = Scaled()
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    train(optimizer, model, batches(3))
    assert model.power.item() != 0
    assert "power: used by exp" in str(optimizer.report())


EVERY_FIT = pytest.mark.parametrize("fit", FITS, ids=str)


@EVERY_FIT
def test_a_batch_with_nan_moves_nothing(fit):
    model, data = network(), batches(6)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), fit=fit, refresh=kf.Refresh(1, 1, 1))
    train(optimizer, model, data[:3])
    before = weights(model)
    x, y = data[3]
    for poisoned in (x.clone().fill_(torch.nan), x.clone().index_fill_(0, torch.tensor([2]), torch.inf)):
        optimizer.step(lambda x=poisoned: model(x), y)
        optimizer.watch.failures = 0  # two in a row would be blamed on the weights
        assert torch.equal(weights(model), before)
    assert optimizer.report().skipped == 2
    losses = train(optimizer, model, data[3:])
    assert all(torch.isfinite(loss) for loss in losses) and torch.isfinite(weights(model)).all()


@EVERY_FIT
def test_a_first_batch_with_nan_moves_nothing(fit):
    model, data = network(), batches(2)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), fit=fit)
    before = weights(model)
    optimizer.step(lambda: model(data[0][0] * torch.nan), data[0][1])
    assert torch.equal(weights(model), before)
    train(optimizer, model, data)
    assert torch.isfinite(weights(model)).all() and not torch.equal(weights(model), before)


def test_a_step_that_makes_the_loss_rise_is_undone_bit_for_bit():
    model, data = network(), batches(1)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), lr=500.0)
    before = weights(model)
    damping = None
    for _ in range(2):
        train(optimizer, model, data)
        report = optimizer.report()
        assert torch.equal(weights(model), before)
        assert damping is None or report.damping > damping
        damping = report.damping
    assert optimizer.report().rejected == 2


@pytest.mark.parametrize("stride", [0.02, 0.2])
def test_the_first_steps_are_bounded_by_the_weights(stride):
    model, data = network(), batches(6)
    trust = kf.LevenbergMarquardt(stride=stride, warmup=4, initial=1e-6, floor=1e-9, relative=1e-6)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), trust=trust, refresh=kf.Refresh(1, 1, 1))
    shares = []
    for x, y in data:
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() > 1}
        optimizer.state.clear()  # without the last step
        optimizer.step(lambda x=x: model(x), y)
        own = dict(model.named_parameters())
        shares.append(max(float((own[name].detach() - p).norm() / p.norm()) for name, p in before.items()))
    assert max(shares[:4]) <= stride * 1.001 and shares[0] == pytest.approx(stride, rel=1e-3)
    assert max(shares[4:]) > stride


def test_eigenvalue_correction_does_not_stall_where_kfac_goes_on():
    task = PROBLEMS["digits"].load()
    inputs, targets = task.dataset.train_inputs, task.dataset.train_targets

    def reached(fit, steps=100):
        model, generator = task.model(seed=0), torch.Generator().manual_seed(0)
        optimizer = kf.NaturalGradient(model, task.likelihood, fit=fit)
        for _ in range(steps):
            chosen = torch.randperm(len(inputs), generator=generator)[:512]
            optimizer.step(lambda x=inputs[chosen]: model(x), targets[chosen])
        return task.evaluate(model)["train_loss"]

    assert reached("ekfac-kfoc") < 1.07 * reached("kfac")


@EVERY_FIT
def test_an_exploded_loss_takes_the_last_step_back(fit):
    model = network()
    data = batches(20)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), fit=fit, **FIXED)
    train(optimizer, model, data[:12])
    before = weights(model)
    optimizer.param_groups[0]["lr"], optimizer.search.kl_limit = 1e5, 1e12
    train(optimizer, model, data[12:13])
    assert float((weights(model) - before).norm()) > 100
    optimizer.param_groups[0]["lr"], optimizer.search.kl_limit = 1.0, 1.0
    train(optimizer, model, data[13:14])
    torch.testing.assert_close(weights(model), before, rtol=1e-2, atol=1e-2)
    assert optimizer.report().rejected == 1


@pytest.mark.parametrize("fit", [*FITS, "diagonal"], ids=str)
def test_dead_units_and_unused_layers_are_no_obstacle(fit):
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
def test_a_singular_factor_is_no_obstacle(fit):
    model, generator = network(), torch.Generator().manual_seed(0)
    optimizer = kf.NaturalGradient(model, kf.Categorical(), fit=fit, refresh=kf.Refresh(1, 1, 1))
    row = torch.randn(1, 4, generator=generator)  # one datum again and again: inputs and gradients of rank one
    losses = [optimizer.step(lambda: model(row.expand(16, -1)), torch.ones(16, dtype=torch.long)) for _ in range(12)]
    assert losses[-1] < losses[0] and torch.isfinite(weights(model)).all()


def test_misuse_is_refused_with_a_reason():
    model, ((x, y), *_) = network(), batches(1)
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(kf.UnsupportedError, match="no curvature yet"):
        optimizer.step()
    with pytest.raises(kf.DataError, match="exactly as forward returned them"):
        optimizer.backward(model(x), y)
    outputs = optimizer.forward(x)
    with pytest.raises(kf.UnsupportedError, match="cannot be evaluated again"):
        optimizer.backward(outputs, y, optimizer.loss(outputs, y) + 1)
    with pytest.raises(ValueError, match="momentum"):
        kf.NaturalGradient(model, kf.Categorical(), momentum=1.5)
    with pytest.raises(ValueError, match="not the model's"):
        kf.NaturalGradient(model, kf.Categorical(), params=[nn.Parameter(torch.zeros(2))])
    with pytest.raises(kf.DataError, match="single number"):
        kf.NaturalGradient(model, kf.Categorical()).step(lambda: nn.functional.cross_entropy(model(x), y), y)


def test_statistics_cost_one_backward_pass_and_observed_labels_none():
    for labels, passes in (("sampled", 1), ("observed", 0)):
        model, data = network(), batches(1)
        optimizer = kf.NaturalGradient(model, kf.Categorical(), labels=labels)
        train(optimizer, model, data)
        assert optimizer.curvature.run.backward_passes == passes


def test_ignored_positions_do_not_count():
    model = nn.Linear(4, 3).double()
    twin = copy.deepcopy(model)
    x, y = torch.randn(6, 5, 4, dtype=torch.float64), torch.randint(3, (6, 5))
    likelihood = Categorical(class_dim=-1)
    optimizer = kf.NaturalGradient(model, likelihood, **EXACT)
    padded = kf.NaturalGradient(twin, likelihood, **EXACT)
    loss = optimizer.step(lambda: model(x), y)
    longer = torch.cat([x, torch.randn(6, 2, 4, dtype=torch.float64)], 1)
    other = padded.step(lambda: twin(longer), nn.functional.pad(y, (0, 2), value=-100))
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(weights(model), weights(twin))
