"""Lookups: the right gradients in every form, and no matrix of the size of a vocabulary squared."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kronfisher as kf
from kronfisher.operators import Diagonal, Kronecker
from kronfisher.optim.layerwise import output_changes
from tests.helpers.checks import assert_exact, assert_fallback
from tests.helpers.networks import Written
from tests.helpers.truth import exact_fisher

V, D = 7, 3
ACROSS = kf.Full(across_layers=True)


def tokens(*shape, high=V):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(sum(shape)))


FORMS = {
    "module": (lambda m, x: m.e(x), lambda: nn.Embedding(V, D)),
    "function": (lambda m, x: F.embedding(x, m.e.weight), lambda: nn.Embedding(V, D)),
    "padding": (lambda m, x: m.e(x), lambda: nn.Embedding(V, D, padding_idx=2)),
    "padding from the end": (lambda m, x: F.embedding(x, m.e.weight, padding_idx=-2), lambda: nn.Embedding(V, D)),
    "sparse": (lambda m, x: m.e(x), lambda: nn.Embedding(V, D, sparse=True)),
    "int32": (lambda m, x: m.e(x.int()), lambda: nn.Embedding(V, D)),
    "sequence first": (lambda m, x: m.e(x.t()).transpose(0, 1), lambda: nn.Embedding(V, D)),
    "flattened": (lambda m, x: m.e(x.flatten()).unflatten(0, x.shape), lambda: nn.Embedding(V, D)),
    "twice": (lambda m, x: m.e(x) * m.e(x.flip(1)).tanh(), lambda: nn.Embedding(V, D)),
    "one token": (lambda m, x: m.e(x[:, 0]), lambda: nn.Embedding(V, D)),
    "transposed table": (
        lambda m, x: F.embedding(x, m.e.weight.t()),
        lambda: nn.Linear(V, D, bias=False),
    ),
    "bag, mean": (lambda m, x: m.e(x), lambda: nn.EmbeddingBag(V, D)),
    "bag, sum": (lambda m, x: m.e(x), lambda: nn.EmbeddingBag(V, D, mode="sum", padding_idx=1)),
    "bag, mean with padding": (lambda m, x: m.e(x), lambda: nn.EmbeddingBag(V, D, padding_idx=1)),
    "bag, weighted": (
        lambda m, x: m.e(x, per_sample_weights=x.cos().to(m.e.weight.dtype)),
        lambda: nn.EmbeddingBag(V, D, mode="sum"),
    ),
    "bags of other lengths": (
        lambda m, x: m.e(x.flatten()[:-1], torch.arange(len(x)) * x.shape[1] - torch.tensor([0, 1, 0, 2, 0])),
        lambda: nn.EmbeddingBag(V, D),
    ),
    "bags with the end": (
        lambda m, x: F.embedding_bag(
            x.flatten(), m.e.weight, torch.tensor([0, 3, 3, 9, 12, 20]), mode="sum", include_last_offset=True
        ),
        lambda: nn.EmbeddingBag(V, D),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form):
    forward, build = FORMS[form]
    torch.manual_seed(0)
    model = Written(lambda m, x: m.l(forward(m, x).sin()).flatten(1), e=build(), l=nn.Linear(D, 2))
    x = tokens(5, 4)
    for fit in ("full", "diagonal", ACROSS):
        assert_exact(model, x, fit=fit)
    fisher = kf.estimate(model, x, kf.Gaussian(), labels="exact", strict=True)
    assert fisher.error(x).relative < 1
    kf.estimate(model, x, kf.Gaussian(), fit="ekfac", strict=True)


def test_the_input_factor_is_a_vector_of_counts():
    model = Written(lambda m, x: m.e(x).sin().sum(1), e=nn.Embedding(V, D, padding_idx=0))
    data = [tokens(5, 4), tokens(3, 4)]
    fisher = kf.estimate(model, data, kf.Gaussian(), labels="exact", fit="kfac")["e.weight"]
    assert isinstance(fisher, Kronecker) and fisher.A.shape == (1, V)
    counts = torch.bincount(torch.cat([x.flatten() for x in data]), minlength=V) / 32
    counts[0] = 0
    assert torch.allclose(fisher.A[0], counts)
    reduced = kf.estimate(model, data, kf.Gaussian(), labels="exact", fit="kfac-reduce")["e.weight"]
    sums = torch.stack([torch.bincount(row, minlength=V) for x in data for row in x]).float()
    sums[:, 0] = 0
    assert torch.allclose(reduced.A[0], sums.T @ sums / 8, atol=1e-6)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


WORDS = 50_000
SIDED = {
    **{name: name for name in ("kfac", "kfac-reduce", "ekfac", "diagonal", "tkfac", "kl", "auto", "kfac-corrected")},
    **{name: name for name in ("kfoc", "kfoc-exact", "kfoc-running", "kfoc-approx", "kpsvd", "kronecker-sum")},
    **{f"sum, {method}": kf.KroneckerSum(method=method) for method in ("deflation", "nonnegative")},
    **{f"ekfac, {basis}": kf.EKFAC(basis) for basis in (kf.TKFAC(), kf.KL(), kf.KFOC(), kf.KFAC("reduce"))},
}
INDEFINITE = ("kfac-corrected", "kronecker-sum", "sum, deflation")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fit", SIDED)
def test_a_vocabulary_is_never_squared(fit, tied):
    words, width = WORDS, 4
    model = Written(
        lambda m, x: m.e(x).tanh() @ m.e.weight.t() if tied else F.linear(m.e(x), m.w, m.b),
        e=nn.Embedding(words, width), **({} if tied else {"w": torch.randn(words, width), "b": torch.zeros(words)}),
    )  # fmt: skip
    x = tokens(2, 3, high=words)
    with Largest() as largest:
        fisher = kf.estimate(model, x, kf.Categorical(class_dim=-1), fit=SIDED[fit])
    assert largest.numel <= 2 * words * (width + 1) * 6  # a few times the weights or the outputs
    structures = " ".join(row.structure for row in fisher.report().rows)
    assert fit == "diagonal" or "diag(50000)" in structures
    v = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    assert torch.isfinite((fisher @ v)["e.weight"]).all()
    if fit not in INDEFINITE and (not tied or fit[:5] not in ("ekfac", "auto")):  # two bases have no inverse
        solved = (fisher + 0.1).solve(v)
        assert torch.allclose(((fisher + 0.1) @ solved)["e.weight"], v["e.weight"], atol=5e-3)  # sums of two in float32


@pytest.mark.parametrize("fit", [kf.Full(), kf.Full(across_layers=True)])
def test_the_exact_block_of_a_vocabulary_is_refused_with_its_bytes(fit):
    model = Written(lambda m, x: m.e(x).sin().sum(1), e=nn.Embedding(WORDS, 4))
    with pytest.raises(kf.MemoryBudgetError, match=r"needs 320,000,000,144 bytes .* Use a smaller structure for the"):
        kf.estimate(model, tokens(2, 3, high=WORDS), kf.Gaussian(), fit=fit)


def test_the_spectrum_of_a_vocabulary_is_refused_with_its_bytes():
    model, x = Written(lambda m, x: m.e(x).sin().sum(1), e=nn.Embedding(WORDS, 4)), tokens(2, 3, high=WORDS)
    fisher = kf.estimate(model, x, kf.Gaussian())
    with pytest.raises(kf.MemoryBudgetError, match=r"e\.weight: the spectrum needs [0-9,]{14,} bytes for directions"):
        fisher.spectrum(x)


def test_bags_of_a_vocabulary():
    model = Written(lambda m, x: m.l(m.e(x)), e=nn.EmbeddingBag(WORDS, 4), l=nn.Linear(4, 3))
    x = tokens(6, 3, high=WORDS)
    for fit in SIDED.values():
        with Largest() as largest:
            fisher = kf.estimate(model, x, kf.Categorical(), fit=fit)
        assert largest.numel <= WORDS * 4 * 6 and torch.isfinite(fisher.trace())
    exact = kf.estimate(model, x, kf.Categorical(), fit="diagonal")
    assert torch.allclose(kf.estimate(model, x, kf.Categorical(), fit="tkfac").trace(), exact.trace())


MANY = 80  # rows of a table whose square costs more than these small networks

BAGS = {
    "mean": (lambda m, x: m.e(x), lambda m, x: F.embedding(x, m.e.weight).mean(1), {}),
    "sum": (lambda m, x: F.embedding_bag(x, m.e.weight, mode="sum"), lambda m, x: m.e.weight[x].sum(1), {}),
    "offsets": (
        lambda m, x: m.e(x.flatten(), torch.arange(len(x)) * x.shape[1]),
        lambda m, x: F.embedding(x, m.e.weight).mean(1),
        {},
    ),
    "two bags an example": (
        lambda m, x: m.e(x.reshape(2 * len(x), -1)).unflatten(0, (len(x), 2)).sin().sum(1),
        lambda m, x: F.embedding(x.reshape(2 * len(x), -1), m.e.weight).mean(1).unflatten(0, (len(x), 2)).sin().sum(1),
        {},
    ),
    "weights of one": (
        lambda m, x: m.e(x, per_sample_weights=torch.ones(x.shape, dtype=m.e.weight.dtype)),
        lambda m, x: F.embedding(x, m.e.weight).sum(1),
        {"mode": "sum"},
    ),
}


@pytest.mark.parametrize("fit", ["kfac", "ekfac", "tkfac", "kl", "kfoc", "kronecker-sum"])
@pytest.mark.parametrize("form", BAGS)
def test_bags_of_a_large_table_are_lookups_that_are_summed(form, fit):
    bag, written, options = BAGS[form]
    torch.manual_seed(0)
    e, l = nn.EmbeddingBag(MANY, D, **options).double(), nn.Linear(D, 2).double()
    x = tokens(6, 4, high=MANY)
    one, two = (Written(lambda m, x, f=f: m.l(f(m, x).tanh()), e=e, l=l) for f in (bag, written))
    one, two = (kf.estimate(m, [x[:2], x[2:]], kf.Gaussian(), fit=fit, labels="exact") for m in (one, two))
    assert f"diag({MANY})" in one["e.weight"].structure
    assert torch.allclose(one.to_dense(), two.to_dense(), rtol=1e-9, atol=1e-12)
    text = " ".join(str(one.report()).split())
    assert f"e.weight: entries of a bag count one by one, because a dense factor of {MANY} rows" in text
    assert one.report().coverage == "100.0 % by layers"


def test_bags_of_unequal_lengths_count_the_entries_that_exist():
    """A counts squared weights of the entries, B the bags' gradients once for each entry; what is padded, nothing."""
    torch.manual_seed(0)
    indices, offsets = tokens(9, high=MANY), torch.tensor([0, 2, 2, 5])

    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.EmbeddingBag(MANY, D, padding_idx=int(indices[-1]))

        def forward(self, x):
            return self.e(indices, x).sin()

    model = Bags().double()
    fisher = kf.estimate(model, offsets, kf.Gaussian(), fit="kfac", labels="exact")
    bags = [indices[a:b][indices[a:b] != indices[-1]] for a, b in ((0, 2), (2, 2), (2, 5), (5, 9))]
    A, B, rows = torch.zeros(MANY).double(), torch.zeros(D, D).double(), 0
    for bag in bags:
        if len(bag):
            value = model.e.weight[bag].mean(0).detach()
            A += torch.bincount(bag, minlength=MANY).double() / len(bag) ** 2
            B += len(bag) * value.cos().square().diag()
            rows += len(bag)
    assert torch.allclose(fisher["e.weight"].to_dense(), torch.kron(B / rows, A.diag() / 4), rtol=1e-9, atol=1e-12)
    assert_exact(model, offsets, fit="diagonal")
    named = kf.estimate(model, offsets, kf.Gaussian(), fit={"e.weight": "kfac", "*": "kfac"}, labels="exact")
    reduced = kf.estimate(model, offsets, kf.Gaussian(), fit="kfac-reduce", labels="exact")
    for dense in (named, reduced):  # the sum of a bag as one input, in full
        assert dense["e.weight"].A.shape == (1, MANY, MANY) and "one by one" not in str(dense.report())
    truth = exact_fisher(model, offsets)
    close, far = (float((f.to_dense() - truth).norm() / truth.norm()) for f in (named, fisher))
    assert close < far < 1
    assert fisher.error(offsets).relative == pytest.approx(far, rel=1e-6)
    assert named.error(offsets).relative == pytest.approx(close, rel=1e-6)


