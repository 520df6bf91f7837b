"""Updates that change outputs by about as much in every direction, against eigendecompositions in float64."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.fisher.blocks import Block, Window
from kronfisher.operators import Kronecker
from kronfisher.optim.layerwise import matrix_roots, output_changes
from kronfisher.optim.layerwise.matrix_roots import cost_of_product, cost_of_root
from kronfisher.optim.layerwise.output_changes import OutputChanges

DAMPING = 0.05


@pytest.fixture(autouse=True)
def operations_are_free(monkeypatch):
    """Otherwise networks as small as these do without."""
    for module, name in ((matrix_roots, "CALLS_OF_ROOT"), (output_changes, "CALLS_OF_ROOT"), (output_changes, "CALLS")):
        monkeypatch.setattr(module, name, 0.0)


def layer(parameter, window=None, *, bias=None, sums=None, **ends):
    """What of a layer's inverse is looked at."""
    block = Block("w", "test", window or Window.of("w", parameter).grouped, bias)
    ends = {"reads_data": False, "makes_outputs": False} | ends
    return SimpleNamespace(blocks=(block,), other=None, layer=SimpleNamespace(input_sums=sums, **ends))


def curvature(groups, outputs, inputs, dtype=torch.float64):
    a, b = (torch.randn(groups, n, 2 * n, dtype=dtype) for n in (inputs, outputs))
    return Kronecker(a @ a.mT / (2 * inputs), b @ b.mT / (2 * outputs), "w")


def damped(A):
    return A + DAMPING * A.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(A.shape[-1]).to(A)


def changed(update, A):
    """``(U A Uᵀ + .3 c)^(−1/2) U`` of the length of U, by the singular vectors of the whitened update."""
    lower = torch.linalg.cholesky(A)
    left, values, right = torch.linalg.svd(update @ lower, full_matrices=False)
    squares = values.square()
    values = values / (squares + matrix_roots.SHARE * squares.mean(-1, keepdim=True)).sqrt()
    out = (left * values[..., None, :]) @ right @ torch.linalg.inv(lower)
    return out * update.norm(dim=(1, 2), keepdim=True) / out.norm(dim=(1, 2), keepdim=True)


def even(parameter, operator, update, window=None, **settings):
    changes, one = OutputChanges(DAMPING), layer(parameter, window, **settings)
    changes.follow([one], 1e9)
    changes.note(one, operator)
    updates = {"w": update.clone()}
    changes.even(updates)
    return updates["w"]


