"""Contractions of data with weights, and weights picked by a tensor index: exact, by layers, as written with linear."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronfisher as kf
from kronfisher.layers.activations import Dense
from kronfisher.operators.factors import dense
from tests.helpers.checks import assert_exact
from tests.helpers.networks import Written
from tests.helpers.truth import exact_fisher


def P(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def chosen(x, n):
    return (x[..., 0] * 9).long().abs() % n


def each_token(m, x):
    index = chosen(x, 3).flatten()
    shifts = m.b[index].unsqueeze(1)
    return torch.baddbmm(shifts, x.flatten(0, 1).unsqueeze(1), m.w[index]).squeeze(1).unflatten(0, x.shape[:2])


def twice(m, x):
    h = torch.einsum("boi,bti->bto", m.w[chosen(x, 3)[:, 0]], x)
    return torch.einsum("btoi,bti->bto", m.w[chosen(x, 3)], h)


def products(m, x):
    return F.linear((x[..., None] * x.sin()[..., None, :]).flatten(2), m.w.flatten(1)).tanh().flatten(1)


def einsum(equation, *shape):
    return lambda: Written(lambda m, x: torch.einsum(equation, x, m.w), w=P(*shape))


def written(forward, **shapes):
    return lambda: Written(forward, **{name: P(*shape) for name, shape in shapes.items()})


# x [5, 4, 3] → outputs
CASES = {
    "heads": einsum("btd,dhk->bthk", 3, 2, 2),
    "heads around inputs": einsum("btd,hdk->bhtk", 2, 3, 2),
    "heads around inputs, after positions": einsum("btd,hdk->bthk", 2, 3, 4),
    "outputs around inputs, the last ones fewer": einsum("btd,kdh->bhtk", 4, 3, 2),
    "heads around a scale": einsum("btd,hdk->bhtkd", 2, 3, 2),
    "groups around heads": einsum("bti,thio->bhto", 4, 2, 3, 2),
    "groups that only heads join": einsum("bti,thi->bthi", 4, 2, 3),
    "three axes of outputs, two of them around inputs": einsum("bti,hkio->btkho", 2, 2, 3, 2),
    "heads picked for each example": written(
        lambda m, x: torch.einsum("bhdk,btd->bhtk", m.w[chosen(x, 3)[:, 0]], x), w=(3, 2, 3, 2)
    ),
    "groups": einsum("bgi,gio->bgo", 4, 3, 2),
    "groups, outputs first": einsum("bgi,goi->bog", 4, 2, 3),
    "a scale": einsum("...i,i->...i", 3),
    "a scale, transposed": einsum("bti,it->bti", 3, 4),
    "a scale, summed": einsum("bti,t->bt", 4),
    "implicit output": einsum("bti,io", 3, 2),
    "a vector for each group": einsum("bhd,hd->bh", 4, 3),
    "along positions": einsum("bti,ts->bsi", 4, 2),
    "three operands": written(lambda m, x: torch.einsum("bti,ijo,btj->bto", x, m.w, x.sin()), w=(3, 3, 2)),
    "matrices on the right": written(lambda m, x: x.unsqueeze(2) @ m.w, w=(4, 3, 2)),
    "matrices on the left": written(lambda m, x: m.w @ x.unsqueeze(-1), w=(4, 2, 3)),
    "matrices for several": written(lambda m, x: x.unsqueeze(1) @ m.w, w=(1, 2, 3, 2)),
    "bmm": written(lambda m, x: torch.bmm(x.transpose(0, 1), m.w).transpose(0, 1), w=(4, 3, 2)),
    "baddbmm": written(
        lambda m, x: torch.baddbmm(m.b, x.transpose(0, 1), m.w).transpose(0, 1), w=(4, 3, 2), b=(4, 1, 2)
    ),
    "bmm with a matrix for all": written(lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)), w=(3, 2)),
    "a matrix for all on the left": written(lambda m, x: m.w.expand(len(x), 2, 4) @ x, w=(2, 4)),
    "a stack of matrices for all": written(
        lambda m, x: x.unsqueeze(2) @ m.w.unsqueeze(0).expand(len(x), -1, -1, -1), w=(4, 3, 2)
    ),
    "tensordot": written(lambda m, x: torch.tensordot(x, m.w, dims=([1, 2], [1, 0])), w=(3, 4, 2)),
    "bilinear": lambda: Written(lambda m, x: m.l(x, x.cos()), l=nn.Bilinear(3, 3, 2)),
    "einsum of a low-rank path": written(
        lambda m, x: torch.einsum("bti,oi->bto", x, m.w + m.B @ m.A), w=(4, 3), B=(4, 2), A=(2, 3)
    ),
    "picked for each token": written(each_token, w=(3, 3, 2), b=(3, 2)),
    "picked in einsum": written(lambda m, x: torch.einsum("btoi,bti->bto", m.w[chosen(x, 3)], x), w=(3, 2, 3)),
    "picked in a product, transposed": written(lambda m, x: x.unsqueeze(2) @ m.w[chosen(x, 3)].mT, w=(3, 2, 3)),
    "picked several times": written(
        lambda m, x: torch.einsum("bkoi,bti->btko", m.w[chosen(x, 3)[:, :2]], x), w=(3, 2, 3)
    ),
    "picked for each example": written(
        lambda m, x: torch.einsum("boi,bti->bto", m.w.index_select(0, chosen(x, 3)[:, 0]), x), w=(3, 2, 3)
    ),
    "picked by one index": written(lambda m, x: x @ m.w[chosen(x, 3)[0, :1]], w=(3, 3, 2)),
    "rows of tables": written(lambda m, x: x * m.s[chosen(x, 3)] + m.t[chosen(x, 2)], s=(3, 3), t=(2, 3)),
    "picked twice": written(twice, w=(3, 3, 3)),
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("case", CASES)
def test_contractions_are_exact_and_by_layers(case):
    model, x = nn.Sequential(CASES[case](), nn.Tanh(), nn.Flatten(1)).double(), torch.randn(5, 4, 3)
    truth = exact_fisher(model, x)
    for fit in (kf.Full(across_layers=True), "diagonal"):
        assert_exact(model, x, fit=fit, tolerance=1e-10, truth=truth)
    assert kf.coverage(model, x).complete


def same_blocks(model, other, x, fits=("kfac", "ekfac", "kfoc")):
    for fit in fits:
        one, two = (kf.estimate(m, x, kf.Gaussian(), labels="exact", fit=fit) for m in (model, other))
        torch.testing.assert_close(one.to_dense(), two.to_dense(), rtol=1e-8, atol=1e-10)


def test_factors_are_those_of_linear():
    x, w = torch.randn(5, 4, 3), P(2, 3)
    linear = Written(lambda m, x: F.linear(x, m.w).tanh().flatten(1), w=w)
    same_blocks(Written(lambda m, x: torch.einsum("oi,bti->bto", m.w, x).tanh().flatten(1), w=w), linear, x)
    both = Written(products, w=P(2, 3, 3))
    same_blocks(Written(lambda m, x: F.bilinear(x, x.sin(), m.w).tanh().flatten(1), w=P(2, 3, 3)), both, x)


HEADS = {"ntd,hdk->nhtk": 1, "ntd,hdk->nthk": 2}  # the axis of the heads


def heads(equation, *shape):
    return Written(lambda m, x: torch.einsum(equation, x, m.w).tanh().flatten(1), w=P(*shape))


@pytest.mark.parametrize("equation", HEADS)
def test_heads_whose_outputs_lie_around_the_inputs_have_the_factors_of_a_layer_each(equation):
    """Seen: the diagonal, because outputs with inputs between them in memory are no axis of a single matrix."""
    for shape in ((2, 3, 4), (3, 3, 5)):

        def each(m, x, count=shape[0]):
            return torch.stack([x @ m.w[k] for k in range(count)], HEADS[equation]).tanh().flatten(1)

        def expanded(m, x, count=shape[0]):
            return torch.einsum("h" + equation, x.expand(count, *x.shape), m.w).tanh().flatten(1)

        x = torch.randn(5, 4, 3)
        same_blocks(heads(equation, *shape), Written(each, w=P(*shape)), x, ("kfac", "ekfac"))
        same_blocks(heads(equation, *shape), Written(expanded, w=P(*shape)), x)


SHARED = {
    "heads": lambda m, x: torch.einsum("ntd,hdk->nhtk", x, m.w),
    "heads, expanded": lambda m, x: torch.einsum("hntd,hdk->nhtk", x.expand(2, *x.shape), m.w),
    "broadcast": lambda m, x: x.unsqueeze(1) @ m.w,
}


@pytest.mark.parametrize("fit", ["kfac", "kfac-reduce", "kfac-corrected", "ekfac"])
@pytest.mark.parametrize("form", SHARED)
def test_data_that_all_heads_meet_are_multiplied_and_decomposed_once(form, fit, monkeypatch):
    """Seen: one input factor for each head, all of them the same."""
    multiplied, decomposed = [], []
    add, decompose = Dense.add_covariance_, dense.eigh

    def counted(inputs, *args):
        multiplied.append(inputs.shape[0])
        add(inputs, *args)

    def noted(matrix, name):
        decomposed.append(len(matrix))
        return decompose(matrix, name)

    monkeypatch.setattr(Dense, "add_covariance_", counted)
    monkeypatch.setattr(dense, "eigh", noted)
    x = torch.randn(5, 4, 3)
    shared = Written(lambda m, x: SHARED[form](m, x).tanh().flatten(1), w=P(2, 3, 3)).double()
    apart = Written(lambda m, x: torch.stack([x @ w for w in m.w], 1).tanh().flatten(1), w=P(2, 3, 3)).double()
    found = kf.estimate(shared, x, kf.Gaussian(), fit=fit, labels="exact", strict=True)
    assert multiplied and set(multiplied) == {1}
    solved = (found + 0.1).solve({"w": shared.w})["w"]
    assert decomposed == [1, 2] or fit == "kfac-corrected"  # whose factors are those of no inputs
    same = kf.estimate(apart, x, kf.Gaussian(), fit=fit, labels="exact")
    torch.testing.assert_close(found.to_dense(), same.to_dense(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(solved, (same + 0.1).solve({"w": shared.w})["w"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_inverses_of_factors_that_all_heads_have_are_those_of_each(masked):
    """In training factors are inverted by their Cholesky factors, made once, too."""
    x, mask = torch.randn(5, 4, 3), torch.arange(20).reshape(5, 4) % 3 > 0

    def forward(m, x):
        return torch.einsum("ntd,hdk->nthk", x, m.w).tanh().flatten(2)

    model = Written(forward, w=P(2, 3, 3)).double()
    data = (x, torch.zeros(5, 4, 6)) if masked else x
    options = {"mask": lambda batch: mask} if masked else {}
    block = kf.estimate(model, data, kf.Gaussian(), fit="kfac", labels="exact", **options)["w"]
    counted = x[mask] if masked else x.flatten(0, 1)
    torch.testing.assert_close(block.A, (counted.mT @ counted / len(counted)).expand(2, 3, 3))
    damped, eye = block.damped_by_shares(0.1, 0.2), torch.eye(18)
    torch.testing.assert_close(damped.inverse().to_dense() @ damped.to_dense(), eye)
    torch.testing.assert_close((block + 0.3).inverse().to_dense() @ (block + 0.3).to_dense(), eye)


@pytest.mark.parametrize("equation", HEADS)
def test_products_of_heads_that_are_fitted_together_are_no_further_from_the_best_ones_than_alone(equation):
    """Iterations go on until every head has settled, so that those of one are as many as it takes alone, or more."""

    def each(m, x):
        return torch.stack([x @ w for w in m.w], HEADS[equation]).tanh().flatten(1)

    for shape, x in (((2, 3, 4), torch.randn(5, 4, 3)), ((3, 3, 5), torch.randn(9, 1, 3))):
        model = heads(equation, *shape).double()
        truth = exact_fisher(model, x)
        errors = []
        for m in (model, Written(each, w=model.w.detach())):
            fisher = kf.estimate(m, x, kf.Gaussian(), fit="kfoc", labels="exact")
            errors.append(torch.stack([_distance(fisher, truth, model.w, k) for k in range(shape[0])]))
        (together, best), (alone, _) = (one.unbind(1) for one in errors)
        further = kf.KFOC().tolerance ** 2 / best  # A and B are each about as far from the best ones as the tolerance
        assert (together <= alone + 1e-12).all() and (alone <= best + further).all()
        exact = kf.KFOC(tolerance=1e-11, iterations=1000)
        same_blocks(model, Written(each, w=model.w.detach()), x, [exact])


def _distance(fisher, truth, weight, head):
    """The relative error of one head's block, and that of the best product, by singular values."""
    places = torch.arange(weight.numel()).reshape(weight.shape)[head].mT  # [O, I]
    own, given = (matrix[places.reshape(-1, 1), places.flatten()] for matrix in (truth, fisher.to_dense()))
    rows = own.reshape(*places.shape, *places.shape).transpose(1, 2).flatten(2).flatten(0, 1)
    left = torch.linalg.svdvals(rows)[1:].norm() / rows.norm()
    return torch.stack([(own - given).norm() / own.norm(), left])


