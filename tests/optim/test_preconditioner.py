"""The preconditioner composes with any optimiser of torch."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import kronfisher as kf
from tests.helpers.networks import Written, perceptron


def dropping():
    return perceptron(4, 6, 3, after=[nn.Dropout(0.3)], seed=2)


def batch(n=12):
    return torch.randn(n, 4, dtype=torch.float64), torch.randint(3, (n,))


@pytest.mark.parametrize("fit", ["kfac", "ekfac", "full"])
def test_gradients_are_multiplied_by_the_damped_inverse(fit):
    model, (x, y) = dropping().eval(), batch()
    options = {"fit": fit, "damping": kf.Tikhonov(0.2), "labels": "exact"}
    preconditioner = kf.Preconditioner(model, kf.Categorical(), scale=None, **options)
    nn.functional.cross_entropy(preconditioner(x), y).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    preconditioner.step()
    fisher = kf.estimate(model, x, kf.Categorical(), fit=fit, labels="exact")
    expected = (fisher + 0.2).solve(gradients)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_the_extra_backward_pass_leaves_the_users_graph_and_gradients_alone():
    model, (x, y) = dropping(), batch()
    twin = copy.deepcopy(model)
    preconditioner = kf.Preconditioner(model, kf.Categorical())
    torch.manual_seed(4)
    outputs = preconditioner(x)
    assert all(p.grad is None for p in model.parameters())
    after = torch.get_rng_state()
    nn.functional.cross_entropy(outputs, y).backward()
    torch.manual_seed(4)
    nn.functional.cross_entropy(twin(x), y).backward()
    assert torch.equal(after, torch.get_rng_state())
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_goes_down_with_any_optimiser(optimizer):
    model, (x, y) = dropping().eval(), batch(40)
    preconditioner = kf.Preconditioner(model, kf.Categorical(), kl_limit=0.1)
    inner = optimizer(model.parameters(), lr=0.1)
    losses = []
    for _ in range(25):
        inner.zero_grad()
        loss = nn.functional.cross_entropy(preconditioner(x), y)
        loss.backward()
        preconditioner.step()
        inner.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_limit_holds():
    model, (x, y) = dropping().eval(), batch()
    preconditioner = kf.Preconditioner(model, kf.Categorical(), trust=0.1, kl_limit=1e-4)
    nn.functional.cross_entropy(preconditioner(x), y).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    preconditioner.step()
    scaled = sum(float((p.grad * gradients[name]).sum()) for name, p in model.named_parameters())
    natural = preconditioner.direction.precondition(gradients, 0.1)
    slope = sum(float((natural[name] * g).sum()) for name, g in gradients.items())
    assert scaled == pytest.approx(slope * (1e-4 / slope) ** 0.5)


def test_a_state_is_resumed_bit_for_bit():
    x, y = batch()
    first, second = dropping(), dropping()
    one, other = (kf.Preconditioner(model, kf.Categorical(), refresh=kf.Refresh(3, 4)) for model in (first, second))

    def step(model, preconditioner):
        model.zero_grad()
        torch.manual_seed(6)
        nn.functional.cross_entropy(preconditioner(x), y).backward()
        preconditioner.step()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad

    for _ in range(5):
        step(first, one)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for _ in range(5):
        step(first, one)
        step(second, other)
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_misuse_is_refused_with_a_reason():
    model, (x, y) = dropping(), batch()
    with pytest.raises(kf.UnsupportedError, match="sees neither"):
        kf.Preconditioner(model, kf.Categorical(), trust=kf.LevenbergMarquardt())
    with pytest.raises(ValueError, match="not the model's"):
        kf.Preconditioner(model, kf.Categorical(), params=[nn.Parameter(torch.zeros(1))])
    preconditioner = kf.Preconditioner(model, kf.Categorical())
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(kf.UnsupportedError, match="in place of the model"):
        preconditioner.step()
    with pytest.raises(kf.DataError, match="not the state"):
        preconditioner.load_state_dict({})


def test_outputs_that_are_not_finite_leave_no_statistics():
    model, (x, y) = dropping().eval(), batch()
    preconditioner = kf.Preconditioner(model, kf.Categorical())
    for bad in (True, False):
        model.zero_grad()
        nn.functional.cross_entropy(preconditioner(x * torch.nan if bad else x), y).backward()
        with pytest.warns(kf.NumericalWarning, match="preconditions nothing") if bad else nullcontext():
            preconditioner.step()
    assert preconditioner.statistics.dropped == 1
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_each_layer_keeps_the_norm_of_its_gradient():
    model, (x, y) = dropping().eval(), batch()
    plain, scaled = (kf.Preconditioner(model, kf.Categorical(), scale=scale) for scale in (None, "gradient"))
    found = []
    for preconditioner in (plain, scaled):
        model.zero_grad()
        nn.functional.cross_entropy(preconditioner(x), y).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        preconditioner.step()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for layer in {name.split(".")[0] for name in gradients}:
        before, natural, answer = (
            torch.cat([each[f"{layer}.{kind}"].flatten() for kind in ("weight", "bias")])
            for each in (gradients, *found)
        )
        torch.testing.assert_close(answer, natural * before.norm() / natural.norm())
    with pytest.raises(ValueError, match="scale"):
        kf.Preconditioner(model, kf.Categorical(), scale="layer")


@pytest.mark.parametrize("rate", [0.001, 0.01, 0.1])
def test_training_stays_finite_at_the_rates_of_the_optimiser_itself(rate):
    x = torch.rand(64, 20, generator=torch.Generator().manual_seed(0))
    x[:, 10:] *= 1e-3  # inputs that hardly vary
    y = (10 * x[:, 0]).long() % 3
    for after in ([], [nn.LayerNorm(3)], [nn.BatchNorm1d(3)]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3), *after)
        preconditioner = kf.Preconditioner(model, kf.Categorical())
        sgd = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        losses = []
        for k in range(60):
            rows = slice(16 * (k % 4), 16 * (k % 4) + 16)
            sgd.zero_grad()
            loss = nn.functional.cross_entropy(preconditioner(x[rows]), y[rows])
            loss.backward()
            preconditioner.step()
            sgd.step()
            losses.append(float(loss.detach()))
        assert sum(losses[-4:]) < sum(losses[:4])


def test_the_outputs_may_be_a_part_of_what_the_model_returns():
    class Answering(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = dropping().eval()

        def forward(self, x):
            return self.inner(x), x

    model, plain, (x, y) = Answering(), dropping().eval(), batch()
    with pytest.raises(kf.DataError, match=r"outputs=lambda answer"):
        kf.Preconditioner(model, kf.Categorical())(x)
    taking = kf.Preconditioner(model, kf.Categorical(), outputs=lambda answer: answer[0])
    preconditioner = kf.Preconditioner(plain, kf.Categorical())
    nn.functional.cross_entropy(taking(x)[0], y).backward()
    nn.functional.cross_entropy(preconditioner(x), y).backward()
    for one in (taking, preconditioner):
        one.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_the_report_says_what_the_warnings_said_and_what_no_layer_covers():
    (x, y), last = batch(), nn.Linear(2, 3).double()
    model = Written(lambda m, x: m.last(x[:, :2]) + x @ m.w.square(), w=torch.randn(4, 3).double(), last=last)
    preconditioner = kf.Preconditioner(model, kf.Categorical())
    nn.functional.cross_entropy(preconditioner(x), y).backward()
    with pytest.warns(kf.NumericalWarning, match="57% of the parameters are outside every fit"):
        preconditioner.step()
    preconditioner.statistics.next_due = 0
    with pytest.warns(kf.NumericalWarning, match="no forward pass was captured"):
        preconditioner.step()
    report = preconditioner.report()
    assert (report.step, report.overdue, list(report.uncovered)) == (2, 1, ["w"])
    assert "1 steps on statistics older than promised" in str(report) and "along their own gradients: w" in str(report)


def test_layers_that_are_added_or_unfrozen_later_are_preconditioned_from_the_next_statistics_on():
    (x, y), body = batch(), nn.Linear(4, 4).double().requires_grad_(False)
    model = nn.Sequential(body, nn.Tanh(), nn.Linear(4, 3).double())
    preconditioner = kf.Preconditioner(model, kf.Categorical(), refresh=kf.Refresh(statistics=1))

    def gradient():
        model.zero_grad()
        nn.functional.cross_entropy(preconditioner(x), y).backward()
        given = [p for p in model.parameters() if p.grad is not None]
        plain = [p.grad.clone() for p in given]
        preconditioner.step()
        return [torch.equal(p.grad, own) for p, own in zip(given, plain, strict=True)]

    assert gradient() == [False] * 2
    body.requires_grad_(True)
    assert gradient() == [False] * 4
    model.append(nn.Linear(3, 3).double())
    assert gradient() == [False] * 6