@pytest.mark.parametrize("sizes", [(5, 9), (9, 5), (7, 7), (2, 12), (12, 2)], ids=str)
def test_the_root_of_what_outputs_change_by(sizes, monkeypatch):
    monkeypatch.setattr(matrix_roots, "QUINTIC", (1.875, -1.25, 0.375))  # converges, slowly
    monkeypatch.setattr(matrix_roots, "ROUNDS", 30)
    update, operator = torch.randn(*sizes, dtype=torch.float64), curvature(1, *sizes)
    expected = changed(update[None], damped(operator.A))[0]
    torch.testing.assert_close(even(torch.empty(sizes), operator, update), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sizes", [(40, 90), (90, 40), (64, 64)], ids=str)
def test_two_rounds_come_near_it(sizes):
    scales = torch.logspace(0, -1.5, sizes[0], dtype=torch.float64)[:, None]
    update, operator = scales * torch.randn(*sizes, dtype=torch.float64), curvature(1, *sizes)
    lower = torch.linalg.cholesky(damped(operator.A)[0])
    ours = even(torch.empty(sizes), operator, update)
    spread = [torch.linalg.svdvals(one @ lower) for one in (update, ours, changed(update[None], damped(operator.A))[0])]
    before, near, exact = (float(values.std() / values.mean()) for values in spread)
    assert near < 0.6 * before and near < exact + 0.1, (before, near, exact)
    torch.testing.assert_close(ours.norm(), update.norm())


def test_the_mean_of_inputs_belongs_to_the_bias():
    update, mean = torch.randn(6, 4, dtype=torch.float64), torch.tensor([3.0, -2.0, 1.0, 5.0], dtype=torch.float64)
    covariance = curvature(1, 6, 4).A
    joint = torch.zeros(1, 5, 5, dtype=torch.float64)
    joint[:, :4, :4], joint[:, 4, :4], joint[:, :4, 4], joint[:, 4, 4] = (
        covariance + mean[:, None] * mean,
        mean,
        mean,
        1,
    )
    B = torch.eye(6, dtype=torch.float64)[None]
    with_bias = even(torch.empty(6, 4), Kronecker(joint, B, "w"), update, bias=Window.of("b", torch.empty(6)).grouped)
    torch.testing.assert_close(with_bias, even(torch.empty(6, 4), Kronecker(covariance, B, "w"), update))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_way_to_see_a_weight(dtype):
    def check(parameter, view, groups, outputs, inputs):
        window = Window.of("w", parameter, view(parameter))
        window = window.grouped if groups == 1 else window.reshaped(groups, outputs, *parameter.shape[1:])
        operator, update = curvature(groups, outputs, inputs, dtype), torch.randn(parameter.shape, dtype=dtype)
        ours = even(parameter, operator, update, window)
        plain = torch.empty(groups * outputs, inputs)
        flat = even(
            plain,
            operator,
            view(update).reshape(groups * outputs, inputs).contiguous(),
            Window.of("w", plain).reshaped(groups, outputs, inputs),
        )
        torch.testing.assert_close(view(ours).reshape(groups * outputs, inputs), flat)
        assert not torch.equal(ours, update)

    check(torch.empty(5, 4), lambda w: w, 1, 5, 4)
    check(torch.empty(4, 5), lambda w: w.t(), 1, 5, 4)
    check(torch.empty(5, 2, 3, 3), lambda w: w, 1, 5, 18)
    check(torch.empty(2, 5, 3, 3), lambda w: w.transpose(0, 1), 1, 5, 18)
    check(torch.empty(5, 2, 3, 3).to(memory_format=torch.channels_last), lambda w: w, 1, 5, 18)
    check(torch.empty(6, 2, 3, 3), lambda w: w, 3, 2, 18)


def test_layers_at_the_ends_and_single_rows_stay():
    update, operator = torch.randn(5, 4, dtype=torch.float64), curvature(1, 5, 4)
    for end in ("reads_data", "makes_outputs"):
        assert torch.equal(even(torch.empty(5, 4), operator, update, **{end: True}), update)
    row, one = torch.randn(1, 4, dtype=torch.float64), curvature(1, 1, 4)
    assert torch.equal(even(torch.empty(1, 4), one, row), row)
    changes, missing = OutputChanges(DAMPING), layer(torch.empty(5, 4))
    changes.follow([missing], 1e9)
    changes.note(missing, operator)
    changes.even(updates := {"other": update.clone()})
    assert torch.equal(updates["other"], update)
    changes.even({})


def test_sums_of_the_statistics_serve_as_they_are():
    update, operator = torch.randn(5, 4, dtype=torch.float64), curvature(1, 5, 4)
    ours = even(torch.empty(5, 4), operator, update, sums=7.0 * operator.A)
    torch.testing.assert_close(ours, even(torch.empty(5, 4), operator, update))
    _, optimizer = _trained(9)
    layers = optimizer.parts.statistics.layers
    for _ in range(2):
        for layer in layers:
            sums = layer.input_sums
            assert torch.equal(sums, sums.mT) and sums is layer.average.states[0].inputs
            torch.testing.assert_close(layer.operator().A * layer.average.states[0].rows, sums)
            layer.begin()
            layer.group.state.states[0].inputs += torch.rand_like(sums).triu()
            layer.group.state.count = layer.group.state.states[0].rows = 1.0
            layer.merge(0.5)


def test_values_that_are_not_finite_change_nothing_later():
    update, operator, one = torch.randn(5, 4, dtype=torch.float64), curvature(1, 5, 4), layer(torch.empty(5, 4))
    changes = OutputChanges(DAMPING)
    changes.follow([one], 1e9)
    changes.note(one, operator)
    for bad in (torch.full_like(update, float("inf")), torch.zeros_like(update), update * 1e200):
        for _ in range(output_changes.EVERY):
            changes.even({"w": bad.clone()})
    changes.even(updates := {"w": update.clone()})
    torch.testing.assert_close(updates["w"], even(torch.empty(5, 4), operator, update))


def test_arithmetic_is_limited_and_the_oldest_roots_go_first():
    parameters = [torch.empty(6, 6) for _ in range(4)]
    layers = [layer(p, Window(f"w{k}", (6, 6), (6, 1), (1, 6, 6), (36, 6, 1))) for k, p in enumerate(parameters)]
    root = cost_of_root(layers[0].blocks[0].weight)
    changes = OutputChanges(DAMPING)
    changes.follow(layers, root / output_changes.AFFORDABLE)  # as much as one root, each step
    for one in layers:
        changes.note(one, curvature(1, 6, 6))
    made = []
    for _ in range(4 + output_changes.EVERY):
        changes.even({f"w{k}": torch.randn(6, 6, dtype=torch.float64) for k in range(4)})
        made.append([group.made for group in changes._together])
    assert made[0] == [1, 1, 1, 1]  # all that are missing
    assert sorted(made[-1]) == [5, 6, 7, 8], made  # one at a time, each as often as the others
    most = cost_of_product(layers[0].blocks[0].weight) / output_changes.AFFORDABLE
    changes.follow(layers, 0.9 * most)  # not even one product with an update
    changes.even(updates := {"w0": torch.ones(6, 6, dtype=torch.float64)})
    assert (updates["w0"] == 1).all()


def test_small_networks_do_without(monkeypatch):
    monkeypatch.setattr(output_changes, "CALLS", 2e6)
    _, optimizer = _trained(3)
    assert not optimizer.parts.direction.changes._known


def test_a_root_serves_a_few_steps():
    update, operator, one = torch.randn(5, 4, dtype=torch.float64), curvature(1, 5, 4), layer(torch.empty(5, 4))
    changes, scales = OutputChanges(DAMPING), torch.logspace(0, -1, 5, dtype=torch.float64)[:, None]
    changes.follow([one], 1e9)
    changes.note(one, operator)
    changes.even({"w": update.clone()})
    fresh = even(torch.empty(5, 4), operator, scales * update)
    for step in range(2, output_changes.EVERY + 2):
        changes.even(updates := {"w": scales * update})
        assert torch.equal(updates["w"], fresh) == (step == output_changes.EVERY + 1)
        torch.testing.assert_close(updates["w"].norm(), (scales * update).norm())


def _trained(steps, *, resume=None, rows=64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = kf.NaturalGradient(model, kf.Categorical())
    x, y = torch.randn(rows, 6), torch.randint(3, (rows,))
    for step in range(steps):
        if step == resume:
            weights, state = model.state_dict(), optimizer.state_dict()
            model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
            model.load_state_dict(weights)
            optimizer = kf.NaturalGradient(model, kf.Categorical())
            optimizer.load_state_dict(state)
        optimizer.step(lambda m=model: m(x), y)
    return model, optimizer


@pytest.mark.parametrize("rows", [64, 1024])
@pytest.mark.parametrize("resume", [1, 2, 7, 23])
def test_resumed_training_goes_on_as_it_was(resume, rows):
    whole, parted = _trained(26, rows=rows), _trained(26, resume=resume, rows=rows)
    for one, other in zip(whole[0].parameters(), parted[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_layer_without_gradient_for_a_while():
    model, optimizer = _trained(3)
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    model[2].requires_grad_(False)
    before = model[2].weight.clone()
    for _ in range(3):
        optimizer.step(lambda: model(x), y)
    assert torch.equal(before, model[2].weight)
    model[2].requires_grad_(True)
    for _ in range(3):
        optimizer.step(lambda: model(x), y)
    assert not torch.equal(before, model[2].weight) and torch.isfinite(model[2].weight).all()


class Heads(nn.Module):
    """Two layers make the outputs, and the one that is called last makes none."""

    def __init__(self):
        super().__init__()
        self.inner, self.middle = nn.Linear(6, 8), nn.Linear(8, 8)
        self.first, self.second, self.late = nn.Linear(8, 5), nn.Linear(8, 5), nn.Linear(8, 8)

    def forward(self, x):
        h = self.middle(self.inner(x).tanh()).tanh()
        first = self.first(h)
        return torch.cat([first, self.second(h + self.late(h).tanh())], 1)


def test_what_makes_the_outputs_stays():
    """Evened, rates that are exponentials of these exploded."""
    torch.manual_seed(0)
    model, x = Heads(), torch.randn(1024, 6)
    optimizer = kf.NaturalGradient(model, kf.Poisson())
    for _ in range(3):
        optimizer.step(lambda: model(x), torch.poisson(torch.ones(1024, 10)))
    wanted = {window.parameter for window in optimizer.parts.direction.changes._wanted}
    assert wanted == {"middle.weight", "late.weight"}
    assert {layer.name for layer in optimizer.parts.statistics.layers if layer.makes_outputs} == {
        "first.weight",
        "second.weight",
    }
