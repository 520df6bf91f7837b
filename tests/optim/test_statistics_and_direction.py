"""Averages and inverses during training agree with estimates on the same data."""

import pytest
import torch
from torch import nn

import kronfisher as kf
from kronfisher.fits import Plan
from kronfisher.fits.ekfac import Eigenvalues
from kronfisher.operators import KroneckerBasis
from kronfisher.operators.factors import outer
from tests.helpers.networks import images
from tests.helpers.training import Curvature

FITS = ["kfac", "kfac-reduce", "block-tridiagonal", "ekfac", "diagonal", "full", {"0.*": "kfac", "*": "diagonal"}]


def batch(n=7, dtype=torch.float64):
    return torch.randn(n, 2, 4, 4, dtype=dtype), torch.randint(3, (n,))


def vector(model):
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("damping", [kf.FactoredTikhonov, kf.Tikhonov])
@pytest.mark.parametrize("fit", FITS, ids=str)
def test_the_first_statistics_are_an_estimate(fit, damping):
    model, (x, _) = images(), batch()
    curvature = Curvature(model, fit, damping())
    curvature.observe(x)
    curvature.merge()
    curvature.renew(0.3)
    v = vector(model)
    # the second pass of EKFAC sees the batch as an estimate does
    expected = (kf.estimate(model, x, kf.Categorical(), fit=fit, labels="exact") + damping(0.3)).solve(v)
    answer = curvature.precondition(v, 0.3)
    for name in v:
        torch.testing.assert_close(answer[name], expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_statistics_are_averaged_with_decreasing_weights(dtype):
    model = images(dtype)
    curvature = Curvature(model, refresh=kf.Refresh(average=0.5))
    sums, batches = None, [batch(n, dtype)[0] for n in (5, 8, 3)]
    for x in batches:
        curvature.observe(x)
        curvature.merge()
        curvature.step += 1
        own = kf.estimate(model, x, kf.Categorical(), labels="exact", fit="kfac")["0.weight"].B * len(x)
        sums = own if sums is None else 0.5 * sums + own
    layer = next(layer for layer in curvature.statistics.layers if layer.name == "0.weight")
    torch.testing.assert_close(layer.fit.finish(layer.average).B, sums / (0.25 * 5 + 0.5 * 8 + 3))


@pytest.mark.parametrize("fit", ["kfac", "ekfac", "kfoc", "block-tridiagonal"])
def test_statistics_of_a_batch_take_memory_only_while_it_is_read(fit):
    model = images()
    curvature = Curvature(model, fit, refresh=kf.Refresh(1, 1))
    for x, _ in (batch(), batch(), batch()):
        curvature.observe(x)
        if fit != "ekfac":  # it has taken the batch into its average to renew the basis
            assert all(_bytes(layer.group.state) > 0 for layer in curvature.statistics.layers)
        curvature.merge()
        curvature.step += 1
        for layer in curvature.statistics.layers:
            assert _bytes(layer.group.state) == 0 < _bytes(layer.average)


def _bytes(state):
    return sum(t.numel() * t.element_size() for one in state.states for t in one.sums.values())


def test_parts_of_a_batch_add_up():
    model, (x, _) = images(), batch(10)
    whole, parts = Curvature(model), Curvature(model)
    whole.observe(x)
    for part in x.split([4, 6]):
        parts.observe(part)
    for curvature in (whole, parts):
        curvature.merge()
        curvature.renew(0.1)
    v = vector(model)
    for one, other in zip(whole.precondition(v, 0.1).values(), parts.precondition(v, 0.1).values(), strict=True):
        torch.testing.assert_close(one, other)


def test_statistics_that_are_not_finite_are_dropped():
    model, (x, _) = images(), batch()
    curvature = Curvature(model)
    curvature.observe(x)
    curvature.merge()
    curvature.renew(0.1)
    before = curvature.precondition(v := vector(model), 0.1)
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = 1e200  # outputs stay finite behind the tanh; second moments of inputs do not
    curvature.step = curvature.statistics.next_due
    curvature.observe(x * 1e200)
    curvature.merge()
    assert curvature.statistics.dropped == 1
    curvature.direction.inverses[0].due = 0
    curvature.renew(0.1)
    for name, answer in curvature.precondition(v, 0.1).items():
        assert torch.isfinite(answer).all(), name
        torch.testing.assert_close(answer, before[name])


def test_parameters_that_no_block_covers_are_found_and_scaled_by_the_mean():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.power = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return torch.addcmul(y := self.layer(x), y, self.power)

    model = Odd()
    curvature = Curvature(model)
    curvature.observe(x := torch.randn(6, 3))
    curvature.merge()
    curvature.renew(0.1)
    assert list(curvature.statistics.uncovered) == ["power"] and "addcmul" in curvature.statistics.uncovered["power"]
    answer = curvature.precondition({name: torch.ones_like(p) for name, p in model.named_parameters()}, 0.1)
    model.power.requires_grad_(False)
    mean = kf.estimate(model, x, kf.Categorical(), labels="exact", fit="kfac").trace() / 12
    torch.testing.assert_close(answer["power"], torch.full((3,), float(1 / (mean + 0.1))))


def test_examples_coupled_by_the_batch_are_treated_as_independent_and_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    curvature = Curvature(model)
    curvature.observe(torch.randn(6, 3))
    assert curvature.statistics.coupled == ["0.weight"]
    assert not curvature.statistics.uncovered


@pytest.mark.parametrize("fit", ["kfac", "kfoc", "diagonal"])
def test_scale_and_shift_of_batch_normalisation_have_each_examples_own_part_of_the_gradient(fit):
    """As if every example had a scale and a shift of its own; the second layer's rows mix examples."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(16, 3)).double()
    nn.init.normal_(model[1].weight), nn.init.normal_(model[4].weight)
    x, y = torch.randn(6, 1, 4, 4).double(), torch.arange(6) % 3
    curvature = Curvature(model, fit, labels="observed")
    curvature.observe(x, y)
    curvature.merge()
    assert not {"1.weight", "1.bias", "4.weight", "4.bias"} & curvature.statistics.uncovered.keys()
    own, h = {}, x
    for k, module in enumerate(model):
        if not isinstance(module, nn.BatchNorm2d):
            h = module(h)
            continue
        mean, variance = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), unbiased=False, keepdim=True)
        own[k] = [p.detach().expand(6, -1)[..., None, None].clone().requires_grad_() for p in module.parameters()]
        h = (h - mean) / (variance + module.eps).sqrt() * own[k][0] + own[k][1]
    loss = nn.functional.cross_entropy(h, y, reduction="sum")
    for layer in curvature.statistics.layers:
        place = layer.name.split(".")[0]
        if place in ("1", "4"):
            leaf = own[int(place)][layer.name.endswith("bias")]
            gradients = torch.autograd.grad(loss, leaf, retain_graph=True)[0].flatten(1)
            truth = gradients.T @ gradients / 6
            found = layer.fit.finish(layer.average).to_dense()
            torch.testing.assert_close(found, truth.diagonal().diag() if fit == "diagonal" else truth)


@pytest.mark.parametrize("fit", ["full", "diagonal", "kfoc", "ekfac", kf.KroneckerSum(2)], ids=str)
def test_below_batch_normalisation_every_row_counts_as_its_own_examples(fit):
    """Fits by example, too, take a row's gradient as its own example's, whatever it passes on to the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)).double()
    x, y = torch.randn(6, 2, 4, 4).double(), torch.arange(6) % 3
    curvature = Curvature(model, fit, labels="observed")
    for _ in range(2):  # the second batch is not examined again
        curvature.observe(x, y)
        curvature.merge()
        curvature.step += 1
    assert curvature.statistics.coupled == ["0.weight"] and not curvature.statistics.uncovered
    after = model[0](x).detach().requires_grad_()
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(model[1:](after), y, reduction="sum"), after)
    patches = nn.functional.unfold(x, 2)
    patches = torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1)
    own = torch.einsum("not,nit->noi", g.flatten(2), patches).flatten(1)
    truth, layer = own.T @ own / 6, next(each for each in curvature.statistics.layers if each.name == "0.weight")
    found = layer.fit.finish(layer.average).to_dense()
    if fit == "full":
        torch.testing.assert_close(found, truth)
    elif fit == "diagonal":
        torch.testing.assert_close(found.diagonal(), truth.diagonal())
    else:
        rearranged = truth.reshape(3, 9, 3, 9).transpose(1, 2).reshape(9, 81)
        values = torch.linalg.svdvals(rearranged)
        least = values[2 if isinstance(fit, kf.KroneckerSum) else 1 :].norm()
        error = (found - truth).norm()
        assert error < truth.norm() if fit == "ekfac" else error == pytest.approx(float(least), rel=1e-4)