def in_turn(first):
    """Every value with each of the equations; each with one of them by default, in turns, the others are slow."""
    for k, value in enumerate(first):
        for j, equation in enumerate(HEADS):
            marks = () if (k + j) % len(HEADS) == 0 else pytest.mark.slow
            yield pytest.param(value, equation, marks=marks, id=f"{value}-{equation}")


@pytest.mark.parametrize(("dtype", "equation"), [*in_turn([torch.float32, torch.float64])])
def test_heads_whose_outputs_lie_around_the_inputs_are_exact_in_batches_that_differ(equation, dtype):
    model, x = heads(equation, 2, 3, 4).to(dtype), torch.randn(7, 4, 3, dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for data in (x, [x[:1], x[1:]], [x[1:], x[:1]], [x[:4], x[4:] * (x[4:] > 0)]):
        truth = exact_fisher(model, data)
        for fit in ("full", kf.Full(across_layers=True), "diagonal"):
            assert_exact(model, data, fit=fit, tolerance=tolerance, truth=truth)
        kf.estimate(model, data, kf.Gaussian(), strict=True)


@pytest.mark.parametrize(("fit", "equation"), [*in_turn(["kfac", "ekfac", "kfoc"])])
def test_training_treats_heads_whose_outputs_lie_around_the_inputs_by_layers(equation, fit):
    torch.manual_seed(0)
    part = heads(equation, 2, 3, 4)
    model, x, y = nn.Sequential(part, nn.Linear(32, 2)).double(), torch.randn(20, 4, 3), torch.randn(20, 2)
    before, optimizer = part.w.detach().clone(), kf.NaturalGradient(model, kf.Gaussian(), fit=fit)
    losses = [float(optimizer.step(lambda: model(x), y)) for _ in range(8)]
    assert losses[-1] < losses[0] and not optimizer.report().uncovered
    assert ((part.w - before).abs().amax((1, 2)) > 1e-3).all()


def test_factors_of_experts_are_those_of_the_rows_that_picked_them():
    """As a loop over experts has them, whatever the way to pick; an expert that no row picks has none."""
    x, w = torch.randn(6, 3), P(4, 3, 2)

    def loop(m, x):
        index, found = chosen(x, 3), []
        for expert in range(3):
            found.append(
                torch.zeros(len(x), 2).index_add(
                    0, places := (index == expert).nonzero()[:, 0], x[places] @ m.w[expert]
                )
            )
        return sum(found).tanh()

    picked = Written(lambda m, x: torch.einsum("bio,bi->bo", m.w[chosen(x, 3)], x).tanh(), w=w)
    one, two = (kf.estimate(m, x, kf.Gaussian(), labels="exact", fit="kfac") for m in (picked, Written(loop, w=w)))
    torch.testing.assert_close(one.to_dense(), two.to_dense(), rtol=1e-8, atol=1e-10)
    assert one["w[3:4, :, :]"].trace() == 0
    (one + 1e-3).solve({"w": w})


def test_an_eager_loop_over_experts_is_exact():
    """A weight is picked by an index that data made; it meets them only in the product."""

    def loop(m, x):
        index, total = chosen(x, 3), torch.zeros(len(x) * 4, 2)
        for expert in index.unique():
            places = (index.flatten() == expert).nonzero()[:, 0]
            total = total.index_add(0, places, F.linear(x.flatten(0, 1)[places], m.w[expert]).tanh())
        return total.unflatten(0, x.shape[:2]).flatten(1)

    model, x = Written(loop, w=P(3, 2, 3)), torch.randn(5, 4, 3)
    truth = exact_fisher(model, x)
    for fit in (kf.Full(across_layers=True), "diagonal"):
        assert_exact(model, x, fit=fit, tolerance=1e-10, truth=truth)
    kf.estimate(model, x, kf.Gaussian(), fit="kfoc")


def test_training_treats_experts_by_layers():
    experts = Written(lambda m, x: torch.einsum("boi,bi->bo", m.w[chosen(x, 3)], x).tanh(), w=P(3, 4, 3))
    model, x, y = nn.Sequential(experts, nn.Linear(4, 2)), torch.randn(20, 3), torch.randn(20, 2)
    optimizer = kf.NaturalGradient(model, kf.Gaussian())
    losses = [float(optimizer.step(lambda: model(x), y)) for _ in range(8)]
    assert losses[-1] < losses[0] and "fallback" not in str(optimizer.report())


@pytest.mark.parametrize("fit", ["kfac", "ekfac", "kfoc"])
def test_a_matrix_that_is_expanded_for_a_batched_product_is_that_of_a_linear_layer(fit):
    """Seen: exact, but with a dense factor of all its elements."""
    torch.manual_seed(0)
    expanded = Written(lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)).tanh().flatten(1), w=P(3, 4)).double()
    plain = Written(lambda m, x: (x @ m.w).tanh().flatten(1), w=P(3, 4)).double()
    x = torch.randn(6, 4, 3).double()
    for data in (x, [x[:1], x[1:]], [x[1:], x[:1]]):
        one, two = (
            kf.estimate(m, data, kf.Gaussian(), fit=fit, labels="exact", strict=True) for m in (expanded, plain)
        )
        assert one["w"].structure == two["w"].structure and "3x4" in one["w"].structure
        torch.testing.assert_close(one.to_dense(), two.to_dense(), rtol=1e-9, atol=1e-12)
    optimizer = kf.NaturalGradient(expanded, kf.Gaussian())
    losses = [float(optimizer.step(lambda: expanded(x), torch.zeros(6, 16).double())) for _ in range(6)]
    assert losses[-1] < losses[0] and not optimizer.report().uncovered


def test_an_axis_of_one_beside_one_of_none_shows_nothing_of_the_weight():
    model = Written(lambda m, x: x @ m.v + torch.einsum("bi,io->bo", x[:, :0], m.w), v=P(3, 2), w=P(1, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    fisher = kf.estimate(model, x, kf.Gaussian(), labels="exact", fit="full")
    assert torch.equal(fisher["w"].to_dense(), torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(fisher["v"].to_dense(), torch.kron(torch.eye(2).double(), x.T @ x / 5))
