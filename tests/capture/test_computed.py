"""Weights computed from weights: exact where the fit is, by layers, as a layer written out, and in training."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kronfisher as kf
from tests.helpers.checks import assert_exact, assert_fallback
from tests.helpers.close import close
from tests.helpers.networks import Written
from tests.helpers.truth import exact_fisher

PARAMETRISATIONS = nn.utils.parametrizations


def P(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def frozen(*shape):
    return nn.Parameter(P(*shape), requires_grad=False)


def scores(m, x):
    places = torch.arange(4)
    bias = m.table(places[:, None] - places + 3).permute(2, 0, 1).unsqueeze(0)
    return ((x @ x.mT).unsqueeze(1) + bias).softmax(-1).flatten(1, 2) @ x


# x [5, 4, 3] → outputs
CASES = {
    "a scale of one and more": lambda: Written(lambda m, x: F.rms_norm(x, (3,)) * (1 + m.w), w=P(3)),
    "a matrix of one and more": lambda: Written(lambda m, x: F.linear(x, 1 + m.w, m.b), w=P(6, 3), b=P(6)),
    "half a matrix, transposed": lambda: Written(lambda m, x: x @ (2 - m.w.t() / 2), w=P(6, 3)),
    "groups of a convolution": lambda: Written(lambda m, x: F.conv1d(x, 1 + m.w, m.b, groups=2), w=P(6, 2, 2), b=P(6)),
    "low rank beside a frozen matrix": lambda: Written(
        lambda m, x: F.linear(x, m.m.weight + (m.B @ m.A) * 0.5, m.m.bias),
        m=nn.Linear(3, 6).requires_grad_(False), B=P(6, 2), A=P(2, 3),
    ),
    "low rank beside a trained matrix": lambda: Written(
        lambda m, x: F.linear(x, m.w + 2 * (m.B @ m.A), m.b), w=P(6, 3), B=P(6, 2), A=P(2, 3), b=P(6)
    ),
    "low rank, transposed": lambda: Written(
        lambda m, x: F.linear(x, m.w - (m.A.t() @ m.B.t()).T), w=P(6, 3), B=P(6, 2), A=P(2, 3)
    ),
    "low rank in a convolution": lambda: Written(
        lambda m, x: F.conv1d(x, m.w + (m.B @ m.A).view(6, 4, 2), m.b.sigmoid()),
        w=P(6, 4, 2), B=P(6, 2), A=P(2, 8), b=P(6),
    ),
    "low rank in a lookup": lambda: Written(
        lambda m, x: F.embedding((x * 7).long().abs() % 5, m.w + m.B @ m.A).flatten(1), w=P(5, 3), B=P(5, 2), A=P(2, 3)
    ),
    "a product of three": lambda: Written(lambda m, x: F.linear(x, m.A @ m.B @ m.C), A=P(6, 2), B=P(2, 4), C=P(4, 3)),
    "a scale for each row": lambda: Written(lambda m, x: F.linear(x, m.s[:, None] * m.w), w=P(6, 3), s=P(6)),
    "a scale for each column": lambda: Written(lambda m, x: F.linear(x, m.w * m.s), w=P(6, 3), s=P(3)),
    "a scale of all": lambda: Written(lambda m, x: F.linear(x, m.w * m.s + m.v), w=P(6, 3), s=P(1)[0], v=P(6, 3)),
    "the sum with the transposed": lambda: Written(lambda m, x: F.linear(x, m.w + m.w.t()), w=P(3, 3)),
    "twice": lambda: Written(lambda m, x: F.linear(F.linear(x, 1 + m.w).tanh(), 1 + m.w), w=P(3, 3)),
    "scales by functions": lambda: Written(
        lambda m, x: x * torch.tanh(m.w) + F.softplus(m.v) * m.u.norm(), w=P(1), v=P(3), u=P(2, 2)
    ),
    "a table of relative positions": lambda: Written(scores, table=nn.Embedding(7, 2)),
    "a learned query, expanded": lambda: Written(
        lambda m, x: F.scaled_dot_product_attention(m.l(m.q.expand(len(x), -1, -1)), m.k(x), x),
        q=P(1, 2, 3), l=nn.Linear(3, 3), k=nn.Linear(3, 3),
    ),
    "a learned query, normalised": lambda: Written(
        lambda m, x: m.n(m.q.expand(len(x), -1, -1)).bmm(x.mT).softmax(-1) @ x, q=P(2, 3), n=nn.LayerNorm(3)
    ),
    "a query that a layer makes": lambda: Written(
        lambda m, x: (m.l(m.q) @ x.mT).softmax(-1) @ x, q=P(2, 3), l=nn.Linear(3, 3)
    ),
    "a query for all": lambda: Written(
        lambda m, x: m.a(m.q.expand(len(x), -1, -1), x, x)[0],
        q=P(2, 3), a=nn.MultiheadAttention(3, 1, batch_first=True),
    ),
    "a state that meets the examples in an addition": lambda: Written(
        lambda m, x: F.linear(torch.zeros(len(x), 3) + m.h, m.w).tanh()[:, None] * x, h=P(3), w=P(3, 3)
    ),
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("double")


def network(case):
    return nn.Sequential(CASES[case](), nn.Tanh(), nn.Flatten(1)).double()


@pytest.mark.parametrize("case", CASES)
def test_estimates_are_exact_and_by_layers(case):
    model, x = network(case), torch.randn(5, 4, 3)
    for fit in (kf.Full(across_layers=True), "diagonal"):
        assert_exact(model, x, fit=fit, tolerance=1e-10)
    assert kf.coverage(model, x).complete
    fisher = kf.estimate(model, x, kf.Gaussian(), labels="exact", fit="kfac", strict=True)
    assert "100.0 % by layers" in str(fisher.report())


def test_a_low_rank_path_is_two_layers():
    """Factors are those of ``x → A x → B A x``, whatever the weight that both are added to."""
    model = network("low rank beside a frozen matrix")
    (merged, *_), x = model, torch.randn(5, 4, 3)
    apart = Written(
        lambda m, x: (F.linear(x, m.w, m.b) + F.linear(F.linear(x, m.A), m.B) * 0.5).tanh().flatten(1),
        w=frozen(6, 3), b=frozen(6), A=merged.A, B=merged.B,
    )  # fmt: skip
    apart.w.requires_grad_(False).copy_(merged.m.weight)
    apart.b.requires_grad_(False).copy_(merged.m.bias)
    for fit in ("kfac", "ekfac", "kfoc"):
        one, two = (kf.estimate(m, x, kf.Gaussian(), labels="exact", fit=fit) for m in (model, apart))
        for name in ("A", "B"):
            torch.testing.assert_close(one[f"0.{name}"].to_dense(), two[name].to_dense(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("build", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_length_and_direction_of_a_normalised_weight_are_by_layers(build):
    with pytest.warns(FutureWarning) if build is nn.utils.weight_norm else pytest.MonkeyPatch.context():
        model = nn.Sequential(build(nn.Linear(3, 6)), nn.Tanh(), nn.Flatten(1)).double()
    x = torch.randn(5, 4, 3).double()
    truth = exact_fisher(model, x)
    for fit in (kf.Full(across_layers=True), "diagonal"):
        assert_exact(model, [x[:3], x[3:]], fit=fit, tolerance=1e-10, truth=truth)
    for fit in ("ekfac", "tkfac"):
        fisher = kf.estimate(model, x, kf.Gaussian(), fit=fit, labels="exact", strict=True)
        assert all(block.kind != "diagonal" for _, block in fisher.entries)
        close(fisher.trace(), truth.trace(), 1e-8)


def test_factors_of_normalised_rows_are_closer_than_the_diagonal():
    torch.manual_seed(0)
    build = PARAMETRISATIONS.weight_norm
    model = nn.Sequential(build(nn.Linear(20, 16)), nn.Tanh(), build(nn.Linear(16, 5)), nn.Flatten(1)).double()
    x = torch.randn(100, 4, 20).double() * torch.linspace(2, 0.2, 20).double() + 0.5
    kfac, diagonal = (kf.estimate(model, x, kf.Gaussian(), fit=fit).error(x).blocks for fit in ("kfac", "diagonal"))
    for name in ("0.parametrizations.weight.original1", "2.parametrizations.weight.original1"):
        assert kfac[name] < 0.8 * diagonal[name]


NORMED = {
    "rows": (lambda: Written(lambda m, x: F.linear(x, F.normalize(m.w)).flatten(1), w=P(6, 3)), True),
    "rows of an image": (
        lambda: Written(
            lambda m, x: F.conv1d(x.mT, F.normalize(m.w.flatten(1)).view(6, 3, 2)).flatten(1), w=P(6, 3, 2)
        ),
        True,
    ),
    "columns": (lambda: Written(lambda m, x: (x @ F.normalize(m.w, dim=0)).flatten(1), w=P(3, 6)), True),
    "rows on the right": (lambda: Written(lambda m, x: (x @ F.normalize(m.w)).flatten(1), w=P(3, 6)), True),
    "columns of inputs": (
        lambda: Written(lambda m, x: F.linear(x, F.normalize(m.w, dim=0)).flatten(1), w=P(6, 3)),
        True,
    ),
    "few rows": (lambda: Written(lambda m, x: F.linear(x, F.normalize(m.w)).flatten(1), w=P(2, 3)), True),
    "few rows on the right": (lambda: Written(lambda m, x: (x @ F.normalize(m.w)).flatten(1), w=P(3, 2)), True),
    "few columns": (lambda: Written(lambda m, x: (x @ F.normalize(m.w, dim=0)).flatten(1), w=P(3, 2)), True),
    "columns inside a product": (
        lambda: Written(lambda m, x: F.linear(x, m.u @ F.normalize(m.w, dim=0)).flatten(1), w=P(4, 3), u=P(2, 4)),
        True,
    ),
    "weight norm of columns": (
        lambda: nn.Sequential(PARAMETRISATIONS.weight_norm(nn.Linear(3, 6), dim=1), nn.Flatten(1)),
        True,
    ),
    "weight norm of one column and all rows": (
        lambda: nn.Sequential(PARAMETRISATIONS.weight_norm(nn.Linear(3, 1), dim=1), nn.Flatten(1)),
        True,
    ),
    "too many numbers of columns": (
        lambda: Written(lambda m, x: F.linear(x, F.normalize(m.w, dim=0)).flatten(1), w=P(6, 3)),
        False,
    ),
    "too many numbers": (lambda: Written(lambda m, x: F.linear(x, F.normalize(m.w)).flatten(1), w=P(6, 3)), False),
    "another norm": (lambda: Written(lambda m, x: F.linear(x, F.normalize(m.w, p=1)).flatten(1), w=P(6, 3)), False),
}


@pytest.mark.parametrize("name", NORMED)
def test_norms_of_rows_are_exact_whether_they_have_a_form_or_not(name, monkeypatch):
    build, known = NORMED[name]
    if name.startswith("too many numbers"):
        monkeypatch.setattr("kronfisher.layers.expressions._NUMBERS", 3 * (6 + 3) - 1)
    model, x = build().double(), torch.randn(4, 4, 3).double()
    for fit in ("full", "diagonal"):
        assert_exact(model, [x[:3], x[3:]], fit=fit, tolerance=1e-10)
    assert kf.coverage(model, x).complete == known


def normed_by(length, *shape):
    return Written(lambda m, x: F.linear(x, m.w / length(m)), w=P(*shape), s=P(1))


DIVIDED = {
    "spectral norm": lambda: PARAMETRISATIONS.spectral_norm(nn.Linear(3, 6)),
    "spectral norm, older": lambda: nn.utils.spectral_norm(nn.Linear(3, 6)),
    "spectral norm of a convolution": lambda: nn.Sequential(
        Written(lambda m, x: x.mT), PARAMETRISATIONS.spectral_norm(nn.Conv1d(3, 6, 2))
    ),
    "all of the matrix": lambda: normed_by(lambda m: m.w.norm(), 2, 3),
    "the root of a mean square": lambda: normed_by(lambda m: (m.w.square().mean() + 1e-3).sqrt(), 6, 3),
    "a sum of its own and another's": lambda: normed_by(lambda m: 5 + m.w[0, 1] * m.w[1].sum(), 6, 3),
    "the corner of its square": lambda: normed_by(lambda m: 3 + (m.w @ m.w.mT)[0, 0].tanh(), 6, 3),
}


@pytest.mark.parametrize("name", DIVIDED)
def test_a_matrix_divided_by_a_number_of_its_own_is_by_layers_in_estimates(name):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = nn.Sequential(DIVIDED[name](), nn.Tanh(), nn.Flatten(1)).double().eval()
    x = torch.randn(5, 4, 3).double()
    for fit in (kf.Full(across_layers=True), "diagonal"):
        assert_exact(model, [x[:3], x[3:]], fit=fit, tolerance=1e-10)
    assert kf.coverage(model, x).complete
    matrix = max(dict(model.named_parameters()), key=lambda key: model.get_parameter(key).numel())
    truth = exact_fisher(model, x)
    for fit in ("ekfac", "tkfac"):  # which keep the trace
        fisher = kf.estimate(model, x, kf.Gaussian(), fit=fit, labels="exact")
        assert fisher[matrix].kind != "diagonal"
        close(fisher.trace(), truth.trace(), 1e-8)
    kfac = kf.estimate(model, x, kf.Gaussian(), fit="kfac", labels="exact")
    assert kfac.error(x).blocks[matrix] < 1


def test_the_factors_of_a_spectrally_normalised_layer_do_not_see_what_its_norm_adds():
    """K-FAC's factors are those of the layer with its norm held constant; K-FOC, which sees products, is closer."""
    torch.manual_seed(0)
    model = nn.Sequential(PARAMETRISATIONS.spectral_norm(nn.Linear(3, 6)), nn.Tanh(), nn.Flatten(1)).double().eval()
    norm = float(torch.linalg.matrix_norm(model[0].parametrizations.weight.original.detach(), 2))
    held = Written(lambda m, x: F.linear(x, m.w / norm, m.b).tanh().flatten(1), w=P(6, 3), b=P(6)).double()
    with torch.no_grad():
        held.w.copy_(model[0].parametrizations.weight.original)
        held.b.copy_(model[0].bias)
        u, v = model[0].parametrizations.weight[0]._u, model[0].parametrizations.weight[0]._v
        left, _, right = torch.linalg.svd(held.w)
        u.copy_(left[:, 0])
        v.copy_(right[0])
    x, name = torch.randn(50, 4, 3).double(), "0.parametrizations.weight.original"
    one, two = (kf.estimate(m, x, kf.Gaussian(), fit={"*": "kfac"}, labels="exact") for m in (model, held))
    torch.testing.assert_close(one[name].to_dense(), two["w"].to_dense(), rtol=1e-8, atol=1e-10)
    best = kf.estimate(model, x, kf.Gaussian(), fit="kfoc-exact", labels="exact")
    assert best.error(x).blocks[name] < one.error(x).blocks[name] < 0.5