def test_inverses_are_renewed_round_robin():
    refresh = kf.Refresh(inverse=8)
    due = [[0] * 4 for _ in range(200)]
    at = [0, 0, 0, 0]
    for step in range(200):
        for place in range(4):
            if at[place] <= step:
                due[step][place], at[place] = 1, refresh.turn(step, place, 4)
    late = due[100:]
    assert max(map(sum, late)) == 1 and sum(map(sum, late)) == pytest.approx(100 / 8 * 4, abs=4)


@pytest.mark.parametrize("basis", [kf.KFAC(), kf.KFOC()])
def test_eigenvalues_of_earlier_batches_come_along_into_a_new_basis(basis):
    model = images()
    curvature = Curvature(model, kf.EKFAC(basis), refresh=kf.Refresh(1, 1, 1, average=0.5))
    before = {}
    for x, _ in (batch(9), batch(6), batch(8)):
        curvature.observe(x)
        curvature.merge()
        curvature.renew(0.3)
        curvature.step += 1
        for layer in curvature.statistics.layers:
            assert layer.average is not None
            state = layer.average.states[-1]
            U = KroneckerBasis(state.inputs, state.outputs).back(torch.eye(layer.dim).double()).mT
            batches = [block.name for block in layer.blocks]
            truth = kf.estimate(model, x, kf.Categorical(), labels="exact", fit="full")[batches[0]].to_dense() * len(x)
            values = diagonal(U, truth)
            if layer.name in before:
                V, old = before[layer.name]
                product = outer(state.output_values, state.input_values)
                leaked = diagonal(U, whole(V, diagonal(V, whole(U, product)))) / product
                values = values + 0.5 * diagonal(U, whole(V, old)) / leaked
            torch.testing.assert_close(state.sums["eigenvalues"].flatten(), values, rtol=1e-6, atol=1e-10)
            before[layer.name] = U, values