def test_training_steps_over_a_vocabulary_of_bags(monkeypatch):
    """No matrix of the size of the table squared; the table makes the steps of one that is looked up."""
    monkeypatch.setattr(output_changes, "AFFORDABLE", 1e9)  # whatever a pass costs, which depends on how it is written
    torch.manual_seed(0)
    bag, written = (
        Written(lambda m, x, f=f: m.l(f(m, x).tanh()), e=nn.EmbeddingBag(6000, 4), l=nn.Linear(4, 3))
        for f in (BAGS["mean"][0], BAGS["mean"][1])
    )
    written.load_state_dict(bag.state_dict())
    x, y = tokens(150, 5, high=6000), torch.arange(150) % 3
    losses = {}
    for model in (bag, written):
        optimizer = kf.NaturalGradient(model, kf.Categorical())
        with Largest() as largest:
            losses[model] = [float(optimizer.step(lambda m=model: m(x), y)) for _ in range(12)]
        assert largest.numel <= 6000 * 4 * 6
        assert optimizer.parts.statistics.tables == {"e.weight"} and not optimizer.report().uncovered
    assert losses[bag] == pytest.approx(losses[written], rel=1e-4) and losses[bag][-1] < 0.8 * losses[bag][0]


@pytest.mark.parametrize("fit", ["kfac", "tkfac", "kl", "kfoc", "auto"])
def test_a_large_tied_weight_is_solved_as_a_small_one_is(fit, monkeypatch):
    """Above the limit of what is formed, the two roles are a sum of two products; the matrix is the same."""
    model = Written(lambda m, x: m.e(x).tanh() @ m.e.weight.t(), e=nn.Embedding(V, D)).double()
    x = tokens(5, 4)

    def solved():
        fisher = kf.estimate(model, x, kf.Categorical(class_dim=-1), fit=fit)
        v = torch.arange(V * D).double()
        return fisher["e.weight"], fisher.to_dense(), (fisher + 0.1).solve(v)

    small, dense, answer = solved()
    monkeypatch.setattr("kronfisher.operators.operator.DENSE_LIMIT", 3)
    large, same, close = solved()
    assert large.kind == "kronecker-sum" or fit == "auto"
    assert small.kind == "total" or fit == "auto"
    assert torch.allclose(dense, same) and torch.allclose(answer, close, rtol=1e-4)


