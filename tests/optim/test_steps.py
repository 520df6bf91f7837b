"""Steps agree with dense algebra, with each other in both interfaces, and with groups, schedulers and masks."""

import copy

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.experiments.race.problems import PROBLEMS
from tests.helpers.training import FITS, FIXED, batches, network, train, weights
from tests.helpers.truth import exact_fisher

EXACT = {"labels": "exact", "trust": 0.1}


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
        own = optimizer.step(lambda x=x: model(x), y)
        torch.testing.assert_close(own, loss.detach())
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


def test_statistics_cost_one_backward_pass_and_observed_labels_none():
    for labels, passes in (("sampled", 1), ("observed", 0)):
        model, data = network(), batches(1)
        optimizer = kf.NaturalGradient(model, kf.Categorical(), labels=labels)
        train(optimizer, model, data)
        assert optimizer.parts.statistics.backward_passes == passes


def test_ignored_positions_do_not_count():
    model = nn.Linear(4, 3).double()
    twin = copy.deepcopy(model)
    x, y = torch.randn(6, 5, 4, dtype=torch.float64), torch.randint(3, (6, 5))
    likelihood = kf.Categorical(class_dim=-1)
    optimizer = kf.NaturalGradient(model, likelihood, **EXACT)
    padded = kf.NaturalGradient(twin, likelihood, **EXACT)
    loss = optimizer.step(lambda: model(x), y)
    longer = torch.cat([x, torch.randn(6, 2, 4, dtype=torch.float64)], 1)
    other = padded.step(lambda: twin(longer), nn.functional.pad(y, (0, 2), value=-100))
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(weights(model), weights(twin))


def test_autocast_around_a_step_compares_with_the_new_weights():
    model, (x, y) = network(), batches(1, n=64)[0]
    optimizer = kf.NaturalGradient(model, kf.Categorical(), lr=300.0, trust=kf.LevenbergMarquardt(stride=float("inf")))
    before = weights(model)
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(lambda: model(x), y)
    assert optimizer.report().rejected == 1 and torch.equal(weights(model), before)


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

    def reached(fit, steps=200):  # it is a little behind in the first hundred
        model, generator = task.model(seed=0), torch.Generator().manual_seed(0)
        optimizer = kf.NaturalGradient(model, task.likelihood, fit=fit)
        for _ in range(steps):
            chosen = torch.randperm(len(inputs), generator=generator)[:512]
            optimizer.step(lambda x=inputs[chosen]: model(x), targets[chosen])
        return task.evaluate(model)["train_loss"]

    assert reached("ekfac-kfoc") < 1.07 * reached("kfac")


def test_a_loss_of_ones_own_moves_at_a_fixed_rate_and_says_so():
    model, (x, y) = network(), batches(1, n=64)[0]
    y = x.argmax(1) % 3
    optimizer = kf.NaturalGradient(model, kf.Categorical(), momentum="exact", trust=kf.Constant())
    losses = []
    with pytest.warns(kf.NumericalWarning, match="A loss of your own cannot be evaluated again") as caught:
        for _ in range(30):
            optimizer.zero_grad()
            outputs = optimizer.forward(x)
            losses.append(float(optimizer.backward(outputs, y, optimizer.loss(outputs, y))))
            optimizer.step()
    assert len(caught) == 1 and losses[-1] < 0.9 * losses[0]


def test_a_token_that_begins_near_zero_bounds_no_step():
    class Token(nn.Module):
        def __init__(self, size):
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.token = network(), nn.Parameter(size * torch.randn(1, 1, 4))

        def forward(self, x):
            return self.inner(x + self.token[0])

    found = []
    for size in (1e-6, 0.1):
        model, data = Token(size), batches(6)
        optimizer = kf.NaturalGradient(model, kf.Categorical(), step=kf.QuadraticModel())
        train(optimizer, model, data)
        found.append(optimizer.report())
    assert found[0].step_size > 0.1 * found[1].step_size and found[0].damping < 10 * found[1].damping