def diagonal(U, matrix):
    return (U.mT @ matrix @ U).diagonal()


def whole(U, values):
    return (U * values) @ U.mT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenvalues_that_belong_to_the_new_product_arrive_as_its_own(dtype):
    """By a turn of 0.01 a large eigenvalue would leak a hundred times what the smallest is."""
    a, b = torch.tensor([1.0, 1e-3, 1e-6], dtype=dtype), torch.tensor([2.0, 1e-4], dtype=dtype)
    skew = torch.tensor([[0.0, 1.0, -2.0], [-1.0, 0.0, 1.0], [2.0, -1.0, 0.0]], dtype=dtype)
    turn = torch.linalg.matrix_exp(0.01 * skew)
    new = {"inputs": torch.eye(3, dtype=dtype)[None], "outputs": torch.eye(2, dtype=dtype)[None]}
    old = {"inputs": turn[None], "outputs": new["outputs"]}
    values = torch.outer(b, diagonal(turn, torch.diag(a)))  # of the product, in the old eigenvectors
    values = {"eigenvalues": values[None], "input_values": a[None], "output_values": b[None]}
    before = Eigenvalues((), Plan(0), count=4.0, rows=4.0, **values, **old)
    after = Eigenvalues((), Plan(0), **values, **new)
    carried = kf.EKFAC().carried(before, after)
    torch.testing.assert_close(carried.sums["eigenvalues"][0], torch.outer(b, a), rtol=1e-4, atol=0)
    assert carried.count == 4.0


def test_bases_are_renewed_more_often_in_the_first_steps():
    data, dues = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(12)], {}
    for fit in ("kfac", "ekfac"):
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
        optimizer = kf.NaturalGradient(model, kf.Categorical(), fit=fit, refresh=kf.Refresh())
        dues[fit] = []
        for x, y in data:
            optimizer.step(lambda model=model, x=x: model(x), y)
            dues[fit].append(optimizer.parts.statistics.next_due)
    assert dues["kfac"] == [1, 2, 3, 4, 6, 6, 9, 9, 9, 13, 13, 13]
    assert dues["ekfac"] == [1, 2, 3, 4, 5, 6, 7, 8, 10, 10, 12, 12]


def test_early_periods_are_at_most_the_steps_so_far():
    assert kf.Refresh(early=4).after(20, 10) == 25 and kf.Refresh().after(20, 10) == 30
    assert kf.Refresh().careful() == kf.Refresh(early=4) and kf.Refresh(early=9).careful() == kf.Refresh(early=9)
    with pytest.raises(ValueError, match="early"):
        kf.Refresh(early=0.5)