def test_sides_beyond_the_limit_are_diagonals():
    model, x = nn.Linear(6, 5), torch.randn(40, 6)
    whole = kf.estimate(model, x, kf.Gaussian(), fit="kfac")["weight"]
    wide = kf.estimate(model, x, kf.Gaussian(), fit=kf.KFAC(max_dim=5))["weight"]
    both = kf.estimate(model, x, kf.Gaussian(), fit=kf.KFAC(max_dim=4))["weight"]
    assert [each.structure for each in (whole, wide, both)] == [
        "kronecker 7x5", "kronecker diag(7)x5", "kronecker diag(7)xdiag(5)",
    ]  # fmt: skip
    assert torch.allclose(wide.A[0], whole.A[0].diagonal()) and torch.equal(wide.B, whole.B)
    assert torch.allclose(both.B[0], whole.B[0].diagonal(), rtol=1e-5)
    assert repr(kf.KFAC(max_dim=5)) == "KFAC(mode='expand', max_dim=5)"
    for fit in (kf.KFAC(max_dim=5), kf.KFAC(max_dim=4), kf.KFAC("reduce", max_dim=4), kf.EKFAC(kf.KFAC(max_dim=4))):
        fisher = kf.estimate(model, x, kf.Gaussian(), fit=fit, labels="exact")
        truth = exact_fisher(model, x)
        found = float((fisher.to_dense() - truth).norm() / truth.norm())
        assert fisher.error(x).relative == pytest.approx(found, rel=1e-3)
    with pytest.raises(ValueError, match="max_dim"):
        kf.KFAC(max_dim=-1)