def test_norms_whose_derivative_is_no_sum_of_few_products_are_left_to_the_fallback():
    model = nn.Sequential(normed_by(lambda m: m.w.norm(), 6, 5), nn.Flatten(1)).double()
    assert_fallback(model, torch.randn(5, 4, 5).double(), r"0\.w: used by ")


def test_copies_that_are_changed_in_place_are_no_longer_the_weight():
    model = Written(lambda m, x: F.linear(x, m.w.clone().mul_(2)).flatten(1), w=P(6, 3))
    for fit in ("full", "diagonal"):
        assert_exact(model, torch.randn(5, 4, 3), fit=fit, tolerance=1e-10)

    def halved(m, x):
        w = 1 + m.w
        w[:2].mul_(0.5)
        return F.linear(x, w).flatten(1)

    for fit in ("full", "diagonal"):
        assert_exact(Written(halved, w=P(6, 3)), torch.randn(5, 4, 3), fit=fit, tolerance=1e-10)


@pytest.mark.parametrize(
    "case", ["low rank beside a frozen matrix", "a scale of one and more", "a scale for each row", "weight norm"]
)
def test_training_treats_them_by_layers(case):
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 6)) if case == "weight norm" else CASES[case]()
    model, x = nn.Sequential(layer, nn.Tanh(), nn.Flatten(1), nn.LazyLinear(4)).double(), torch.randn(20, 4, 3)
    y = torch.randn(*model(x).shape)
    optimizer = kf.NaturalGradient(model, kf.Gaussian())
    losses = [float(optimizer.step(lambda: model(x), y)) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert "fallback" not in str(optimizer.report())


def test_a_zero_without_memory_is_written_out():
    """The gradient of `sgn` is one; torch's kernel for weight norm reads what lies where its numbers would be."""
    model = Written(
        lambda m, x: m.last(F.linear(x, m.w, torch._weight_norm(m.v, m.g, 0).view(2)).sgn()),
        w=torch.randn(2, 3), v=torch.randn(2, 1), g=torch.randn(2, 1), last=nn.Linear(2, 2),
    )  # fmt: skip
    x = torch.randn(5, 3)
    for value in range(1, 6):
        junk = [torch.full((numel,), float(value)) for numel in (1, 2, 4, 8, 10, 16)]
        del junk
        fisher = kf.estimate(model, x, kf.Gaussian(), fit="full", labels="exact")
        assert all(fisher[name].trace() == 0 for name in ("w", "v", "g"))