def test_positions_in_all_the_ways_people_add_them():
    """A table of positions is the same for all data; its rows meet them where it is added."""
    x = tokens(5, 4)
    e, p = nn.Embedding(V, D), nn.Embedding(6, D)
    ways = [
        lambda m, x: m.e(x) + m.p(torch.arange(x.shape[1])),
        lambda m, x: m.p(torch.arange(x.shape[1])[None]) + m.e(x),
        lambda m, x: m.e(x) + m.p.weight[: x.shape[1]],
        lambda m, x: m.e(x) + m.p(torch.arange(x.shape[1]).expand(len(x), -1)),
        lambda m, x: m.e(x).add_(m.p(torch.arange(x.shape[1]))),
        lambda m, x: m.e(x) - (0 - m.p(torch.arange(x.shape[1]))),
    ]
    truth = None
    for k, way in enumerate(ways):
        model = Written(lambda m, x, way=way: way(m, x).sin().flatten(1), e=e, p=p)
        fisher = assert_exact(model, x, fit=ACROSS, truth=truth)
        assert_exact(model, x, fit="diagonal", truth=truth)
        truth = exact_fisher(model, x) if truth is None else truth
        kfac = kf.estimate(model, x, kf.Gaussian(), labels="exact")
        assert not any(block.method.startswith("fallback: ") for block in kfac.info.blocks.values())
        assert fisher.names == ("e.weight", "p.weight")
        if k in (0, 1, 3, 4):
            assert kfac["p.weight"].structure == "kronecker diag(6)x3"
    minus = Written(lambda m, x: (m.e(x) - m.p(torch.arange(x.shape[1]))).sin().flatten(1), e=e, p=p)
    assert_exact(minus, x, fit=ACROSS)
    other = Written(lambda m, x: (m.e(x) * m.p(torch.arange(x.shape[1]))).flatten(1), e=e, p=p)
    assert_fallback(other, x, r"p\.weight: used by embedding before any data enter")

    def twice(m, x):
        positions = m.p(torch.arange(x.shape[1]))
        return (m.e(x) + positions).sin().flatten(1) * positions.flatten()

    assert_fallback(Written(twice, e=e, p=p), x, r"p\.weight: used (by|in) ")

    def both(m, x):
        positions = m.p(torch.arange(x.shape[1]))
        return ((m.e(x) + positions).sin() + positions).flatten(1)

    assert_exact(Written(both, e=e, p=p), x, fit=ACROSS)
    assert kf.coverage(Written(both, e=e, p=p), x).complete


@pytest.mark.parametrize("fit", ["kfac", "diagonal", "full", "ekfac"])
@pytest.mark.parametrize("table", ["lookup", "slice"])
def test_batches_of_other_lengths(fit, table):
    """The table is used in another length by every batch; a batch of one datum does not broadcast it."""

    def forward(m, x):
        p = m.p(torch.arange(x.shape[1])) if table == "lookup" else m.p.weight[: x.shape[1]]
        return m.l((m.e(x) + p).sin().sum(1))

    model = Written(forward, e=nn.Embedding(V, D), p=nn.Embedding(6, D), l=nn.Linear(D, 2))
    data = [tokens(3, 4), tokens(2, 6), tokens(1, 2), tokens(1, 5)]
    fisher = kf.estimate(model, data, kf.Gaussian(), labels="exact", fit=fit, strict=True)
    if fit in ("diagonal", "full"):
        assert_exact(model, data, fit=fit)
    else:
        again = kf.estimate(model, data[::-1], kf.Gaussian(), labels="exact", fit=fit)
        assert torch.allclose(fisher.to_dense(), again.to_dense(), atol=1e-5)


def test_what_a_single_datum_does_not_determine_is_refused():
    x = tokens(3, 4)
    for options, message in (
        ({"max_norm": 0.5}, "max_norm, which changes the weights"),
        ({"scale_grad_by_freq": True}, "scale_grad_by_freq"),
    ):
        for build in (nn.Embedding, nn.EmbeddingBag):
            model = Written(lambda m, x: m.e(x).flatten(1), e=build(V, D, **options))
            before = model.e.weight.detach().clone()
            with pytest.raises(kf.UnsupportedError, match=rf"e\.weight: this embedding uses {message}"):
                kf.estimate(model, x, kf.Gaussian())
            assert torch.equal(before, model.e.weight)


def test_the_largest_of_a_bag_is_left_to_the_fallback():
    model = Written(lambda m, x: m.e(x), e=nn.EmbeddingBag(V, D, mode="max"))
    assert_fallback(model, tokens(4, 3), r"e\.weight: used by embedding_bag")


def test_rows_that_are_picked_by_index_are_lookups():
    model, x = Written(lambda m, x: m.e.weight[x].sin().flatten(1), e=nn.Embedding(V, D)), tokens(4, 3)
    looked_up = Written(lambda m, x: m.e(x).sin().flatten(1), e=model.e)
    for fit in (ACROSS, "kfac"):
        one, two = (kf.estimate(m, x, kf.Gaussian(), labels="exact", fit=fit, strict=True) for m in (model, looked_up))
        assert torch.equal(one.to_dense(), two.to_dense())


@pytest.mark.parametrize("frozen", ["e.weight", "p.weight"])
def test_one_of_two_tables_is_frozen(frozen):
    model = Written(lambda m, x: (m.e(x) + m.p(torch.arange(x.shape[1]))).sin().flatten(1),
                    e=nn.Embedding(V, D), p=nn.Embedding(6, D))  # fmt: skip
    model.get_parameter(frozen).requires_grad_(False)
    for fit in (ACROSS, "diagonal"):
        assert_exact(model, tokens(4, 3), fit=fit)
    assert kf.coverage(model, tokens(4, 3)).complete


def test_lookups_that_are_frozen_cost_nothing():
    model = Written(lambda m, x: m.l(m.e(x)).flatten(1), e=nn.Embedding(V, D).requires_grad_(False), l=nn.Linear(D, 2))
    assert assert_exact(model, tokens(4, 3), fit=ACROSS).names == ("l.weight", "l.bias")
    assert isinstance(kf.estimate(model, tokens(4, 3), kf.Gaussian(), fit="diagonal")["l.weight"], Diagonal)
